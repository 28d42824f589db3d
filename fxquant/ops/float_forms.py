"""What is known of each operation where onnxruntime computes it in float32, and the operations with that filled in.

Measured on onnxruntime 1.31.1 (x86-64, AVX-512): against torch with random, subnormal and signed zero operands, alone
and in chains; and against single elements, in runs of 1 to 40, shifted runs, and 400,000 elements on four threads.
A power is x * x (* x) as in torch, but a tensor of one element goes another way (std::pow). torch's square root is not
the nearest float32 on every CPU, its fused `a + alpha b` rounds once, and what it rounds to whole numbers has other
signed zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from fxquant.ops._arguments import bind, output_types
from fxquant.ops.base import FloatForm, OpDef

aten = torch.ops.aten

_AGREE = """
    relu relu6 hardtanh clamp clamp_one_side leaky_relu prelu threshold hardshrink
    abs neg reciprocal sign floor ceil round minimum maximum where masked_fill
    equal not_equal less less_or_equal greater greater_or_equal is_nan is_infinite is_finite
    logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not cast
"""
_MOVE = """
    concat stack pad constant_pad reflection_pad replication_pad copy_into scatter slice_scatter select_scatter
    embedding any all zeros empty ones full zeros_like ones_like full_like eye eye_of_two_sizes scalar_tensor
    upper_triangle lower_triangle upper_triangle_indices lower_triangle_indices live_batch_norm
"""
_ARE_POINTWISE = """
    sqrt exp tan sinh cosh asinh acosh atanh erf sigmoid tanh silu hardswish hardsigmoid gelu softshrink
    reciprocal_square_root expm1 exp2 remainder fmod truncate addcmul addcdiv lerp
"""
_DRIFT = "log sin cos asin acos atan mish log_sigmoid log2 log10 log1p selu elu celu softplus"

_NAMES = {
    FloatForm.AGREES: _AGREE,
    FloatForm.MOVES: _MOVE,
    FloatForm.POINTWISE: _ARE_POINTWISE,
    FloatForm.DRIFTS: _DRIFT,
}
FORMS: Mapping[str, FloatForm] = {name: form for form, names in _NAMES.items() for name in names.split()}


def _unscaled(node: fx.Node) -> FloatForm:
    """A sum or difference; torch fuses the product with `alpha`."""
    return FloatForm.AGREES if bind(node).get("alpha", 1) == 1 else FloatForm.POINTWISE


def _quotient(node: fx.Node) -> FloatForm:
    return FloatForm.AGREES if bind(node).get("rounding_mode") is None else FloatForm.POINTWISE


def _power(node: fx.Node) -> FloatForm | None:
    base, exponent = list(bind(node).values())[:2]
    if isinstance(exponent, fx.Node):
        return None if isinstance(base, fx.Node) else FloatForm.POINTWISE
    return _whole_power(node) if exponent in (2, 3) else FloatForm.POINTWISE


def _whole_power(node: fx.Node) -> FloatForm:
    sizes = [size for kind in output_types(node) for size in kind.shape if isinstance(size, int)]
    return FloatForm.AGREES if any(size > 1 for size in sizes) else FloatForm.DRIFTS


FORMS_OF: Mapping[str, Callable[[fx.Node], FloatForm | None]] = {
    "add": _unscaled,
    "subtract": _unscaled,
    "reverse_subtract": _unscaled,
    "multiply": lambda _: FloatForm.AGREES,
    "divide": _quotient,
    "power": _power,
    "square": _whole_power,
}


def with_float_forms(family: Sequence[OpDef]) -> tuple[OpDef, ...]:
    """The operations of a family with their `float_form`s."""
    return tuple(replace(one, float_form=FORMS.get(one.name), float_form_of=FORMS_OF.get(one.name)) for one in family)
