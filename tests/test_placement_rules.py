"""Placement rules: the most specific rule decides each setting; contradictions and rules in vain name their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxquant
from fxquant.errors import ConfigError, PassError
from fxquant.graph.pipeline import Pipeline, parse_pipeline
from fxquant.graph.program import Program, Stage, input_slots, input_spec, output_spec
from fxquant.graph.trace import PassEntry
from fxquant.ops.table import TABLE
from fxquant.passes import AssignSpecs, FoldBatchNorm
from fxquant.placement import Rule, check_rules, defaults, settle
from fxquant.spec import QuantSpec, SpecOverride, Target
from tests.helpers import residual_program, run_pass

U8 = QuantSpec()
S8 = QuantSpec(signed=True, symmetric=True, strict=True)


def bits(number: int) -> SpecOverride:
    """A change of the bits alone."""
    return SpecOverride(bits=number)


def assigned(*rules: Rule, target: Target = Target.ONNXRUNTIME_X64) -> tuple[Program, PassEntry]:
    """The residual net of tests/helpers.py, its specs assigned under these rules."""
    program = residual_program()
    program.target = target
    run_pass(FoldBatchNorm(), program)
    return program, run_pass(AssignSpecs(rules=rules), program)


def refusal(*rules: Rule) -> str:
    """What assign-specs says against these rules."""
    with pytest.raises(PassError) as caught:
        assigned(*rules)
    return str(caught.value)


def vain(entry: PassEntry) -> list[str]:
    """The misses of a trace that are about rules."""
    return [str(miss) for miss in entry.misses if miss.node.startswith("rules[")]


# --- a reference: every setting of a node, decided by asking all rules ----------------------------------------------

Said = tuple[tuple[int, int], object]


def words(rules: Sequence[Rule], node: fx.Node, side: str, name: str) -> Iterator[Said]:
    """Strength and value of each rule's word on one field of one side of a node ("quantize" is a side of its own)."""
    definition = TABLE.find(node, None)
    assert definition is not None
    kinds = {definition.name, *definition.types_for(node)}
    for rule in rules:
        levels = {
            0: rule.op in kinds,
            1: rule.module in (".*", node.meta.get("module_path", "")),
            2: rule.node == node.name,
        }
        for level in (level for level, is_met in levels.items() if is_met):
            if side == "quantize":
                yield from [((level, 0), rule.quantize)] if rule.quantize is not None else []
                continue
            for fineness, key in ((0, "activation"), (1, side)):
                change = getattr(rule, key)
                if not (side == "weight" and key == "activation") and change is not None:
                    yield from [((level, fineness), value)] if (value := getattr(change, name)) is not None else []


def brute_force(rules: Sequence[Rule], node: fx.Node) -> dict[str, object] | None:
    """quantize and the fields that rules set, by name; None where two of the strongest words differ."""
    found: dict[str, object] = {}
    sides = [("quantize", "quantize")]
    sides += [(side, item.name) for side in ("input", "output", "weight") for item in fields(SpecOverride)]
    for side, name in sides:
        said = list(words(rules, node, side, name))
        top = max((strength for strength, _ in said), default=None)
        values = {value for strength, value in said if strength == top}
        if len(values) > 1 and found.get("quantize", True):
            return None
        if values and found.get("quantize", True):
            found["quantize" if side == "quantize" else f"{side}.{name}"] = next(iter(values))
    return found


overrides = st.one_of(
    st.none(), st.builds(SpecOverride, bits=st.sampled_from([None, 3, 4]), estimator=st.sampled_from([None, "mse"]))
)
keys = st.sampled_from(
    [{"op": "Conv"}, {"op": "convolution"}, {"op": "add"}, {"module": ".*"}, {"module": "conv"}, {"node": "conv"}]
)


@st.composite
def drawn_rules(draw: st.DrawFn) -> tuple[Rule, ...]:
    """Up to five rules that say something."""
    found = []
    for _ in range(draw(st.integers(0, 5))):
        said = {name: draw(overrides) for name in ("activation", "weight", "input", "output")}
        quantize = draw(st.sampled_from([None, None, True, False]))
        if quantize is not None or any(value is not None for value in said.values()):
            found.append(Rule(**draw(keys), quantize=quantize, **said))
    return tuple(found)


