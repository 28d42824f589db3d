"""What the values behind quantizers are called in the clean float model, and so in an encodings file.

1. A parameter or buffer has its path in the state_dict ("layer1.0.conv1.weight"), unless something else is called so.
2. Any other value has its node's name; a value that the model returns has the output's name.
3. A value with two grids (a table that is both embedding and head) has the second under a name of its own, that of the
   FakeQuant node: an Identity in the clean model.
"""

from __future__ import annotations

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program
from fxquant.lowering.signature import input_nodes, output_leaves


class TensorNames:
    """Names of one program's tensors, without their quantizers.

    `tensors` has the name of the tensor behind each FakeQuant and BiasFakeQuant node, in graph order.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        inputs = input_nodes(program)
        leaves = output_leaves(program, reserved={node.name for node in inputs})
        self._outputs = frozenset(leaf.name for leaf in leaves)
        self._nodes = {node.name for node in program.graph.nodes}
        self._carriers = self._find_carriers()
        constants = Constants(program)
        self._returned: dict[fx.Node, str] = {}
        for leaf in leaves:
            if isinstance(leaf.value, fx.Node):
                carrier = self.carrier(leaf.value)
                if carrier not in inputs and not constants.is_constant(carrier):
                    self._returned.setdefault(carrier, leaf.name)
        self.tensors = {node: self.name(node) for node in program.graph.nodes if self.is_quantizer(node) and node.users}

    def is_quantizer(self, node: fx.Node) -> bool:
        """Whether `node` calls a FakeQuant or a BiasFakeQuant."""
        return self._program.fake_quant(node) is not None or self._program.bias_fake_quant(node) is not None

    def carrier(self, node: fx.Node) -> fx.Node:
        """The node whose tensor stands for `node`: a quantizer's source, or itself (case 3, and all other nodes)."""
        return self._carriers.get(node, node)

    def name(self, node: fx.Node) -> str:
        """The name of a node's tensor."""
        carrier = self.carrier(node)
        return self._returned.get(carrier) or self.written_name(carrier)

    def written_name(self, node: fx.Node) -> str:
        """The name that a node's tensor is written with, before the model's outputs get theirs."""
        if node.op == "get_attr":
            path = str(node.target)
            if path not in self._outputs and (path == node.name or path not in self._nodes):
                return path
        return f"{node.name}.1" if node.name in self._outputs else node.name

    def _find_carriers(self) -> dict[fx.Node, fx.Node]:
        """Case 3: the first quantizer of a tensor is for the tensor itself, and so are others of the same grid."""
        carriers: dict[fx.Node, fx.Node] = {}
        grids: dict[object, object] = {}
        for node in self._program.graph.nodes:
            if not self.is_quantizer(node):
                continue
            source = node.args[0]
            assert isinstance(source, fx.Node)
            source = carriers.get(source, source)
            tensor = str(source.target) if source.op == "get_attr" else source
            is_first = grids.setdefault(tensor, node.target) == node.target
            carriers[node] = source if is_first else node
        return carriers
