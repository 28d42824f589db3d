"""Every error of fxquant, each saying thing, place, expected, got and remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FxquantError(Exception):
    """An error that a user can act on.

    Arguments:
        thing: what failed, in a few words ("fold-batch-norm: node 'bn1'").
        place: where: module path, source line, file and key, or "" when `thing` says it.
        expected: what would have been right.
        got: what was found instead.
        remedy: what to do about it.
    """

    def __init__(self, thing: str, *, place: str = "", expected: str = "", got: str = "", remedy: str = "") -> None:
        self.thing = thing
        self.place = place
        self.expected = expected
        self.got = got
        self.remedy = remedy
        super().__init__(self._message())

    def _message(self) -> str:
        head = f"{self.thing} ({self.place})" if self.place else self.thing
        parts = [head]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.got:
            parts.append(f"got {self.got}")
        text = "; ".join(parts)
        return f"{text}. {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[object, ...]:
        fields = {"place": self.place, "expected": self.expected, "got": self.got, "remedy": self.remedy}
        return (_rebuild, (type(self), self.thing, fields), dict(self.__dict__))


def _rebuild(kind: type[FxquantError], thing: str, fields: dict[str, str]) -> FxquantError:
    return kind(thing, **fields)


class CaptureError(FxquantError):
    """The model could not be captured, or its graph does not compute what the model computes."""


class SpecError(FxquantError):
    """A quantization specification or encoding contradicts itself or its limits."""


class ConfigError(FxquantError):
    """A pipeline or placement file says something that fxquant does not know."""


class PassError(FxquantError):
    """A pass failed, or broke a rule of the engine.

    Raised by a PassManager it carries `pass_name`, `node` (name of the node at fault, "" if unknown) and `rendered`:
    the printed graph as the pass left it, before it was rolled back.
    """

    pass_name: str = ""
    node: str = ""
    rendered: str = ""


class CalibrationError(FxquantError):
    """Calibration had no data, or data that no range can be read from."""


class ExportError(FxquantError):
    """The program cannot be lowered to ONNX as asked."""


class ParityError(FxquantError):
    """Program and ONNX file cannot be compared."""


class StorageError(FxquantError):
    """A file cannot be written or read."""


class UserCodeError(FxquantError):
    """What a user wrote raised; a search ends with it, and goes on when it is resumed."""


class ScoreError(FxquantError):
    """An `evaluate` gave no finite number."""


def clipped(text: str, limit: int = 60) -> str:
    """What a user's file calls something, for a message: one line, at most `limit` characters."""
    shown = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)


def nearest(name: str, accepted: Iterable[str]) -> str:
    """A remedy sentence for an unknown name: the nearest match, then all accepted ones."""
    names = sorted(accepted)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Accepted: {', '.join(names) if names else 'none'}."
