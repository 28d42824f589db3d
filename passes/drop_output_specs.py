"""Quantize values where integer operations read them, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, input_slots, input_spec
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.base import OpDef, Role

from .norms import in_front_of_live
from .values import INTEGER_ROLES, check_ops, definition_of, is_float_value, is_layer, is_named, wanted_specs


@dataclass(frozen=True)
class DropOutputSpecs(Pass):
    """Drop what operations want of their own outputs: a value is quantized where a reader wants it.

    assign-specs writes for kernels that take and give codes. A compiler that fuses a quantizer into whatever precedes
    it (TensorRT, OpenVINO) wants Q/DQ on the inputs of what it shall run on integers; on an output that no such
    operation reads they cost time and accuracy.

    1. No operation wants its own output quantized. What leaves the graph is in float.
    2. With `readers`, operations that they do not name want nothing of their inputs either, and run in float.
    3. Of the two addends of a sum, one straight from a layer that nothing else reads stays in float, with `residual`:
       the sum becomes part of that layer's kernel, which takes the other addend, the residual, as codes. Both straight
       from layers: the second is the residual. Neither: the sum runs in float.
    4. Pooling maxima, reshapes and concatenations pass a wish for codes on from their output to their inputs;
       activations do not.

    Contract: PRESERVES (it only annotates).

    Options:
        readers: the operations that read codes (our names or ONNX operator types); empty for all that
            assign-specs chose.
        residual: quantize sums as in case 3.
    """

    name: ClassVar[str] = "drop-output-specs"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    readers: tuple[str, ...] = ()
    residual: bool = False

    def __post_init__(self) -> None:
        check_ops(self.readers, "drop-output-specs: readers")

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Drop the outputs' specs, then decide on the inputs' from the graph's end to its start."""
        for node in program.graph.nodes:
            rewriter.set_output_spec(node, None)
        constants = Constants(program)
        for node in reversed(list(program.graph.nodes)):
            definition = definition_of(program, node)
            if definition is None or not node.meta.get("input_specs"):
                continue
            if self.residual and _is_sum(node, definition):
                _keep_residual(program, rewriter, node, constants)
            elif definition.role_for(node) in (Role.GRID_PRESERVING, Role.CONCAT):
                if not _is_wanted(node):  # case 4
                    _drop_inputs(rewriter, node)
            elif definition.role_for(node) is Role.ACTIVATION:
                _drop_inputs(rewriter, node)
            elif self.readers and not is_named(self.readers, node, definition):  # case 2
                _drop_inputs(rewriter, node)
                rewriter.set_float_reason(node, f"{definition.name} is not one of the operations that read codes")


def _is_sum(node: fx.Node, definition: OpDef) -> bool:
    addends = [value for value in node.all_input_nodes if is_float_value(value)]
    return "Add" in definition.types_for(node) and definition.role_for(node) in INTEGER_ROLES and len(addends) == 2


def _keep_residual(program: Program, rewriter: Rewriter, node: fx.Node, constants: Constants) -> None:
    """Case 3."""
    slots = input_slots(node)
    fresh = [slot for slot in (0, 1) if _is_from_layer(program, slots[slot])]
    residual = None if not fresh else 1 if 0 in fresh else 0
    for slot in (0, 1):
        if slot != residual or constants.is_constant(slots[slot]):
            rewriter.set_input_spec(node, slot, None)
    if not node.meta.get("input_specs"):
        rewriter.set_float_reason(node, "no addend comes straight from a layer, whose kernel would add the other one")


def _is_from_layer(program: Program, value: fx.Node) -> bool:
    return is_layer(program, in_front_of_live(program, value)) and len(value.users) == 1


def _is_wanted(node: fx.Node) -> bool:
    """Whether a reader wants this value quantized, or one of its parts."""
    parts = [] if is_float_value(node) else list(node.users)
    return any(wanted_specs(value) for value in (node, *parts))


def _drop_inputs(rewriter: Rewriter, node: fx.Node) -> None:
    for slot in range(len(input_slots(node))):
        if input_spec(node, slot) is not None:
            rewriter.set_input_spec(node, slot, None)
