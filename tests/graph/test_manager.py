"""The manager refuses what a pass did not record, checks stages, and leaves a program whole when a pass fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from fxquant.errors import PassError, SpecError
from fxquant.graph.manager import PassManager
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage, ValueType
from fxquant.graph.render import render
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.spec import QuantSpec, Target
from tests.helpers import Builder, aten, quantized_program, residual_program

Action = Callable[[Program, Rewriter], None]
EVERY_STAGE = tuple(Stage)


@dataclass(frozen=True)
class Doing(Pass):
    """A pass that does whatever it is given."""

    name: ClassVar[str] = "doing"
    stages: ClassVar[tuple[Stage, ...]] = EVERY_STAGE
    contract: ClassVar[Contract] = Contract.CHANGES

    action: Action = lambda program, rewriter: None

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        self.action(program, rewriter)


def make_pass(
    name: str, stages: tuple[Stage, ...], leaves: Stage | None = None, action: Action = Doing.action, **more: Any
) -> Pass:
    """A pass with its own name, stages and deed."""
    members = {"name": name, "stages": stages, "leaves": leaves, **more}
    kind = type(name, (Doing,), members)
    item = kind(action)
    assert isinstance(item, Pass)
    return item


def run(program: Program, action: Action, **options: Any) -> Any:
    return PassManager([Doing(action)]).run(program, **options)


# What a pass may not do behind the rewriter's back: the deed, the program it is done to, and what the error must say.


def rewires(program: Program, rewriter: Rewriter) -> None:
    program.node("relu").args = (program.node("conv"),)


def mutates_kwargs(program: Program, rewriter: Rewriter) -> None:
    program.node("block_0_add").kwargs = {"alpha": 2}


def retargets(program: Program, rewriter: Rewriter) -> None:
    program.node("relu").target = aten.sigmoid.default


def erases(program: Program, rewriter: Rewriter) -> None:
    node = program.node("relu")
    node.replace_all_uses_with(program.node("bn"))
    program.graph.erase_node(node)


def creates(program: Program, rewriter: Rewriter) -> None:
    with program.graph.inserting_after(program.node("relu")):
        program.graph.call_function(aten.relu.default, (program.node("relu"),)).meta["type"] = ValueType(
            (), torch.float32
        )


def reorders(program: Program, rewriter: Rewriter) -> None:
    program.node("conv").prepend(program.node("fc_weight"))


def renames(program: Program, rewriter: Rewriter) -> None:
    program.node("relu").name = "relu_renamed"


def annotates(program: Program, rewriter: Rewriter) -> None:
    program.node("relu").meta["output_spec"] = QuantSpec()


def annotates_in_place(program: Program, rewriter: Rewriter) -> None:
    program.node("conv").meta["input_specs"][0] = QuantSpec(bits=4)


def overwrites_weight(program: Program, rewriter: Rewriter) -> None:
    with torch.no_grad():
        program.tensor(program.node("conv_weight")).mul_(2.0)


def overwrites_data(program: Program, rewriter: Rewriter) -> None:
    program.tensor(program.node("conv_weight")).data.mul_(2.0)


def replaces_weight(program: Program, rewriter: Rewriter) -> None:
    program.module.get_submodule("conv").weight = nn.Parameter(torch.zeros(4, 3, 3, 3))


def changes_statistics(program: Program, rewriter: Rewriter) -> None:
    program.module.get_submodule("bn").get_buffer("running_mean").add_(1.0)


def changes_eps(program: Program, rewriter: Rewriter) -> None:
    module = program.module.get_submodule("bn")
    assert isinstance(module, nn.BatchNorm2d)
    module.eps = 1.0


def replaces_module(program: Program, rewriter: Rewriter) -> None:
    program.module.bn = nn.BatchNorm2d(4)


def adds_module(program: Program, rewriter: Rewriter) -> None:
    program.module.add_submodule("fake_quants.conv", FakeQuant(QuantSpec()))


def changes_stage(program: Program, rewriter: Rewriter) -> None:
    program.stage = Stage.FINALIZED


def changes_target(program: Program, rewriter: Rewriter) -> None:
    program.target = Target.TENSORRT


def names_target(program: Program, rewriter: Rewriter) -> None:
    program.target = "tensorrt"  # type: ignore[assignment]  # the mistake under test


def changes_name(program: Program, rewriter: Rewriter) -> None:
    program.name = "mine"


def replaces_root(program: Program, rewriter: Rewriter) -> None:
    program.module = residual_program().module


def freezes_weight(program: Program, rewriter: Rewriter) -> None:
    for parameter in program.module.get_submodule("conv").parameters():
        parameter.requires_grad_(False)


def hooks_module(program: Program, rewriter: Rewriter) -> None:
    program.module.get_submodule("bn").register_forward_hook(lambda module, args, output: output * 2.0)


def hooks_root(program: Program, rewriter: Rewriter) -> None:
    program.module.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def replaces_graph(program: Program, rewriter: Rewriter) -> None:
    program.module.graph = fx.Graph()


def edits_what_it_recorded_before(program: Program, rewriter: Rewriter) -> None:
    rewriter.set_float_reason(program.node("relu"), "because")
    rewires(program, rewriter)


FAULTS = [
    (rewires, "unrecorded edit: args of node 'relu' was changed", "relu"),
    (mutates_kwargs, "unrecorded edit: kwargs of node 'block_0_add' was changed", "block_0_add"),
    (retargets, "unrecorded edit: target of node 'relu' was changed", "relu"),
    (erases, "unrecorded edit: node 'relu' was erased", "relu"),
    (creates, "unrecorded edit: node 'relu_default' was created", "relu_default"),
    (reorders, "unrecorded edit: node 'fc_weight' stands where 'conv' stood", "fc_weight"),
    (renames, "unrecorded edit: node 'relu' was erased", "relu"),
    (annotates, "unrecorded edit: meta of node 'relu' was changed", "relu"),
    (annotates_in_place, "unrecorded edit: meta of node 'conv' was changed", "conv"),
    (overwrites_weight, "unrecorded edit: tensor 'conv.weight' was changed", "conv.weight"),
    (overwrites_data, "unrecorded edit: tensor 'conv.weight' was changed", "conv.weight"),
    (replaces_weight, "unrecorded edit: tensor 'conv.weight' was changed", "conv.weight"),
    (changes_statistics, "unrecorded edit: tensor 'bn.running_mean' was changed", "bn.running_mean"),
    (changes_eps, "unrecorded edit: 'eps' of module 'bn' was changed from 0.001 to 1.0", "bn"),
    (replaces_module, "unrecorded edit: module 'bn' was changed", "bn"),
    (adds_module, "unrecorded edit: module 'fake_quants' was added", "fake_quants"),
    (changes_stage, "unrecorded edit: stage of the program was changed from captured to finalized", ""),
    (changes_target, "unrecorded edit: target of the program was changed from Target.ONNXRUNTIME_X64 to", ""),
    (names_target, "unrecorded edit: target of the program was changed from Target.ONNXRUNTIME_X64 to 'tensorrt'", ""),
    (changes_name, "unrecorded edit: name of the program was changed from 'tiny' to 'mine'", ""),
    (replaces_root, "unrecorded edit: the graph was replaced", ""),
    (
        freezes_weight,
        "unrecorded edit: requires_grad of tensor 'conv.weight' was changed from True to False",
        "conv.weight",
    ),
    (hooks_module, "unrecorded edit: hooks (forward_hooks) of module 'bn' were changed", "bn"),
    (hooks_root, "unrecorded edit: hooks (forward_pre_hooks) of module '' were changed", ""),
    (replaces_graph, "unrecorded edit: the graph was replaced", ""),
    (edits_what_it_recorded_before, "unrecorded edit: args of node 'relu' was changed", "relu"),
]


@pytest.mark.parametrize("deed, said, node", FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_unrecorded_edit_is_refused_by_name(deed: Action, said: str, node: str) -> None:
    program = residual_program()
    program.node("conv").meta["input_specs"] = {0: QuantSpec()}
    with pytest.raises(PassError) as caught:
        run(program, deed)
    assert f"doing: {said}" in str(caught.value)
    assert caught.value.pass_name == "doing"
    assert caught.value.node.startswith(node)
    assert caught.value.rendered.startswith("program 'tiny'")


OVERWRITING = (overwrites_weight, overwrites_data, changes_statistics)


@pytest.mark.parametrize(
    "deed", [fault[0] for fault in FAULTS if fault[0] not in OVERWRITING], ids=lambda f: f.__name__
)
def test_refused_pass_leaves_the_program_as_it_was(deed: Action) -> None:
    program = residual_program()
    program.node("conv").meta["input_specs"] = {0: QuantSpec()}
    x = torch.ones(2, 3, 8, 8)
    text, fingerprint, expected = render(program), program.fingerprint(), program.module(x)
    with pytest.raises(PassError) as caught:
        run(program, deed)
    assert "the program was rolled back" in "".join(caught.value.__notes__)
    assert render(program) == text
    assert program.fingerprint() == fingerprint
    assert (program.stage, program.target, program.name) == (Stage.CAPTURED, Target.ONNXRUNTIME_X64, "tiny")
    assert all(parameter.requires_grad for parameter in program.module.parameters())
    assert torch.equal(program.module(x), expected)
    run(program, lambda program, rewriter: None)


@pytest.mark.parametrize("deed", OVERWRITING, ids=lambda f: f.__name__)
def test_refused_pass_says_which_values_are_lost(deed: Action) -> None:
    with pytest.raises(PassError) as caught:
        run(residual_program(), deed)
    path = "bn.running_mean" if deed is changes_statistics else "conv.weight"
    assert f"the old values of '{path}', overwritten in place without the rewriter, are lost" in str(caught.value)
    assert str(caught.value).endswith("capture the model again.")
    assert caught.value.node == path and caught.value.rendered.startswith("program 'tiny'")


def test_interrupted_pass_that_overwrote_values_says_so() -> None:
    def is_interrupted(program: Program, rewriter: Rewriter) -> None:
        overwrites_weight(program, rewriter)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(residual_program(), is_interrupted)
    assert "the old values of 'conv.weight'" in "".join(caught.value.__notes__)


def test_buffer_made_differentiable_is_refused_and_detached() -> None:
    def attaches(program: Program, rewriter: Rewriter) -> None:
        program.module.get_buffer("bn.running_mean").mul_(program.module.get_parameter("fc.bias").sum())

    program = residual_program()
    with pytest.raises(PassError, match=r"tensor 'bn.running_mean' was changed.*are lost"):
        run(program, attaches)
    assert not program.module.get_buffer("bn.running_mean").requires_grad


def test_requires_grad_and_hooks_changed_while_editing_are_accepted() -> None:
    def edits(program: Program, rewriter: Rewriter) -> None:
        with rewriter.editing("conv"):
            freezes_weight(program, rewriter)
        with rewriter.editing("bn"):
            hooks_module(program, rewriter)

    program = residual_program()
    run(program, edits)
    assert not program.module.get_parameter("conv.weight").requires_grad


def test_hook_of_the_user_stays_when_a_pass_is_refused() -> None:
    def unhooks(program: Program, rewriter: Rewriter) -> None:
        handle.remove()

    program = residual_program()
    handle = program.module.get_submodule("bn").register_forward_hook(lambda module, args, output: output * 2.0)
    x = torch.ones(2, 3, 8, 8)
    expected = program.module(x)
    with pytest.raises(PassError, match=r"hooks \(forward_hooks\) of module 'bn' were changed"):
        run(program, unhooks)
    assert torch.equal(program.module(x), expected)


def test_program_that_cannot_be_printed_is_rolled_back_all_the_same() -> None:
    def breaks(program: Program, rewriter: Rewriter) -> None:
        program.module = "model"  # type: ignore[assignment]  # the mistake under test

    program = residual_program()
    text = render(program)
    with pytest.raises(PassError, match="doing: ") as caught:
        run(program, breaks)
    assert caught.value.rendered.startswith("the graph cannot be printed: AttributeError")
    assert render(program) == text


def test_fake_quant_mode_changed_behind_the_rewriter_is_refused() -> None:
    def thaws(program: Program, rewriter: Rewriter) -> None:
        for _, module in program.fake_quant_nodes():
            module.mode = Mode.OFF

    program = quantized_program()
    with pytest.raises(PassError, match=r"'mode' of module 'fake_quants\.\w+' was changed from Mode.FAKE to Mode.OFF"):
        run(program, thaws)
    assert all(module.mode is Mode.FAKE for _, module in program.fake_quant_nodes())


def test_recorded_edits_of_every_kind_are_accepted() -> None:
    def edits(program: Program, rewriter: Rewriter) -> None:
        relu, conv = program.node("relu"), program.node("conv")
        new = rewriter.call_function(aten.sigmoid.default, (relu,), name="gate", before=relu.next, like=relu)
        rewriter.replace_uses(relu, new)
        rewriter.set_arg(conv, 3, [1, 1])
        rewriter.set_target(new, aten.tanh.default)
        rewriter.move(program.node("fc_weight"), conv)
        rewriter.set_output_spec(relu, QuantSpec(), rule="mine")
        rewriter.set_tensor("conv.weight", torch.zeros(4, 3, 3, 3))
        rewriter.add_tensor("conv.extra", torch.zeros(2), parameter=False)
        rewriter.add_module("fake_quants.relu", FakeQuant(QuantSpec()))
        with rewriter.editing("bn") as module:
            module.get_buffer("running_mean").zero_()
        rewriter.note(Note(NoteKind.OTHER, "relu", "gated"))

    program = residual_program()
    (entry,) = run(program, edits).entries
    assert entry.modified
    assert "gate = aten.tanh(relu)" in render(program)
    assert program.notes == (Note(NoteKind.OTHER, "relu", "gated"),)
    assert not program.module.get_parameter("conv.weight").any()


def test_edit_in_place_that_fails_later_is_given_back() -> None:
    def edits_and_fails(program: Program, rewriter: Rewriter) -> None:
        with rewriter.editing("bn") as module:
            module.get_buffer("running_mean").zero_()
        raise ValueError("no luck")

    program = residual_program()
    before = program.module.get_submodule("bn").get_buffer("running_mean").clone()
    with pytest.raises(PassError, match="ValueError: no luck"):
        run(program, edits_and_fails)
    assert torch.equal(program.module.get_submodule("bn").get_buffer("running_mean"), before)


def test_set_tensor_keeps_ties() -> None:
    program = residual_program()
    program.module.get_submodule("bn").register_parameter("twin", program.module.get_parameter("conv.weight"))
    run(program, lambda program, rewriter: rewriter.set_tensor("conv.weight", torch.ones(4, 3, 3, 3)))
    assert program.module.get_parameter("bn.twin") is program.module.get_parameter("conv.weight")
    assert torch.equal(program.module.get_parameter("bn.twin"), torch.ones(4, 3, 3, 3))


# Errors raised inside a pass


def test_error_in_a_pass_names_pass_and_node_and_shows_the_lines_around() -> None:
    def fails(program: Program, rewriter: Rewriter) -> None:
        for node in program.graph.nodes:
            if node.name == "block_0_add":
                raise ZeroDivisionError("nothing to divide")

    with pytest.raises(
        PassError, match="doing: node 'block_0_add'; got ZeroDivisionError: nothing to divide"
    ) as caught:
        run(residual_program(), fails)
    assert caught.value.node == "block_0_add"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "> block_0_add = aten.add(block_0_conv, relu)" in "".join(caught.value.__notes__)
    assert caught.value.rendered == render(residual_program())


@pytest.mark.parametrize(
    "err, said",
    [(ValueError("no luck"), "got ValueError: no luck."), (ValueError(), "got ValueError without a text.")],
    ids=["text", "no text"],
)
def test_error_at_no_node_says_where_the_graph_is(err: ValueError, said: str) -> None:
    def fails(program: Program, rewriter: Rewriter) -> None:
        raise err

    with pytest.raises(PassError) as caught:
        run(residual_program(), fails)
    remedy = "The graph as the pass left it is on `.rendered` of this error."
    assert str(caught.value) == f"doing: the pass failed; {said} {remedy}"


def test_fxquant_error_in_a_pass_keeps_its_parts() -> None:
    def fails(program: Program, rewriter: Rewriter) -> None:
        raise SpecError("range", place="here", expected="finite bounds", got="nan", remedy="Look.")

    with pytest.raises(PassError) as caught:
        run(residual_program(), fails)
    assert str(caught.value) == "doing: range (here); expected finite bounds; got nan. Look."
    assert isinstance(caught.value.__cause__, SpecError)


def test_interrupted_pass_is_rolled_back() -> None:
    def is_interrupted(program: Program, rewriter: Rewriter) -> None:
        rewriter.set_float_reason(program.node("relu"), "half done")
        raise KeyboardInterrupt

    program = residual_program()
    with pytest.raises(KeyboardInterrupt):
        run(program, is_interrupted)
    assert "float_reason" not in program.node("relu").meta


def test_passes_before_the_failing_one_stay_done() -> None:
    def fails(program: Program, rewriter: Rewriter) -> None:
        raise ValueError("no")

    reason = make_pass(
        "reason", (Stage.CAPTURED,), Stage.ASSIGNED, lambda p, r: r.set_float_reason(p.node("relu"), "so")
    )
    program = residual_program()
    with pytest.raises(PassError, match="failing"):
        PassManager([reason, make_pass("failing", (Stage.ASSIGNED,), None, fails)]).run(program)
    assert program.stage is Stage.ASSIGNED
    assert program.node("relu").meta["float_reason"] == "so"


# Lint


def breaks_order(program: Program, rewriter: Rewriter) -> None:
    rewriter.move(program.node("conv"), program.node("x"))


def drops_type(program: Program, rewriter: Rewriter) -> None:
    rewriter.set_type(program.node("relu"), None)


def reads_nothing(program: Program, rewriter: Rewriter) -> None:
    rewriter.remove_module("conv")


def mistypes_weight(program: Program, rewriter: Rewriter) -> None:
    rewriter.set_tensor("conv.weight", torch.zeros(4, 3, 5, 5))


@pytest.mark.parametrize(
    "deed, said",
    [
        (breaks_order, "definitions before uses"),
        (drops_type, "node 'relu'.*expected meta 'type'"),
        (reads_nothing, "node 'conv_weight'.*expected the path of a parameter or buffer; got 'conv.weight'"),
        (mistypes_weight, r"node 'conv_weight'.*expected float32\[4, 3, 3, 3\]; got float32\[4, 3, 5, 5\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ill_formed_graph_is_refused(deed: Action, said: str) -> None:
    program = residual_program()
    text = render(program)
    with pytest.raises(PassError, match=said):
        run(program, deed)
    assert render(program) == text


def test_bias_that_names_no_fake_quants_is_refused() -> None:
    def unlinks(program: Program, rewriter: Rewriter) -> None:
        rewriter.set_arg(program.node("conv_bias_fq"), 1, program.node("x"))

    with pytest.raises(PassError, match="node 'conv_bias_fq'.*the FakeQuant nodes of input and weight"):
        run(quantized_program(), unlinks)


def test_second_owner_of_a_range_is_refused() -> None:
    def calls_twice(program: Program, rewriter: Rewriter) -> None:
        last = program.node("sigmoid")
        new = rewriter.call_module("fake_quants.conv", (last,), name="sigmoid_fq", before=last.next, like=last)
        rewriter.replace_uses(last, new)

    with pytest.raises(
        PassError, match="one owner of the range of 'fake_quants.conv'; got two: 'conv_fq' and 'sigmoid_fq'"
    ):
        run(quantized_program(), calls_twice)


# Stages


def test_wrong_stage_order_is_refused_when_the_list_is_built() -> None:
    assign = make_pass("assign", (Stage.CAPTURED,), Stage.ASSIGNED)
    insert = make_pass("insert", (Stage.ASSIGNED,), Stage.INSERTED)
    fold = make_pass("fold", (Stage.CAPTURED,))
    with pytest.raises(PassError) as caught:
        PassManager([fold, insert, assign])
    assert str(caught.value) == (
        "pass 2 'insert' cannot run after 'fold'; expected a program at stage assigned; "
        "got stage captured, which 'fold' runs at and leaves as it is. Move 'assign' before 'insert'."
    )
    with pytest.raises(
        PassError, match="pass 3 'fold' cannot run after 'insert'.*got stage inserted.*Move 'fold' before"
    ):
        PassManager([assign, insert, fold])
    with pytest.raises(PassError, match="Put a pass that leaves stage assigned between 'fold' and 'insert'"):
        PassManager([fold, PassManager([insert])])


def test_nested_managers_run_in_place() -> None:
    order: list[str] = []

    def noting(name: str) -> Pass:
        return make_pass(name, EVERY_STAGE, None, lambda program, rewriter: order.append(name))

    manager = PassManager([noting("a"), PassManager([noting("b"), PassManager([noting("c")])]), noting("d")])
    trace = manager.run(residual_program())
    assert order == ["a", "b", "c", "d"] == [entry.pass_name for entry in trace]
    assert len(manager) == 4


def test_possible_entries_are_those_that_reach_the_end() -> None:
    freeze = make_pass("freeze", (Stage.INSERTED, Stage.CALIBRATED))
    settle = make_pass("settle", (Stage.CALIBRATED,), Stage.FINALIZED)
    assert PassManager([freeze]).entries == (Stage.INSERTED, Stage.CALIBRATED)
    assert PassManager([freeze, settle]).entries == (Stage.CALIBRATED,)
    assert PassManager([]).entries == tuple(Stage)
    assert PassManager([freeze, settle]).stage_after(Stage.CALIBRATED) is Stage.FINALIZED


def test_wrong_stage_is_refused_at_run() -> None:
    settle = PassManager([make_pass("settle", (Stage.CALIBRATED,))])
    with pytest.raises(
        PassError, match="'settle' cannot run; expected a program at stage calibrated; got stage captured"
    ):
        settle.run(residual_program())
    program = residual_program()
    program.stage = Stage.INSERTED
    with pytest.raises(PassError, match="Calibrate the program first"):
        settle.run(program)


def test_pass_class_instead_of_pass_is_refused() -> None:
    with pytest.raises(PassError, match=r"Write Doing\(\), with brackets"):
        PassManager([Doing])  # type: ignore[list-item]  # the mistake under test


def test_name_instead_of_pass_is_refused() -> None:
    with pytest.raises(PassError, match=r"got 'fold-batch-norm'. Write FoldBatchNorm\(\), or name passes in a TOML"):
        PassManager(["fold-batch-norm"])  # type: ignore[list-item]  # the mistake under test


# Contracts


def test_preserving_pass_that_changes_outputs_is_refused() -> None:
    def halves(program: Program, rewriter: Rewriter) -> None:
        rewriter.set_tensor("fc.bias", program.module.get_parameter("fc.bias") * 0.99)

    liar = make_pass("liar", EVERY_STAGE, None, halves, contract=Contract.PRESERVES)
    honest = make_pass("honest", EVERY_STAGE, None, halves, contract=Contract.CHANGES)
    x = torch.ones(2, 3, 8, 8)
    program = residual_program()
    text = program.fingerprint()
    with pytest.raises(
        PassError, match="liar: output 0 changed, though the pass promises to preserve it.*at most 0.0001"
    ):
        PassManager([liar]).run(program, check_inputs=(x,))
    assert program.fingerprint() == text
    PassManager([liar]).run(residual_program(), check_inputs=x, tolerance=0.1)
    PassManager([honest]).run(residual_program(), check_inputs={"x": x})
    PassManager([liar]).run(residual_program())


def test_output_check_leaves_no_trace_in_observers_and_statistics() -> None:
    def annotates(program: Program, rewriter: Rewriter) -> None:
        rewriter.set_float_reason(program.node("relu"), "checked")

    build = Builder()
    x = build.input("x", 3, 8, 8)
    norm = build.batch_norm("bn", x)
    relu = build.relu("relu", norm)
    build.output(build.fake_quant(relu, QuantSpec()))
    program = build.program()
    program.module.train()
    for _, module in program.fake_quant_nodes():
        module.mode = Mode.OBSERVE
    before = {key: value.clone() for key, value in program.module.state_dict().items()}
    item = make_pass("annotate", EVERY_STAGE, None, annotates, contract=Contract.PRESERVES)
    PassManager([item]).run(program, check_inputs=torch.full((2, 3, 8, 8), 9.0))
    assert program.module.training
    assert all(
        torch.equal(value, before[key]) or value.isnan().all() for key, value in program.module.state_dict().items()
    )


def test_recompilation_happens_once_for_each_pass_that_edited_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    recompile = Program.recompile

    def counting(self: Program) -> None:
        nonlocal count
        count += 1
        recompile(self)

    def gates_twice(program: Program, rewriter: Rewriter) -> None:
        rewriter.set_target(program.node("relu"), aten.sigmoid.default)
        rewriter.set_target(program.node("relu"), aten.tanh.default)

    monkeypatch.setattr(Program, "recompile", counting)
    program = residual_program()
    nothing = Doing()
    annotate = Doing(lambda p, r: r.set_float_reason(p.node("relu"), "x"))
    PassManager([nothing, annotate, Doing(gates_twice), nothing]).run(program)
    assert count == 1
    assert "tanh" in program.module.code


def test_untouched_tensor_is_not_taken_for_changed_when_others_of_its_shape_are_added() -> None:
    def adds(program: Program, rewriter: Rewriter) -> None:
        for index in range(3):
            rewriter.add_tensor(f"conv.more_{index}", torch.zeros(4, 3, 3, 3), parameter=False)

    program = residual_program()
    program.module.register_buffer("large", torch.arange(5002.0))
    run(program, adds)
    run(program, lambda program, rewriter: rewriter.add_tensor("other", torch.arange(5002.0), parameter=False))


TENSORS = {
    "scalar": torch.tensor(3.0),
    "odd count": torch.arange(7.0),
    "even count": torch.arange(8.0),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "large": torch.arange(5001.0),
    "half": torch.arange(6.0).half(),
    "bool": torch.tensor([True, False, True]),
    "int64": torch.arange(5),
    "complex": torch.complex(torch.arange(4.0), torch.ones(4)),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("twins", [1, 3])
def test_data_of_any_kind_overwritten_without_a_version_is_seen(name: str, twins: int) -> None:
    program = residual_program()
    for index in range(twins):
        program.module.register_buffer(f"own_{index}", TENSORS[name].clone())

    def overwrites_last(program: Program, rewriter: Rewriter) -> None:
        data = program.module.get_buffer(f"own_{twins - 1}").data
        data[(-1,) * data.ndim] = 0

    run(program, lambda program, rewriter: None)
    if TENSORS[name].numel() == 0:
        return
    with pytest.raises(PassError, match=f"tensor 'own_{twins - 1}' was changed"):
        run(program, overwrites_last)
