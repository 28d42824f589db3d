"""may_depend_on_mode: never False for a model that computes otherwise in train mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.capture.mode_scan import may_depend_on_mode
from fxquant.graph.program import NoteKind
from tests.passes.pipelines import residual


def noisy(x: torch.Tensor, training: bool) -> torch.Tensor:
    return x * 2.0 if training else x


def asks(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return noisy(x, module.training)


TABLE: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {"asks": asks}


class Base(nn.Module):
    """A layer; subclasses compute otherwise in train mode, each in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(x)
        return found


class Direct(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (1.0 if self.training else 0.0)


class InMethod(Base):
    def extra(self, x: torch.Tensor) -> torch.Tensor:
        return x + (1.0 if self.training else 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extra(super().forward(x))


class InProperty(Base):
    @property
    def factor(self) -> float:
        return 2.0 if self.training else 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class InHelper(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return asks(self, super().forward(x))


class InTable(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return TABLE["asks"](self, super().forward(x))


class Inherited(InHelper):
    pass


class Functional(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rrelu(super().forward(x), training=self.training)


class Patched(Base):
    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x: asks(self, self.fc(x))  # type: ignore[method-assign]


def hooked() -> nn.Module:
    model = Base()
    model.register_forward_hook(lambda module, args, output: asks(module, output))
    return model


MODE_DEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "direct": Direct,
    "method": InMethod,
    "property": InProperty,
    "helper": InHelper,
    "table": InTable,
    "inherited": Inherited,
    "functional": Functional,
    "nested": lambda: nn.Sequential(nn.ReLU(), nn.Sequential(Direct())),
    "torch's own": lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU()),
    "patched": Patched,
    "hooked": hooked,
}


@pytest.mark.parametrize("case", MODE_DEPENDENT)
def test_mode_is_found_wherever_it_is_asked_for(case: str) -> None:
    assert may_depend_on_mode(MODE_DEPENDENT[case]())


@pytest.mark.parametrize("case", [case for case in MODE_DEPENDENT if case != "patched"])
def test_capture_lists_what_the_eval_mode_loses(case: str) -> None:
    program = capture(MODE_DEPENDENT[case](), torch.randn(2, 4))
    assert [note for note in program.notes if note.kind is NoteKind.LOST_IN_EVAL]


constant = torch.tensor([1.0, 2.0])


class NamesakeOfGlobal(Base):
    """An attribute that is called as a tensor among the module's globals."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(x) + self.constant
        return found


def test_tensors_among_globals_do_not_disturb_the_scan() -> None:
    assert not may_depend_on_mode(NamesakeOfGlobal().train())


def test_plain_models_are_not_exported_twice() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.GELU(), nn.Flatten())
    assert not may_depend_on_mode(plain)
    assert not may_depend_on_mode(Base())
    assert not may_depend_on_mode(residual())


class AttentionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.attention(x[:, None], x[:, None], x[:, None])[0]
        return found


class InBranch(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return F.dropout(x, 0.5) if self.training else x


class InProbability(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), p=0.5 if self.training else 0.0)


class OtherProbability(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5 if self.training else 0.25, self.training)


class InEvalOnly(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5, not self.training)


class Restored(Base):
    """Dropout that capture restores, module and functional, and one that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.alpha_dropout(F.dropout(self.drop(super().forward(x)), 0.3, self.training), 0.1, self.training)
        x = F.dropout2d(x[:, :, None, None], 0.4, self.training)
        return F.dropout(x, 0.5, training=True, inplace=True)


def texts(model: nn.Module, kind: NoteKind) -> list[tuple[str, str]]:
    return [(note.place, note.text) for note in capture(model, torch.randn(2, 4)).notes if note.kind is kind]


@pytest.mark.parametrize(
    ("model", "place", "text"),
    [
        (AttentionNet, "attention", "only in train mode: dropout(p=0.5)"),
        (InBranch, "", "only in train mode: dropout(p=0.5)"),
        (InProbability, "", "only in train mode: dropout(p=0.5)"),
        (OtherProbability, "", "only in train mode: dropout(p=0.5); in eval mode instead: dropout(p=0.25)"),
        (InEvalOnly, "", "only in train mode: dropout(p=0.5) switched off; in eval mode instead: dropout(p=0.5)"),
    ],
)
def test_dropout_is_noted_when_only_one_mode_has_it(model: type[nn.Module], place: str, text: str) -> None:
    assert texts(model(), NoteKind.LOST_IN_EVAL) == [(place, text)]


def test_dropout_is_not_noted_when_capture_restores_it() -> None:
    model = Restored()
    assert may_depend_on_mode(model)
    assert texts(model, NoteKind.LOST_IN_EVAL) == []


def test_dropout_that_drops_nothing_in_eval_mode_is_not_called_active() -> None:
    assert texts(InProbability(), NoteKind.OTHER) == []
    assert any("active in eval mode" in text for _, text in texts(InEvalOnly(), NoteKind.OTHER))
