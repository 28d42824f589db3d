"""Groups, candidates, costs and the search of mixed precision, each alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.errors import ConfigError
from fxquant.evaluation import quantized
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program
from fxquant.placement import Rule
from fxquant.spec import Granularity, SpecOverride
from fxquant.tuning.candidates import CANDIDATES, Candidate
from fxquant.tuning.configurations import Space
from fxquant.tuning.costs import Sizes, bit_ops, macs
from fxquant.tuning.search import BudgetSpent, Ladder, Option, Outcome, Search, hull, ladder, steps
from fxquant.tuning.sensitivity import damage_of, outputs_of, quantizers_of
from tests.passes.harness import Chain
from tests.preset_nets import batches, net

PER_CHANNEL = load_pipeline("int8_per_channel")
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
ALL = tuple(CANDIDATES.values())


def space_of(model: nn.Module, x: torch.Tensor = IMAGE, pipeline: Pipeline = PER_CHANNEL) -> Space:
    return Space(capture(model.eval(), x), pipeline, ALL, [x])


def grouped(model: nn.Module, x: torch.Tensor = IMAGE) -> list[set[str]]:
    return [{*group.names, *group.followers} for group in space_of(model, x).groups]


def assigned(space: Space, **names: str) -> tuple[str, ...]:
    """int8 per channel, but for the groups that begin with these operations."""
    return tuple(names.get(group.operations[0].name, "int8_per_channel") for group in space.groups)


def grids(program: Program) -> dict[str, int]:
    """The bits of every quantized value, by its name."""
    return {str(node.args[0]): module.spec.bits for node, module in program.fake_quant_nodes()}


# Groups


def test_residual_sum_joins_the_readers_of_both_its_inputs() -> None:
    found = grouped(net("residual"))
    assert {"a1", "add", "relu"} in found  # both read the stem's value
    assert {"a2", "relu_1"} in found
    assert {"b1", "down", "relu_2"} in found  # both read the first sum
    assert {"add_1"} in found


def test_concatenation_joins_the_readers_of_its_inputs() -> None:
    found = grouped(net("dense"))
    (joined,) = [names for names in found if "cat" in names]
    assert {"one", "cat", "cat_1", "relu"} <= joined  # one and cat read the stem's value, cat_1 its maximum


def test_max_pooling_passes_its_value_on_to_the_readers() -> None:
    model = Chain(first=nn.Conv2d(3, 4, 1), pool=nn.MaxPool2d(2), last=nn.Conv2d(4, 2, 1))
    assert grouped(model) == [{"first"}, {"last"}]


def test_output_that_nobody_reads_belongs_to_its_maker() -> None:
    space = space_of(Chain(first=nn.Conv2d(3, 4, 1), last=nn.Conv2d(4, 2, 1)))
    program = quantized(
        capture(Chain(first=nn.Conv2d(3, 4, 1), last=nn.Conv2d(4, 2, 1)).eval(), IMAGE),
        space.pipeline_of(assigned(space, last="int16_activations"), "tuned"),
        [IMAGE],
    )
    assert grids(program) == {"x": 8, "first_weight": 8, "first": 16, "last_weight": 8, "last": 16}


def test_value_that_only_float_reads_is_written_as_its_writer_has_it() -> None:
    model = Chain(first=nn.Conv2d(3, 4, 1), last=nn.Conv2d(4, 2, 1)).eval()
    space = space_of(model)
    pipeline = space.pipeline_of(("int16_activations", "float"), "tuned")
    assert grids(quantized(capture(model, IMAGE), pipeline, [IMAGE])) == {"x": 16, "first_weight": 8, "first": 16}


@pytest.mark.parametrize("name", ["residual", "dense", "depthwise", "attention"])
def test_any_assignment_can_be_prepared(name: str) -> None:
    data = batches(name)
    captured = capture(net(name), data[0])
    space = Space(captured, PER_CHANNEL, ALL, data)
    for shift in range(3):
        cycle = itertools.cycle(ALL[shift:] + ALL[:shift])
        assignment = tuple(next(cycle).name for _ in space.groups)
        program = quantized(captured, space.pipeline_of(assignment, "tuned"), data)
        for group, candidate in zip(space.groups, assignment, strict=True):
            bits = CANDIDATES[candidate].activation_bits
            if bits is not None:
                assert {module.spec.bits for module in _read(program, group.names)} == {bits}, group


def _read(program: Program, names: tuple[str, ...]) -> list[Any]:
    nodes = [source for name in names for source in program.node(name).all_input_nodes]
    found = [program.fake_quant(node) for node in nodes]
    return [module for module in found if module is not None and not module.follows]


# Candidates as rules


def test_candidate_that_is_the_config_needs_no_rule() -> None:
    space = space_of(net("residual"))
    made = space.pipeline_of(space.uniform(CANDIDATES["int8_per_channel"]), "tuned")
    assert made.to_toml() == PER_CHANNEL.to_toml()


def test_granularity_is_chosen_under_either_config() -> None:
    model = net("residual")
    for config in ("int8_per_channel", "int8_per_tensor"):
        space = space_of(model, pipeline=load_pipeline(config))
        for name, axis in (("int8_per_channel", 0), ("int8_per_tensor", None)):
            pipeline = space.pipeline_of(space.uniform(CANDIDATES[name]), "tuned")
            program = quantized(capture(model, IMAGE), pipeline, [IMAGE])
            weights = [module.spec for _, module in program.fake_quant_nodes() if module.follows]
            assert len(weights) == 7
            assert {spec.granularity for spec in weights} == {Granularity(axis)}, (config, name)


def test_candidate_that_is_another_one_there_is_left_out_with_the_reason() -> None:
    space = space_of(net("residual"))
    (index,) = [number for number, group in enumerate(space.groups) if group.names == ("add_1",)]
    assert space.names(index) == ("float", "int16_activations", "int8_per_channel")
    reasons = {item.candidate: item.reason for item in space.left_out if item.group == "add_1"}
    assert reasons == {
        "int8_per_tensor": "it is 'int8_per_channel' there",
        "w4a16": "it is 'int16_activations' there",
        "w4a8": "it is 'int8_per_channel' there",
    }


def test_rule_of_the_config_on_a_node_is_kept() -> None:
    base = load_pipeline("int8_per_channel")
    rule = Rule(node="a2", weight=SpecOverride(bits=6))
    passes = [_with_rule(item, rule) for item in base.prepare_passes]
    space = space_of(net("residual"), pipeline=base.changed(prepare=passes))
    (index,) = [number for number, group in enumerate(space.groups) if "a2" in group.names]
    assert space.names(index) == ()
    assert {item.reason for item in space.left_out if item.group == "a2"} == {
        "a rule of the config names one of its nodes"
    }


def _with_rule(item: Any, rule: Rule) -> Any:
    return replace(item, rules=(rule,)) if item.name == "assign-specs" else item


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": ""}, "a name without commas"),
        ({"name": "a,b"}, "a name without commas"),
        ({"name": "half", "quantize": False, "weight_bits": 4}, "quantize=False alone"),
    ],
)
def test_wrong_candidate_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Candidate(**options)


def test_pipeline_without_rules_is_refused() -> None:
    base = load_pipeline("int8_per_channel")
    passes = [item for item in base.prepare_passes if item.name == "remove-identity"]
    with pytest.raises(ConfigError, match="cannot be tuned.*placement rules"):
        space_of(net("residual"), pipeline=base.changed(prepare=passes))


# Costs, counted by hand


class Products(nn.Module):
    """One of each product, on (N, 4, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.grouped = nn.Conv2d(8, 4, 1, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.grouped(self.depthwise(self.plain(x))))
        x = self.linear(x.flatten(2).transpose(1, 2))  # (N, 36, 5)
        return x @ x.transpose(1, 2)


HAND = {
    "plain": 8 * 6 * 6 * 4 * 9,
    "depthwise": 8 * 3 * 3 * 1 * 9,
    "grouped": 4 * 3 * 3 * 4 * 1,
    "up": 4 * 3 * 3 * 3 * 4,  # input elements x outputs of a group x kernel
    "linear": 36 * 5 * 6,
    "matmul": 36 * 36 * 5,
}


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_those_counted_by_hand(batch: int) -> None:
    x = torch.randn(batch, 4, 6, 6)
    program = capture(Products().eval(), x)
    assert macs(program, Sizes.of(program, x)) == HAND


def test_bit_ops_are_macs_times_bits_and_32_by_32_in_float() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 4, 6, 6), Products().eval()
    space = Space(capture(model, x), PER_CHANNEL, ALL, [x])
    assignment = assigned(space, plain="float", depthwise="int16_activations", grouped="w4a8")
    program = quantized(capture(model, x), space.pipeline_of(assignment, "tuned"), [x])
    bits = {"plain": 1024, "depthwise": 16 * 8, "grouped": 8 * 4, "up": 1024, "linear": 64, "matmul": 64}
    counts = macs(program, Sizes.of(program, x))
    assert counts == HAND
    assert bit_ops(program, counts) == {name: count * bits[name] for name, count in HAND.items()}


