"""From a program to an ONNX model in memory: every node written once, in graph order."""

from __future__ import annotations

import operator
from importlib.metadata import version
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import fx

from fxquant.errors import ExportError, FxquantError
from fxquant.graph.program import Program, Stage
from fxquant.lowering.fallback import emit_unknown
from fxquant.lowering.guards import run_guards
from fxquant.lowering.quantizers import emit_quantizer, is_left_to_quantizer
from fxquant.lowering.signature import input_nodes, output_leaves
from fxquant.lowering.writer import GraphWriter
from fxquant.numerics.fake_quant import Mode
from fxquant.ops.base import Emitted, Emitter, OpTable, Role
from fxquant.ops.table import TABLE
from fxquant.spec import Target

FIRST_OPSET = 13
PRODUCER = "fxquant"
NOT_CERTIFIED = "not certified on onnxruntime"


def lower(program: Program, opset: int = 21, table: OpTable = TABLE) -> ir.Model:
    """The ONNX model of a program: a float model before `insert-fake-quant`, a QDQ model after calibration.

    Arguments:
        program: at stage captured, assigned, calibrated or finalized; never changed.
        opset: 13 or later.
        table: where operations are looked up.

    Raises:
        ExportError: a value has no range, the opset lacks something, or a node cannot be written.
    """
    check_opset(opset)
    check_ranges(program)
    writer = GraphWriter(program, opset, table)
    if writer.is_guarded:
        run_guards(writer.scene)
    return write_model(writer, table, _metadata(program))


def write_model(writer: GraphWriter, table: OpTable, metadata: dict[str, str]) -> ir.Model:
    """The model that `writer` makes of its program: inputs, nodes in graph order, outputs."""
    program = writer.program
    leaves = output_leaves(program, reserved={node.name for node in input_nodes(program)})
    writer.reserve(leaf.name for leaf in leaves)
    for node in input_nodes(program):
        writer.add_input(node)
    for node in program.graph.nodes:
        if node.op in ("call_function", "call_module") and not writer.is_constant(node) and not _is_state_update(node):
            _emit(node, writer, table)
    outputs = [writer.add_output(leaf.value, leaf.name) for leaf in leaves]
    return _model(writer, outputs, metadata)


def check_ranges(program: Program) -> None:
    """Refuse a program whose FakeQuants still observe or have no grid; the error lists the values."""
    missing = [
        str(node.args[0])
        for node, module in program.fake_quant_nodes()
        if module.mode is Mode.OBSERVE
        or (not module.has_encoding and not module.follows and module.mode is not Mode.OFF)
    ]
    if not missing:
        return
    shown = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    raise ExportError(
        f"export: {len(missing)} values have no range",
        place=f"program '{program.name}' at stage {program.stage}",
        expected="a calibrated program" if program.stage <= Stage.INSERTED else "a range for every FakeQuant",
        got=shown,
        remedy="Run fxquant.calibrate(program, batches) first.",
    )


def check_opset(opset: int) -> None:
    """Refuse an opset that nothing is written at."""
    last = onnx.defs.onnx_opset_version()
    if not FIRST_OPSET <= opset <= last:
        expected = f"an opset from {FIRST_OPSET} to {last} (onnx {onnx.__version__})"
        raise ExportError("export: opset", expected=expected, got=str(opset))


def _is_state_update(node: fx.Node) -> bool:
    """A buffer that the model updates: capture noted that ONNX cannot keep it."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not node.users


def _emit(node: fx.Node, writer: GraphWriter, table: OpTable) -> None:
    try:
        writer.emit(node, _emitter(node, writer, table))
    except FxquantError:
        raise
    except Exception as err:
        raise writer.refuse(
            node, f"{type(err).__name__}: {err}", "This is a fault of the operation's emitter."
        ) from err


def _emitter(node: fx.Node, writer: GraphWriter, table: OpTable) -> Emitter:
    program = writer.program
    module = program.submodule(node) if node.op == "call_module" else None
    if program.fake_quant(node) is not None or program.bias_fake_quant(node) is not None:
        return _quantizer
    definition = table.find(node, module)
    if definition is not None and definition.role_for(node) is Role.ACTIVATION and is_left_to_quantizer(node, writer):
        return _input_itself
    if definition is not None:
        return definition.emit
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _getitem
    return emit_unknown


def _quantizer(node: fx.Node, writer: Any) -> Emitted:
    return emit_quantizer(node, writer)


def _input_itself(node: fx.Node, writer: Any) -> Emitted:
    found: ir.Value = writer.value(node.args[0])
    return found


def _getitem(node: fx.Node, writer: Any) -> Emitted:
    found: tuple[ir.Value, ...] = writer.values(node.args[0])
    index = node.args[1]
    assert isinstance(index, int)
    return found[index]


def _model(writer: GraphWriter, outputs: list[ir.Value], metadata: dict[str, str]) -> ir.Model:
    graph = ir.Graph(
        writer.inputs,
        outputs,
        nodes=writer.nodes,
        initializers=list(writer.initializers.values()),
        opset_imports=writer.opset_imports,
        name=writer.program.name,
    )
    ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_operatorsetid("", writer.opset)])
    model = ir.Model(
        graph,
        ir_version=ir_version,
        producer_name=PRODUCER,
        producer_version=version("fxquant"),
        functions=writer.functions,
        metadata_props=metadata,
    )
    common.RemoveUnusedNodesPass()(model)
    _infer_helpers(model)
    return model


def _metadata(program: Program) -> dict[str, str]:
    found = {
        "fxquant.version": version("fxquant"),
        "fxquant.fingerprint": program.fingerprint(),
        "fxquant.target": program.target.value,
        "fxquant.stage": str(program.stage),
    }
    if program.target is not Target.ONNXRUNTIME_X64:
        found["fxquant.note"] = NOT_CERTIFIED
    return found


def _infer_helpers(model: ir.Model) -> None:
    """Give shape and dtype to the values that no FX node stands for; those that one stands for keep theirs."""
    known = {
        value: (value.shape, value.type)
        for node in model.graph
        for value in node.outputs
        if value.shape is not None and value.type is not None
    }
    common.ShapeInferencePass(strict_mode=False)(model)
    for value, (shape, kind) in known.items():
        value.shape, value.type = shape, kind
