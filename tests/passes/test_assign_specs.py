"""assign-specs: integer operations ask for specs, everything else says why it stays in float."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.errors import CalibrationError, PassError
from fxquant.graph.program import Program, Stage, input_spec
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.passes import AssignSpecs, DecomposeAttention, masks
from fxquant.placement import Rule
from fxquant.spec import QuantSpec, SpecOverride
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import captured, difference, output
from tests.passes.pipelines import IMAGE, residual, specs

aten = torch.ops.aten
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


@pytest.mark.parametrize("low", [0.0, 2.0])
def test_clip_behind_a_fixed_range_wants_what_its_reader_wants(low: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.fc(torch.clamp(torch.sigmoid(x).reshape(-1, 2, 2).flatten(1), low, 3.0))
            return found

    program = captured(Net(), torch.randn(2, 4))
    fxquant.load_pipeline("int8_per_channel").prepare(program)
    limits = program.fake_quant(program.node("clamp_fq")).spec.limits  # type: ignore[union-attr]
    assert limits.high is None or limits.high > 1.0, "a clip from 2 on gives what the sigmoid cannot"


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
    rules = (
        Rule(node="conv2", activation=SpecOverride(bits=6)),
        Rule(op="convolution", activation=SpecOverride(bits=4)),
    )
    program = captured(residual(), IMAGE)
    run_pass(AssignSpecs(rules=rules), program)
    assert specs(program)["conv1"].startswith("u4") and specs(program)["conv2"].startswith("u6")


@pytest.mark.parametrize(
    "rule",
    [
        Rule(op="Convv", quantize=False),
        Rule(node="conv9", quantize=False),
        Rule(module="layer.*", quantize=False),
    ],
)
def test_rule_that_matches_nothing_is_refused(rule: Rule) -> None:
    program = captured(residual(), IMAGE)
    with pytest.raises(PassError, match=r"assign-specs: rules\[0\]: (op|node|module) '"):
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


LOWEST = torch.finfo(torch.float32).min
Weigh = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q, k turned, mask -> attention weights
TOKENS = torch.randn(8, 6, 32, generator=torch.Generator().manual_seed(3))


def _by_hand(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = q @ k + mask
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def _by_hand_with_max(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = q @ k + mask
    powers = torch.exp(scores - torch.max(scores, -1, keepdim=True)[0])
    return powers / powers.sum(-1, keepdim=True)


def _with_sink(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = q @ k + mask
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]


# Of a mask that is added (0 or a large negative number), and of one that keeps (1) or hides (0).
ADDED: dict[str, Weigh] = {
    "add": lambda q, k, mask: torch.softmax(q @ k + mask, -1),
    "log_softmax": lambda q, k, mask: torch.log_softmax(q @ k + mask, -1).exp(),
    "softmax": lambda q, k, mask: torch.softmax(q @ k + mask, -1),
    "safe_softmax": lambda q, k, mask: aten._safe_softmax.default(q @ k + mask, -1),
    "divide": lambda q, k, mask: torch.softmax((q @ k + mask) / 4, -1),
    "multiply": lambda q, k, mask: torch.softmax((q @ k + mask) * 0.5, -1),
    "maximum": lambda q, k, mask: torch.softmax(torch.maximum(q @ k + mask, torch.tensor(LOWEST)), -1),
    "minimum": lambda q, k, mask: torch.softmax(torch.minimum(q @ k + mask, torch.tensor(50.0)), -1),
    "clamp": lambda q, k, mask: torch.softmax(torch.clamp(q @ k + mask, LOWEST, 50.0), -1),
    "clamp_one_side": lambda q, k, mask: torch.softmax(torch.clamp_max(q @ k + mask, 50.0), -1),
    "subtract": lambda q, k, mask: torch.softmax(q @ k - (-mask), -1),
    "reverse_subtract": lambda q, k, mask: torch.softmax(torch.rsub(-mask, q @ k), -1),
    "cast": lambda q, k, mask: torch.softmax((q @ k + mask).double().float(), -1),
    "stack": lambda q, k, mask: torch.softmax(torch.stack([q @ k + mask, q @ k + 2 * mask]), -1)[0],
    "neg": lambda q, k, mask: torch.softmax(-(-(q @ k) - mask), -1),
    "baddbmm": lambda q, k, mask: torch.softmax(torch.baddbmm(mask, q, k), -1),
    "baddbmm with alpha": lambda q, k, mask: torch.softmax(torch.baddbmm(mask, q, k, alpha=0.25) / 2, -1),
    "exp": _by_hand,
    "exp and max": _by_hand_with_max,
    "concat": _with_sink,
    "concatenated masks": lambda q, k, m: torch.softmax(q @ k - torch.cat([m[..., :3], m[..., 3:]], -1).abs(), -1),
    "two masks": lambda q, k, mask: torch.softmax(q @ k + (mask + mask * 0.5), -1),
    "reshaped": lambda q, k, mask: torch.softmax((q @ k + mask).unsqueeze(1), -1).squeeze(1),
}
KEPT: dict[str, Weigh] = {
    "subtract": lambda q, k, keep: torch.softmax(q @ k - (1 - keep) * 1e9, -1),
    "multiply": lambda q, k, keep: torch.softmax((q @ k) * keep - 1e9 * (1 - keep), -1),
    "where": lambda q, k, keep: torch.softmax(torch.where(keep > 0, q @ k, -1e9), -1),
    "masked_fill": lambda q, k, keep: torch.softmax((q @ k).masked_fill(keep == 0, -math.inf), -1),
    "product of masks": lambda q, k, m: torch.softmax(q @ k - ((1 - m) * m.new_full((6,), -1e9)).abs(), -1),
}


class Masked(nn.Module):
    """Attention of one head whose weights are computed in a given manner, and a classifier."""

    def __init__(self, weigh: Weigh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.head = (nn.Linear(32, 32) for _ in range(4))
        self.weigh = weigh

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = self.weigh(self.q(x) * 0.3, self.k(x).transpose(-2, -1), mask)
        found: torch.Tensor = self.head(weights @ self.v(x))
        return found


class MultiHead(nn.Module):
    """nn.MultiheadAttention as called by default: with the weights, from baddbmm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.attention(x, x, x, attn_mask=mask[0])[0])
        return found