def test_macs_of_a_fixed_batch_are_those_of_one_sample() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.fc(x.reshape(6, 4)))

    x = torch.randn(6, 4)
    program = capture(Fixed().eval(), x)
    assert macs(program, Sizes.of(program, x)) == {"fc": 20}


def test_macs_of_attention_are_those_counted_by_hand() -> None:
    x = batches("attention")[0]  # (4, 6, 16), two heads of 8
    program = capture(net("attention"), x)
    PER_CHANNEL.prepare(program)
    found = sorted(macs(program, Sizes.of(program, x)).values())
    assert found == sorted([6 * 48 * 16, 2 * 6 * 6 * 8, 2 * 6 * 6 * 8, 6 * 16 * 16, 6 * 32 * 16, 6 * 16 * 32])


# Sensitivity


def test_damage_is_that_of_the_groups_own_quantizers() -> None:
    data = batches("residual")
    captured = capture(net("residual"), data[0])
    space = Space(captured, PER_CHANNEL, ALL, data)
    program = quantized(captured, PER_CHANNEL, data)
    expected, modes = outputs_of(captured, data), [module.mode for _, module in program.fake_quant_nodes()]
    (group,) = [item for item in space.groups if item.names == ("a2",)]
    mine = [str(node.args[0]) for node, module in program.fake_quant_nodes() if module in quantizers_of(program, group)]
    assert mine == ["relu_1", "a2_weight", "a2"]
    damage = damage_of(program, group, data, expected)
    with program.quantizers(only="(?!(relu_1|a2_weight|a2)$).+", weights=False, activations=False):
        found = outputs_of(program, data)
    noise = sum(float(((one[0] - other[0]) ** 2).sum()) for one, other in zip(found, expected, strict=True))
    assert damage == pytest.approx(noise / sum(float((one[0] ** 2).sum()) for one in expected), rel=1e-9)
    assert 0 < damage < 0.01
    assert [module.mode for _, module in program.fake_quant_nodes()] == modes


