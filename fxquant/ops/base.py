"""OpDef: everything that the rest of fxquant asks about one operation; OpTable: where it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.errors import FxquantError
from fxquant.ops.kernels import Kernel
from fxquant.spec import Limits

Emitted = ir.Value | tuple[ir.Value, ...]
Size = int | fx.Node


class Role(Enum):
    """What an operation is to quantization."""

    WEIGHTED = "compute with a weight"  # convolution, linear
    COMPUTE = "compute on activations"  # add, mul, matmul, average pooling: integer kernel between Q and DQ
    GRID_PRESERVING = "grid-preserving"  # max pooling, reshape ...: output codes are input codes
    CONCAT = "concatenation"  # integer kernel at any scales; may share one grid
    ACTIVATION = "activation"  # relu, clip: absorbed by the quantizer behind it
    FIXED_RANGE = "fixed output range"  # sigmoid, softmax: integer kernel, known range
    FLOAT = "float island"  # runs in float between DequantizeLinear and QuantizeLinear
    INDEX = "integers, booleans and sizes"  # never quantized


class FloatForm(Enum):
    """What is known of an operation where onnxruntime computes it in float32.

    Measured on onnxruntime 1.31.1, level ALL as EXTENDED: runs of 1 to 40 elements, shifted runs, tensors of 400,000
    elements on four threads, all against single elements; and against torch with signed zeros and subnormals.
    """

    AGREES = "agrees"  # elementwise, rounded as IEEE 754 has it: torch's float32 bit for bit
    MOVES = "moves"  # values of its inputs, and constants, in other places
    POINTWISE = "pointwise"  # a function of each element, the same in every place: not torch's, but it can be tabulated
    DRIFTS = "drifts"  # elementwise, and rounded differently in vector and remainder loops


class Writer(Protocol):
    """What an emitter may ask of the ONNX writer (fxquant.lowering.writer); operations import no lowering."""

    opset: int

    @property
    def flattens_linear(self) -> bool:
        """Whether linear layers on more than two axes are to be Reshape, Gemm, Reshape (Target.flattens_linear)."""

    def value(self, node: fx.Node) -> ir.Value:
        """The ONNX value of a node's single output."""

    def values(self, node: fx.Node) -> tuple[ir.Value, ...]:
        """The ONNX values of a node with several outputs."""

    def shape(self, node: fx.Node) -> tuple[int | str, ...]:
        """Shape of a node's tensor output; symbolic sizes are strings."""

    def dtype(self, node: fx.Node) -> torch.dtype:
        """Dtype of a node's tensor output."""

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], *, outputs: int = 1, **attributes: Any) -> Any:
        """Append an ONNX node; returns its ir.Value, or a tuple of them when `outputs` > 1.

        Attributes are int, float, str, or lists of them (None is left out). The last node that an emitter appends
        carries the FX node's name, earlier ones get a suffix.
        """

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """An initializer with these contents; equal contents share one."""

    def operand(self, value: Any, like: torch.dtype | None = None) -> ir.Value:
        """The ONNX value of an FX argument: a node's value, or a Python number as a scalar constant of dtype `like`."""

    def weight(self, node: fx.Node, perm: Sequence[int] | None = None) -> ir.Value:
        """The value of a weight argument, transposed by `perm` if given.

        Where the argument is a constant (a parameter, or a parameter behind a FakeQuant) the transposition is done in
        the initializer and the DequantizeLinear's axis follows; otherwise a Transpose is appended.
        """

    def sizes(self, sizes: Sequence[Size]) -> ir.Value:
        """A 1-D int64 value of sizes: constant where all are ints, else concatenated from the nodes' scalars."""

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """Append a Cast."""

    def refuse(self, node: fx.Node, reason: str, remedy: str = "") -> FxquantError:
        """The error to raise when `node` cannot be emitted (names node, source line, reason)."""


Emitter = Callable[[fx.Node, Writer], Emitted]


