"""What was taken off a layer's bias to make up for quantization: the float network that it approximates has it back."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.program import Program
from fxquant.ops.table import TABLE

CORRECTION = "bias_correction"  # key of a layer's meta: a number for each channel; Rewriter.set_bias_correction


def correction_of(node: fx.Node) -> torch.Tensor | None:
    """What was taken off a layer's bias so far, float64 of shape (channels,); None: nothing."""
    found = node.meta.get(CORRECTION)
    return None if found is None else torch.tensor(found, dtype=torch.float64)


def undo_corrections(program: Program) -> None:
    """Give the biases of a program back what was taken off them, in place."""
    for node in program.graph.nodes:
        taken, definition = correction_of(node), TABLE.find(node, None) if node.op == "call_function" else None
        if taken is None or definition is None or definition.bias is None:
            continue
        bias = node.args[definition.bias]
        while isinstance(bias, fx.Node) and program.bias_fake_quant(bias) is not None:
            bias = bias.args[0]
        assert isinstance(bias, fx.Node)
        tensor = program.tensor(bias)
        with torch.no_grad():
            tensor.copy_((tensor.double() + taken.to(tensor.device).reshape(tensor.shape)).to(tensor.dtype))
        del node.meta[CORRECTION]