# The search, on ladders whose truth is known


LADDERS = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=4, unique=True),
    min_size=1,
    max_size=4,
)


def ladders_of(numbers: list[list[tuple[int, int]]]) -> list[Ladder]:
    """Ladders from pairs of cost and damage, each with float (cost 50, damage 0) on top."""
    return [
        ladder([Option("float", 50, 0), *(Option(f"c{index}", *pair) for index, pair in enumerate(pairs))])
        for pairs in numbers
    ]


def total(ladders: list[Ladder], assignment: tuple[str, ...]) -> tuple[float, float]:
    chosen = [
        next(item for item in options if item.candidate == name)
        for options, name in zip(ladders, assignment, strict=True)
    ]
    return sum(item.cost for item in chosen), sum(item.damage for item in chosen)


@given(LADDERS)
def test_ladders_fall_in_cost_and_rise_in_damage(numbers: list[list[tuple[int, int]]]) -> None:
    for options in ladders_of(numbers):
        assert all(one.cost > other.cost and one.damage <= other.damage for one, other in itertools.pairwise(options))
        corners = hull(options)
        assert corners[0] == options[0] and corners[-1] == options[-1]
        slopes = [(two.damage - one.damage) / (one.cost - two.cost) for one, two in itertools.pairwise(corners)]
        assert slopes == sorted(slopes)
        for one, two in itertools.pairwise(corners):  # no option lies below the line between two corners
            share = [(one.cost - item.cost) / (one.cost - two.cost) for item in options]
            line = [one.damage + part * (two.damage - one.damage) for part in share]
            inside = [0 <= part <= 1 for part in share]
            assert all(
                item.damage >= height - 1e-9
                for item, height, within in zip(options, line, inside, strict=True)
                if within
            )
    prices = [step.price for step in steps(ladders_of(numbers))]
    assert prices == sorted(prices)


