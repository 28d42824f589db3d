"""Certification: on which onnxruntime and instruction set a kernel's formula was measured, and whether it holds here.

A formula is certified where it was measured on millions of codes (CERTIFIED_ON). Because the same version runs other
instructions on another machine, a self-test of a few hundred codes repeats the comparison once a process. A kernel
whose self-test fails is uncertified, with a warning; one that passes on an unlisted machine is too, and says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from fxquant.numerics import runtime
from fxquant.simulation.self_test import SELF_TESTS, Outcome, self_test
from fxquant.simulation.self_test_cases import FULL_SCALE

SATURATION = (
    "sums of two products of full-scale codes saturate at 16 bits, as on x64 without VNNI; "
    "quantize weights to 7 bits, or set session.x64quantprecision to 1"
)


class CertificationWarning(UserWarning):
    """A kernel of onnxruntime does not compute what is simulated: its codes are not promised in this process."""


@dataclass(frozen=True)
class Platform:
    """What decides which kernels run: the version of onnxruntime, and the instruction set it finds."""

    onnxruntime: str
    instruction_set: str

    def __str__(self) -> str:
        return f"onnxruntime {self.onnxruntime} on {self.instruction_set}"


@dataclass(frozen=True)
class Certificate:
    """Whether a kernel's codes are promised here.

    Arguments:
        operator: onnxruntime's operator.
        holds: whether they are.
        reason: why not, and what to do; "" if they are.
        outcome: what the self-test found.
    """

    operator: str
    holds: bool
    reason: str
    outcome: Outcome


_MEASURED = (Platform("1.31.1", "x86_64 avx512_vnni"),)
CERTIFIED_ON: Mapping[str, tuple[Platform, ...]] = MappingProxyType(dict.fromkeys(SELF_TESTS, _MEASURED))


def here() -> Platform:
    """The platform of this process."""
    return Platform(runtime.runtime_version(), runtime.instruction_set())


def certificate(
    operator: str, config: tuple[tuple[str, str], ...] = (), platform: Platform | None = None
) -> Certificate:
    """Whether `operator`'s kernel is certified, by the list and by its self-test, which runs once a process.

    Arguments:
        operator: of onnxruntime, "QLinearConv".
        config: session config entries that it runs with.
        platform: in place of this process's.

    A self-test that finds a difference is a CertificationWarning.
    """
    return _certificate(operator, config, platform or here())


def forget() -> None:
    """Let self-tests run again."""
    _certificate.cache_clear()
    _outcome.cache_clear()


@cache
def _outcome(operator: str, config: tuple[tuple[str, str], ...]) -> Outcome:
    return self_test(operator, config)


@cache
def _certificate(operator: str, config: tuple[tuple[str, str], ...], platform: Platform) -> Certificate:
    if operator not in CERTIFIED_ON:
        return Certificate(operator, False, f"kernel {operator} has no self-test", Outcome(0, 0, ()))
    outcome = _outcome(operator, config)
    found = f"{outcome.differing:,} of {outcome.compared:,} codes of {operator}'s self-test differ"
    if outcome.differing:
        cause = SATURATION if FULL_SCALE in outcome.failed else f"in: {', '.join(outcome.failed)}"
        reason = f"{found} on {platform}: {cause}"
        warnings.warn(f"kernel {operator} is uncertified: {reason}", CertificationWarning, stacklevel=3)
        return Certificate(operator, False, reason, outcome)
    if platform not in CERTIFIED_ON[operator]:
        known = "; ".join(str(one) for one in CERTIFIED_ON[operator])
        return Certificate(operator, False, f"certified on {known}, not on {platform} ({found})", outcome)
    return Certificate(operator, True, "", outcome)
