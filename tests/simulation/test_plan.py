"""The plan is what onnxruntime runs, node by node; and it says of each island how far its codes are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.simulation.plan import IslandKind, read_plan
from fxquant.spec import Granularity, QuantSpec, Target
from tests.lowering.programs import S8_PER_CHANNEL, float_program, quantized
from tests.simulation.plans import Edit, Forward, disagreements, quantizer, run

Tensor = torch.Tensor


def _rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _attention(net: Any, x: Tensor) -> Tensor:
    rows = _rows(net.c1(x))
    out: Tensor = net.fc(torch.softmax(net.q(rows) @ rows.transpose(1, 2) * 0.35, -1) @ rows)
    return out


def _masked_scores(net: Any, x: Tensor) -> Tensor:
    rows = _rows(net.c1(x))
    scores = net.q(rows) @ rows.transpose(1, 2)
    return scores.masked_fill(~torch.ones(60, 60, dtype=torch.bool).tril(), float("-inf"))


def _residual(net: Any, x: Tensor) -> Tensor:
    stem = F.relu(net.c1(x))
    out: Tensor = net.fc(F.relu(net.c2(stem) + stem).mean((2, 3)))
    return out


def _squeeze_excite(net: Any, x: Tensor) -> Tensor:
    stem = F.hardswish(net.c1(x))
    out: Tensor = net.c2(stem * F.hardsigmoid(net.c3(F.adaptive_avg_pool2d(stem, 1))))
    return out


def _moves(net: Any, x: Tensor) -> Tensor:
    rows = _rows(F.max_pool2d(F.relu6(net.c1(x)), 2))
    out: Tensor = net.c2(rows.reshape(x.shape[0], 8, -1).unsqueeze(3).repeat(1, 1, 1, 2))
    return out


def _spelled_gelu(net: Any, x: Tensor) -> Tensor:
    a = net.c1(x)
    out: Tensor = net.c2(a * 0.5 * (1 + torch.erf(a / 2**0.5)))
    return out


NETS: dict[str, Forward] = {
    "residual": _residual,
    "concat": lambda net, x: net.c3(torch.cat([net.c1(x), net.c2(F.gelu(net.c1(x)))], 1)[:, 4:12]),
    "squeeze-excite": _squeeze_excite,
    "attention": _attention,
    "masked-scores": _masked_scores,
    "moves": _moves,
    "shared-activation": lambda net, x: (lambda a: net.c2(F.relu(a)) + net.c3(a))(net.c1(x)),
    "returned-in-float": lambda net, x: (lambda a: (a, net.c2(F.relu(a)), net.fc(a.mean((2, 3)))))(net.c1(x)),
    "bounded": lambda net, x: net.c2(torch.sigmoid(F.hardtanh(net.c1(F.relu(x)), -2, 3)).clamp(0.2, 0.7)),
    "spelled-gelu": _spelled_gelu,
    "gates": lambda net, x: (lambda a, b: net.c2(torch.tanh(a) * torch.sigmoid(b)))(net.c1(x), net.c2(net.c1(x))),
    "pools": lambda net, x: net.c2(F.avg_pool2d(net.c1(x), 3, 1, 1)) + F.adaptive_avg_pool2d(net.c1(x), (6, 10)),
    "selected": lambda net, x: (lambda a: net.c3(torch.where(a > 0, a, -0.7)) + a.masked_fill(a > 1, 0.3))(net.c1(x)),
    "selected-then-clipped": lambda net, x: (lambda a: net.c3(F.relu(torch.where(a > 0, a, -0.7))))(net.c1(x)),
    "transposed": lambda net, x: net.c2(F.relu(net.up(F.leaky_relu(net.c1(x), 0.1)))),
    "parameters": lambda net, x: net.c2(net.c1(x) * net.slope + net.slope),
    "norm": lambda net, x: net.fc(net.norm(_rows(net.c1(x))) @ net.q.weight.t()),
    "resized": lambda net, x: (
        net.c2(F.interpolate(F.interpolate(net.c1(x), scale_factor=2.0), size=9, mode="linear"))
        if x.ndim == 3
        else net.c2(F.interpolate(net.c1(x), scale_factor=2.0, mode="bilinear"))
    ),
    "quotient": lambda net, x: (lambda a: net.c3((a - 0.5) / (F.relu(net.c2(a)) + 1)))(net.c1(x)),
}


@pytest.mark.parametrize("name", NETS)
def test_plan_is_what_onnxruntime_runs(name: str) -> None:
    found = run(NETS[name])
    assert disagreements(found.program, found.plan, found.report.fusion) == []
    assert found.report.certified_differing == 0


def _base(net: Any, x: Tensor) -> Tensor:
    """conv - relu - max pool, added to its own GELU behind a convolution; mean and linear."""
    pooled = F.max_pool2d(F.relu(net.c1(x)), 2)
    out: Tensor = net.fc((net.c2(pooled) + F.gelu(pooled)).mean((2, 3)))
    return out


def _off(name: str) -> Edit:
    def edit(program: Program) -> None:
        quantizer(program, name).mode = Mode.OFF

    return edit


def _zero_point(name: str, value: int) -> Edit:
    return lambda program: quantizer(program, name).zero_point.fill_(value) and None


def _bits(name: str, bits: int) -> Edit:
    def edit(program: Program) -> None:
        module = quantizer(program, name)
        module.spec = replace(module.spec, bits=bits)
        module.set_range(torch.tensor(-1.0), torch.tensor(3.0))

    return edit


EDITS: dict[str, Edit] = {
    **{f"{name}-off": _off(name) for name in ("x", "c1_weight", "relu", "c2", "gelu", "fc_weight", "add")},
    "relu-zero-point": _zero_point("relu", 10),
    "relu-one-code-above": _zero_point("relu", 1),
    "sum-zero-point": _zero_point("add", 255),
    **{f"{name}-{bits}-bits": _bits(name, bits) for name in ("relu", "c2", "gelu") for bits in (4, 16)},
}


@pytest.mark.parametrize("name", EDITS)
def test_plan_is_what_onnxruntime_runs_after_an_edit(name: str) -> None:
    found = run(_base, EDITS[name])
    assert disagreements(found.program, found.plan, found.report.fusion) == []
    assert found.report.certified_differing == 0


def test_disagreement_is_found_when_a_site_is_missing() -> None:
    found = run(_base)
    end = found.program.node("add_fq")
    without = replace(found.plan, sites={node: site for node, site in found.plan.sites.items() if node is not end})
    assert disagreements(found.program, without, found.report.fusion) == ["add: ABSORBED or FLOAT planned, INTEGER ran"]


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda net, x: net.c2(F.gelu(net.c1(x))), {"x": "INPUT", "gelu": "TABLE"}),
        (lambda net, x: net.c2(F.gelu(net.c1(x)).chunk(2, 1)[0].repeat(1, 2, 1, 1)), {"getitem": "TABLE"}),
        (lambda net, x: (lambda a: net.c2(torch.tanh(a) - F.gelu(a)))(net.c1(x)), {"sub": "TABLE"}),
        (lambda net, x: net.c2(net.c1(x) - 0.5), {"sub": "IEEE"}),
        (lambda net, x: net.c2(F.max_pool2d(net.c1(x), 2)), {"max_pool2d": "MOVED"}),
        (lambda net, x: net.c2(F.softplus(net.c1(x))), {"softplus": "FLOAT"}),
        (lambda net, x: net.fc(net.norm(_rows(net.c1(x)))), {"norm": "FLOAT"}),
    ],
)
def test_island_has_its_kind(function: Forward, kinds: dict[str, str]) -> None:
    plan = run(function).plan
    found = {str(end.args[0]): island.kind.name for end, island in plan.islands.items()}
    assert {name: found.get(name) for name in kinds} == kinds


def test_reason_names_the_first_node_that_is_not_certified() -> None:
    plan = run(lambda net, x: net.c2((F.softplus(net.c1(x)) + 1) / 3)).plan
    (island,) = [island for island in plan.islands.values() if island.kind is IslandKind.FLOAT]
    assert [node.name for node in island.nodes][0] == "softplus"
    assert island.uncertified.startswith("softplus (softplus): onnxruntime's vector and remainder loops round")


def test_sixteen_bit_source_has_no_table() -> None:
    plan = run(lambda net, x: net.c2(torch.tanh(net.c1(x))), _bits("c1", 16)).plan
    (island,) = [island for end, island in plan.islands.items() if str(end.args[0]) == "tanh"]
    assert island.kind is IslandKind.FLOAT and "no function of one 8-bit code" in island.uncertified


def test_nothing_is_certified_for_another_target() -> None:
    found = run(_base)
    found.program.target = next(target for target in Target if target is not Target.ONNXRUNTIME_X64)
    plan = read_plan(found.program)
    assert plan.sites == {}
    assert {island.kind for island in plan.islands.values()} == {IslandKind.INPUT, IslandKind.FLOAT}


def _overflowing(name: str, scale: float) -> Edit:
    def edit(program: Program) -> None:
        quantizer(program, name).scale.fill_(scale)

    return edit


OVERFLOWS: dict[str, tuple[Forward, float, str]] = {
    "softmax": (lambda net, x: net.c2(torch.softmax(net.c1(x), -1)), 1e-5, "QLinearSoftmax overflows"),
    "add": (lambda net, x: net.c1(x) + net.c3(net.c1(x)), 1e-10, "beyond int32"),
    "mul": (lambda net, x: net.c1(x) * net.c3(net.c1(x)), 1e-10, "beyond int32"),
    "adaptive_avg_pool2d": (lambda net, x: net.c3(F.adaptive_avg_pool2d(net.c1(x), 1)), 1e-6, "does not run"),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_kernel_that_would_overflow_is_planned_and_run_in_float(name: str) -> None:
    function, scale, reason = OVERFLOWS[name]
    found = run(function, _overflowing(name, scale), simulation="exact")
    island = found.plan.islands[found.program.node(f"{name}_fq")]
    assert reason in island.reason
    assert disagreements(found.program, found.plan, found.report.fusion) == []
    assert found.report.certified_differing == 0
    assert run(function).plan.site_of(name) is not None


@pytest.mark.parametrize(("scale", "is_absorbed"), [(0.046692606, False), (0.046332046, True), (0.0466, True)])
def test_clip_near_a_tie_is_redundant_as_float32_has_it(scale: float, is_absorbed: bool) -> None:
    """In float64 the bounds of the first two round to the other side."""

    def edit(program: Program) -> None:
        module = quantizer(program, "hardtanh")
        module.scale.fill_(scale)
        module.zero_point.fill_(126)

    found = run(lambda net, x: net.c2(F.hardtanh(net.c1(x), -6, 6)), edit, simulation="exact")
    assert (found.plan.site_of("hardtanh") is not None) == is_absorbed
    assert disagreements(found.program, found.plan, found.report.fusion) == []
    assert found.report.certified_differing == 0


def _reason(module: nn.Module, spec: QuantSpec, edit: Edit) -> str:
    """Why a layer of its own, built without passes, has no kernel."""
    x = torch.rand(4, 8)
    program = quantized(float_program(module, x), ("input_1", "linear"), x, weight_spec=spec)
    edit(program)
    return read_plan(program).islands[program.node("linear_fq")].reason


def test_weight_with_scales_along_its_inputs_has_no_kernel() -> None:
    spec = replace(S8_PER_CHANNEL, granularity=Granularity(1))
    assert _reason(nn.Linear(8, 8, bias=False), spec, lambda _: None) == "its weight has scales along axis 1"


def test_bias_on_the_scale_of_another_value_that_is_off_has_no_kernel() -> None:
    """Lowering refuses such a bias; the plan may be asked before."""

    def edit(program: Program) -> None:
        bias = program.bias_fake_quant(program.node("bias_fq"))
        assert bias is not None
        own = bias.sources
        other = FakeQuant(QuantSpec(8))
        other.mode = Mode.OFF
        bias.link(other, own[1])

    assert _reason(nn.Linear(8, 8), S8_PER_CHANNEL, edit) == "its bias 'bias_fq' is not quantized to int32"


def test_arithmetic_in_half_precision_is_not_certified() -> None:
    plan = run(lambda net, x: net.c2((net.c1(x).half() + 0.5).float())).plan
    (island,) = [island for island in plan.islands.values() if island.kind is IslandKind.FLOAT]
    assert island.uncertified.endswith("it is computed in torch.float16")
