"""Quantize biases to int32, as integer kernels add them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant
from fxquant.ops.kernels import KERNEL_BITS
from fxquant.spec import Target

from .values import definition_of


@dataclass(frozen=True)
class QuantizeBias(Pass):
    """Give the bias of every layer with quantized input and weight the grid f(sx * sw), zero point 0, int32.

    1. A bias that is a parameter, or computed from parameters alone (as a live batch norm's is), in a layer whose input
       and weight come from FakeQuants.
    2. A bias shared by several layers gets a grid for each of them.
    3. Where onnxruntime is the target, a layer that reads codes of more than 8 bits runs in float: its bias stays in
       float, too, and its weight's scales are not raised for it.

    A bias whose codes would exceed 2^23 raises its channel's weight scale when the program is calibrated
    (fxquant.calibration reports it). Declines, with the reason, a bias that is computed, case 3, and that of a layer
    whose weight is quantized in blocks, or per channel where it is that of a grouped transposed convolution: sx * sw is
    then not one scale for each output channel. Contract: QUANTIZES.
    """

    name: ClassVar[str] = "quantize-bias"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.INSERTED,)
    contract: ClassVar[Contract] = Contract.QUANTIZES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every layer that has a bias."""
        constants = Constants(program)
        for node in list(program.graph.nodes):
            definition = definition_of(program, node)
            position = None if definition is None else definition.weight_for(node)
            if definition is None or definition.bias is None or position is None:
                continue
            bias = node.args[definition.bias] if definition.bias < len(node.args) else None
            weight = node.args[position]
            x = next((arg for arg in node.args if isinstance(arg, fx.Node) and arg not in (bias, weight)), None)
            if not isinstance(bias, fx.Node) or not isinstance(weight, fx.Node) or x is None:
                continue
            weight_quant = program.fake_quant(weight)
            x_quant = program.fake_quant(x)
            if x_quant is None or weight_quant is None or program.bias_fake_quant(bias) is not None:
                continue
            reason = "" if constants.is_constant(bias) else "it is computed, not a parameter"
            if program.target is Target.ONNXRUNTIME_X64 and x_quant.spec.bits > KERNEL_BITS:
                reason = f"its layer reads {x_quant.spec.bits}-bit codes, which no integer kernel takes"  # case 3
            if not has_scale_for_each(bias, weight_quant):
                reason = f"its layer's weight is {weight_quant.spec.granularity}, not one scale for each output channel"
            if reason:
                rewriter.miss(node, f"bias {bias.name} of {node.name} stays in float: {reason}")
                continue
            put_on_grid(program, rewriter, node, definition.bias, (bias, x, weight))


def put_on_grid(
    program: Program, rewriter: Rewriter, node: fx.Node, position: int, sources: tuple[fx.Node, fx.Node, fx.Node]
) -> None:
    """Quantize the bias at `position` of a layer; `sources`: the bias, and the FakeQuants of input and weight."""
    bias = sources[0]
    taken = sum(1 for user in bias.users if program.bias_fake_quant(user) is not None)
    suffix = f"_{taken}" if taken else ""  # case 2 of QuantizeBias
    path = rewriter.fake_quant_path(bias.name + suffix)
    rewriter.add_module(path, BiasFakeQuant())
    quantized = rewriter.call_module(path, sources, name=f"{bias.name}_fq{suffix}", before=node, like=bias)
    rewriter.set_arg(node, position, quantized)


def has_scale_for_each(bias: fx.Node, weight_quant: FakeQuant) -> bool:
    """Whether the weight has one scale, or one for each element of the bias."""
    if weight_quant.spec.granularity.block is not None:
        return False
    found = value_type(bias)
    return weight_quant.scale.ndim == 0 or found is None or tuple(weight_quant.scale.shape) == found.shape
