"""Why a value, or an operation, is in float: as the pass that left it there said, or else as the graph shows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxquant.graph.constants import Constants
from fxquant.graph.islands import IslandMap, has_foreign_kernel
from fxquant.graph.program import Program, Stage, input_slots, input_spec, output_spec, value_type
from fxquant.numerics.fake_quant import Mode
from fxquant.ops.base import OpDef, Role
from fxquant.ops.table import TABLE

FOLLOWS = "follows its input"
_NAMED = 3  # readers that a reason names
_FOLLOWING = (Role.ACTIVATION, Role.GRID_PRESERVING)


def float_reason(program: Program, value: fx.Node, constants: Constants) -> str:
    """Why no quantizer reads `value`; never "".

    1. What the pass that decided has said.
    2. No pass has decided yet.
    3. Another constant is computed from it, which is what the layer reads.
    4. Nothing wants it: its operation has no integer kernel, or is not known, or counts positions.
    5. A relu or clip behind it is quantized instead.
    6. It follows its input, which is in float.
    7. A bias is quantized with its layer's input and weight only.
    8. All that reads it does so in float.
    """
    if value.meta.get("float_reason"):
        return str(value.meta["float_reason"])
    if program.stage is Stage.CAPTURED:
        return "specs are not assigned yet (stage captured)"
    return (
        _of_constant(value, constants)
        or _of_operation(program, value)
        or _absorbed(program, value)
        or _followed(program, value)
        or _of_bias(program, value)
        or _of_readers(program, value)
    )


def operation_reason(program: Program, known: IslandMap, node: fx.Node) -> str:
    """Why an operation of an inserted program runs in float, though its value may be quantized behind it; never "".

    1. It has no integer kernel, or is not known.
    2. What the pass that decided has said, if that is about the operation and not about its value alone.
    3. It reads floats.
    4. Its value is read in float.
    """
    said, missing = str(node.meta.get("float_reason", "")), known.float_inputs(node)
    if said and (not missing or node not in known.writes) and not _explain_themselves(missing):
        return said
    without_kernel = _of_operation(program, node)
    if without_kernel:
        return without_kernel
    if said and _is_left_in_float(node):
        return said
    if missing:
        in_blocks = [slot for slot in missing if _is_on(program, slot)]
        reason = f"{_names(in_blocks)} is quantized in blocks, which no kernel takes" if in_blocks else ""
        return reason or f"reads {_names(missing)} in float"
    return _of_readers(program, node)


def _of_constant(value: fx.Node, constants: Constants) -> str:
    computed = [user for user in value.users if constants.is_constant(user)] if constants.is_constant(value) else []
    return f"{_names(computed)} {'is' if len(computed) == 1 else 'are'} computed from it" if computed else ""


def _is_on(program: Program, slot: fx.Node) -> bool:
    module = program.fake_quant(slot)
    return module is not None and module.mode is not Mode.OFF


def _explain_themselves(sources: Sequence[fx.Node]) -> bool:
    return any(source.meta.get("float_reason") for source in sources)


def _is_left_in_float(layer: fx.Node) -> bool:
    """Whether a layer's reason for float is about all of it: it wants nothing, and nothing else says why it does not.

    A placement that quantizes single values gives a reason for what the layer makes, and others for what it reads.
    """
    slots = input_slots(layer)
    is_asked = any(input_spec(layer, slot) is not None for slot in range(len(slots)))
    return bool(layer.meta.get("float_reason")) and not (is_asked or _explain_themselves(slots))


def _is_quantizer(program: Program, node: fx.Node) -> bool:
    return program.fake_quant(node) is not None or program.bias_fake_quant(node) is not None


def _of_operation(program: Program, value: fx.Node) -> str:
    if value.op not in ("call_function", "call_module"):
        return ""
    definition = _definition(program, value)
    if definition is None:
        return f"operation {value.target} is not in the table"
    role = definition.role_for(value)
    if role is Role.INDEX:
        return f"{definition.name} makes positions or sizes"
    has_kernel = role is not Role.FLOAT or has_foreign_kernel(program, value, definition)
    return "" if has_kernel else f"{definition.name} has no integer kernel"


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
    if _role(program, value) not in _FOLLOWING:
        return ""
    if value_type(source) is None and source.args and isinstance(source.args[0], fx.Node):
        source = source.args[0]  # of the split, where `value` is a part
    if program.fake_quant(source) is not None or _is_quantized(program, source):
        return ""
    return f"{FOLLOWS} '{source.name}', which is in float"


def _of_bias(program: Program, value: fx.Node) -> str:
    for layer in value.users:
        definition = _definition(program, layer)
        if definition is None or definition.bias is None or definition.weight_for(layer) is None:
            continue
        if layer.args[definition.bias : definition.bias + 1] != (value,) or _is_left_in_float(layer):
            continue
        in_float = f"the bias of '{layer.name}', which kernels of {program.target.value} add in float"
        if program.stage < Stage.INSERTED:
            later = f"quantized once '{layer.name}' reads quantized input and weight"
            return in_float if program.target.fuses_float_ends else later
        sources = [arg for arg in layer.args if isinstance(arg, fx.Node) and arg is not value]
        missing = [source for source in sources if program.fake_quant(source) is None]
        if missing:
            return f"the bias of '{layer.name}', which reads {_names(missing)} in float"
        if program.target.fuses_float_ends:
            return in_float
        return f"the bias of '{layer.name}': {_undone(program, value, sources)}"
    return ""


def _undone(program: Program, bias: fx.Node, sources: Sequence[fx.Node]) -> str:
    """Why a bias stays in float behind quantized sources."""
    modules = [program.fake_quant(source) for source in sources]
    blocks = [module.spec.granularity for module in modules if module is not None and module.spec.granularity.block]
    if blocks:
        return f"its layer's weight is {blocks[0]}, not one scale for each output channel"
    return "it is computed, not a parameter" if bias.op != "get_attr" else "no pass has quantized biases"


def _of_readers(program: Program, value: fx.Node) -> str:
    if not value.users:
        return "nothing reads it"
    texts = []
    for user in value.users:
        name = "the program's output" if user.op == "output" else f"'{user.name}'"
        reason = user.meta.get("float_reason") or ("" if user.op == "output" else _of_operation(program, user))
        texts.append(f"{name} ({reason})" if reason and not _is_quantizer(program, user) else name)
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
