"""assign-specs: integer operations ask for specs, everything else says why it stays in float."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxquant.errors import PassError
from fxquant.graph.program import Stage, input_spec
from fxquant.passes import AssignSpecs, DecomposeAttention
from fxquant.placement import Rule
from fxquant.spec import QuantSpec
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import captured, difference, output
from tests.passes.pipelines import IMAGE, residual, specs

U8 = QuantSpec()
S8 = QuantSpec(signed=True, symmetric=True, strict=True)


def test_specs_are_assigned_to_integer_operations() -> None:
    program = captured(residual(), IMAGE)
    entry = run_pass(AssignSpecs(), program)
    assert entry.modified and program.stage is Stage.ASSIGNED
    assert {"conv1", "relu", "pool", "conv2", "add", "fc", "relu_1"} <= set(specs(program))
    conv = program.node("conv1")
    assert (input_spec(conv, 0), input_spec(conv, 1), input_spec(conv, 2)) == (U8, S8, None)


def test_float_operation_declines_with_its_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.norm(self.fc(x))
            return found

    program = captured(Net(), torch.randn(2, 4))
    run_pass(AssignSpecs(), program)
    assert "norm" not in specs(program)
    assert "no integer kernel" in program.node("norm").meta["float_reason"]


def test_outputs_are_preserved_bit_for_bit() -> None:
    model = residual()
    program = captured(model, IMAGE)
    run_pass(AssignSpecs(), program, IMAGE)
    assert difference(program, output(model, IMAGE), IMAGE) == 0.0


def test_second_run_is_refused_by_stage() -> None:
    program = captured(residual(), IMAGE)
    run_pass(AssignSpecs(), program)
    with pytest.raises(PassError, match="assigned"):
        run_pass(AssignSpecs(), program)


def test_printed_graph_is_golden() -> None:
    program = captured(residual(), IMAGE)
    run_pass(AssignSpecs(), program)
    assert_golden(str(program), "assign_specs_residual.txt")


@pytest.mark.parametrize(
    ("rule", "in_float"),
    [
        (Rule(op="add", quantize=False), {"add"}),
        (Rule(op="Conv", quantize=False), {"conv1", "conv2"}),
        (Rule(module="conv2", quantize=False), {"conv2"}),
        (Rule(node="fc", quantize=False), {"fc"}),
    ],
)
def test_rule_leaves_nodes_in_float(rule: Rule, in_float: set[str]) -> None:
    program = captured(residual(), IMAGE)
    run_pass(AssignSpecs(rules=(rule,)), program)
    excluded = {n.name for n in program.graph.nodes if str(n.meta.get("float_reason", "")).startswith("excluded")}
    assert excluded == in_float


def test_more_specific_rule_wins() -> None:
    rules = (Rule(node="conv2", activation=QuantSpec(bits=6)), Rule(op="convolution", activation=QuantSpec(bits=4)))
    program = captured(residual(), IMAGE)
    run_pass(AssignSpecs(rules=rules), program)
    assert specs(program)["conv1"].startswith("u4") and specs(program)["conv2"].startswith("u6")


@pytest.mark.parametrize("rule", [Rule(op="Convv"), Rule(node="conv9"), Rule(module="layer.*")])
def test_rule_that_matches_nothing_is_refused(rule: Rule) -> None:
    program = captured(residual(), IMAGE)
    with pytest.raises(PassError, match="placement rule"):
        run_pass(AssignSpecs(rules=(rule,)), program)


class Attention(nn.Module):
    """Two projections and masked attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k = self.q(x).unsqueeze(1), self.k(x).unsqueeze(1)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)


def test_mask_and_softmax_form_a_float_island() -> None:
    x, mask = torch.randn(2, 6, 8), torch.zeros(2, 1, 6, 6)
    mask[..., 3:] = torch.finfo(torch.float32).min
    program = captured(Attention(), x, mask)
    run_pass(DecomposeAttention(), program)
    run_pass(AssignSpecs(), program)
    added, softmax = (program.node(f"scaled_dot_product_attention_{part}") for part in ("mask", "softmax"))
    assert "mask" in added.meta["float_reason"] and "mask" in softmax.meta["float_reason"]
    assert not {added.name, softmax.name} & set(specs(program))
    assert "input_specs" not in added.meta and "input_specs" not in softmax.meta


class Scores(nn.Module):
    """A softmax over plain and over masked scores."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(x)
        return torch.softmax(y, -1), torch.softmax((y + mask).view(-1, 2, 4), -1)


def test_only_the_masked_softmax_reads_a_float_value() -> None:
    program = captured(Scores(), torch.randn(2, 8), torch.randn(2, 8))
    run_pass(AssignSpecs(), program)
    plain, masked = program.node("softmax"), program.node("softmax_1")
    assert input_spec(plain, 0) == U8 and input_spec(masked, 0) is None
    assert specs(program)["softmax"].endswith("within [0, 1]") and "add" not in specs(program)
