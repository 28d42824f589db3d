"""What emitters ask of a node: its arguments by name, its dtypes, and its operands promoted as torch promotes them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._emit import squeeze
from fxquant.ops.base import Emitter, OpDef, Role, Writer
from fxquant.ops.kernels import Kernel
from fxquant.spec import Limits

# onnxruntime's CPU kernels do arithmetic on 32 and 64 bits; torch's results on these are the same after a cast back.
NARROW = frozenset({torch.bool, torch.int8, torch.uint8, torch.int16})

# Sizes that are real numbers are emitted as double, as Python computes them.
SIZE_SQUARE_ROOT: Any = vars(torch)["_sym_sqrt"]  # what torch traces math.sqrt of a size to
FLOAT_SIZES = frozenset({operator.truediv, torch.sym_float, SIZE_SQUARE_ROOT})
_FLOAT_IF_ANY = frozenset(
    {operator.add, operator.sub, operator.mul, operator.neg, operator.pow, torch.sym_max, torch.sym_min}
)

MAX_INT = 2**63 - 1


class Typed(Protocol):
    """What `node.meta["type"]` holds (fxquant.graph.program.ValueType), as far as operations read it."""

    @property
    def shape(self) -> tuple[int | str, ...]:
        """Sizes; symbolic ones are strings."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype."""


def bind(node: fx.Node) -> dict[str, Any]:
    """All arguments of a node by the names of its operator's schema, defaults filled in."""
    target = cast(Any, node.target)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def output_types(node: fx.Node) -> tuple[Typed, ...]:
    """Types of a node's outputs; none for a size."""
    found = node.meta.get("type", ())
    return found if isinstance(found, tuple) else (cast(Typed, found),)


def is_size(value: Any) -> bool:
    """Whether an argument is a node that gives a Python number (a size), not a tensor."""
    return isinstance(value, fx.Node) and not output_types(value)


def is_float_size(value: Any) -> bool:
    """Whether a size, or a Python number, is a real number."""
    if not isinstance(value, fx.Node):
        return isinstance(value, float)
    if value.target in FLOAT_SIZES:
        return True
    return value.target in _FLOAT_IF_ANY and any(is_float_size(argument) for argument in value.args)


def is_float(value: Any) -> bool:
    """Whether an argument is a node whose (first) output is a tensor of a floating dtype."""
    types = output_types(value) if isinstance(value, fx.Node) else ()
    return bool(types) and types[0].dtype.is_floating_point


def same_float_dtype(*values: Any) -> bool:
    """Whether all arguments are tensors of one floating dtype."""
    return all(is_float(value) for value in values) and len({output_types(value)[0].dtype for value in values}) == 1


def static_shape(shape: Sequence[int | str]) -> tuple[int, ...] | None:
    """A shape whose sizes are all known now, else None."""
    sizes = tuple(size for size in shape if isinstance(size, int))
    return sizes if len(sizes) == len(shape) else None


def axis_of(dim: int, rank: int) -> int:
    """A dimension counted from 0; of a scalar, 0."""
    return dim % max(rank, 1)


def ints(w: Writer, *values: int) -> ir.Value:
    """A constant 1-D int64 value."""
    return w.constant(np.array(values, dtype=np.int64))


def scalar(w: Writer, size: Any) -> ir.Value:
    """A size, or a Python int, as an int64 scalar of shape ()."""
    if not isinstance(size, fx.Node):
        return w.constant(np.array(size, dtype=np.int64))
    return squeeze(w, w.value(size), [0])


def computable(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which onnxruntime can compute what torch computes in `dtype`."""
    return torch.int32 if dtype in NARROW else dtype


def promoted(w: Writer, *operands: Any) -> torch.dtype:
    """The dtype to which torch promotes operands: tensors, scalar tensors, sizes and numbers rank differently."""
    first, *others = (_sample(w, value) for value in operands)
    if not others:
        return first.dtype if isinstance(first, torch.Tensor) else torch.result_type(first, first)
    return torch.result_type(first, others[0])


def _sample(w: Writer, value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return value
    if is_size(value):
        return 1.0 if is_float_size(value) else 1
    return torch.empty((1,) * min(len(w.shape(value)), 1), dtype=w.dtype(value))


def operand(w: Writer, value: Any, dtype: torch.dtype) -> ir.Value:
    """An argument (tensor, size or Python number) as an ONNX value of `dtype`."""
    if not isinstance(value, fx.Node):
        return w.operand(value, dtype)
    if is_size(value):
        number = scalar(w, value)
        return number if dtype == torch.int64 and not is_float_size(value) else w.cast(number, dtype)
    return as_dtype(w, w.value(value), w.dtype(value), dtype)


def as_dtype(w: Writer, value: ir.Value, have: torch.dtype, want: torch.dtype) -> ir.Value:
    """`value`, cast if it is not of dtype `want` already."""
    return value if have == want else w.cast(value, want)


def finish(node: fx.Node, w: Writer, value: ir.Value, computed: torch.dtype) -> ir.Value:
    """A result computed in `computed`, in the dtype that the node has."""
    return as_dtype(w, value, computed, w.dtype(node))


def input_as_output(node: fx.Node, w: Writer) -> ir.Value:
    """The first argument in the output's dtype."""
    return operand(w, bind_first(node), w.dtype(node))


def bind_first(node: fx.Node) -> Any:
    """A node's first argument, however it was given."""
    return next(iter(bind(node).values()))


def identity(w: Writer, value: ir.Value) -> ir.Value:
    """`value` under the node's own name; onnxruntime removes it before it looks for Q/DQ."""
    result: ir.Value = w.op("Identity", [value])
    return result


def define(
    name: str,
    targets: Sequence[Any],
    role: Role | Callable[[fx.Node], Role],
    emit: Emitter,
    *onnx_types: str,
    output_range: Limits | None = None,
    since_opset: int = 13,
    kernel: Kernel | None = None,
) -> OpDef:
    """An OpDef whose nodes are INDEX when their output is not of a floating dtype; `role` is for those that are."""

    def role_of(node: fx.Node) -> Role:
        if not is_float(node):
            return Role.INDEX
        return role if isinstance(role, Role) else role(node)

    return OpDef(
        name=name,
        targets=tuple(targets),
        role=role if isinstance(role, Role) else Role.FLOAT,
        role_of=role_of,
        emit=emit,
        onnx_types=onnx_types,
        output_range=output_range,
        since_opset=since_opset,
        kernel=kernel,
    )
