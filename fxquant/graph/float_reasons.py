"""Why a value is in float: as the pass that left it there said, or else as the graph shows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxquant.graph.program import Program, Stage, output_spec, value_type
from fxquant.ops.base import OpDef, Role
from fxquant.ops.table import TABLE

_NAMED = 3  # readers that a reason names
_FOLLOWING = (Role.ACTIVATION, Role.GRID_PRESERVING)


def float_reason(program: Program, value: fx.Node) -> str:
    """Why no quantizer reads `value`; never "".

    1. What the pass that decided has said.
    2. No pass has decided yet.
    3. Nothing wants it: its operation has no integer kernel, or is not known, or counts positions.
    4. A relu or clip behind it is quantized instead.
    5. It follows its input, which is in float.
    6. A bias is quantized with its layer's input and weight only.
    7. All that reads it does so in float.
    """
    if value.meta.get("float_reason"):
        return str(value.meta["float_reason"])
    if program.stage is Stage.CAPTURED:
        return "specs are not assigned yet (stage captured)"
    return (
        _of_operation(program, value)
        or _absorbed(program, value)
        or _followed(program, value)
        or _of_bias(program, value)
        or _of_readers(program, value)
    )


def _of_operation(program: Program, value: fx.Node) -> str:
    if value.op not in ("call_function", "call_module"):
        return ""
    definition = _definition(program, value)
    if definition is None:
        return f"operation {value.target} is not in the table"
    role = definition.role_for(value)
    if role is Role.INDEX:
        return f"{definition.name} makes positions or sizes"
    return f"{definition.name} has no integer kernel" if role is Role.FLOAT else ""


def _absorbed(program: Program, value: fx.Node) -> str:
    users = list(value.users)
    if not users or not all(_role(program, user) is Role.ACTIVATION and _is_quantized(program, user) for user in users):
        return ""
    return f"quantized behind {_names(users)}, which its quantizer absorbs"


def _is_quantized(program: Program, value: fx.Node) -> bool:
    """Whether a value, or the relu or clip behind it, has a quantizer or is to have one."""
    if output_spec(value) is not None or any(program.fake_quant(user) is not None for user in value.users):
        return True
    return any(_role(program, user) is Role.ACTIVATION and _is_quantized(program, user) for user in value.users)


def _followed(program: Program, value: fx.Node) -> str:
    if value.op == "placeholder" or not value.args or not isinstance(value.args[0], fx.Node):
        return ""
    source = value.args[0]
    if _role(program, value) not in _FOLLOWING and value_type(source) is not None:
        return ""
    if program.fake_quant(source) is not None or _is_quantized(program, source):
        return ""
    return f"follows its input '{source.name}', which is in float"


def _of_bias(program: Program, value: fx.Node) -> str:
    for layer in value.users:
        definition = _definition(program, layer)
        if definition is None or definition.bias is None or definition.weight_for(layer) is None:
            continue
        if layer.args[definition.bias : definition.bias + 1] != (value,) or layer.meta.get("float_reason"):
            continue
        if program.stage < Stage.INSERTED:
            return f"quantized once '{layer.name}' reads quantized input and weight"
        sources = [arg for arg in layer.args if isinstance(arg, fx.Node) and arg is not value]
        missing = [source for source in sources if program.fake_quant(source) is None]
        if missing:
            return f"the bias of '{layer.name}', which reads {_names(missing)} in float"
        computed = "it is computed, not a parameter" if value.op != "get_attr" else "no pass has quantized biases"
        return f"the bias of '{layer.name}': {computed}"
    return ""


def _of_readers(program: Program, value: fx.Node) -> str:
    if not value.users:
        return "nothing reads it"
    texts = []
    for user in value.users:
        name = "the program's output" if user.op == "output" else f"'{user.name}'"
        reason = user.meta.get("float_reason") or ("" if user.op == "output" else _of_operation(program, user))
        texts.append(f"{name} ({reason})" if reason else name)
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return f"read in float by {', '.join(texts[:_NAMED])}{more}"


def _definition(program: Program, node: fx.Node) -> OpDef | None:
    if node.op not in ("call_function", "call_module"):
        return None
    return TABLE.find(node, program.submodule(node) if node.op == "call_module" else None)


def _role(program: Program, node: fx.Node) -> Role | None:
    definition = _definition(program, node)
    return None if definition is None else definition.role_for(node)


def _names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(f"'{node.name}'" for node in nodes)
