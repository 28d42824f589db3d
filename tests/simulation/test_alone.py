"""The integer simulation computes what is not certified in onnxruntime itself, operation by operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxquant.simulation.alone import Alone
from fxquant.simulation.plan import IslandKind
from tests.helpers import Builder
from tests.simulation.plans import Forward, run

aten = torch.ops.aten

NETS: dict[str, Forward] = {
    "layer-norm": lambda net, x: net.fc(net.norm(net.c1(x).flatten(2).transpose(1, 2))),
    "softplus": lambda net, x: net.c2(F.softplus(net.c1(x))),
    "mean": lambda net, x: net.c2(net.c1(x) - net.c1(x).mean(1, keepdim=True)),
    "bilinear": lambda net, x: net.c2(F.interpolate(net.c1(x), scale_factor=1.7, mode="bilinear")),
    "group-norm": lambda net, x: net.c2(F.group_norm(net.c1(x), 2)),
    "log-softmax": lambda net, x: net.c2(F.log_softmax(net.c1(x), 1)),
}


@pytest.mark.parametrize("name", NETS)
def test_island_that_is_not_certified_is_onnxruntimes(name: str) -> None:
    found = run(NETS[name])
    assert IslandKind.FLOAT in {island.kind for island in found.plan.islands.values()}
    assert found.plan.unknown
    assert found.report.codes_compared > 0 and found.report.codes_differing == 0


def _node(target: Any, *arguments: Any, shape: tuple[int, ...] = (5,)) -> fx.Node:
    build = Builder()
    return build.call("node", target, build.input("x", *shape), *arguments)


def test_operation_is_onnxruntimes_not_torchs() -> None:
    node = _node(aten.gelu.default)
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    found = Alone().compute(node, {node.args[0]: x}, lambda: pytest.fail("torch was asked"))
    torch.testing.assert_close(found, F.gelu(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, F.gelu(x))


@pytest.mark.parametrize(
    ("target", "arguments", "why"),
    [
        (aten.topk.default, (2,), "two outputs"),
        (aten.linalg_inv.default, (), "no ONNX operator"),
        (aten.bernoulli.default, (), "random"),
        (aten.add_.Tensor, (1.0,), "state"),
    ],
)
def test_torch_is_asked_where_the_operation_cannot_be_written_alone(
    target: Any, arguments: tuple[Any, ...], why: str
) -> None:
    node = _node(target, *arguments, shape=(5, 5))
    x = torch.randn(2, 5, 5)
    assert Alone().compute(node, {node.args[0]: x}, lambda: why) == why
