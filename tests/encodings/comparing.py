"""How many codes of two programs of one net differ: of activations and parameters, simulated, and stored in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fxquant.graph.constants import Constants
from fxquant.graph.program import Program
from fxquant.lowering.lower import lower
from fxquant.numerics.fake_quant import Mode
from tests.encodings.nets import Inputs


def differing_codes(first: Program, second: Program, inputs: Inputs) -> int:
    """Codes that differ at any FakeQuant, fed by the simulation `exact`, and outputs that do."""
    differing = 0
    found = [_codes(program, inputs) for program in (first, second)]
    assert found[0].keys() == found[1].keys() and found[0]
    for name, codes in found[0].items():
        differing += int((codes != found[1][name]).sum())
    return differing


def _codes(program: Program, inputs: Inputs) -> dict[str, torch.Tensor]:
    constants, found = Constants(program), {}
    hooks = [
        module.register_forward_hook(_keep(found, name))
        for name, module in program.module.named_modules()
        if name in {str(node.target) for node, quant in program.fake_quant_nodes() if quant.mode is not Mode.OFF}
    ]
    outputs = {}
    with torch.no_grad():
        for simulation in ("float", "exact"):
            program.simulate = simulation
            leaves = pytree.tree_leaves(program.module(*inputs))
            outputs |= {f"{simulation}.{index}": leaf for index, leaf in enumerate(leaves)}
    program.simulate = "float"
    for hook in hooks:
        hook.remove()
    for node, module in program.bias_nodes():
        found[node.name] = module.codes(constants.tensor(node.args[0]))  # type: ignore[arg-type]
    return found | outputs


def _keep(found: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: Any, inputs: Any, _: Any) -> None:
        codes = module.codes(inputs[0])
        found[name] = torch.cat([found[name].flatten(), codes.flatten()]) if name in found else codes

    return hook


def differing_bytes(first: Program, second: Program) -> int:
    """Initializers of the two ONNX models that differ, and 1 if the graphs do."""
    models = [lower(program) for program in (first, second)]
    graphs = [
        str([(node.op_type, [v and v.name for v in node.inputs], node.outputs) for node in m.graph]) for m in models
    ]
    tensors = [{k: v.const_value.numpy() for k, v in m.graph.initializers.items()} for m in models]  # type: ignore[union-attr]
    assert tensors[0].keys() == tensors[1].keys()
    return sum(not np.array_equal(t, tensors[1][k]) for k, t in tensors[0].items()) + (graphs[0] != graphs[1])