def _hidden(value: float) -> torch.Tensor:
    """[8, 6, 6]: `value` where key j is later than query i, else 0."""
    later = torch.arange(6) > torch.arange(6)[:, None]
    return torch.zeros(8, 6, 6).masked_fill(later, value)


def _quantized(model: nn.Module, mask: torch.Tensor) -> tuple[Program, float]:
    """The calibrated program and the signal-to-noise ratio of its logits in dB."""
    expected = output(model, TOKENS, mask)
    program = captured(model, TOKENS, mask)
    fxquant.load_pipeline("int8_per_channel").prepare(program)
    fxquant.calibrate(program, [(TOKENS, mask)], progress=False)
    noise = output(program.module, TOKENS, mask) - expected
    return program, float(10 * torch.log10(expected.square().mean() / noise.square().mean()))


def _assert_mask_in_float(model: nn.Module, mask: torch.Tensor) -> None:
    program, ratio = _quantized(model, mask)
    quantizers = {name: module for name, module in program.module.named_modules() if isinstance(module, FakeQuant)}
    ranges = {name: max(-float(q.encoding.min.min()), float(q.encoding.max.max())) for name, q in quantizers.items()}
    assert {name: size for name, size in ranges.items() if size > 1e4} == {}
    products = [node for node in program.graph.nodes if node.target in (aten.matmul.default, aten.bmm.default)]
    for scores in products[:-1]:  # quantized before the mask
        assert [user.name for user in scores.users] == [f"{scores.name}_fq"]
    assert ratio > 30.0


@pytest.mark.parametrize("value", [-1e9, LOWEST, -math.inf])
@pytest.mark.parametrize("form", ADDED)
def test_added_mask_stays_in_float(form: str, value: float) -> None:
    _assert_mask_in_float(Masked(ADDED[form]), _hidden(value))


@pytest.mark.parametrize("form", KEPT)
def test_mask_made_of_kept_positions_stays_in_float(form: str) -> None:
    _assert_mask_in_float(Masked(KEPT[form]), (_hidden(1.0) == 0).float())


@pytest.mark.parametrize("value", [-1e9, LOWEST, -math.inf])
def test_mask_of_torchs_multi_head_attention_stays_in_float(value: float) -> None:
    _assert_mask_in_float(MultiHead(), _hidden(value))


@pytest.mark.parametrize("name", sorted(masks.WALKED | masks.SOFTMAXES))
def test_every_operation_that_is_walked_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "WALKED", masks.WALKED - {name})
    monkeypatch.setattr(masks, "SOFTMAXES", masks.SOFTMAXES - {name})
    mask = _hidden(-1e9) if name in ADDED else (_hidden(1.0) == 0).float()
    with pytest.raises((AssertionError, CalibrationError)):
        _assert_mask_in_float(Masked((KEPT | ADDED)[name]), mask)


@pytest.mark.parametrize("form", ["concatenated masks", "product of masks"])
def test_what_computes_the_mask_must_stay_in_float(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_weighted", lambda program: set(program.graph.nodes))
    mask = _hidden(-1e9) if form in ADDED else (_hidden(1.0) == 0).float()
    with pytest.raises((AssertionError, CalibrationError)):
        _assert_mask_in_float(Masked((KEPT | ADDED)[form]), mask)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda q, k, _: torch.softmax(q @ k, -1),
        lambda q, k, _: torch.softmax(q @ k * 0.5, -1),
        lambda q, k, _: torch.softmax(q @ k / torch.tensor(2.0) - 1.0, -1),
    ],
)
def test_softmax_of_scores_and_numbers_reads_codes(weigh: Weigh) -> None:
    program = captured(Masked(weigh), TOKENS, _hidden(0.0))
    run_pass(AssignSpecs(), program)
    softmax = program.node("softmax")
    assert input_spec(softmax, 0) == U8 and "float_reason" not in softmax.meta
