"""The `exact` arithmetic: onnxruntime's codes in float32 on any device, with fake quantization's gradients.

    product   acc = op(x, w, b) on centred codes, exact in float32 by certificate (accumulate.py)
              y = clip(rint(f(acc * M)))                     M, rounding and clipping as in kernels/requantize.py
              dL/dy passes where fake quantization would let it pass: inside the grid and inside relu's or clip's bounds
    table     a function of one or two codes, looked up in a table of all of them, derivatives too (tables.py)
    other     codes by the reference formula; backward through the same nodes in float, fake quantization included
    learned   at the end of each of them, the range's parameters get fake quantization's gradient (learned_ranges.py)

Gradients are those of real values (numerics/codes.py). For acc = sum x w + b, real y = sx sw acc, so with G = dL/dy
    dL/dx = op^T(G sw, w)        dL/dw = op^T(G sw, x) sx / sw        dL/db = sum(G sw) / sw
that is: autograd of `op` on centred codes, fed with G sw, and the last two scaled. (Scales are at least 2^-60: G sw is
a normal float32 for |G| > 2^-66, also in dead channels.) There are no second derivatives (first_order.py).
Straight-through estimator: Bengio et al., 2013 (arXiv:1308.3432).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxquant.graph.program import Program
from fxquant.numerics.codes import Codes, Grid
from fxquant.numerics.kernels.requantize import product_multiplier
from fxquant.numerics.rounding import lowest_for_nan
from fxquant.numerics.straight_through import next_float32, open_interval
from fxquant.ops.activation import activation_bounds
from fxquant.ops.kernels import GeneralKernel, PairKernel, ProductKernel, UnaryKernel
from fxquant.simulation.accumulate import Accumulator, Strategy
from fxquant.simulation.executor import Call, Executor, real_of
from fxquant.simulation.first_order import first_order
from fxquant.simulation.islands import DEFAULT_OPSET, Harvest
from fxquant.simulation.learned_ranges import is_learning, learn
from fxquant.simulation.plan import Unary, along_channels
from fxquant.simulation.real import real_site, unquantized_site
from fxquant.simulation.tables import Tables

aten = torch.ops.aten
_OPEN = (aten.relu.default, aten.relu6.default, aten.hardtanh.default)  # their gradient is 0 at their bounds


class ExactArithmetic:
    """See the module's docstring; `opset` is that of the file, which decides how some operations are written."""

    def __init__(self, opset: int = DEFAULT_OPSET) -> None:
        self._tables = Tables()
        self._harvest = Harvest(opset)
        self.accumulator = Accumulator()

    def quantize(self, real: torch.Tensor, grid: Grid) -> Codes:
        """Codes of real values; the gradient passes inside the grid."""
        scale, zero_point = grid.for_rank(real.ndim)
        low, high = grid.bounds if zero_point.ndim == 0 else (grid.qmin - zero_point, grid.qmax - zero_point)
        wide = real.to(torch.float32)
        return learn(Codes(_to_grid(wide, scale, low, high), grid), lambda x: x.div(scale), wide)

    def run(self, call: Call) -> Codes | torch.Tensor:
        """By the kernel's form."""
        kernel = call.site.kernel
        if isinstance(kernel, ProductKernel):
            return self._product(call, kernel)
        assert call.out is not None, "only products write float32"
        if isinstance(kernel, UnaryKernel | PairKernel):
            return self._tables.look_up(call, kernel)
        assert isinstance(kernel, GeneralKernel) and kernel.codes is not None
        codes = kernel.codes(call.site.operation, call.args, call.out)
        return _straight_through(call, call.out, (codes - call.out.zero_point).to(torch.float32))

    def look_up(self, function: Unary, source: Codes, out: Grid | None) -> Codes | torch.Tensor:
        """From the table that was harvested of it, its derivatives from the same nodes in float."""
        return self._harvest.look_up(function, source, out)

    def compute(self, node: fx.Node, inputs: Mapping[fx.Node, Any], in_torch: Callable[[], Any]) -> Any:
        """In torch: it has gradients, and runs on any device."""
        return in_torch()

    def _product(self, call: Call, kernel: ProductKernel) -> Codes | torch.Tensor:
        left, right = call.args[kernel.left], call.args[kernel.right]
        scale = along_channels(right.grid.scale, kernel, call.site)
        operands = list(call.args)
        operands[kernel.left] = left.centred
        operands[kernel.right] = _scale_gradient(
            right.centred, left.grid.scale / right.grid.for_rank(right.centred.ndim)[0]
        )
        for position, argument in enumerate(call.args):
            if isinstance(argument, Codes) and position not in (kernel.left, kernel.right):
                operands[position] = _scale_gradient(argument.centred, 1.0 / right.grid.scale)
        accumulated = self.accumulator.add_up(call, kernel, operands)
        if call.out is None:
            return _to_real(accumulated, left.grid.scale * scale, scale)
        multiplier = product_multiplier(left.grid.scale, scale, call.out.scale)
        passes = gradient_bounds(call.site.activations, call.out)
        keeps = is_learning(call.out)  # in `accumulated`, what is rounded
        codes = Codes(_requantize(accumulated, multiplier, scale, call.out.bounds, passes, keeps), call.out)
        bounds = _activation_steps(call.site.activations, call.out)
        return learn(codes, lambda scaled: scaled.clamp(*bounds), accumulated)


