"""The printed graph: one line a node, the same from run to run.

    conv1 = aten.convolution(x_fq, conv1_weight_fq, stride=2, padding=1) : float32[s0, 32, 56, 56]  @features.conv1

Arguments are named as the operator's schema names them; what equals its default is left out, and a stride, padding,
dilation or kernel size that is the same along all axes is written once. Behind the type stand the module path, and in
braces what quantization knows: specs wanted, rule, reason for float; of a FakeQuant its spec, mode and grid.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxquant.graph.program import FAKE_QUANTS, Program, ValueType, input_slots
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant
from fxquant.numerics.padded_convolution import PADDED_CONVOLUTION

# Names of arguments that are one number an axis: [2, 2] reads as 2.
_PER_AXIS = frozenset(("stride", "padding", "dilation", "output_padding", "kernel_size"))
# The schemas of the two convolutions have no defaults; these are nn.Conv2d's.
_CONVOLUTION_DEFAULTS = {
    "bias": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "transposed": False,
    "output_padding": 0,
    "groups": 1,
}
_MISSING = object()


def render(program: Program) -> str:
    """The program as text: a header with name, stage, target and size, then one line a node."""
    return "\n".join((render_header(program), *(render_node(program, node) for node in program.graph.nodes))) + "\n"


def render_header(program: Program) -> str:
    """The first line of a printed program."""
    count = len(program.graph.nodes)
    return f"program '{program.name}': stage {program.stage}, target {program.target.value}, {count} nodes"


def diff(old: Program, new: Program) -> str:
    """A unified diff of the two printed programs; "" when they print the same."""
    return diff_texts(render(old), render(new), old.name, new.name)


def diff_texts(old: str, new: str, old_name: str, new_name: str) -> str:
    """A unified diff of two texts, with three lines of context."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), old_name, new_name, lineterm="")
    text = "\n".join(lines)
    return f"{text}\n" if text else ""


def excerpt(program: Program, name: str, context: int = 4) -> str:
    """The lines around the node called `name`, that line marked; "" if the graph has no such node."""
    nodes = list(program.graph.nodes)
    found = next((index for index, node in enumerate(nodes) if node.name == name), None)
    if found is None:
        return ""
    first = max(0, found - context)
    lines = [
        f"{'>' if node is nodes[found] else ' '} {render_node(program, node)}"
        for node in nodes[first : found + context + 1]
    ]
    return "\n".join(lines)


def render_node(program: Program, node: fx.Node) -> str:
    """One node as one line. Never fails on a graph that a pass has broken: an error report prints such graphs."""
    text = f"{node.name} = {_call(program, node)}"
    if "type" in node.meta:
        text += f" : {_type(node.meta['type'])}"
    path = node.meta.get("module_path", "")
    if path and node.op != "get_attr":
        text += f"  @{path}"
    known = [*_quantizer(program, node), *_intent(node)]
    return f"{text}  {{{'; '.join(known)}}}" if known else text


def _call(program: Program, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"get {node.target}"
    if node.op == "output":
        return f"return {_value(node.args[0] if node.args else None)}"
    if node.op == "call_module":
        module = _submodule(program, node)
        kind = type(module).__name__ if module is not None else "missing module"
        where = "" if isinstance(module, (FakeQuant, BiasFakeQuant)) else f"[{node.target}]"
        return f"{kind}{where}({', '.join([*_arguments(node), *_hyperparameters(module)])})"
    return f"{short_target(node)}({', '.join(_arguments(node))})"


def short_target(node: fx.Node) -> str:
    """The operation of a call_function node, without what goes without saying: "aten.convolution", "getitem"."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default").removesuffix(".Tensor")
    return str(getattr(node.target, "__name__", node.target))


def _arguments(node: fx.Node) -> list[str]:
    names = _argument_schema(node)
    texts = []
    for index, value in enumerate(node.args):
        name, default = names[index] if index < len(names) else ("", _MISSING)
        if default is _MISSING or not _same(value, default):
            is_plain = not name or default is _MISSING and (isinstance(value, fx.Node) or index == 0)
            texts.append(_argument("" if is_plain else name, value))
    defaults = dict(names)
    texts.extend(
        _argument(name, value) for name, value in node.kwargs.items() if not _same(value, defaults.get(name, _MISSING))
    )
    return texts


def _argument_schema(node: fx.Node) -> list[tuple[str, Any]]:
    """Name and default (or _MISSING) of each argument, in order."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    is_convolution = node.target in (torch.ops.aten.convolution.default, PADDED_CONVOLUTION)
    known = _CONVOLUTION_DEFAULTS if is_convolution else {}
    return [
        (argument.name, known.get(argument.name, argument.default_value if argument.has_default_value() else _MISSING))
        for argument in node.target._schema.arguments
    ]


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, (list, tuple)) and value and not isinstance(default, (list, tuple)):
        return all(_same(item, default) for item in value)
    if isinstance(value, (fx.Node, list, tuple)) and not isinstance(default, (list, tuple)):
        return False
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


