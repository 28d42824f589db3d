"""The quantized values of a program, under the names that an encodings file has for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program, value_type
from fxquant.lowering.encodings import Encodings
from fxquant.lowering.tensor_names import TensorNames
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant
from fxquant.spec import Encoding

ANY_OPSET = 21  # grids do not depend on it, codes do


@dataclass(frozen=True)
class QuantizedValue:
    """A tensor behind a quantizer: its name in files, the quantizer's node and module, and whether it is constant."""

    name: str
    node: fx.Node
    module: FakeQuant | BiasFakeQuant
    is_constant: bool

    @property
    def rank(self) -> int:
        """Number of dimensions of the tensor."""
        kind = value_type(self.node)
        assert kind is not None, self.node.format_node()
        return len(kind.shape)


class QuantizedValues:
    """All of them, in graph order, and their grids."""

    def __init__(self, program: Program) -> None:
        self.constants = Constants(program)
        self._encodings = Encodings(program, self.constants, ANY_OPSET)
        self.all = [self._value(program, node, name) for node, name in TensorNames(program).tensors.items()]

    def _value(self, program: Program, node: fx.Node, name: str) -> QuantizedValue:
        module = program.fake_quant(node) or program.bias_fake_quant(node)
        assert module is not None
        return QuantizedValue(name, node, module, self._encodings.is_constant_quantizer(node))

    def is_off(self, value: QuantizedValue) -> bool:
        """Whether the quantizer passes its input on."""
        return self._encodings.is_off(value.node)

    def encoding(self, value: QuantizedValue) -> Encoding:
        """The grid as it is now; one that follows a weight as the weight is now."""
        return self._encodings.encoding(value.node)

    def fake_quants(self) -> Mapping[FakeQuant, QuantizedValue]:
        """Every FakeQuant with the first value that it quantizes."""
        found: dict[FakeQuant, QuantizedValue] = {}
        for value in self.all:
            if isinstance(value.module, FakeQuant):
                found.setdefault(value.module, value)
        return found
