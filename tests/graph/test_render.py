"""The printed graph is stable, complete and readable, and prints graphs that a pass has broken too."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxquant.graph.program import Stage, ValueType
from fxquant.graph.render import diff, excerpt, render, render_node
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.spec import Granularity, Limits, QuantSpec
from tests.helpers import Builder, assert_golden, aten, quantized_program, residual_program


def test_residual_program_prints_as_the_golden_file() -> None:
    assert_golden(render(residual_program()), "render_residual.txt")


def test_quantized_program_prints_as_the_golden_file() -> None:
    assert_golden(render(quantized_program()), "render_quantized.txt")


def test_printing_twice_or_a_copy_gives_the_same_text() -> None:
    program = quantized_program()
    assert render(program) == str(program) == render(program.copy()) == render(quantized_program())
    assert "0x" not in render(program)


def test_every_node_prints_on_one_line() -> None:
    program = residual_program()
    lines = render(program).splitlines()
    assert [line.split(" = ")[0] for line in lines[1:]] == [node.name for node in program.graph.nodes]


def line(build: Builder, node: fx.Node, stage: Stage = Stage.CAPTURED) -> str:
    """The line of one node of a program that returns it."""
    build.output(node)
    return render_node(build.program(stage=stage), node)


def test_defaults_are_left_out_and_options_named() -> None:
    build = Builder()
    x = build.input("x", 4, 9, 9)
    conv = build.conv("conv", x, 8, 3, stride=2, padding=0, groups=4, bias=False)
    assert line(build, conv) == (
        "conv = aten.convolution(x, conv_weight, stride=2, groups=4) : float32[s0, 8, 4, 4]  @conv"
    )


def test_option_that_differs_between_axes_prints_in_full() -> None:
    build = Builder()
    weight = build.tensor("conv.weight", torch.zeros(2, 3, 1, 1))
    x = build.input("x", 3, 9, 9)
    conv = build.call("conv", aten.convolution.default, x, weight, None, [1, 2], [0, 0], [1, 1], False, [0, 0], 1)
    assert "stride=[1, 2])" in line(build, conv)


def test_numbers_lists_and_slices_print_as_written() -> None:
    build = Builder()
    x = build.input("x", 4)
    total = build.call("cat", aten.cat.default, [x, build.call("clamp", aten.clamp.default, x, -1.0, 2)], 1)
    assert line(build, total) == "cat = aten.cat([x, clamp], dim=1) : float32[s0, 8]  @cat"
    program = build.program()
    assert render_node(program, program.node("clamp")).startswith("clamp = aten.clamp(x, min=-1.0, max=2)")


def test_false_is_not_taken_for_zero() -> None:
    build = Builder()
    softmax = build.call("softmax", aten._softmax.default, build.input("x", 4), 1, False)
    assert "half_to_float=False" in line(build, softmax)


def test_several_outputs_print_their_types_and_getitem_its_index() -> None:
    build = Builder()
    split = build.call("split", aten.split.Tensor, build.input("x", 4), 2, 1)
    second = build.call("second", __import__("operator").getitem, split, 1)
    assert line(build, second) == "second = getitem(split, 1) : float32[s0, 2]  @second"
    program = build.program()
    assert ": (float32[s0, 2], float32[s0, 2])" in render_node(program, program.node("split"))


def test_scalar_has_no_type() -> None:
    build = Builder()
    size = build.call("size", aten.sym_size.int, build.input("x", 4), 0)
    assert line(build, size) == "size = aten.sym_size.int(x, dim=0)  @size"


def test_modules_print_what_they_were_made_with() -> None:
    build = Builder()
    x = build.input("x", 4, 8, 8)
    drop = build.module("drop", "head.drop", nn.Dropout(0.25), x)
    assert line(build, drop) == "drop = Dropout[head.drop](x, p=0.25) : float32[s0, 4, 8, 8]  @head.drop"


def test_specs_rule_and_float_reason_print_behind_the_node() -> None:
    build = Builder()
    relu = build.relu("relu", build.input("x", 4))
    relu.meta.update(
        {
            "output_spec": QuantSpec(limits=Limits(0.0, 6.0)),
            "input_specs": {0: QuantSpec(bits=4, signed=True, symmetric=True)},
            "rule": "op = 'relu'",
            "float_reason": "excluded",
            "shares_encoding_with": "x",
        }
    )
    assert line(build, relu).endswith(
        "{output u8 asymmetric per-tensor within [0, 6]; x as s4 symmetric per-tensor; shares the grid of x; "
        "rule op = 'relu'; float: excluded}"
    )


def test_fake_quant_prints_spec_mode_and_grid() -> None:
    build = Builder()
    x = build.input("x", 4)
    node = build.fake_quant(x, QuantSpec(granularity=Granularity(1)), -1.0, 3.0)
    text = line(build, node)
    assert text.endswith("{u8 asymmetric per-channel(1), mode=fake, 4 scales 0.0156863..0.0156863 zp=64}")
    module = build.program().fake_quant(node)
    assert isinstance(module, FakeQuant)
    module.mode = Mode.OBSERVE
    module.scale.fill_(float("nan"))
    assert render_node(build.program(), node).endswith("mode=observe, no range yet}")


def test_shared_range_names_its_owner() -> None:
    build = Builder()
    owner = build.fake_quant(build.input("x", 4), QuantSpec())
    node = build.graph.create_node("call_module", owner.target, (owner,), {"observe": False}, name="twin")
    node.meta["type"] = ValueType(("s0", 4), torch.float32)
    assert line(build, node).endswith("range of x}")
    assert "FakeQuant(x_fq, observe=False)" in render_node(build.program(), node)


def test_broken_graph_still_prints() -> None:
    program = residual_program()
    del program.module.bn
    program.node("relu").args = ()
    text = render(program)
    assert "bn = missing module[bn](conv)" in text
    assert "relu = aten.relu()" in text


def test_diff_shows_only_what_differs() -> None:
    old, new = residual_program(), residual_program()
    assert diff(old, new) == ""
    new.node("relu").target = aten.sigmoid.default
    changed = [text for text in diff(old, new).splitlines()[2:] if text[0] in "+-"]
    assert changed == [
        "-relu = aten.relu(bn) : float32[s0, 4, 8, 8]  @relu",
        "+relu = aten.sigmoid(bn) : float32[s0, 4, 8, 8]  @relu",
    ]


def test_excerpt_marks_the_node_and_is_empty_for_an_unknown_one() -> None:
    text = excerpt(residual_program(), "relu", context=1).splitlines()
    assert [part[:2] for part in text] == ["  ", "> ", "  "]
    assert text[1].startswith("> relu = ")
    assert excerpt(residual_program(), "nothing") == ""
