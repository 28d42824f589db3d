"""Small quantized programs, built by hand: FakeQuants inserted and calibrated without any pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant.graph.program import Program, Stage, value_type
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant, Mode
from fxquant.spec import Granularity, QuantSpec
from tests.ops.harness import capture_for_test

aten = torch.ops.aten
U8 = QuantSpec(8)
S8_PER_CHANNEL = QuantSpec(8, signed=True, symmetric=True, granularity=Granularity(0))
WEIGHTED = (aten.convolution.default, aten.linear.default)


class Residual(nn.Module):
    """conv-relu-conv-add(-relu)-maxpool-gap-flatten-linear: each kind of fusion that onnxruntime knows for a CNN."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.conv1(x))
        joined = torch.relu(self.conv2(first) + first)
        pooled = nn.functional.max_pool2d(joined, 2)
        result: torch.Tensor = self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(pooled, 1), 1))
        return result


RESIDUAL_VALUES = ("x", "relu", "conv2d_1", "relu_1", "max_pool2d", "adaptive_avg_pool2d", "flatten", "linear")
RESIDUAL_SHARES = {"max_pool2d": "relu_1", "flatten": "adaptive_avg_pool2d"}


def residual_program(seed: int = 0, **options: Any) -> Program:
    """A calibrated Residual."""
    torch.manual_seed(seed)
    program = float_program(Residual(), image())
    return quantized(program, RESIDUAL_VALUES, image(8), shares=RESIDUAL_SHARES, **options)


def image(batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Normal noise of shape [batch, 3, 8, 8]."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def float_program(module: nn.Module, *inputs: torch.Tensor) -> Program:
    """A captured program whose first axis is the batch."""
    return capture_for_test(module.eval(), inputs, [True] * len(inputs))


def quantized(
    program: Program,
    values: Sequence[str],
    *batches: torch.Tensor,
    spec: QuantSpec = U8,
    specs: Mapping[str, QuantSpec] | None = None,
    weight_spec: QuantSpec = S8_PER_CHANNEL,
    shares: Mapping[str, str] | None = None,
    calibrate: bool = True,
) -> Program:
    """Quantize `values` (node names), weight and bias of each convolution and linear, then calibrate on one call."""
    for name in values:
        owner = (shares or {}).get(name)
        insert(program, program.node(name), (specs or {}).get(name, spec), owner)
    for node in list(program.graph.nodes):
        if node.target in WEIGHTED:
            _quantize_parameters(program, node, weight_spec)
    program.recompile()
    program.stage = Stage.INSERTED
    if calibrate:
        calibrate_on(program, *batches)
    return program


def insert(program: Program, node: fx.Node, spec: QuantSpec, owner: str | None = None) -> fx.Node:
    """Put a FakeQuant behind a node; every reader reads it."""
    kind = value_type(node)
    assert kind is not None
    shape = spec.granularity.encoding_shape(kind.shape)  # type: ignore[arg-type]  # what has axes has sizes
    path = f"fake_quants.{owner or node.name}"
    if owner is None:
        program.module.add_submodule(path, FakeQuant(spec, shape, follows=node.op == "get_attr"))
    kwargs: dict[str, Any] = {} if owner is None else {"observe": False}
    users = list(node.users)
    with program.graph.inserting_after(node):
        made = program.graph.create_node("call_module", path, (node,), kwargs, name=f"{node.name}_fq")
    made.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, made)
    return made


def _quantize_parameters(program: Program, node: fx.Node, spec: QuantSpec) -> None:
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if program.fake_quant(weight) is None:
        weight = insert(program, weight, spec)
    bias = node.args[2] if len(node.args) > 2 else None
    is_in_blocks = spec.granularity.block is not None
    if not isinstance(bias, fx.Node) or program.fake_quant(x) is None or is_in_blocks:
        return
    path = f"fake_quants.{bias.name}"
    program.module.add_submodule(path, BiasFakeQuant())
    with program.graph.inserting_before(node):
        made = program.graph.create_node("call_module", path, (bias, x, weight), {}, name=f"{bias.name}_fq")
    made.meta = dict(bias.meta)
    node.args = (*node.args[:2], made, *node.args[3:])


def calibrate_on(program: Program, *batches: torch.Tensor) -> None:
    """Observe one call, then compute every encoding."""
    with torch.no_grad():
        program.module(*batches)
        for _, module in program.fake_quant_nodes():
            module.compute_encoding()
            module.mode = Mode.FAKE
        program.module(*batches)
    program.stage = Stage.CALIBRATED


def fake_quant_of(program: Program, value: str) -> FakeQuant:
    """The FakeQuant of the value called `value`."""
    module = program.module.get_submodule(f"fake_quants.{value}")
    assert isinstance(module, FakeQuant)
    return module
