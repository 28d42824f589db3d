"""Drawings are well-formed, show what they should, and boxes and edges keep clear of each other."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import FxquantError
from fxquant.graph.draw import draw, to_dot, to_svg
from fxquant.graph.islands import Island, islands
from fxquant.graph.layout import COLUMN_GAP, ROW_GAP, Layout, lay_out
from fxquant.spec import QuantSpec
from tests.helpers import Builder, aten, quantized_program, residual_program

SVG = "{http://www.w3.org/2000/svg}"


def test_islands_tell_integer_from_float() -> None:
    program = quantized_program()
    found = {node.name: island for node, island in islands(program).items()}
    assert found == {
        "x": Island.BOUNDARY,
        "x_fq": Island.QUANTIZER,
        "conv_weight": Island.CONSTANT,
        "conv_weight_fq": Island.QUANTIZER,
        "conv_bias": Island.CONSTANT,
        "conv_bias_fq": Island.QUANTIZER,
        "conv": Island.INTEGER,
        "conv_fq": Island.QUANTIZER,
        "sigmoid": Island.FLOAT,
        "output": Island.BOUNDARY,
    }


def test_absorbed_activation_belongs_to_its_layer() -> None:
    build = Builder()
    x = build.fake_quant(build.input("x", 3, 8, 8), QuantSpec())
    weight = build.fake_quant(
        build.tensor("conv.weight", build.random(4, 3, 1, 1)), QuantSpec(signed=True, symmetric=True)
    )
    conv = build.call("conv", aten.convolution.default, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    relu = build.relu("relu", conv)
    build.output(build.fake_quant(relu, QuantSpec()), build.call("size", aten.sym_size.int, x, 0))
    found = islands(build.program())
    assert (found[conv], found[relu]) == (Island.INTEGER, Island.INTEGER)
    assert found[build.program().node("size")] is Island.INDEX


def test_layer_with_a_float_reader_is_float() -> None:
    build = Builder()
    x = build.fake_quant(build.input("x", 3, 8, 8), QuantSpec())
    weight = build.fake_quant(
        build.tensor("conv.weight", build.random(4, 3, 1, 1)), QuantSpec(signed=True, symmetric=True)
    )
    conv = build.call("conv", aten.convolution.default, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    build.output(build.fake_quant(conv, QuantSpec()), conv)
    assert islands(build.program())[conv] is Island.FLOAT


def test_unquantized_program_is_all_float() -> None:
    found = set(islands(residual_program()).values())
    assert found == {Island.BOUNDARY, Island.CONSTANT, Island.FLOAT}


def test_svg_is_xml_with_a_box_for_each_node_but_constants() -> None:
    root = ElementTree.fromstring(to_svg(quantized_program()))
    titles = [group.find(f"{SVG}title") for group in root.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    last_lines = [(title.text or "").splitlines()[-1].split(" = ")[0] for title in titles if title is not None]
    assert last_lines == ["x", "x_fq", "conv", "conv_fq", "sigmoid", "output"]
    text = "".join(root.itertext())
    assert "codes in, codes out (1)" in text and "float (1)" in text and "quantizer (2)" in text
    assert "conv_weight = get conv.weight" not in text and "conv_weight_fq = FakeQuant" in text
    edges = [path for path in root.iter(f"{SVG}path") if path.get("marker-end")]
    assert len(edges) == 5


def test_svg_escapes_names() -> None:
    program = residual_program()
    program.name = "<a & b>"
    ElementTree.fromstring(to_svg(program))


def test_dot_has_a_node_for_each_box_and_every_edge() -> None:
    program = quantized_program()
    program.name = 'a "b" \\'
    text = to_dot(program)
    assert text.startswith('digraph "a \\"b\\" \\\\" {') and text.endswith("}\n")
    names = re.findall(r'^  "(\w+)" \[label=', text, re.MULTILINE)
    assert names == ["x", "x_fq", "conv", "conv_fq", "sigmoid", "output"]
    edges = re.findall(r'^  "(\w+)" -> "(\w+)";$', text, re.MULTILINE)
    assert edges == list(itertools.pairwise(names))


@pytest.mark.parametrize("suffix, start", [(".svg", "<svg "), (".dot", 'digraph "tiny"')])
def test_suffix_decides(suffix: str, start: str, tmp_path: Path) -> None:
    path = tmp_path / f"graph{suffix}"
    residual_program().draw(path)
    assert path.read_text(encoding="utf-8").startswith(start)


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="expected a name that ends in .svg or .dot; got '.png'"):
        draw(residual_program(), tmp_path / "graph.png")
    assert list(tmp_path.iterdir()) == []


def test_drawing_is_the_same_every_time() -> None:
    assert to_svg(residual_program()) == to_svg(residual_program())


graphs = st.integers(1, 14).flatmap(
    lambda count: st.tuples(
        st.lists(st.tuples(st.floats(20, 200), st.floats(16, 50)), min_size=count, max_size=count),
        st.lists(
            st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda e: e[0] < e[1]), unique=True
        ),
    )
)


def boxes_of(layout: Layout, sizes: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    found = []
    for index, (width, height) in enumerate(sizes):
        x, y = layout.centres[index]
        found.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return found


@given(graph=graphs)
def test_boxes_do_not_overlap_and_edges_go_down(graph: tuple[list[tuple[float, float]], list[tuple[int, int]]]) -> None:
    sizes, edges = graph
    layout = lay_out(dict(enumerate(sizes)), edges)
    boxes = boxes_of(layout, sizes)
    for one, other in itertools.combinations(boxes, 2):
        beside = one[2] + COLUMN_GAP - 1e-6 <= other[0] or other[2] + COLUMN_GAP - 1e-6 <= one[0]
        above = one[3] + 1e-6 <= other[1] or other[3] + 1e-6 <= one[1]
        assert beside or above
    assert min(box[0] for box in boxes) >= -1e-6 and max(box[2] for box in boxes) <= layout.width + 1e-6
    for (source, target), points in ((edge, layout.paths[edge]) for edge in edges):
        assert points[0][1] == pytest.approx(boxes[source][3]) and points[-1][1] == pytest.approx(boxes[target][1])
        assert all(lower[1] > upper[1] for upper, lower in itertools.pairwise(points))


@given(graph=graphs)
def test_edges_pass_between_boxes(graph: tuple[list[tuple[float, float]], list[tuple[int, int]]]) -> None:
    sizes, edges = graph
    layout = lay_out(dict(enumerate(sizes)), edges)
    boxes = boxes_of(layout, sizes)
    for (source, target), points in layout.paths.items():
        for (x, top), (_, bottom) in zip(points[1:-1:2], points[2:-1:2], strict=True):
            for index, box in enumerate(boxes):
                crosses = box[0] < x < box[2] and box[1] < bottom and box[3] > top
                assert not crosses or index in (source, target)


def test_chain_with_a_shortcut_stays_straight() -> None:
    layout = lay_out(dict.fromkeys(range(5), (100.0, 20.0)), [(0, 1), (1, 2), (2, 3), (3, 4), (1, 4)])
    assert len({round(x, 6) for x, _ in layout.centres.values()}) == 1
    assert {x for x, _ in layout.paths[(1, 4)][1:-1]} == {layout.paths[(1, 4)][1][0]}
    assert layout.height == pytest.approx(5 * 20 + 4 * ROW_GAP)