def _argument(name: str, value: Any) -> str:
    if name in _PER_AXIS and isinstance(value, (list, tuple)) and value and all(item == value[0] for item in value):
        value = value[0]
    return f"{name}={_value(value)}" if name else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(_value, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return ":".join("" if part is None else _value(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    return value.__qualname__ if isinstance(value, type) else repr(value)


def _type(found: ValueType | tuple[ValueType, ...]) -> str:
    return str(found) if isinstance(found, ValueType) else f"({', '.join(map(str, found))})"


def _submodule(program: Program, node: fx.Node) -> nn.Module | None:
    try:
        return program.submodule(node)
    except AttributeError:
        return None


def _hyperparameters(module: nn.Module | None) -> Iterator[str]:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        yield f"eps={module.eps:g}"
        yield f"momentum={module.momentum}"
        if not module.affine:
            yield "affine=False"
        if not module.track_running_stats:
            yield "track_running_stats=False"
    elif isinstance(module, nn.modules.dropout._DropoutNd):
        yield f"p={module.p:g}"


def _quantizer(program: Program, node: fx.Node) -> Iterator[str]:
    module = _submodule(program, node) if node.op == "call_module" else None
    if isinstance(module, FakeQuant):
        yield f"{module.spec}, mode={module.mode.value}, {_grid(module)}"
        if not node.kwargs.get("observe", True):
            yield f"range of {str(node.target).removeprefix(f'{FAKE_QUANTS}.')}"
    elif isinstance(module, BiasFakeQuant):
        yield "s32, scale = input scale * weight scale"


def _grid(module: FakeQuant) -> str:
    if not module.has_encoding:
        return "no range yet"
    scale, zero_point = module.scale.detach().cpu(), module.zero_point.detach().cpu()
    if scale.ndim == 0:
        return f"scale={scale.item():.6g} zp={zero_point.item()}"
    low, high = int(zero_point.min()), int(zero_point.max())
    zero = f"{low}" if low == high else f"{low}..{high}"
    return f"{scale.numel()} scales {scale.min().item():.6g}..{scale.max().item():.6g} zp={zero}"


def _intent(node: fx.Node) -> Iterator[str]:
    """What placement wants of this node and has not got yet, and why."""
    if node.meta.get("output_spec") is not None:
        yield f"output {node.meta['output_spec']}"
    specs = node.meta.get("input_specs") or {}
    slots = input_slots(node) if specs else []
    for slot, spec in sorted(specs.items()):
        source = slots[slot] if slot < len(slots) else None
        if source is None or not str(source.target).startswith(f"{FAKE_QUANTS}."):
            yield f"{source.name if source is not None else f'slot {slot}'} as {spec}"
    if node.meta.get("shares_encoding_with"):
        yield f"shares the grid of {node.meta['shares_encoding_with']}"
    if node.meta.get("rule"):
        yield f"rule {node.meta['rule']}"
    if node.meta.get("float_reason"):
        yield f"float: {node.meta['float_reason']}"