@settings(deadline=None)
@given(LADDERS, st.integers(0, 100))
def test_search_ends_where_no_move_of_one_or_two_groups_is_left(
    numbers: list[list[tuple[int, int]]], allowed: int
) -> None:
    ladders, asked = ladders_of(numbers), []

    def try_out(assignment: tuple[str, ...]) -> Outcome:
        asked.append(assignment)
        cost, damage = total(ladders, assignment)
        return Outcome(damage <= allowed, cost)

    search = Search(ladders, try_out)
    search.run()
    assert len(asked) == len(set(asked)) and not search.is_spent
    reached = [assignment for assignment in asked if total(ladders, assignment)[1] <= allowed]
    best = min(reached, key=lambda assignment: total(ladders, assignment)[0])
    cost, _ = total(ladders, best)
    for other in itertools.product(*([option.candidate for option in options] for options in ladders)):
        if sum(one != two for one, two in zip(other, best, strict=True)) <= 2:
            other_cost, damage = total(ladders, other)
            assert other_cost >= cost or damage > allowed


@given(st.integers(1, 9), st.integers(0, 9))
def test_bisection_finds_the_longest_prefix_that_reaches_the_target(count: int, allowed: int) -> None:
    ladders = ladders_of([[(5, 1)]] * count)
    search = Search(
        ladders, lambda assignment: Outcome(assignment.count("c0") <= allowed, total(ladders, assignment)[0])
    )
    assert search._bisect() == search.prefix(min(count, allowed))


def test_search_is_cheap_where_everything_may_be_cheapest() -> None:
    ladders = ladders_of([[(5, 1)]] * 4)
    asked: list[tuple[str, ...]] = []

    def try_out(assignment: tuple[str, ...]) -> Outcome:
        asked.append(assignment)
        return Outcome(True, total(ladders, assignment)[0])

    Search(ladders, try_out).run()
    assert asked == [("c0",) * 4]


def test_neighbours_that_only_work_together_are_found() -> None:
    """What is wrong beside a float neighbour is right beside a 16-bit one."""
    ladders = [ladder([Option("float", 1024, 0), Option("a16", 128, 1), Option("a8", 64, 50)])] * 2

    def try_out(assignment: tuple[str, ...]) -> Outcome:
        is_right = assignment[1] == "a16" or assignment == ("float", "float")
        return Outcome(is_right, total(ladders, assignment)[0])

    found: dict[tuple[str, ...], Outcome] = {}

    def remembered(assignment: tuple[str, ...]) -> Outcome:
        found[assignment] = try_out(assignment)
        return found[assignment]

    Search(ladders, remembered).run()
    assert min((outcome.cost, key) for key, outcome in found.items() if outcome.reached)[1] == ("a8", "a16")


def test_set_of_moves_that_misses_the_target_is_halved() -> None:
    """After the first group the second one's step is too much, and so is the fourth's; the third one's is not."""
    ladders = [ladder([Option("float", 50, 0), Option("cheap", 50 - saved, damage)]) for saved, damage in SAVED]
    found: dict[tuple[str, ...], Outcome] = {}

    def try_out(assignment: tuple[str, ...]) -> Outcome:
        cost, damage = total(ladders, assignment)
        found[assignment] = Outcome(damage <= 8, cost)
        return found[assignment]

    Search(ladders, try_out).run()
    assert found["cheap", "float", "cheap", "float"].reached


