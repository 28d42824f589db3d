"""Draw a program: an SVG without any other tool, or DOT for graphviz.

Parameters and the quantizers behind them are left out (they show in a box's tooltip, which is the node's printed
line); the other quantizers are small; what integer kernels can run has another colour than what stays in float.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import fx

from fxquant.errors import FxquantError
from fxquant.files import write_text
from fxquant.graph.islands import Island, islands
from fxquant.graph.layout import Layout, lay_out
from fxquant.graph.program import Program, input_slots, value_type
from fxquant.graph.render import render_header, render_node, short_target

FORMATS = (".svg", ".dot")
_MARGIN = 24.0
_TOP = 86.0  # room for title and legend
_LEGEND_WIDTH = 780.0
_FONT = "ui-sans-serif, 'DejaVu Sans', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Style:
    """Colours of one kind of box."""

    fill: str
    line: str
    text: str = "#1c2833"


STYLES = {
    Island.INTEGER: Style("#d3ecdb", "#2e7d4f"),
    Island.FLOAT: Style("#fde5c4", "#c07a15"),
    Island.QUANTIZER: Style("#41618f", "#2c4568", "#ffffff"),
    Island.BOUNDARY: Style("#e4e7eb", "#6b7785"),
    Island.INDEX: Style("#ffffff", "#a3acb6", "#5a6673"),
}
_LEGEND = (
    (Island.INTEGER, "codes in, codes out"),
    (Island.FLOAT, "float"),
    (Island.QUANTIZER, "quantizer"),
    (Island.INDEX, "sizes, integers, booleans"),
    (Island.BOUNDARY, "input, output"),
)


@dataclass(frozen=True)
class Box:
    """One node of the drawing."""

    island: Island
    title: str
    lines: tuple[str, ...]
    width: float
    height: float
    tooltip: str


def draw(program: Program, path: str | os.PathLike[str]) -> None:
    """Draw `program` to `path`; its suffix says how: .svg or .dot.

    Raises FxquantError for another suffix, StorageError if the file cannot be written.
    """
    place = Path(path)
    if place.suffix not in FORMATS:
        raise FxquantError(
            "drawing", place=str(place), expected=f"a name that ends in {' or '.join(FORMATS)}", got=f"'{place.suffix}'"
        )
    text = to_svg(program) if place.suffix == ".svg" else to_dot(program)
    write_text(place, text)


def to_svg(program: Program) -> str:
    """The drawing as SVG text."""
    boxes = _boxes(program)
    edges = _edges(boxes)
    layout = lay_out({node: (box.width, box.height) for node, box in boxes.items()}, edges)
    width = max(layout.width, 9.2 * len(render_header(program)), _LEGEND_WIDTH) + 2 * _MARGIN
    shift = (width - layout.width) / 2
    height = layout.height + _TOP + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}" font-size="12">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#7b8794"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        *_heading(program, boxes),
        f'<g transform="translate({shift:.1f},{_TOP:.1f})">',
        *(_svg_edge(layout, edge) for edge in layout.paths),
        *(_svg_box(box, *layout.centres[node]) for node, box in boxes.items()),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def to_dot(program: Program) -> str:
    """The drawing as DOT text, for graphviz."""
    boxes = _boxes(program)
    lines = [
        f"digraph {_quoted(program.name)} {{",
        '  node [shape=box style="filled,rounded" fontname="Helvetica" fontsize=11];',
        '  edge [color="#7b8794"];',
    ]
    for node, box in boxes.items():
        style = STYLES[box.island]
        label = "\n".join((box.title, *box.lines))
        lines.append(
            f"  {_quoted(node.name)} [label={_quoted(label)} tooltip={_quoted(box.tooltip)} "
            f'fillcolor="{style.fill}" color="{style.line}" fontcolor="{style.text}"];'
        )
    lines += [f"  {_quoted(source.name)} -> {_quoted(target.name)};" for source, target in _edges(boxes)]
    return "\n".join((*lines, "}")) + "\n"


def _boxes(program: Program) -> dict[fx.Node, Box]:
    found = islands(program)
    hidden = {node for node, island in found.items() if island is Island.CONSTANT}
    for node in program.graph.nodes:
        if found[node] is Island.QUANTIZER and isinstance(node.args[0], fx.Node) and node.args[0] in hidden:
            hidden.add(node)
    return {node: _box(program, node, island) for node, island in found.items() if node not in hidden}


def _box(program: Program, node: fx.Node, island: Island) -> Box:
    tooltip = "\n".join([*(render_node(program, slot) for slot in _constants(node)), render_node(program, node)])
    module = program.fake_quant(node)
    if module is not None:
        text = f"{'s' if module.spec.signed else 'u'}{module.spec.bits}"
        return Box(island, text, (), 30.0, 16.0, tooltip)
    lines = [_operation(program, node)] if node.op in ("call_function", "call_module") else []
    found = value_type(node)
    if found is not None:
        lines.append(str(found))
    width = max(7.4 * len(node.name), *(6.0 * len(line) for line in lines), 40.0) + 18.0
    return Box(island, node.name, tuple(lines), width, 20.0 + 13.0 * len(lines), tooltip)


def _constants(node: fx.Node) -> list[fx.Node]:
    """The parameters, and the quantizers behind them, that a node reads."""
    found: list[fx.Node] = []
    for slot in input_slots(node):
        source = slot.args[0] if slot.op == "call_module" and slot.args else slot
        if isinstance(source, fx.Node) and source.op == "get_attr":
            found.append(slot)
    return found


def _operation(program: Program, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(program.submodule(node)).__name__
    name = short_target(node).removeprefix("aten.")
    if name == "convolution":
        weight, stride, groups = node.args[1], node.args[3], node.args[8]
        found = value_type(weight) if isinstance(weight, fx.Node) else None
        kernel = "x".join(map(str, found.shape[2:])) if found is not None else ""
        steps = set(stride) if isinstance(stride, (list, tuple)) else {stride}
        parts = [
            f"convolution {kernel}",
            f"stride {'x'.join(map(str, sorted(map(str, steps))))}" if steps != {1} else "",
            f"groups {groups}" if groups != 1 else "",
        ]
        return " ".join(filter(None, parts))
    return name


def _edges(boxes: dict[fx.Node, Box]) -> list[tuple[fx.Node, fx.Node]]:
    pairs = ((slot, node) for node in boxes for slot in input_slots(node) if slot in boxes)
    return list(dict.fromkeys(pairs))


def _heading(program: Program, boxes: dict[fx.Node, Box]) -> list[str]:
    counts = Counter(box.island for box in boxes.values())
    parts = [
        f'<text x="{_MARGIN}" y="30" font-size="15" font-weight="600" fill="#1c2833">'
        f"{escape(render_header(program))}</text>"
    ]
    left = _MARGIN
    for island, text in _LEGEND:
        label = f"{text} ({counts[island]})"
        style = STYLES[island]
        parts.append(
            f'<rect x="{left:.0f}" y="46" width="14" height="14" rx="3" fill="{style.fill}" stroke="{style.line}"/>'
        )
        parts.append(f'<text x="{left + 20:.0f}" y="57" fill="#3d4852" font-size="11">{escape(label)}</text>')
        left += 34 + 6.2 * len(label)
    return parts


def _svg_box(box: Box, x: float, y: float) -> str:
    style = STYLES[box.island]
    left, top = x - box.width / 2, y - box.height / 2
    radius = 8 if box.island is Island.QUANTIZER else 5
    rect = (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius}" '
        f'fill="{style.fill}" stroke="{style.line}"/>'
    )
    size = 10 if box.island is Island.QUANTIZER else 12
    weight = "400" if box.island is Island.QUANTIZER else "600"
    base = top + (12 if box.island is Island.QUANTIZER else 15)
    texts = [_svg_text(x, base, box.title, f'font-size="{size}" font-weight="{weight}" fill="{style.text}"')]
    for index, line in enumerate(box.lines, 1):
        texts.append(_svg_text(x, base + 13 * index, line, 'font-size="10.5" fill="#5a6673"'))
    return f"<g><title>{escape(box.tooltip)}</title>{rect}{''.join(texts)}</g>"


def _svg_text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" {attributes}>{escape(text)}</text>'


def _svg_edge(layout: Layout, edge: tuple[object, object]) -> str:
    """A smooth line through an edge's points, vertical at each of them."""
    points = layout.paths[edge]
    commands = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        bend = (y1 - y0) / 2
        commands.append(f"C{x0:.1f},{y0 + bend:.1f} {x1:.1f},{y1 - bend:.1f} {x1:.1f},{y1:.1f}")
    is_long = len(points) > 2
    look = 'stroke="#4f6d9c" stroke-width="1.6"' if is_long else 'stroke="#7b8794" stroke-width="1.2"'
    return f'<path d="{" ".join(commands)}" fill="none" {look} marker-end="url(#tip)"/>'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
