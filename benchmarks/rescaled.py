"""Function-preserving rescaling of a network's channels, which naive per-tensor quantization does not survive.

With y = f(W1 x + b1) read by W2 alone, and f(s y) = s f(y) for s > 0 (ReLU, leaky ReLU, none), the network computes
the same with s W1, s b1 and W2 / s, for each channel its own s: the freedom that cross-layer equalization uses (Nagel
et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, arXiv:1906.04721, section 4.1)
to make ranges equal, used the other way. A batch norm behind W1 takes s in its weight and bias. ReLU6 is not
homogeneous: a layer in front of it is left alone, unless `with_relu` has made ReLU of it, which is another function. A
value that several nodes read, such as one that is added to a shortcut, is left alone too: its channels are those of the
whole stage. This module needs torch alone: it also runs in the environments of peers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout)
HOMOGENEOUS_FUNCTIONS = (torch.relu, functional.relu, functional.leaky_relu)
Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Link:
    """Modules by name: a layer, the batch norm behind it, if any, and the one layer that reads what they give."""

    layer: str
    norm: str | None
    reader: str


class LayerTracer(fx.Tracer):
    """Traces down to layers; a subclass of one, such as a convolution that pads its input, is a layer itself."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is a node of the graph."""
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def with_relu(net: nn.Module) -> nn.Module:
    """The network with ReLU for every ReLU6, its parameters shared with `net`: another function."""
    graph = LayerTracer().trace(net)
    traced = fx.GraphModule(net, graph)
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.ReLU6):
            traced.set_submodule(node.target, nn.ReLU())
        elif node.op == "call_function" and node.target is functional.relu6:
            node.target, node.kwargs = functional.relu, {}
    traced.recompile()
    return traced.train(net.training)


def links(net: nn.Module) -> list[Link]:
    """Where channels can be rescaled, in the order of the graph."""
    graph, modules = LayerTracer().trace(net), dict(net.named_modules())
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    found = [_link(node, modules) for node in graph.nodes if isinstance(modules.get(str(node.target)), Layer)]
    return [link for link in found if link is not None and called.count(link.layer) == called.count(link.reader) == 1]


def rescale(net: nn.Module, octaves: float, seed: int) -> list[Link]:
    """Rescale the channels at every link by 2^u, u uniform in -octaves ... octaves, in place; return the links."""
    generator = torch.Generator().manual_seed(seed)
    found = links(net)
    for link in found:
        norm = None if link.norm is None else net.get_submodule(link.norm)
        layer, reader = net.get_submodule(link.layer), net.get_submodule(link.reader)
        assert isinstance(layer, Layer) and isinstance(reader, Layer)
        draw = torch.rand(layer.weight.shape[0], generator=generator, dtype=torch.float64)
        _apply(torch.exp2((2 * draw - 1) * octaves), layer if norm is None else norm, reader)
    return found


@torch.no_grad()
def _apply(factors: Tensor, writer: nn.Module, reader: Layer) -> None:
    """Multiply what `writer` gives, and divide in `reader`, in float64 so that each weight is rounded once."""
    for parameter in (writer.weight, writer.bias):
        if parameter is not None:
            assert isinstance(parameter, Tensor)
            parameter.copy_(parameter * _along(factors, 0, parameter))
    if _is_depthwise(reader):
        repeated = factors.repeat_interleave(reader.weight.shape[0] // len(factors))
        reader.weight.copy_(reader.weight / _along(repeated, 0, reader.weight))
    else:
        reader.weight.copy_(reader.weight / _along(factors, 1, reader.weight))


def _along(factors: Tensor, axis: int, weight: Tensor) -> Tensor:
    return factors.view([-1 if dimension == axis else 1 for dimension in range(weight.dim())])


def _link(node: fx.Node, modules: dict[str, nn.Module]) -> Link | None:
    layer, norm, reader = str(node.target), None, _only_reader(node)
    if reader is not None and isinstance(modules.get(str(reader.target)), nn.BatchNorm2d):
        norm, reader = str(reader.target), _only_reader(reader)
    while reader is not None and _is_homogeneous(reader, modules):
        reader = _only_reader(reader)
    target = modules.get(str(reader.target)) if reader is not None else None
    if not isinstance(target, Layer) or not (target_is_plain(target)):
        return None
    assert reader is not None
    return Link(layer, norm, str(reader.target))


def target_is_plain(reader: Layer) -> bool:
    """Whether each input channel meets weights of its own: neither grouped, unless depthwise, nor padded by values."""
    if isinstance(reader, nn.Linear):
        return True
    return reader.padding_mode == "zeros" and (reader.groups == 1 or _is_depthwise(reader))


def _is_depthwise(reader: Layer) -> bool:
    return isinstance(reader, nn.Conv2d) and reader.groups == reader.in_channels > 1


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_homogeneous(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    target: Any = node.target
    return isinstance(modules.get(str(target)), HOMOGENEOUS) or target in HOMOGENEOUS_FUNCTIONS