def test_group_is_made_dearer_where_another_one_then_saves_more() -> None:
    """By prices the first group goes first, and the second one's step is too much beside it."""
    ladders = [ladder([Option("float", 10, 0), Option("cheap", cost, damage)]) for cost, damage in ((6, 1), (1, 3))]
    found: dict[tuple[str, ...], Outcome] = {}

    def try_out(assignment: tuple[str, ...]) -> Outcome:
        cost, damage = total(ladders, assignment)
        found[assignment] = Outcome(damage <= 3, cost)
        return found[assignment]

    search = Search(ladders, try_out)
    search.run()
    assert search.prefix(1) == ("cheap", "float") and found["float", "cheap"].reached


SAVED = ((10, 5), (40, 30), (2, 2), (30, 31))  # cost saved and damage; prices 0.5, 0.75, 1 and 1.03


def test_target_that_float_misses_ends_the_search() -> None:
    ladders, asked = ladders_of([[(5, 1)]] * 4), []

    def try_out(assignment: tuple[str, ...]) -> Outcome:
        asked.append(assignment)
        return Outcome(False, 0.0)

    Search(ladders, try_out).run()
    assert asked == [("c0",) * 4, ("float",) * 4]


def test_spent_budget_ends_the_search() -> None:
    def try_out(assignment: tuple[str, ...]) -> Outcome:
        raise BudgetSpent

    search = Search(ladders_of([[(5, 1)]]), try_out)
    search.run()
    assert search.is_spent


def test_move_that_costs_more_than_reckoned_is_not_accepted() -> None:
    ladders = [ladder([Option("float", 50, 0), Option("a16", 10, 1), Option("a8", 5, 9)])] * 2
    costs = {"float": 50.0, "a16": 90.0, "a8": 5.0}  # slower than float, though fewer bits

    def try_out(assignment: tuple[str, ...]) -> Outcome:
        return Outcome("a8" not in assignment, sum(costs[name] for name in assignment))

    asked: dict[tuple[str, ...], Outcome] = {}
    Search(ladders, lambda assignment: asked.setdefault(assignment, try_out(assignment))).run()
    assert ("float", "float") in asked


@pytest.mark.parametrize(
    ("noise", "cost", "bits", "is_taken"),
    [(0.02, 101, 16, True), (0.0, 101, 16, False), (0.0, 100, 32, True), (0.0, 100, 33, False), (0.0, 99, 33, True)],
)
def test_move_is_taken_if_it_is_cheaper_or_within_noise_and_no_wider(
    noise: float, cost: float, bits: int, is_taken: bool
) -> None:
    """Float costs 100 and has 32 bits; 4-bit weights are right beside 16-bit activations alone."""
    ladders = [ladder([Option("float", 50, 0), Option("a16", 40, 8), Option("w4", 5, 9)])] * 2
    costs, widths = {"float": 100.0, "a16": cost, "w4": 50.0}, {"float": 32, "a16": bits, "w4": 8}
    asked: list[tuple[str, ...]] = []

    def try_out(assignment: tuple[str, ...]) -> Outcome:
        asked.append(assignment)
        is_reached = "w4" not in assignment or set(assignment) == {"a16", "w4"}
        return Outcome(is_reached, sum(map(costs.__getitem__, assignment)), sum(map(widths.__getitem__, assignment)))

    Search(ladders, try_out, noise).run()
    assert (("w4", "a16") in asked) is is_taken


def test_activation_bits_are_those_of_what_each_group_reads() -> None:
    space = space_of(net("residual"))
    widths = {name: space.activation_bits(space.uniform(CANDIDATES[name])) for name in ("float", "w4a16", "w4a8")}
    assert widths == {name: bits * len(space.groups) for name, bits in (("float", 32), ("w4a16", 16), ("w4a8", 8))}
    as_configured = Space(capture(net("residual").eval(), IMAGE), PER_CHANNEL, (Candidate("plain"),), [IMAGE])
    assert as_configured.activation_bits(("plain",) * len(space.groups)) == 8 * len(space.groups)


def test_functional_padding_and_relu_stay_with_their_readers() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.last(F.pad(F.relu6(self.first(x)), (1, 1, 1, 1))))

    assert grouped(Padded()) == [{"first"}, {"last", "hardtanh"}]