PROGRAM = residual_program()


@settings(max_examples=300, deadline=None)
@given(drawn_rules(), st.sampled_from(["conv", "block_0_conv", "block_0_add", "fc"]))
def test_settle_equals_a_brute_force_reference(rules: tuple[Rule, ...], name: str) -> None:
    node = PROGRAM.node(name)
    definition = TABLE.find(node, None)
    assert definition is not None
    expected = brute_force(rules, node)
    if expected is None:
        with pytest.raises(ConfigError, match="contradicts"):
            settle(node, definition, rules, defaults(U8, S8))
        return
    decision = settle(node, definition, rules, defaults(U8, S8))
    assert decision.quantize is expected.get("quantize", True)
    for side, base in (("input", U8), ("output", U8), ("weight", S8)):
        given_ = {key.split(".")[1]: value for key, value in expected.items() if key.startswith(f"{side}.")}
        assert getattr(decision, side).spec == SpecOverride(**given_).apply(base)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(drawn_rules(), st.randoms(use_true_random=False))
def test_order_of_rules_does_not_matter(rules: tuple[Rule, ...], random: object) -> None:
    node, shuffled = PROGRAM.node("conv"), list(rules)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    found = []
    for order in (rules, shuffled):
        try:
            decision = settle(node, TABLE.find(node, None), order, defaults(U8, S8))
            found.append((decision.quantize, decision.input.spec, decision.output.spec, decision.weight.spec))
        except ConfigError:
            found.append(None)  # type: ignore[arg-type]
    assert found[0] == found[1]


# --- what a rule can say --------------------------------------------------------------------------------------------


def test_output_changes_what_a_node_gives_and_its_readers_yield() -> None:
    program, _ = assigned(Rule(node="block_0_conv", output=SpecOverride(fixed=(0.0, 1.0))))
    conv, add = program.node("block_0_conv"), program.node("block_0_add")
    assert output_spec(conv) == input_spec(add, 0) == replace(U8, fixed=(0.0, 1.0))
    assert input_spec(conv, 0) == input_spec(add, 1) == output_spec(add) == U8
    assert add.meta["input_rules"][0] == "agrees with block_0_conv: node 'block_0_conv' (rules[0])"


def test_input_changes_what_a_node_reads_and_its_producer_yields() -> None:
    program, _ = assigned(Rule(node="block_0_conv", input=bits(4)))
    assert output_spec(program.node("relu")) == input_spec(program.node("block_0_add"), 1) == replace(U8, bits=4)
    assert output_spec(program.node("block_0_conv")) == U8


def test_weight_alone_is_changed() -> None:
    program, _ = assigned(Rule(module=r"block\..*", weight=bits(4)))
    conv = program.node("block_0_conv")
    assert input_spec(conv, 1) == replace(S8, bits=4) and input_spec(conv, 0) == output_spec(conv) == U8
    assert conv.meta["input_rules"] == {0: "defaults", 1: r"module 'block\..*' (rules[0])"}


def test_values_that_share_a_grid_get_one_spec() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.a(x).view(-1, 2, 2).transpose(1, 2).chunk(2, 1)
            found: torch.Tensor = self.b((left + right).flatten(1).repeat(1, 2))
            return found

    program = fxquant.capture(Net().eval(), torch.randn(2, 4))
    run_pass(AssignSpecs(rules=(Rule(op="add", input=bits(4)),)), program)
    add = program.node("add")
    moved = ["a", "reshape", "transpose", *(node.name for node in input_slots(add))]
    assert {name: output_spec(program.node(name)).bits for name in moved} == dict.fromkeys(moved, 4)  # type: ignore[union-attr]
    assert output_spec(add) == U8


def test_quantize_true_takes_back_what_a_less_specific_rule_excluded() -> None:
    rules = (Rule(op="Conv", quantize=False), Rule(node="block_0_conv", quantize=True))
    program, entry = assigned(*rules)
    assert program.node("conv").meta["float_reason"] == "excluded by rule op 'Conv' (rules[0])"
    assert output_spec(program.node("block_0_conv")) == U8 and vain(entry) == []


