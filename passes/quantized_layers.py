"""Layers with a quantized weight, as post-training algorithms see them; and weights that are given their codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.graph.program import Program, describe
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import FakeQuant, Mode

from .fold_batch_norm import shared_tensors
from .values import definition_of, is_layer


class Change(Enum):
    """What an algorithm is about to change of a layer: it decides which layers are settled for it."""

    GRID = "grid"  # the weight's grid: it must not be frozen
    CODES = "codes"  # how the weight is rounded: its grid may be frozen, but the weight must not lie on it already
    BIAS = "bias"  # the bias alone: whatever the weight's state, if the operation has a place for a bias


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or linear whose weight is a parameter of its own behind a FakeQuant.

    Arguments:
        node: the layer.
        input: what it reads: a FakeQuant's node, or a float value.
        weight: the get_attr node of its weight.
        quantizer: the node that calls the weight's FakeQuant.
        bias: the get_attr node of its bias; None if it has none.
        bias_position: where the bias stands among the layer's args; None: it has no place for one (x @ weight).
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    quantizer: fx.Node
    bias: fx.Node | None
    bias_position: int | None

    def fake_quant(self, program: Program) -> FakeQuant:
        """The weight's FakeQuant."""
        module = program.fake_quant(self.quantizer)
        assert module is not None
        return module


def quantized_layers(
    program: Program, rewriter: Rewriter | None = None, change: Change = Change.CODES
) -> Iterator[QuantizedLayer]:
    """The layers that an algorithm may change so, in graph order; with a rewriter, the others are near misses.

    What one algorithm has settled, another leaves: who chooses grids (sequential-mse) leaves those that are frozen; who
    rounds weights (adaround, gptq) works on a frozen grid, but not on a weight that lies on it already.
    """
    shared = shared_tensors(program)
    for node in program.graph.nodes:
        if node.op != "call_function" or not is_layer(program, node):
            continue
        found = _as_quantized(program, node, shared, change)
        if isinstance(found, QuantizedLayer):
            yield found
        elif rewriter is not None:
            rewriter.miss(node, f"{node.name} left as it is: {found}")


def _as_quantized(program: Program, node: fx.Node, shared: dict[int, str], change: Change) -> QuantizedLayer | str:
    definition = definition_of(program, node)
    assert definition is not None
    position = definition.weight_for(node)
    assert position is not None
    quantizer = node.args[position]
    module = program.fake_quant(quantizer) if isinstance(quantizer, fx.Node) else None
    if module is None or not isinstance(quantizer, fx.Node) or module.mode is Mode.OFF:
        return "its weight is not quantized"
    weight = quantizer.args[0]
    assert isinstance(weight, fx.Node)
    if weight.op != "get_attr":
        return f"its weight is computed, by {weight.name}"
    readers = [user for user in quantizer.users if program.bias_fake_quant(user) is None]
    if len(weight.users) != 1 or len(readers) != 1:
        return f"its weight {weight.name} is read at several places"
    if id(program.tensor(weight)) in shared:
        return f"its weight is shared: {shared[id(program.tensor(weight))]}"
    if change is not Change.BIAS and (reason := _why_settled(module, program.tensor(weight), change)):
        return reason
    source = node.args[getattr(definition.kernel, "left", 0)]
    assert isinstance(source, fx.Node)
    place = definition.bias
    if change is Change.BIAS and place is None:
        return "it has no place for a bias"
    bias = node.args[place] if place is not None and place < len(node.args) else None
    while isinstance(bias, fx.Node) and program.bias_fake_quant(bias) is not None:
        bias = bias.args[0]
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return f"its bias is computed, by {bias.name}"
    assert bias is None or isinstance(bias, fx.Node)
    return QuantizedLayer(node, source, weight, quantizer, bias, place)


def _why_settled(module: FakeQuant, weight: torch.Tensor, change: Change) -> str:
    if module.mode is not Mode.FROZEN:
        return ""
    if change is Change.GRID:
        return "its weight's grid is frozen: another algorithm, or a file, has settled it"
    lies_on_grid = torch.equal(module.real(module.codes(weight)), weight.detach().to(torch.float32))
    return "its weight lies on its frozen grid: another algorithm has rounded it" if lies_on_grid else ""


def fix_codes(program: Program, rewriter: Rewriter, layer: QuantizedLayer, codes: torch.Tensor) -> None:
    """Give a layer's weight these codes for good: its numbers are put on its grid, and the grid is frozen.

    `codes`: integers of the weight's shape, within the grid. Nothing else has to know: whoever quantizes the weight
    (fake quantization, exact, integer, the ONNX file) finds these codes.
    """
    module = layer.fake_quant(program)
    with torch.no_grad():
        rewriter.set_tensor(str(layer.weight.target), module.real(codes))
    rewriter.set_mode(str(layer.quantizer.target), Mode.FROZEN)
    wrong = int((module.codes(program.tensor(layer.weight)) != codes.to(torch.int32)).sum())
    if wrong:
        raise PassError(
            f"{rewriter.pass_name}: weight '{layer.weight.name}'",
            place=describe(layer.node),
            expected=f"codes within {module.spec.qmin}..{module.spec.qmax}",
            got=f"{wrong} of {codes.numel()} that its grid does not give back",
        )
