"""The clean float model: a program without its quantizers, whose tensors are called as its encodings file says.

Runtimes that bring their own quantizer import the two together. Parameters keep their names and their layout of the
state_dict (a Transpose stands where the integer model has a transposed weight), so that an axis means the same in all
three; nothing is written for onnxruntime's sake.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from torch import fx

from fxquant.errors import ExportError
from fxquant.graph.program import Program
from fxquant.lowering.encodings import Encodings
from fxquant.lowering.export import check_model, save_model
from fxquant.lowering.lower import check_opset, write_model
from fxquant.lowering.tensor_names import TensorNames
from fxquant.lowering.writer import GraphWriter, snapshot
from fxquant.ops.base import Emitted, Emitter, OpTable
from fxquant.ops.table import TABLE


def lower_clean(program: Program, opset: int = 21, table: OpTable = TABLE) -> ir.Model:
    """The float ONNX model of a program at any stage, its quantizers left out; the program is not changed.

    Raises ExportError: a node cannot be written.
    """
    check_opset(opset)
    writer = CleanWriter(program, opset, table)
    model = write_model(writer, table, {"fxquant.version": version("fxquant"), "fxquant.form": "float"})
    _require_names(writer, model)
    return model


def export_clean(
    program: Program, path: str | os.PathLike[str], *, opset: int = 21, external_data: bool | None = None
) -> Path:
    """Write the clean float model of a program to an ONNX file: checked by onnx.checker, whole or not at all.

    Raises ExportError as `export_onnx` does.
    """
    model = lower_clean(program, opset)
    check_model(model)
    return save_model(model, Path(path), external_data)


class CleanWriter(GraphWriter):
    """Writes a program as if every FakeQuant were off."""

    def __init__(self, program: Program, opset: int, table: OpTable) -> None:
        super().__init__(program, opset, table)
        self.names = TensorNames(program)
        self.encodings = _AllOff(program, self.constants, opset)
        self._parameters: dict[str, ir.Value] = {}
        self.reserve(self.names.written_name(node) for node in program.graph.nodes if node.op == "get_attr")

    @property
    def is_guarded(self) -> bool:
        """No: what guards and barriers protect is not written."""
        return False

    def emit(self, node: fx.Node, emitter: Emitter) -> None:
        """Write a node; a quantizer as what it reads."""
        super().emit(node, self._pass_on if self.names.is_quantizer(node) else emitter)

    def weight(self, node: fx.Node, perm: Sequence[int] | None = None) -> ir.Value:
        """The value of a weight argument in its own layout, behind a Transpose if `perm` is one."""
        value = super().weight(node)
        if perm is None or list(perm) == sorted(perm):
            return value
        result: ir.Value = self.op("Transpose", [value], perm=list(perm))
        return result

    def add_output(self, leaf: fx.Node | int | float | bool, name: str) -> ir.Value:
        """The graph output `name`; a value that an encodings file knows by another name goes through an Identity."""
        if isinstance(leaf, fx.Node) and self.value(leaf).name in self._kept_names(leaf):
            value = self._copied(self.value(leaf), f"{name}.copy")
            self._values[leaf] = (value,)
        return super().add_output(leaf, name)

    def _kept_names(self, leaf: fx.Node) -> set[str]:
        """Names that tensors must keep: those of quantized values other than the leaf's own."""
        own = self.names.carrier(leaf)
        return {name for node, name in self.names.tensors.items() if self.names.carrier(node) is not own}

    def _pass_on(self, node: fx.Node, writer: object) -> Emitted:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value, wanted = self.value(source), self.names.written_name(self.names.carrier(node))
        return value if value.name == wanted else self._copied(value, wanted)

    def _copied(self, value: ir.Value, name: str) -> ir.Value:
        copied = self.place("Identity", [value], name)
        copied.shape, copied.type = value.shape, value.type
        return copied

    def _write_constant(self, node: fx.Node, order: tuple[int, ...] | None) -> ir.Value:
        assert order is None, "weight() transposes"
        if self.names.is_quantizer(node):
            found = self._pass_on(node, self)
            assert isinstance(found, ir.Value)
            return found
        if node.op != "get_attr":
            return super()._write_constant(node, None)
        name = self.names.written_name(node)
        if name not in self._parameters:
            self._names.discard(name)  # it was kept for this
            self._parameters[name] = self.initializer(name, snapshot(self.constants.tensor(node)))
        return self._parameters[name]


class _AllOff(Encodings):
    """Encodings of a program whose quantizers are all off."""

    def is_off(self, node: fx.Node) -> bool:
        """Yes."""
        return True


def _require_names(writer: CleanWriter, model: ir.Model) -> None:
    known = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    known |= {value.name for node in model.graph for value in node.outputs}
    lost = [name for name in writer.names.tensors.values() if name not in known]
    if lost:
        remedy = "An operation's emitter gave its value another name; the nodes named above are the place to look."
        raise ExportError("export: the float model lacks quantized values", got=", ".join(lost), remedy=remedy)