@pytest.mark.parametrize("quantize", [None, False])
def test_node_rule_speaks_of_a_graph_input(quantize: bool | None) -> None:
    program, entry = assigned(Rule(node="x", output=bits(6), quantize=quantize))
    conv = program.node("conv")
    assert input_spec(conv, 0) == (None if quantize is False else replace(U8, bits=6)) and output_spec(conv) == U8
    assert program.node("x").meta.get("float_reason", "") == (
        "" if quantize is None else "excluded by rule node 'x' (rules[0])"
    )
    assert vain(entry) == []


def test_node_rule_speaks_of_a_parameter() -> None:
    weight = next(
        node.name for node in residual_program().graph.nodes if node.op == "get_attr" and node.target == "fc.weight"
    )
    program, _ = assigned(Rule(node=weight, weight=bits(5)), Rule(op="Gemm", weight=SpecOverride(estimator="mse")))
    assert input_spec(program.node("fc"), 1) == replace(S8, bits=5, estimator="mse")
    assert program.node("fc").meta["input_rules"][1] == f"node '{weight}' (rules[0]), op 'Gemm' (rules[1])"


def test_relu_takes_its_own_output_and_can_be_excluded() -> None:
    program, _ = assigned(Rule(op="Relu", output=SpecOverride(fixed=(0.0, 6.0))))
    assert output_spec(program.node("relu")) == replace(U8, fixed=(0.0, 6.0))
    program, _ = assigned(Rule(op="Relu", quantize=False))
    assert "excluded" in program.node("relu").meta["float_reason"] and output_spec(program.node("relu")) is None


class Moved(nn.Module):
    """Two layers' results joined, pooled and split in halves, which two layers and a relu read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        joined = torch.cat([self.a(x), self.b(x)], 1)
        left, right = torch.max_pool2d(joined, 2).chunk(2, 1)
        return self.c(left), self.d(torch.relu(right))


@pytest.mark.parametrize(
    ("name", "in_float"),
    [
        ("cat", ["cat", "max_pool2d", "getitem", "getitem_1"]),
        ("max_pool2d", ["max_pool2d", "getitem", "getitem_1"]),
        ("chunk", ["getitem", "getitem_1"]),
    ],
)
def test_what_moves_or_joins_codes_is_left_in_float_with_its_value(name: str, in_float: list[str]) -> None:
    program = fxquant.capture(Moved().eval(), torch.randn(2, 4, 6, 6))
    entry = run_pass(AssignSpecs(rules=(Rule(node=name, quantize=False),)), program)
    assert vain(entry) == []
    nodes = [node for node in program.graph.nodes if node.name in in_float]
    assert [node.name for node in nodes] == in_float
    assert [output_spec(node) for node in nodes] == [None] * len(nodes)
    for node in nodes:
        assert "float_reason" in node.meta
        readers = [(user, input_slots(user).index(node)) for user in node.users]
        assert [input_spec(*reader) for reader in readers] == [None] * len(readers)
    assert output_spec(program.node("a")) == output_spec(program.node("c")) == U8
    assert input_spec(program.node("c"), 1) == S8 and input_spec(program.node("d"), 0) == U8  # behind the relu
    assert ("cat" in in_float) == (output_spec(program.node("cat")) is None)


def test_what_moves_float_values_is_quantized_for_its_readers_though_excluded() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)).eval()
    program = fxquant.capture(model, torch.randn(2, 4, 6, 6))
    run_pass(AssignSpecs(rules=(Rule(module="[01]", quantize=False),)), program)
    pool, last = program.node("_1"), program.node("_2")
    assert output_spec(pool) is None and input_spec(pool, 0) is None and input_spec(last, 0) == U8


def test_exclusion_of_moved_codes_asks_nothing_of_the_other_settings() -> None:
    program, _ = assigned(Rule(module=".*", weight=SpecOverride(strict=False)), Rule(op="Relu", quantize=True))
    assert input_spec(program.node("fc"), 1) == replace(S8, strict=False)
    assigned(Rule(module=".*", weight=SpecOverride(strict=True)))


def test_rule_that_takes_a_node_back_is_why() -> None:
    program, _ = assigned(Rule(op="Conv", quantize=False), Rule(node="block_0_conv", quantize=True))
    assert program.node("block_0_conv").meta["rule"] == "node 'block_0_conv' (rules[1])"


def test_what_one_rule_says_of_other_settings_stands() -> None:
    rules = (Rule(node="relu", output=SpecOverride(fixed=(0.0, 6.0))), Rule(op="Conv", activation=bits(4)))
    program, _ = assigned(*rules)
    assert input_spec(program.node("block_0_conv"), 0) == replace(U8, bits=4, fixed=(0.0, 6.0))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_contradiction_names_both_rules_the_node_and_the_values() -> None:
    text = refusal(
        Rule(op="Conv", weight=bits(4)), Rule(op="Gemm", quantize=True), Rule(op="convolution", weight=bits(8))
    )
    assert text == (
        "assign-specs: rules[2] contradicts rules[0] at node 'conv'; expected one value for 'weight.bits'; got 4 by "
        "rules[0], op 'Conv' and 8 by rules[2], op 'convolution'. Take it out of one of them, or say it in a more "
        'specific rule (node = "conv").'
    )
    settled = [Rule(node=name, weight=bits(2)) for name in ("conv", "block_0_conv")]
    assigned(Rule(op="Conv", weight=bits(4)), Rule(op="convolution", weight=bits(8)), *settled)


def test_contradiction_of_quantize_is_refused() -> None:
    text = refusal(Rule(module="fc", quantize=False), Rule(module="f.", quantize=True))
    assert "at node 'fc'; expected one value for 'quantize'; got false by rules[0], module 'fc' and true by" in text


def test_contradiction_between_maker_and_reader_tells_to_use_output() -> None:
    rules = (Rule(node="conv", activation=bits(4)), Rule(node="block_0_add", activation=bits(6)))
    text = refusal(*rules)
    assert "rules[1] contradicts rules[0] at the value of node 'relu'" in text and "write `output`" in text
    assert "got 4 as the output of relu, node 'conv' (rules[0]) and 6 as an input of block_0_add, node" in text
    program, _ = assigned(rules[0], Rule(node="block_0_add", output=bits(6)))
    assert output_spec(program.node("block_0_add")) == replace(U8, bits=6)
    assert input_spec(program.node("block_0_add"), 1) == replace(U8, bits=4)
    assert "Take it out of one" in refusal(Rule(node="conv", output=bits(4)), Rule(node="block_0_add", input=bits(6)))


@pytest.mark.parametrize("target", [Target.ONNXRUNTIME_X64, Target.TENSORRT])
def test_readers_of_an_input_may_differ_where_the_target_does_not_merge(target: Target) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    program = fxquant.capture(Two().eval(), torch.randn(2, 4))
    program.target = target
    run_pass(AssignSpecs(rules=(Rule(node="b", input=bits(4)), Rule(op="Gemm", input=bits(6)))), program)
    found = [input_spec(program.node(name), 0) for name in ("a", "b")]
    assert found == [replace(U8, bits=4 if target is Target.ONNXRUNTIME_X64 else 6), replace(U8, bits=4)]


def test_output_of_a_float_operation_is_changed_where_its_reader_wants_it_quantized() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)).eval()
    program = fxquant.capture(model, torch.randn(2, 4))
    entry = run_pass(AssignSpecs(rules=(Rule(op="LayerNormalization", output=bits(16)),)), program)
    assert input_spec(program.node("_1"), 0) == replace(U8, bits=16) and vain(entry) == []
    assert output_spec(program.node("_0")) is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(op="Convv", quantize=False), "rules[0]: op 'Convv' is unknown. Did you mean 'Conv'? Accepted: "),
        (Rule(module="blok.*", quantize=False), "rules[0]: module 'blok.*' matches nothing. Did you mean 'block'"),
        (Rule(module="block", quantize=False), "did you mean 'block\\..*'?"),
        (
            Rule(node="block_conv", quantize=False),
            "rules[0]: node 'block_conv' is not in the graph. Did you mean 'block_0_conv'",
        ),
        (
            Rule(node="fc", output=SpecOverride(strict=True)),
            "rules[0]: the spec of node 'fc' (output): QuantSpec.strict",
        ),
    ],
)
def test_rule_that_cannot_be_meant_is_refused_with_what_is_near(rule: Rule, message: str) -> None:
    assert message in refusal(rule)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"quantize": True}, "exactly one of op, module, node; got none"),
        ({"op": "Conv", "node": "x", "quantize": True}, "got op, node"),
        ({"op": "Conv"}, "expected one of quantize, activation, input, output, weight; got none"),
        ({"module": "(", "quantize": True}, "a regular expression"),
    ],
)
def test_rule_that_says_nothing_is_refused(arguments: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Rule(**arguments)  # type: ignore[arg-type]
    assert expected in str(caught.value)


# --- rules in vain are told in the trace ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            (Rule(op="Gelu", quantize=False),),
            ["rules[0] (assign-specs): op 'Gelu' matches no operation of this program"],
        ),
        (
            (Rule(op="Gemm", weight=bits(4)), Rule(node="fc", weight=bits(5))),
            ["rules[0] (assign-specs): op 'Gemm' decides nothing: more specific rules decide all that it says of 'fc'"],
        ),
        (
            (Rule(op="Gemm", quantize=False), Rule(node="fc", weight=bits(5))),
            [
                "rules[1] (assign-specs): node 'fc' decides nothing: in float stays 'fc' (excluded by rule op 'Gemm' "
                "(rules[0]))"
            ],
        ),
        (
            (Rule(op="Add", weight=bits(4)),),
            ["rules[0] (assign-specs): op 'Add' decides nothing: what it sets has no spec of its own at 'block_0_add'"],
        ),
        (
            (Rule(node="fc_bias", quantize=False), Rule(op="Gemm", quantize=True)),
            [
                "rules[0] (assign-specs): node 'fc_bias' decides nothing: what it sets has no spec of its own at "
                "'fc_bias'"
            ],
        ),
    ],
)
def test_rule_in_vain_is_told(rules: tuple[Rule, ...], expected: list[str]) -> None:
    program, entry = assigned(*rules)
    assert vain(entry) == expected
    told = [f"other: {note}" for note in (text.replace(" (assign-specs)", "") for text in expected)]
    assert [str(note) for note in program.notes][-len(told) :] == told


def test_quantize_true_of_what_has_no_integer_kernel_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval()
    program = fxquant.capture(model, torch.randn(2, 4))
    entry = run_pass(AssignSpecs(rules=(Rule(module=".*", quantize=True), Rule(module="1", quantize=True))), program)
    reason = "cannot quantize '_1' (layer_norm has no integer kernel)"
    assert vain(entry)[0] == f"rules[0] (assign-specs): module '.*' {reason}"
    assert "rules[1] (assign-specs): module '1' decides nothing: in float stays '_1'" in vain(entry)[1]


# --- rules in a file ------------------------------------------------------------------------------------------------

PIPELINE = """
[[prepare]]
pass = "fold-batch-norm"

[[prepare]]
pass = "assign-specs"
{rules}
[[prepare]]
pass = "insert-fake-quant"

[[finalize]]
pass = "settle-encodings"
"""


def parsed(rules: str, place: str = "int8.toml") -> Pipeline:
    """A pipeline from a file whose assign-specs has these lines."""
    return parse_pipeline(PIPELINE.format(rules=rules), "int8", place=place)


@pytest.mark.parametrize(
    "rules",
    [
        'rules = [{ module = "block\\\\..*", weight = { bits = 4 } }, { node = "fc", output = { fixed = [0, 1] } }]\n',
        '[[prepare.rules]]\nmodule = "block\\\\..*"\nweight.bits = 4\n'
        '[[prepare.rules]]\nnode = "fc"\noutput = { fixed = [0, 1] }\n',
    ],
)
def test_rules_are_read_from_toml_and_written_back(rules: str) -> None:
    pipeline = parsed(rules)
    (item,) = [item for item in pipeline.prepare_passes if isinstance(item, AssignSpecs)]
    expected = (Rule(module="block\\..*", weight=bits(4)), Rule(node="fc", output=SpecOverride(fixed=(0.0, 1.0))))
    assert item.rules == expected and item.rules[1].place == "int8.toml: prepare[1] assign-specs.rules[1]"
    again = parse_pipeline(pipeline.to_toml(), "again", place="again.toml")
    assert [type(item) for item in again.prepare_passes] == [type(item) for item in pipeline.prepare_passes]
    assert list(again.prepare_passes)[1] == item


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            '{ op = "Conv", quantize = true }, { module = "blok.*", quantize = false }',
            "rules[1]: module 'blok.*' matches nothing (int8.toml: prepare[1] assign-specs.rules[1]). Did you mean",
        ),
        (
            '{ op = "Conv", quantize = true }, { op = "Cnov", quantize = true }',
            "(int8.toml: prepare[1] assign-specs.rules[1])",
        ),
        ('{ node = "fcc", quantize = true }', "(int8.toml: prepare[1] assign-specs.rules[0]). Did you mean 'fc'"),
        (
            '{ op = "Conv", weight = { bits = 4 } }, { op = "Conv", weight = { bits = 8 } }',
            "(int8.toml: prepare[1] assign-specs.rules[0] and int8.toml: prepare[1] assign-specs.rules[1])",
        ),
    ],
)
def test_error_of_a_rule_names_its_place_in_the_file(rules: str, expected: str) -> None:
    pipeline = parsed(f"rules = [{rules}]")
    with pytest.raises(PassError) as caught:
        pipeline.prepare(residual_program())
    assert expected in str(caught.value)


def test_miss_of_a_rule_names_its_place_in_the_file() -> None:
    trace = parsed('rules = [{ op = "Gelu", quantize = false }]').prepare(residual_program())
    assert "rules[0] (int8.toml: prepare[1] assign-specs.rules[0]): op 'Gelu' matches no operation" in str(trace)


def test_why_names_the_file_of_the_rule() -> None:
    program = residual_program()
    parsed('rules = [{ node = "fc", output = { bits = 4 } }]').prepare(program)
    assert program.node("fc").meta["rule"] == "node 'fc' (int8.toml: prepare[1] assign-specs.rules[0])"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ('{ op = "Conv", quantize = "False" }', "assign-specs.rules[0].quantize); expected true or false"),
        (
            '{ op = "Conv", weigth = { bits = 4 } }',
            "key 'weigth' (int8.toml: prepare[1] assign-specs.rules[0]). Did you mean 'weight'",
        ),
        ('{ op = "Conv", weight = { bits = 99 } }', "assign-specs.rules[0].weight); expected 2 to 16"),
        ('{ op = "Conv", output = { fixed = [1, 0] } }', "assign-specs.rules[0].output); expected low < high"),
        ('{ op = "Conv", output = { estimator = "mes" } }', "assign-specs.rules[0].output). Did you mean 'mse'"),
        ('{ op = "Conv" }', "(int8.toml: prepare[1] assign-specs.rules[0]); expected one of quantize"),
        ('{ op = "Conv", place = "x", quantize = true }', "unknown key 'place'"),
    ],
)
def test_malformed_rule_is_refused_where_the_file_is_read(rules: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(f"rules = [{rules}]")
    assert expected in str(caught.value)


def test_rules_survive_the_file_and_the_copy(tmp_path: Path) -> None:
    program, _ = assigned(Rule(node="fc", weight=bits(4)))
    program.save(tmp_path / "a.fxq")
    for twin in (fxquant.load_program(tmp_path / "a.fxq"), program.copy()):
        assert twin.node("fc").meta["input_rules"][1] == "node 'fc' (rules[0])" and twin.stage is Stage.ASSIGNED


def test_check_rules_passes_known_operations_that_the_program_lacks() -> None:
    check_rules((Rule(op="Gelu", quantize=False), Rule(op="layer_norm", quantize=True)), residual_program(), TABLE)
