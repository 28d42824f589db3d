"""What a quantizer should do (QuantSpec) and what it found (Encoding).

    code  = clip(rint(x / scale) + zero_point, qmin, qmax)        x_hat = (code - zero_point) * scale

`rint` rounds half to even (ONNX QuantizeLinear, opset 21). Scales are float32 values; division is true division.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum

import torch

from fxquant.errors import SpecError
from fxquant.limits import NO_LIMITS as NO_LIMITS
from fxquant.limits import Limits as Limits
from fxquant.limits import bound_text, check_range
from fxquant.range_methods import ESTIMATORS as ESTIMATORS
from fxquant.range_methods import RANGE_TRAINING as RANGE_TRAINING
from fxquant.range_methods import parse_estimator as parse_estimator
from fxquant.range_methods import parse_training as parse_training


class Target(Enum):
    """The runtime whose rules a program obeys."""

    ONNXRUNTIME_X64 = "onnxruntime-x64"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"
    XNNPACK = "xnnpack"
    QNN_HTP = "qnn-htp"

    @property
    def merges_activation_specs(self) -> bool:
        """Whether the runtime merges two quantizers on one activation, so that a value may have one spec only."""
        return self is Target.ONNXRUNTIME_X64

    @property
    def clips_by_grid(self) -> bool:
        """Whether a relu or clip costs the integer kernel in front of it, unless the grid behind it clips as much.

        Other runtimes take it into that kernel as an attribute, on any grid.
        """
        return self is Target.ONNXRUNTIME_X64

    @property
    def flattens_linear(self) -> bool:
        """Whether a linear layer with a bias, on more than two axes, is written as Reshape, Gemm, Reshape.

        Such a Gemm takes the int32 bias into its kernel (QGemm, QNN's FullyConnected). Others fuse MatMul and Add; and
        onnxruntime 1.31, their functional check, refuses a signed QuantizeLinear of opset 21 behind that last Reshape:
        it copies it in front of the Reshape with output_dtype INT8, then makes its zero point UINT8.
        """
        return self in (Target.ONNXRUNTIME_X64, Target.QNN_HTP)

    @property
    def fuses_float_ends(self) -> bool:
        """Whether an integer kernel takes a float bias, and a residual sum and activation behind it, on its sums.

        Others take int32 biases only, and give nothing but codes.
        """
        return self in (Target.TENSORRT, Target.OPENVINO)


@dataclass(frozen=True)
class Granularity:
    """How many encodings a tensor has: one, one for each index of `axis`, or one for each `block` elements along it.

    Blocks are ONNX's: every line along `axis` has its own, so that a weight [out, in] in blocks of 32 along axis 1 has
    out * in / 32 encodings, in a tensor [out, in / 32].
    """

    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None and (self.axis is None or self.block < 1):
            raise SpecError("granularity", expected="an axis and a block of at least 1", got=f"{self}")

    def encoding_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of scale and zero point for a tensor of `shape`: (), (channels,), or `shape` with its axis in blocks.

        Raises SpecError if the tensor has no such axis, or if blocks do not fill it.
        """
        if self.axis is None:
            return ()
        if not -len(shape) <= self.axis < len(shape):
            raise SpecError(f"granularity {self}", expected="an axis of the tensor", got=f"a tensor {list(shape)}")
        axis = self.axis % len(shape)
        if self.block is None:
            return (shape[axis],)
        if shape[axis] % self.block:
            raise SpecError(f"granularity {self}", expected="blocks that fill the axis", got=f"a tensor {list(shape)}")
        return (*shape[:axis], shape[axis] // self.block, *shape[axis + 1 :])

    def __str__(self) -> str:
        if self.axis is None:
            return "per-tensor"
        return f"per-channel({self.axis})" if self.block is None else f"per-block({self.axis}, {self.block})"


PER_TENSOR = Granularity()


@dataclass(frozen=True)
class QuantSpec:
    """How one value is to be quantized.

    Arguments:
        bits: 2 to 16, or 32 for a bias.
        signed: codes in [-2^(bits-1), 2^(bits-1)-1] (signed) or [0, 2^bits-1].
        symmetric: zero point 0 (signed) or the middle of the grid (unsigned).
        strict: symmetric only: leave out the lowest code, so that -max and max are both on the grid.
        granularity: per tensor, per channel or per block.
        limits: a range and zero point that every estimator, learned range and loaded encoding obeys.
        fixed: a fixed real range (low, high) instead of an estimated one.
        estimator: range estimator, with its number in brackets if it takes one ("mse", "percentile(99.9)"); ESTIMATORS.
        training: what training does to the range (RANGE_TRAINING): "static" keeps what calibration found, and lets a
            weight's grid follow the weight; "moving-average(0.01)" moves an activation's towards each batch's extremes
            until it is frozen; "lsq", "lsq+", "min-max" and "log2" learn it. A fixed range stays.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    strict: bool = False
    granularity: Granularity = PER_TENSOR
    limits: Limits = NO_LIMITS
    fixed: tuple[float, float] | None = None
    estimator: str = "min-max"
    training: str = "static"

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 16 or self.bits == 32):
            raise SpecError("QuantSpec.bits", expected="2 to 16 (or 32 for a bias)", got=str(self.bits))
        if self.strict and not (self.symmetric and self.signed):
            raise SpecError("QuantSpec.strict", expected="a symmetric signed grid", got=str(self))
        if self.fixed is not None:
            check_range(*self.fixed, "QuantSpec.fixed")
        parse_estimator(self.estimator)
        parse_training(self.training)
        zero_point = self.limits.zero_point
        if zero_point is not None and not self.qmin <= zero_point <= self.qmax:
            raise SpecError(
                "QuantSpec.limits", expected=f"a zero point in [{self.qmin}, {self.qmax}]", got=str(zero_point)
            )

    @property
    def qmin(self) -> int:
        """Lowest code."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.strict else 0)

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def lowest_code(self) -> int:
        """Lowest code of the full grid of `bits`: qmin, but one less on a strict grid."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point that the spec prescribes: its limit's, 0 or the middle of the grid if symmetric, else None."""
        if self.limits.zero_point is not None:
            return self.limits.zero_point
        if not self.symmetric:
            return None
        return 0 if self.signed else (self.qmax + 1) // 2

    @property
    def steps(self) -> int:
        """qmax - qmin."""
        return self.qmax - self.qmin

    def limited(self, limits: Limits) -> QuantSpec:
        """This spec, with `limits` obeyed too, also by its fixed range; SpecError if nothing is left of that."""
        met = self.limits.meet(limits)
        return replace(self, limits=met, fixed=None if self.fixed is None else met.narrow(self.fixed))

    def __str__(self) -> str:
        kind = f"{'s' if self.signed else 'u'}{self.bits}"
        shape = ("strict " if self.strict else "") + ("symmetric" if self.symmetric else "asymmetric")
        extras = [str(self.granularity)]
        if self.limits != NO_LIMITS:
            extras.append(f"within [{bound_text(self.limits.low)}, {bound_text(self.limits.high)}]")
        if self.fixed is not None:
            extras.append(f"fixed [{self.fixed[0]:g}, {self.fixed[1]:g}]")
        elif self.estimator != QuantSpec.estimator:
            extras.append(f"by {self.estimator}")
        if self.training != QuantSpec.training:
            extras.append(f"trained by {self.training}")
        return f"{kind} {shape} {' '.join(extras)}"


@dataclass(frozen=True)
class SpecOverride:
    """What is to be changed of a QuantSpec; None leaves a field as it is. Its fields are QuantSpec's.

    A grid that becomes unsigned or asymmetric is no longer strict unless the override says so.
    """

    bits: int | None = None
    signed: bool | None = None
    symmetric: bool | None = None
    strict: bool | None = None
    granularity: Granularity | None = None
    limits: Limits | None = None
    fixed: tuple[float, float] | None = None
    estimator: str | None = None
    training: str | None = None

    def __post_init__(self) -> None:
        if self.estimator is not None:
            parse_estimator(self.estimator)
        if self.training is not None:
            parse_training(self.training)
        QuantSpec(bits=QuantSpec.bits if self.bits is None else self.bits, fixed=self.fixed)  # raises what they raise

    def apply(self, spec: QuantSpec) -> QuantSpec:
        """`spec` with what is given here in its place; SpecError if that is no QuantSpec."""
        given = {item.name: value for item in fields(self) if (value := getattr(self, item.name)) is not None}
        if False in (self.symmetric, self.signed):
            given.setdefault("strict", False)
        return replace(spec, **given).limited(NO_LIMITS)  # a fixed range obeys the limits that are there

    def __str__(self) -> str:
        given = [(item.name, getattr(self, item.name)) for item in fields(self)]
        return ", ".join(f"{name} {value}" for name, value in given if value is not None) or "nothing"


BIAS_SPEC = QuantSpec(bits=32, signed=True, symmetric=True)


@dataclass(frozen=True, eq=False)
class Encoding:
    """The grid of one value: `scale` (float32) and `zero_point` (int64), of its Granularity's shape, on the CPU.

    `min`, `max`, `delta` and `offset` are views in AIMET's terms, on the full grid of `bits`, strict or not:

        delta = scale = (max - min) / (2^bits - 1)        offset = min / delta = lowest code - zero_point, 0 or negative

    min and max are float64, in which both equations hold exactly. A strict grid leaves its lowest code unused: there
    min is one step below the lowest real number that the grid has.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    spec: QuantSpec

    def __post_init__(self) -> None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int64:
            got = f"{self.scale.dtype} and {self.zero_point.dtype}"
            raise SpecError("Encoding", expected="a float32 scale and an int64 zero point", got=got)
        if self.scale.shape != self.zero_point.shape:
            got = f"{tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            raise SpecError("Encoding", expected="scale and zero point of one shape", got=got)
        if not bool(torch.isfinite(self.scale).all()) or not bool((self.scale > 0).all()):
            raise SpecError("Encoding", expected="finite scales above 0", got=str(self.scale))
        outside = (self.zero_point < self.spec.qmin) | (self.zero_point > self.spec.qmax)
        if bool(outside.any()):
            expected = f"zero points in [{self.spec.qmin}, {self.spec.qmax}]"
            raise SpecError("Encoding", expected=expected, got=str(self.zero_point))

    @classmethod
    def from_offset(
        cls, delta: torch.Tensor, offset: torch.Tensor, spec: QuantSpec, *, is_positive: bool = False
    ) -> Encoding:
        """The encoding of a step and an offset, of one shape: AIMET's (0 or negative), or as `positive_offset` has it.

        Raises SpecError where the offset is no integer or off the grid, or delta not finite and above 0.
        """
        if not bool((offset == torch.round(offset.double())).all()):  # NaN is not, either
            raise SpecError("Encoding", expected="offsets that are integers", got=str(offset))
        steps = offset.double() if is_positive else -offset.double()
        zero_point = spec.lowest_code + steps.clamp(-(2.0**40), 2.0**40).to(torch.int64)
        return cls(delta.to(torch.float32), zero_point, spec)

    @classmethod
    def from_range(cls, low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> Encoding:
        """The full grid that spans [low, high], moved by less than a step so that 0 is on it; undoes `min` and `max`.

        A prescribed zero point stays, and the scale is the smallest that covers both ends.

            delta = (high - low) / (2^bits - 1)     offset = clip(rint(low / delta), -(2^bits - 1), 0)

        Raises SpecError unless low <= 0 <= high, low < high and both are finite.
        """
        low64, high64 = low.double(), high.double()
        is_range = torch.isfinite(high64 - low64) & (low64 <= 0) & (high64 >= 0) & (low64 < high64)
        if not bool(is_range.all()):
            raise SpecError("Encoding", expected="low <= 0 <= high, low < high, finite", got=f"[{low}, {high}]")
        steps = (1 << spec.bits) - 1
        if spec.fixed_zero_point is None:
            delta = ((high64 - low64) / steps).to(torch.float32)
            return cls.from_offset(delta, torch.round(low64 / delta.double()).clamp(-steps, 0), spec)
        below, above = spec.fixed_zero_point - spec.lowest_code, spec.qmax - spec.fixed_zero_point
        needs = [side / count for side, count in ((-low64, below), (high64, above)) if count]
        scale = torch.stack(needs).amax(dim=0).to(torch.float32)
        return cls(scale, torch.full_like(scale, spec.fixed_zero_point, dtype=torch.int64), spec)

    @property
    def min(self) -> torch.Tensor:
        """Real value of the full grid's lowest code, float64."""
        return self.offset.double() * self.scale.double()

    @property
    def max(self) -> torch.Tensor:
        """Real value of the highest code, float64."""
        return (self.spec.qmax - self.zero_point).double() * self.scale.double()

    @property
    def delta(self) -> torch.Tensor:
        """Step between two codes, float32: the scale."""
        return self.scale

    @property
    def offset(self) -> torch.Tensor:
        """Steps from real 0 down to `min`, as AIMET writes it: in [-(2^bits - 1), 0]; -2^(bits - 1) if symmetric."""
        return self.spec.lowest_code - self.zero_point

    @property
    def positive_offset(self) -> torch.Tensor:
        """The offset with the other sign: the zero point of the same grid in unsigned codes (ONNX, TFLite)."""
        return -self.offset

    def same_grid(self, other: Encoding) -> bool:
        """Whether both map codes to the same real numbers."""
        return (
            self.spec.qmin == other.spec.qmin
            and self.spec.qmax == other.spec.qmax
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )
