"""Layers whose bias an algorithm may shift, and biases that are given new numbers or to layers that had none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxquant.calibration import settle
from fxquant.graph.program import Program, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant, Mode

from .fold_batch_norm import free_path, shared_tensors
from .layers import CONVOLUTIONS
from .quantize_bias import has_scale_for_each, put_on_grid
from .values import definition_of, is_layer


@dataclass(frozen=True)
class BiasedLayer:
    """A layer with a quantized weight whose bias is a parameter, or that has none yet.

    Arguments:
        node: the layer.
        input: what it reads besides weight and bias.
        weight: the node that calls its weight's FakeQuant.
        bias: the get_attr node of its bias; None if it has none.
        position: where the bias stands among the layer's args.
        is_shared: whether others read the bias, too: another call of the same layer, as a rule.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    position: int
    is_shared: bool = False

    @property
    def axis(self) -> int:
        """The channel axis of its output."""
        return 1 if self.node.target in CONVOLUTIONS else -1

    def weight_quant(self, program: Program) -> FakeQuant:
        """The FakeQuant of its weight."""
        module = program.fake_quant(self.weight)
        assert module is not None
        return module

    def bias_quant(self, program: Program) -> BiasFakeQuant | None:
        """The BiasFakeQuant of its bias; None for one in float."""
        value = self.node.args[self.position] if self.position < len(self.node.args) else None
        return program.bias_fake_quant(value) if isinstance(value, fx.Node) else None


def biased_layers(program: Program, rewriter: Rewriter, only: str) -> Iterator[BiasedLayer]:
    """The layers whose bias may be shifted, in graph order; the others are near misses.

    only: a regular expression that a layer's name or module path must match in full; what does not is passed over.
    """
    shared = shared_tensors(program)
    for node in list(program.graph.nodes):
        names = (node.name, str(node.meta.get("module_path", "")))
        if node.op != "call_function" or not is_layer(program, node) or not any(re.fullmatch(only, n) for n in names):
            continue
        found = _as_biased(program, node, shared)
        if isinstance(found, BiasedLayer):
            yield found
        else:
            rewriter.miss(node, f"{node.name} left as it is: {found}")


def _as_biased(program: Program, node: fx.Node, shared: dict[int, str]) -> BiasedLayer | str:
    definition = definition_of(program, node)
    position = None if definition is None else definition.weight_for(node)
    assert definition is not None and position is not None
    weight = node.args[position]
    module = program.fake_quant(weight) if isinstance(weight, fx.Node) else None
    if not isinstance(weight, fx.Node) or module is None or module.mode is Mode.OFF:
        return "its weight is not quantized"
    if definition.bias is None:
        return f"{definition.name} takes no bias"
    found = value_type(weight)
    if found is not None and len(found.shape) < 2:
        return "its weight is a vector, so that its output has no channels"
    bias = node.args[definition.bias] if definition.bias < len(node.args) else None
    source = next((arg for arg in node.args if isinstance(arg, fx.Node) and arg not in (bias, weight)), None)
    if source is None:
        return "its input is its weight"
    while isinstance(bias, fx.Node) and program.bias_fake_quant(bias) is not None:
        bias = bias.args[0]
    assert bias is None or isinstance(bias, fx.Node)
    if bias is None:
        return _why_fixed(program, weight, shared) or BiasedLayer(node, source, weight, None, definition.bias)
    if bias.op != "get_attr":
        return f"its bias is computed, by {bias.name}"
    is_shared = len(bias.users) != 1 or id(program.tensor(bias)) in shared
    return BiasedLayer(node, source, weight, bias, definition.bias, is_shared)


def _why_fixed(program: Program, weight: fx.Node, shared: dict[int, str]) -> str:
    """Why a layer cannot be given a bias beside its weight; "" if it can."""
    source = weight.args[0]
    assert isinstance(source, fx.Node)
    return "" if source.op == "get_attr" else f"it has no bias, and its weight is computed, by {source.name}"


def puts_biases_on_grids(program: Program, layers: Iterable[BiasedLayer]) -> bool:
    """Whether new biases are to be int32 codes as those of `layers` are: quantize-bias ran, or had none to do."""
    if any(True for _ in program.bias_nodes()):
        return True
    return all(layer.bias is None or program.fake_quant(layer.input) is None for layer in layers)


def set_bias(program: Program, rewriter: Rewriter, layer: BiasedLayer, values: torch.Tensor) -> bool:
    """Give a layer's bias these numbers; False if that changes nothing, neither a code nor (in float) a number.

    A bias that others read stays as it is, and the layer gets one of its own beside it.

    A weight's scale is raised at once where a code would overflow otherwise (fxquant.calibration.settle_biases).
    """
    assert layer.bias is not None
    old = program.tensor(layer.bias)
    new = values.reshape(old.shape).to(old.device, old.dtype)
    module = layer.bias_quant(program)
    if torch.equal(new, old) or (module is not None and torch.equal(module.codes(new), module.codes(old))):
        return False
    if layer.is_shared:
        _give_own(program, rewriter, layer, new)
    else:
        rewriter.set_tensor(str(layer.bias.target), new)
    _raise_scales(program, rewriter, module, new)
    return True


def _give_own(program: Program, rewriter: Rewriter, layer: BiasedLayer, value: torch.Tensor) -> None:
    """A bias for this call of a layer alone."""
    assert layer.bias is not None
    path, number = str(layer.bias.target), 1
    owner = program.module.get_submodule(path.rpartition(".")[0])
    while hasattr(owner, f"{path.rpartition('.')[2]}_{number}"):
        number += 1
    path = f"{path}_{number}"
    trains = program.tensor(layer.bias).requires_grad
    rewriter.add_tensor(path, value, parameter=True, requires_grad=trains)
    quantizer = layer.node.args[layer.position]
    assert isinstance(quantizer, fx.Node)
    reader = layer.node if quantizer is layer.bias else quantizer
    own = rewriter.get_attr(path, name=path.replace(".", "_"), before=reader, like=layer.bias)
    rewriter.replace_input(reader, layer.bias, own)


def add_bias(
    program: Program, rewriter: Rewriter, layer: BiasedLayer, values: torch.Tensor, on_grid: bool
) -> BiasedLayer:
    """Give a layer without a bias one with these numbers, beside its weight.

    on_grid: put it on the grid f(sx * sw) if there is one, as quantize-bias does.
    """
    stored = layer.weight.args[0]
    assert isinstance(stored, fx.Node)
    weight, path = program.tensor(stored), free_path(program, str(stored.target))
    value = values.to(weight.device, weight.dtype)
    rewriter.add_tensor(path, value, parameter=True, requires_grad=weight.requires_grad)
    bias = rewriter.get_attr(path, name=path.replace(".", "_"), before=layer.node, like=stored)
    rewriter.set_arg(layer.node, layer.position, bias)
    has_grid = program.fake_quant(layer.input) is not None and has_scale_for_each(bias, layer.weight_quant(program))
    if on_grid and has_grid:
        put_on_grid(program, rewriter, layer.node, layer.position, (bias, layer.input, layer.weight))
        program.link_biases()
    found = BiasedLayer(layer.node, layer.input, layer.weight, bias, layer.position)
    _raise_scales(program, rewriter, found.bias_quant(program), value)
    return found


def _raise_scales(program: Program, rewriter: Rewriter, module: BiasFakeQuant | None, bias: torch.Tensor) -> None:
    if module is not None and bool((module.overflow_floor(bias) > module.sources[1].scale).any()):
        record_settled(program, rewriter)


def record_settled(program: Program, rewriter: Rewriter) -> None:
    """Compute the weights' grids, and raise those that a bias needs; what is frozen or off stays."""
    for path in settle(program):
        rewriter.record(path, "grid computed from the weight")
