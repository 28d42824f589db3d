"""FakeQuant: the one module that holds quantization state; and BiasFakeQuant, whose grid follows from two others."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import nn

from fxquant.errors import CalibrationError, SpecError
from fxquant.numerics.codes import Grid
from fxquant.numerics.estimators import make_estimator
from fxquant.numerics.grids import grid_for_range
from fxquant.numerics.learned_rounding import learned_fake_quantize
from fxquant.numerics.recomputing import FirstForwards, is_recomputing
from fxquant.numerics.rounding import along_axis, dequantize, fake_quantize, quantize
from fxquant.numerics.straight_through import Clip, absorbs, clip_activation, is_plain_cpu
from fxquant.numerics.trained_ranges import LearnedRange, MovingRange, make_range
from fxquant.spec import BIAS_SPEC, PER_TENSOR, Encoding, Granularity, QuantSpec

# Beyond 2^23 a bias code leaves no room in the accumulator's exact float32 range for the products it is added to.
LARGEST_BIAS_CODE = 2**23


class Mode(Enum):
    """What a FakeQuant does to the tensor that it is given."""

    OBSERVE = "observe"  # pass it on, and estimate its range
    OBSERVE_FAKE = "observe-fake"  # estimate its range, and quantize it on the range seen so far
    FAKE = "fake"  # quantize and dequantize; a weight's grid follows the weight
    TRACK = "track"  # quantize and dequantize; in training mode the grid follows a moving average
    LEARN = "learn"  # quantize and dequantize; the grid is computed from parameters
    FROZEN = "frozen"  # quantize and dequantize on a grid that no longer moves
    OFF = "off"  # pass it on

    @property
    def quantizes(self) -> bool:
        """Whether values leave on a grid that is kept."""
        return self in (Mode.FAKE, Mode.TRACK, Mode.LEARN, Mode.FROZEN)

    @property
    def is_settled(self) -> bool:
        """Whether nothing moves the grid any more: calibration and training leave this mode as it is."""
        return self in (Mode.FROZEN, Mode.OFF)


class FakeQuant(nn.Module):
    """Fake quantization of one value.

    Buffers: `scale` (float32; NaN before calibration) and `zero_point` (int64), of the encoding's shape.

    Arguments:
        spec: what to do.
        shape: the encoding's shape, spec.granularity.encoding_shape(tensor's shape).
        follows: whether the grid follows the tensor at every forward (weights) or is calibrated (activations); one
            that is learned (spec.training) only begins at the tensor's.

    `range` is what training moves or learns; None if spec.training is "static". Raises SpecError for a moving average
    of a weight: its grid follows the weight itself.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    scale_floor: torch.Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...] = (), *, follows: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.follows = follows
        self.mode = Mode.OBSERVE
        self.estimator = make_estimator(spec, shape)
        self.range = make_range(spec, shape)
        self._firsts: FirstForwards[None] = FirstForwards()  # those that moved the range
        if follows and isinstance(self.range, MovingRange):
            raise SpecError("a weight's range", expected="'static', or one that is learned", got=spec.training)
        self.register_buffer("scale", torch.full(shape, float("nan")))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("scale_floor", torch.zeros(shape))  # raised where a bias would overflow

    @property
    def has_encoding(self) -> bool:
        """Whether scale and zero point are known."""
        return bool(torch.isfinite(self.scale).all())

    @property
    def encoding(self) -> Encoding:
        """The grid as it is now, on the CPU."""
        if not self.has_encoding:
            raise CalibrationError(
                "FakeQuant has no encoding", remedy="Calibrate the program first (fxquant.calibrate)."
            )
        scale, zero_point = self.scale, self.zero_point
        if self.mode is Mode.LEARN:  # the buffers wait for the next forward
            assert isinstance(self.range, LearnedRange)
            scale, zero_point = self.range.grid(self.scale_floor)
        return Encoding(scale.detach().cpu().clone(), zero_point.detach().cpu().to(torch.int64).clone(), self.spec)

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Compute the grid that covers [low, high] under the spec."""
        scale, zero_point = grid_for_range(low, high, self.spec, is_weight=self.follows)
        self.scale.copy_(torch.maximum(scale, self.scale_floor))
        self.zero_point.copy_(zero_point)

    def set_encoding(self, encoding: Encoding) -> None:
        """Take over a grid (of the same codes)."""
        self.scale.copy_(encoding.scale)
        self.zero_point.copy_(encoding.zero_point)

    def compute_encoding(self) -> None:
        """Turn what the estimator saw into a grid; a fixed range needs no data."""
        if self.spec.fixed is None and not self.estimator.has_range:
            raise CalibrationError(
                "FakeQuant has no range", remedy="Run calibration batches through the program first."
            )
        self.set_range(*self.estimator.range()) if self.spec.fixed is None else self._set_fixed()

    def _set_fixed(self) -> None:
        assert self.spec.fixed is not None
        low, high = self.spec.fixed
        self.set_range(torch.full_like(self.scale, low), torch.full_like(self.scale, high))

    def follow(self, x: torch.Tensor) -> None:
        """Recompute the grid from the tensor itself."""
        low, high = self.estimator.range_of(x)
        if self.spec.fixed is None and (torch.compiler.is_compiling() or self.estimator.has_range):
            self.set_range(low, high)
            return
        if self.spec.fixed is None:
            _require_finite(x)
        self.compute_encoding()

    @property
    def is_following(self) -> bool:
        """Whether the grid is computed from the tensor now."""
        return self.follows and self.mode not in (Mode.FROZEN, Mode.LEARN)

    def engage(self) -> None:
        """Quantize on the grid that is there, and let training do with it what the spec says."""
        self.mode = Mode.FAKE
        if self.range is not None:
            self.mode = Mode.TRACK if isinstance(self.range, MovingRange) else Mode.LEARN
            self.range.start(self.scale, self.zero_point)

    def refresh(self, x: torch.Tensor) -> None:
        """Bring a grid that follows its tensor, or parameters, up to date with them."""
        if self.follows and self.mode is Mode.FAKE:
            self.follow(x)
        self.sync()

    def sync(self) -> None:
        """Write the grid that parameters say, if they do, into the buffers."""
        if self.mode is Mode.LEARN:
            assert isinstance(self.range, LearnedRange)
            with torch.no_grad():
                self._keep(*self.range.grid(self.scale_floor))

    def _keep(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        is_same = not torch.compiler.is_compiling() and torch.equal(scale, self.scale)
        if not (is_same and torch.equal(zero_point, self.zero_point)):
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    @property
    def grid(self) -> Grid:
        """The grid as it is now: the buffers themselves."""
        granularity = self.spec.granularity if self.scale.ndim else PER_TENSOR
        learned = self.learned_grid if self.mode is Mode.LEARN else None
        return Grid(self.scale, self.zero_point, self.spec.qmin, self.spec.qmax, granularity, learned)

    def forward(self, x: torch.Tensor, observe: bool = True, clip: Clip | None = None) -> torch.Tensor:
        """Observe or quantize `x`, by mode; `observe=False` where another node owns the range.

        `clip`: bounds of a relu or hardtanh that is still to be applied to `x`.
        """
        if clip is not None and not self._absorbs(clip, x):
            x, clip = clip_activation(x, clip), None
        if self.mode is Mode.OFF:
            return x
        if self.mode is Mode.OBSERVE_FAKE and self.follows:
            return self._fake_within(*self.estimator.range_of(x), x)
        if self.mode in (Mode.OBSERVE, Mode.OBSERVE_FAKE):
            if observe:
                self.estimator.observe(x)
            fakes = observe and self.mode is Mode.OBSERVE_FAKE
            return self._fake_within(self.estimator.low, self.estimator.high, x) if fakes else x
        if self.mode is Mode.LEARN:
            return self._fake_on_learned(x)
        if self.mode is Mode.TRACK and self.training and observe:
            self._track(x)
        self.refresh(x)
        scale, zero_point = self.grid_for(x.ndim)
        return fake_quantize(x, scale, zero_point, self.spec.qmin, self.spec.qmax, clip)

    def _absorbs(self, clip: Clip, x: torch.Tensor) -> bool:
        if self.mode not in (Mode.FAKE, Mode.FROZEN) or self.follows or not is_plain_cpu(x):
            return False
        return absorbs(clip, self.scale, self.zero_point, self.spec.qmin, self.spec.qmax)

    def learned_grid(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (both float32) for a tensor of `shape`, differentiable by the range's parameters."""
        assert isinstance(self.range, LearnedRange)
        examples = shape[0] if shape and not self.follows else 1
        return self.range.grid(self.scale_floor, shape.numel() // max(examples, 1) // max(self.scale.numel(), 1))

    def _fake_on_learned(self, x: torch.Tensor) -> torch.Tensor:
        found = self.learned_grid(x.shape)
        with torch.no_grad():
            self._keep(*found)
        scale, zero_point = (along_axis(part, self.spec.granularity, x.ndim) for part in found)
        return learned_fake_quantize(x, scale, zero_point, self.spec.qmin, self.spec.qmax)

    def _track(self, x: torch.Tensor) -> None:
        assert isinstance(self.range, MovingRange)
        if is_recomputing():
            self._firsts.require_latest("a moving average")
            return
        if not torch.compiler.is_compiling():
            self._firsts.keep(None)
        with torch.no_grad():
            self.range.update(x)
            self.set_range(self.range.low, self.range.high)

    def _fake_within(self, low: torch.Tensor, high: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`x` quantized within a range of the moment, the grid left as it is; `x` itself if the range is not finite."""
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            return x
        found = grid_for_range(low, high, self.spec, is_weight=self.follows)
        grid = [along_axis(part, self.spec.granularity, x.ndim) for part in found]
        return fake_quantize(x, grid[0], grid[1], self.spec.qmin, self.spec.qmax)

    def grid_for(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, shaped to broadcast against a tensor of `rank` dimensions."""
        granularity = self.spec.granularity
        return along_axis(self.scale, granularity, rank), along_axis(self.zero_point, granularity, rank)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Integer codes (int32) of `x` on the grid as it is now."""
        scale, zero_point = self.grid_for(x.ndim)
        return quantize(x.detach(), scale, zero_point, self.spec.qmin, self.spec.qmax)

    def real(self, codes: torch.Tensor) -> torch.Tensor:
        """Real values (float32) of integer codes."""
        return dequantize(codes, *self.grid_for(codes.ndim))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FakeQuant:
        """Grids and ranges move between devices with the module, and stay in float32 when it is cast."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        return self

    def extra_repr(self) -> str:
        """Spec and mode, for printing."""
        return f"{self.spec}, mode={self.mode.value}"


def _require_finite(weight: torch.Tensor) -> None:
    """Refuse a weight from which no grid can follow."""
    wrong = int((~torch.isfinite(weight)).sum())
    if wrong:
        raise CalibrationError(
            f"a weight that is quantized, of shape {tuple(weight.shape)}, is not finite",
            expected="finite numbers, from which its grid follows",
            got=f"{wrong} of {weight.numel()} NaN or Inf",
            remedy="If training diverged, lower the learning rate and resume from a checkpoint; otherwise mend the "
            "checkpoint that was loaded.",
        )


class BiasFakeQuant(nn.Module):
    """Fake quantization of a bias to int32 at scale f(sx * sw), zero point 0, as onnxruntime's integer kernels add it.

    The two FakeQuants whose scales it multiplies are linked from the graph (Program.link_biases); it owns no state.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: tuple[FakeQuant, FakeQuant] | None = (
            None  # a tuple, so that nn.Module does not register them here
        )

    def link(self, x_quant: FakeQuant, weight_quant: FakeQuant) -> None:
        """Take input and weight scale from these."""
        self._sources = (x_quant, weight_quant)

    @property
    def sources(self) -> tuple[FakeQuant, FakeQuant]:
        """The input's and the weight's FakeQuant."""
        assert self._sources is not None, "Program.link_biases links every BiasFakeQuant"
        return self._sources

    @property
    def scale(self) -> torch.Tensor:
        """f(sx * sw): float32, of the weight scale's shape."""
        x_quant, weight_quant = self.sources
        return x_quant.scale * weight_quant.scale

    @property
    def encoding(self) -> Encoding:
        """The bias's grid as it is now, on the CPU."""
        scale = self.scale.detach().cpu()
        axis = None if scale.ndim == 0 else 0
        spec = QuantSpec(BIAS_SPEC.bits, signed=True, symmetric=True, granularity=Granularity(axis))
        return Encoding(scale, torch.zeros_like(scale, dtype=torch.int64), spec)

    @property
    def grid(self) -> Grid:
        """The grid as it is now, where the parameters are."""
        scale = self.scale
        zero_point = torch.zeros_like(scale, dtype=torch.int64)
        return Grid(scale, zero_point, BIAS_SPEC.qmin, BIAS_SPEC.qmax, Granularity(0) if scale.ndim else PER_TENSOR)

    def codes(self, bias: torch.Tensor) -> torch.Tensor:
        """Integer codes (int32) of a bias of shape (channels,)."""
        zero = torch.zeros_like(self.scale, dtype=torch.int64)
        return quantize(bias.detach(), self.scale, zero, BIAS_SPEC.qmin, BIAS_SPEC.qmax)

    def overflow_floor(self, bias: torch.Tensor) -> torch.Tensor:
        """Smallest weight scales, of the weight scale's shape, at which no bias code exceeds LARGEST_BIAS_CODE."""
        x_quant, weight_quant = self.sources
        need = bias.detach().double().abs() / (x_quant.scale.double() * LARGEST_BIAS_CODE)
        return (need.amax() if weight_quant.scale.ndim == 0 else need).to(torch.float32)

    def forward(self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Quantize the bias once both grids are in use; `x` and `weight` only name the sources."""
        if any(source.mode in (Mode.OFF, Mode.OBSERVE, Mode.OBSERVE_FAKE) for source in self.sources):
            return bias
        zero = torch.zeros_like(self.scale, dtype=torch.int64)
        return fake_quantize(bias, self.scale, zero, BIAS_SPEC.qmin, BIAS_SPEC.qmax)
