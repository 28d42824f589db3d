"""insert-fake-quant: one FakeQuant a value and spec, read by those who are to read it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Stage
from fxquant.numerics.fake_quant import Mode
from fxquant.passes import AssignSpecs, InsertFakeQuant, SelectPerChannel
from fxquant.placement import Rule
from fxquant.spec import Granularity, QuantSpec, SpecOverride, Target
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import captured, difference, output
from tests.passes.pipelines import IMAGE, before, residual


def test_every_wanted_value_gets_a_fake_quant() -> None:
    program = before(InsertFakeQuant, residual(), IMAGE)
    run_pass(InsertFakeQuant(), program)
    names = [node.name for node, _ in program.fake_quant_nodes()]
    assert program.stage is Stage.INSERTED
    assert {"x_fq", "conv1_weight_fq", "relu_fq", "pool_fq", "conv2_fq", "relu_1_fq", "fc_fq"} <= set(names)
    assert "conv1_fq" not in names  # absorbed by relu
    assert program.node("add").args == (program.node("conv2_fq"), program.node("pool_fq"))
    assert [n.name for n in program.node("relu").users] == ["relu_fq"]


def test_module_is_per_channel_and_follows_only_for_weights() -> None:
    program = before(InsertFakeQuant, residual(), IMAGE)
    run_pass(InsertFakeQuant(), program)
    weight = program.module.get_submodule("fake_quants.conv1_weight")
    activation = program.module.get_submodule("fake_quants.x")
    assert tuple(weight.scale.shape) == (8,) and weight.follows
    assert tuple(activation.scale.shape) == () and not activation.follows


class Tied(nn.Module):
    """Two linear layers over one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x))
        return found


def test_value_named_like_an_attribute_of_modules_gets_a_fake_quant() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x > 0).float() * x

    program = before(InsertFakeQuant, Masked(), IMAGE)
    run_pass(InsertFakeQuant(), program)
    assert program.fake_quant(program.node("to_fq")) is program.module.get_submodule("fake_quants.to_")


def test_tied_weight_wanted_with_two_specs_gets_two_fake_quants() -> None:
    program = captured(Tied(), torch.randn(2, 6))
    four = SpecOverride(bits=4)
    PassManager([AssignSpecs(rules=(Rule(node="second", weight=four),)), SelectPerChannel()]).run(program)
    run_pass(InsertFakeQuant(), program)
    read = {name: program.fake_quant(program.node(name).args[1]) for name in ("first", "second")}  # type: ignore[arg-type]
    assert {name: module.spec.bits for name, module in read.items() if module} == {"first": 8, "second": 4}


def test_activation_wanted_with_two_specs_is_refused_by_name() -> None:
    program = captured(residual(), IMAGE)
    PassManager([AssignSpecs()]).run(program)
    program.node("conv2").meta["input_specs"][0] = QuantSpec(bits=4)
    with pytest.raises(PassError, match=r"'pool' is wanted with 2 specs.*conv2"):
        run_pass(InsertFakeQuant(), program)


def test_activation_wanted_with_two_specs_gets_two_fake_quants_on_other_targets() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    program = captured(Two(), torch.randn(2, 4))
    program.target = Target.TENSORRT
    PassManager([AssignSpecs(rules=(Rule(node="b", activation=SpecOverride(bits=4)),))]).run(program)
    run_pass(InsertFakeQuant(), program)
    assert program.node("a").args[0] is not program.node("b").args[0]


def test_activation_wanted_per_channel_is_refused_by_name() -> None:
    program = captured(residual(), IMAGE)
    PassManager([AssignSpecs(activation=QuantSpec(granularity=Granularity(1)))]).run(program)
    with pytest.raises(PassError, match=r"activation 'x' is wanted per-channel\(1\)"):
        run_pass(InsertFakeQuant(), program)


@pytest.mark.parametrize("side", ["weight", "output"])
def test_granularity_that_a_value_cannot_have_names_the_rule(side: str) -> None:
    program = captured(residual(), IMAGE)
    rule = Rule(op="Conv", **{side: SpecOverride(granularity=Granularity(9))})  # type: ignore[arg-type]
    PassManager([AssignSpecs(rules=(rule,))]).run(program)
    with pytest.raises(PassError, match=r"conv1 \(op 'Conv' \(rules\[0\]\)\)"):
        PassManager([InsertFakeQuant()]).run(program)


def test_value_that_is_not_float32_is_refused_by_name() -> None:
    program = captured(residual().double(), IMAGE.double())
    PassManager([AssignSpecs()]).run(program)
    with pytest.raises(PassError, match=r"value 'x' cannot be quantized.*float64"):
        run_pass(InsertFakeQuant(), program)


def test_observing_program_keeps_the_float_outputs() -> None:
    model = residual()
    program = before(InsertFakeQuant, model, IMAGE)
    run_pass(InsertFakeQuant(), program)
    assert all(module.mode is Mode.OBSERVE for _, module in program.fake_quant_nodes())
    assert difference(program, output(model, IMAGE), IMAGE) == 0.0


def test_second_run_is_refused_by_stage() -> None:
    program = before(InsertFakeQuant, residual(), IMAGE)
    run_pass(InsertFakeQuant(), program)
    with pytest.raises(PassError, match="inserted"):
        run_pass(InsertFakeQuant(), program)


def test_printed_graph_is_golden() -> None:
    program = before(InsertFakeQuant, residual(), IMAGE)
    run_pass(InsertFakeQuant(), program)
    assert_golden(str(program), "insert_fake_quant_residual.txt")