def strategies(program: Program, *args: Any, **kwargs: Any) -> dict[str, Strategy]:
    """How `exact` adds up the products of each integer kernel, by the operation's name, in graph order.

    Runs one forward of a copy in eval mode on these inputs, without gradients: the program stays as it is. Layers of
    other than one part are beyond the certificate.
    """
    arithmetic, twin = ExactArithmetic(), program.copy()
    twin.module.eval()
    with torch.no_grad():
        Executor(twin, arithmetic).forward(*args, **kwargs)
    return dict(arithmetic.accumulator.strategies)


def gradient_bounds(activations: tuple[fx.Node, ...], out: Grid) -> tuple[float, float]:
    """In steps of `out`, the open interval of unrounded values whose gradient fake quantization lets pass.

    The quantizer passes where rint(y / s) is on the grid; relu where y > 0, hardtanh strictly inside its bounds, clamp
    at its bounds too.
    """
    passes = open_interval(1.0, *out.bounds)
    for node in activations:
        steps = _activation_steps((node,), out)
        if node.target not in _OPEN:
            steps = next_float32(steps[0], -math.inf), next_float32(steps[1], math.inf)
        passes = max(passes[0], steps[0]), min(passes[1], steps[1])
    return passes


def _activation_steps(activations: tuple[fx.Node, ...], out: Grid) -> tuple[float, float]:
    """Lowest and highest output of activations one after the other, in steps of `out`; infinite where there is none."""
    low, high = -math.inf, math.inf
    for node in activations:
        bounds = activation_bounds(node)
        assert bounds is not None
        steps = [bound / float(out.scale) if math.isfinite(bound) and bound else bound for bound in bounds]
        low, high = (min(max(end, steps[0]), steps[1]) for end in (low, high))
    return low, high


def _straight_through(call: Call, out: Grid, centred: torch.Tensor) -> Codes:
    """Codes with the gradient of the same nodes in float."""
    leaves, spec = pytree.tree_flatten(real_of(call.args))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    reals = [leaves[i] for i in places]

    def fill(reals: tuple[torch.Tensor, ...]) -> Any:
        filled = dict(zip(places, reals, strict=True))
        return pytree.tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], spec)

    site, unquantized = real_site(call), unquantized_site(call)
    codes = Codes(_through(centred, lambda *reals: site(fill(reals)), *reals), out)
    return learn(codes, lambda *reals: unquantized(fill(reals)) / out.scale, *reals)


class _ToGrid(torch.autograd.Function):
    """clip(rint(x / s), low, high): fake quantization without its last multiplication; NaN becomes low."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
        grid = lowest_for_nan(x.div(scale).round_())
        if not ctx.needs_input_grad[0]:
            return grid.clamp_(low, high)
        clamped = torch.clamp(grid, low, high)
        ctx.save_for_backward(grid.eq(clamped))
        return clamped

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


class _Requantize(torch.autograd.Function):
    """clip(rint(f(acc * M))); backward: where it passes, G times the weight's scale.

    The accumulator's memory is used again, and holds f(acc * M) afterwards where it `keeps` it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        accumulator: torch.Tensor,
        multiplier: torch.Tensor,
        factor: torch.Tensor,
        bounds: tuple[float, float],
        passes: tuple[float, float],
        keeps: bool,
    ) -> torch.Tensor:
        scaled = accumulator.mul_(multiplier)  # nothing else reads a fresh accumulator
        if not ctx.needs_input_grad[0]:
            return (scaled.round() if keeps else scaled.round_()).clamp_(*bounds)
        ctx.passes = passes
        ctx.save_for_backward(scaled, factor)
        return scaled.round().clamp_(*bounds)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled, factor = ctx.saved_tensors
        passed = aten.hardtanh_backward(grads[0], scaled, *ctx.passes)
        return passed.mul_(factor), None, None, None, None, None


class _ToReal(torch.autograd.Function):
    """f(acc * f(sx * sw)); backward: G times the weight's scale."""

    @staticmethod
    def forward(ctx: Any, accumulator: torch.Tensor, multiplier: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return accumulator * multiplier

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None, None


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


class _Through(torch.autograd.Function):
    """`centred`, with the gradient of compute(*reals)."""

    @staticmethod
    def forward(
        ctx: Any, centred: torch.Tensor, compute: Callable[..., torch.Tensor], *reals: torch.Tensor
    ) -> torch.Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*reals)
        return centred.view_as(centred)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            reals = [real.detach().requires_grad_(need) for real, need in zip(ctx.saved_tensors, wanted, strict=True)]
            value = ctx.compute(*reals)
        leaves = [real for real, need in zip(reals, wanted, strict=True) if need]
        found = iter(torch.autograd.grad(value, leaves, grads[0], allow_unused=True))
        return (None, None, *(next(found) if need else None for need in wanted))


# torch leaves Function.apply untyped.
_to_grid: Callable[..., torch.Tensor] = _ToGrid.apply
_requantize: Callable[..., torch.Tensor] = _Requantize.apply
_to_real: Callable[..., torch.Tensor] = _ToReal.apply
_scale_gradient: Callable[..., torch.Tensor] = _ScaleGradient.apply
_through: Callable[..., torch.Tensor] = _Through.apply