@dataclass(frozen=True)
class OpDef:
    """One operation.

    Arguments:
        name: our name, for reports and configs ("convolution").
        targets: FX targets that spell it (OpOverloads, Python functions), or module classes for call_module.
        role: what it is to quantization.
        emit: appends its ONNX form and returns the output value(s).
        onnx_types: ONNX operator types that a config's op_type matches ("Conv").
        weight, bias: positions of weight and bias among the node's args.
        channel_axis: axis of the weight's output channels for a given node (grouped, transposed ...).
        output_range: bounds of the output, where the operation fixes them.
        grid_inputs: positions of the args whose grid is the output's, for GRID_PRESERVING (default: the first).
        kernel: the integer kernel that onnxruntime runs for it between Q/DQ; None: it has none (grid-preserving
            operations need none).
        float_form: what is known of it in float; None: nothing (grid-preserving operations move).
        role_of, types_of, weight_of, float_form_of: role, ONNX types, weight position and float form of a given node,
            where the arguments decide (a transposed convolution; a product with a parameter; an exponent). Ask
            `role_for`, `types_for`, `weight_for` and `float_form_for`.
    """

    name: str
    targets: tuple[Any, ...]
    role: Role
    emit: Emitter
    onnx_types: tuple[str, ...] = ()
    weight: int | None = None
    bias: int | None = None
    channel_axis: Callable[[fx.Node], int] | None = None
    output_range: Limits | None = None
    grid_inputs: tuple[int, ...] = (0,)
    since_opset: int = 13
    kernel: Kernel | None = None
    float_form: FloatForm | None = None
    role_of: Callable[[fx.Node], Role] | None = None
    types_of: Callable[[fx.Node], tuple[str, ...]] | None = None
    weight_of: Callable[[fx.Node], int | None] | None = None
    float_form_of: Callable[[fx.Node], FloatForm | None] | None = None

    def role_for(self, node: fx.Node) -> Role:
        """What `node`, a call of this operation, is to quantization."""
        return self.role if self.role_of is None else self.role_of(node)

    def types_for(self, node: fx.Node) -> tuple[str, ...]:
        """The ONNX operator types that a config's op_type matches at `node`."""
        return self.onnx_types if self.types_of is None else self.types_of(node)

    def weight_for(self, node: fx.Node) -> int | None:
        """Position of the weight among the args of `node`; None if it has none."""
        return self.weight if self.weight_of is None else self.weight_of(node)

    def float_form_for(self, node: fx.Node) -> FloatForm | None:
        """What is known of `node` where onnxruntime computes it in float."""
        if self.float_form_of is not None:
            return self.float_form_of(node)
        return FloatForm.MOVES if self.role_for(node) is Role.GRID_PRESERVING else self.float_form


@dataclass
class OpTable:
    """Finds the OpDef of a node; users register their own operations."""

    _by_target: dict[Any, OpDef] = field(default_factory=dict)

    def register(self, *definitions: OpDef) -> None:
        """Add operations; a target that is taken is an error (use `replace` to change one on purpose)."""
        for definition in definitions:
            for target in definition.targets:
                if target in self._by_target:
                    taken = self._by_target[target].name
                    raise FxquantError(f"operation '{definition.name}': target {target} belongs to '{taken}'")
                self._by_target[target] = definition

    def replace(self, definition: OpDef) -> None:
        """Add an operation, taking its targets from whichever had them."""
        for target in definition.targets:
            self._by_target[target] = definition

    def find(self, node: fx.Node, module: torch.nn.Module | None = None) -> OpDef | None:
        """The OpDef of a call_function node, or of a call_module node given its module; None if unknown."""
        if node.op == "call_function":
            return self._by_target.get(node.target)
        if node.op == "call_module" and module is not None:
            for kind in type(module).__mro__:
                if kind in self._by_target:
                    return self._by_target[kind]
        return None

    def names(self) -> list[str]:
        """All operations' names."""
        return sorted({definition.name for definition in self})

    def __iter__(self) -> Iterator[OpDef]:
        seen: set[int] = set()
        for definition in self._by_target.values():
            if id(definition) not in seen:
                seen.add(id(definition))
                yield definition


def table_of(families: Iterable[Sequence[OpDef]]) -> OpTable:
    """A table with the operations of all families."""
    table = OpTable()
    for family in families:
        table.register(*family)
    return table
