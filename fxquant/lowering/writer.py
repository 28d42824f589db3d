"""GraphWriter: builds one ONNX graph from the nodes of one program, and is the Writer that operations emit through.

Names: the ONNX node and value that stand for an FX node carry its name; the helpers of its emission are called
`<name>.<op type>` (an FX name has no dot, so nothing can clash). Parameters, and what is computed from parameters
alone, become initializers when something first reads them; what nothing reads is not written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.errors import ExportError
from fxquant.graph.constants import Constants
from fxquant.graph.program import Program, ValueType, describe, value_type
from fxquant.lowering.attributes import attribute, schema_of
from fxquant.lowering.barriers import input_to_guard
from fxquant.lowering.encodings import Encodings, StoredCodes
from fxquant.lowering.scene import Scene
from fxquant.ops.base import Emitted, Emitter, OpTable, Size
from fxquant.spec import Target

ALLOWED_SCALARS = (bool, int, float, complex)
BATCH = "batch"  # name of the first input's first axis, where it is dynamic


class GraphWriter:
    """Writes the nodes of `program` at `opset`; `fxquant.lowering.export.lower` drives it.

    Arguments:
        program: what is written; never changed.
        opset: version of the ONNX operator set.
        table: where operations are looked up.
    """

    def __init__(self, program: Program, opset: int, table: OpTable) -> None:
        self.program = program
        self.opset = opset
        self.constants = Constants(program)
        self.encodings = Encodings(program, self.constants, opset)
        self.scene = Scene(program, table, self.constants, self.encodings)
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.functions: list[ir.Function] = []
        self.opset_imports: dict[str, int] = {"": opset}
        self._values: dict[fx.Node, tuple[ir.Value, ...]] = {}
        self._weights: dict[tuple[fx.Node, tuple[int, ...] | None], ir.Value] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._symbols: dict[str, str] = {}
        self._names: set[str] = set()
        self._node_names: set[str] = set()
        self._outputs: set[ir.Value] = set()
        self._unclaimed: set[ir.Value] = set()  # outputs of several, which the getitem that reads them will name
        self._current: fx.Node | None = None
        self._pending: list[ir.Node] = []

    # --- what an emitter may ask -------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> ir.Value:
        """The ONNX value of a node's single output; constants are written on first use."""
        found = self.values(node)
        if len(found) != 1:
            raise self.refuse(node, f"it has {len(found)} outputs where one is read")
        return found[0]

    def values(self, node: fx.Node) -> tuple[ir.Value, ...]:
        """The ONNX values of a node with several outputs."""
        if node not in self._values:
            if not self.is_constant(node):
                raise self.refuse(node, "it is read before it is written")
            self._values[node] = (self.weight(node),)
        return self._values[node]

    def shape(self, node: fx.Node) -> tuple[int | str, ...]:
        """Shape of a node's tensor output; symbolic sizes are strings."""
        return self.type_of(node).shape

    def dtype(self, node: fx.Node) -> torch.dtype:
        """Dtype of a node's tensor output."""
        return self.type_of(node).dtype

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], *, outputs: int = 1, **attributes: Any) -> Any:
        """Append an ONNX node; returns its ir.Value, or a tuple of them when `outputs` > 1.

        Attributes take the type that the operator's schema gives them; None is left out. An operator that `opset` does
        not have, or an attribute that it does not know, is an ExportError at the node being written.
        """
        try:
            schema = schema_of(op_type, self.opset)
            given = [attribute(schema, key, value) for key, value in attributes.items() if value is not None]
        except ValueError as err:
            raise self._refuse_current(str(err)) from err
        node = ir.Node("", op_type, _without_trailing_none(inputs), given, num_outputs=outputs)
        self.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """An initializer with these contents; equal contents share one."""
        array = np.asarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._shared:
            tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape))
            self._shared[key] = self.initializer(f"const.{len(self._shared)}", tensor)
        return self._shared[key]

    def operand(self, value: Any, like: torch.dtype | None = None) -> ir.Value:
        """The ONNX value of an FX argument: a node's value, or a Python number as a scalar constant of dtype `like`."""
        if isinstance(value, fx.Node):
            return self.value(value)
        if isinstance(value, ir.Value):
            return value
        if isinstance(value, ALLOWED_SCALARS):
            dtype = like if like is not None else _default_dtype(value)
            return self.constant(np.array(value, dtype=ir_dtype(dtype).numpy()))
        raise self._refuse_current(f"argument {value!r} is neither a tensor nor a number")

    def weight(self, node: fx.Node, perm: Sequence[int] | None = None) -> ir.Value:
        """The value of a weight argument, transposed by `perm` if given.

        Where the argument is a constant (a parameter, what is computed from parameters alone, or such behind a
        FakeQuant) the transposition is done in the initializer, and the DequantizeLinear's axis and blocks follow;
        otherwise a Transpose is appended.
        """
        order = None if perm is None or list(perm) == sorted(perm) else tuple(perm)
        if not self.is_constant(node):
            value = self.value(node)
            return value if order is None else self.op("Transpose", [value], perm=list(order))
        if (node, order) not in self._weights:
            self._weights[node, order] = self._write_constant(node, order)
        return self._weights[node, order]

    def sizes(self, sizes: Sequence[Size]) -> ir.Value:
        """A 1-D int64 value of sizes: constant where all are ints, else concatenated from the nodes' scalars."""
        parts: list[ir.Value] = []
        run: list[int] = []
        for size in sizes:
            if isinstance(size, fx.Node):
                parts += [self._int64s(run)] if run else []
                parts.append(self.value(size))
                run = []
            else:
                run.append(int(size))
        parts += [self._int64s(run)] if run or not parts else []
        return parts[0] if len(parts) == 1 else self.op("Concat", parts, axis=0)

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """Append a Cast."""
        result: ir.Value = self.op("Cast", [value], to=int(ir_dtype(dtype)))
        return result

    def refuse(self, node: fx.Node, reason: str, remedy: str = "") -> ExportError:
        """The error to raise when `node` cannot be emitted (names node, source line, reason)."""
        return ExportError(
            f"export: node '{node.name}' cannot be written", place=describe(node), got=reason, remedy=remedy
        )

    # --- what lowering asks ------------------------------------------------------------------------------------------

    def emit(self, node: fx.Node, emitter: Emitter) -> None:
        """Write `node` through `emitter`, then give its nodes and values their names and types."""
        self._current, self._pending = node, []
        try:
            result = emitter(node, self)
            if self.is_guarded:
                self._guard_inputs()
            self._values[node] = self._name(node, result)
        finally:
            self._current, self._pending = None, []

    def add_input(self, node: fx.Node) -> None:
        """Make a placeholder a graph input."""
        value = ir.Value(name=self.fresh(node.name))
        kind = value_type(node) or ValueType((1,), torch.int64)
        if not self.inputs and kind.shape and isinstance(kind.shape[0], str) and kind.shape[0].isidentifier():
            self._symbols[kind.shape[0]] = BATCH
        self._set_type(value, kind)
        self.inputs.append(value)
        self._values[node] = (value,)

    def reserve(self, names: Iterable[str]) -> None:
        """Keep names for the graph's outputs."""
        self._names.update(names)

    def add_output(self, leaf: fx.Node | int | float | bool, name: str) -> ir.Value:
        """The graph output `name` (reserved before): the leaf's value under that name.

        A leaf that is an input, an initializer or an output already is passed through an Identity.
        """
        value = self.operand(leaf)
        if value.producer() is None or value in self._outputs:
            kind = (value.shape, value.type)
            value = self.op("Identity", [value])
            value.shape, value.type = kind
            producer = value.producer()
            assert producer is not None
            producer.name = self.fresh_node(f"{name}.identity")
        value.name = name
        self._outputs.add(value)
        return value

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node's value is known now: it depends on parameters alone, perhaps behind a FakeQuant."""
        return self.constants.is_constant(node) or self.encodings.is_constant_quantizer(node)

    def onnx_shape(self, kind: ValueType) -> ir.Shape:
        """The ONNX shape of a type; the symbol of the batch is called so."""
        return ir.Shape([size if isinstance(size, int) else self._rename_symbols(size) for size in kind.shape])

    @property
    def is_guarded(self) -> bool:
        """Whether the file is for onnxruntime, whose silent rewrites must be refused or prevented."""
        return self.program.target is Target.ONNXRUNTIME_X64

    @property
    def flattens_linear(self) -> bool:
        """Whether linear layers on more than two axes are written as Reshape, Gemm, Reshape."""
        return self.program.target.flattens_linear

    def barrier(self, value: ir.Value, name: str) -> ir.Value:
        """`value` behind a barrier (fxquant.lowering.barriers)."""
        result = self.place("Max", [value], f"{name}.barrier")
        result.shape, result.type = value.shape, value.type
        return result

    def _guard_inputs(self) -> None:
        for pending in list(self._pending):
            position = input_to_guard(pending)
            guarded = None if position is None else pending.inputs[position]
            if position is not None and guarded is not None and self._current is not None:
                value = self.barrier(guarded, guarded.name or self._current.name)
                pending.replace_input_with(position, value)
                self.nodes.insert(self.nodes.index(pending), self.nodes.pop())

    def append(self, node: ir.Node) -> None:
        """Append an ONNX node as it is; unnamed ones are named when the emission ends."""
        self.nodes.append(node)
        self._pending.append(node)

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer called `name` (made unique)."""
        value = ir.Value(name=self.fresh(name), const_value=tensor)
        value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)  # type: ignore[arg-type]
        tensor.name = value.name
        assert value.name is not None
        self.initializers[value.name] = value
        return value

    def fresh(self, name: str) -> str:
        """`name` for a value, or `name.1`, `name.2` ... if it is taken; taken from now on."""
        return _fresh(name, self._names)

    def fresh_node(self, name: str) -> str:
        """`name` for a node, made unique among nodes."""
        return _fresh(name, self._node_names)

    def place(
        self, op_type: str, inputs: Sequence[ir.Value | None], output: str, *, name: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node with one output called `output` (made unique); the node is called `name`, or as its output."""
        value: ir.Value = self.op(op_type, inputs, **attributes)
        producer = value.producer()
        assert producer is not None
        value.name = self.fresh(output)
        producer.name = self.fresh_node(name or output)
        return value

    # --- inside ------------------------------------------------------------------------------------------------------

    def _write_constant(self, node: fx.Node, order: tuple[int, ...] | None) -> ir.Value:
        if self.encodings.is_constant_quantizer(node) and not self.encodings.is_off(node):
            return self._write_codes(node, self.encodings.stored(node), order)
        if self.encodings.is_constant_quantizer(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return self.weight(source, order)
        tensor = self.constants.tensor(node)
        if order is None:
            return self.initializer(node.name, snapshot(tensor))
        return self.initializer(f"{node.name}.transposed", snapshot(tensor.permute(order)))

    def _write_codes(self, node: fx.Node, stored: StoredCodes, order: tuple[int, ...] | None) -> ir.Value:
        written = stored if order is None else stored.transposed(order)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = self.initializer(f"{source.name}.codes", ir.tensor(written.codes))
        grid = [value, self.constant(written.scale), self.constant(written.zero_point)]
        return self.place("DequantizeLinear", grid, node.name, axis=written.axis, block_size=written.block)

    def _name(self, node: fx.Node, result: Emitted) -> tuple[ir.Value, ...]:
        values = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        several = len(values) > 1 or isinstance(node.meta.get("type"), tuple)
        own = {value for pending in self._pending for value in pending.outputs if value.name is None}
        for index, value in enumerate(values):
            self._name_output(value, f"{node.name}.{index}" if several else node.name, value in own, several)
        self._type_outputs(node, values)
        self._name_nodes(node, values[0].producer() if values else None)
        return values

    def _name_output(self, value: ir.Value, name: str, is_own: bool, several: bool) -> None:
        if is_own and value.name is None:
            value.name = self.fresh(name)
            if several:
                self._unclaimed.add(value)
        elif value in self._unclaimed and not several:
            self._unclaimed.discard(value)
            value.name = self.fresh(name)

    def _name_nodes(self, node: fx.Node, main: ir.Node | None) -> None:
        for pending in self._pending:
            if pending.name is None:
                name = node.name if pending is main else f"{node.name}.{pending.op_type.lower()}"
                pending.name = self.fresh_node(name)
            for index, value in enumerate(pending.outputs):
                if value.name is None:
                    stem = f"{node.name}.{pending.op_type.lower()}"
                    value.name = self.fresh(stem if len(pending.outputs) == 1 else f"{stem}.{index}")
            if self.opset >= 21:  # ONNX has node metadata from there on
                pending.metadata_props.update(_place_of(node))

    def _type_outputs(self, node: fx.Node, values: tuple[ir.Value, ...]) -> None:
        found = node.meta.get("type")
        types = found if isinstance(found, tuple) else (found,)
        for value, kind in zip(values, types, strict=False):  # fewer where an emitter writes no unread output
            if isinstance(kind, ValueType) and value.producer() is not None and value.shape is None:
                self._set_type(value, kind)

    def _set_type(self, value: ir.Value, kind: ValueType) -> None:
        value.shape, value.type = self.onnx_shape(kind), ir.TensorType(ir_dtype(kind.dtype))

    def type_of(self, node: fx.Node) -> ValueType:
        """Shape and dtype of a node's tensor output."""
        found = value_type(node)
        if found is None:
            raise self.refuse(
                node, "its shape and dtype are not known", "A pass that creates nodes must set their type."
            )
        return found

    def _rename_symbols(self, expression: str) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda found: self._symbols.get(found[0], found[0]), expression)

    def _int64s(self, sizes: Sequence[int]) -> ir.Value:
        return self.constant(np.array(sizes, dtype=np.int64))

    def _refuse_current(self, reason: str) -> ExportError:
        if self._current is None:
            return ExportError("export", got=reason)
        return self.refuse(self._current, reason)


def ir_dtype(dtype: torch.dtype) -> ir.DataType:
    """The ONNX dtype of a torch dtype."""
    return ir.tensor_adapters.from_torch_dtype(dtype)


def snapshot(tensor: torch.Tensor) -> ir.TensorProtocol:
    """A copy, so that training on does not change a model that was lowered before."""
    return ir.tensor(tensor.clone(memory_format=torch.contiguous_format))


def _default_dtype(value: bool | int | float | complex) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    if isinstance(value, int):
        return torch.int64
    return torch.float32 if isinstance(value, float) else torch.complex64


def _fresh(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    taken.add(candidate)
    return candidate


def _without_trailing_none(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    kept = list(inputs)
    while kept and kept[-1] is None:
        kept.pop()
    return kept


def _place_of(node: fx.Node) -> dict[str, str]:
    pairs = (("fxquant.module", node.meta.get("module_path", "")), ("fxquant.source", node.meta.get("source", "")))
    return {key: value for key, value in pairs if value}
