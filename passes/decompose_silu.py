"""Take silu apart, so that onnxruntime computes it on codes: x * sigmoid(x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter

from .values import makes_codes

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeSilu(Pass):
    """Replace silu(x) by mul(x, `<name>_sigmoid`), under its own name, where x comes from an integer kernel.

    onnxruntime has integer kernels for Sigmoid (a table) and Mul, and fuses both only with a quantizer between them;
    silu as one node is a float island behind every convolution of an EfficientNet or a YOLO. The price is one more
    rounding, of the sigmoid to steps of at most 1/255.

    Declines, with the reason, where x comes from a float operation (a group norm) or is a graph input: there silu
    belongs to the island. Contract: PRESERVES.
    """

    name: ClassVar[str] = "decompose-silu"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every silu, in graph order: one behind another finds a product in front of it."""
        for node in list(program.graph.nodes):
            if node.target is not aten.silu.default:
                continue
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if not makes_codes(program, x):
                rewriter.miss(node, f"{node.name} not decomposed: {x.name} before it has no integer kernel")
                continue
            name = f"{node.name}_sigmoid"
            gate = rewriter.call_function(aten.sigmoid.default, (x,), name=name, before=node, like=node)
            rewriter.turn_into_function(node, aten.mul.Tensor, (x, gate))
