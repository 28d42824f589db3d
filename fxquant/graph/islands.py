"""Which nodes integer kernels can run, as far as the graph alone says: the colours of a drawing."""

from __future__ import annotations

from enum import Enum

from torch import fx

from fxquant.graph.program import Program, input_slots, value_type
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant
from fxquant.ops.base import Role
from fxquant.ops.table import TABLE


class Island(Enum):
    """What a node is in a quantized graph."""

    INTEGER = "integer"  # reads codes and writes codes
    FLOAT = "float"
    QUANTIZER = "quantizer"
    CONSTANT = "constant"  # a parameter or buffer
    BOUNDARY = "input or output"
    INDEX = "integers, booleans and sizes"


_NEVER_INTEGER = (Role.FLOAT, Role.INDEX)


def islands(program: Program) -> dict[fx.Node, Island]:
    """The island of every node.

    A node is INTEGER if all its float inputs come from quantizers, all that reads it is quantizers, and its operation
    has an integer kernel; an absorbed activation between a layer and its quantizer belongs to the layer. What is
    quantized in blocks counts as float, as no kernel takes it. Whether a runtime fuses a node is for check_parity to
    say, which reads the graph that ran.
    """
    found = {node: _kind(program, node) for node in program.graph.nodes}
    reads = _reads_codes(program, found)
    writes = _writes_codes(program, found)
    for node, island in found.items():
        if island is Island.FLOAT and node in reads and node in writes:
            found[node] = Island.INTEGER
    return found


def _kind(program: Program, node: fx.Node) -> Island:
    if node.op in ("placeholder", "output"):
        return Island.BOUNDARY
    if node.op == "get_attr":
        return Island.CONSTANT
    if node.op == "call_module" and isinstance(program.submodule(node), (FakeQuant, BiasFakeQuant)):
        return Island.QUANTIZER
    if _role(program, node) is Role.INDEX:
        return Island.INDEX
    found = value_type(node)
    return Island.FLOAT if found is None or found.is_float else Island.INDEX


def _role(program: Program, node: fx.Node) -> Role | None:
    if node.op not in ("call_function", "call_module"):
        return None
    definition = TABLE.find(node, program.submodule(node) if node.op == "call_module" else None)
    return None if definition is None else definition.role_for(node)


def _is_float(node: fx.Node) -> bool:
    found = value_type(node)
    return found is not None and found.is_float


def _reads_codes(program: Program, found: dict[fx.Node, Island]) -> set[fx.Node]:
    reads: set[fx.Node] = set()
    for node, island in found.items():
        role = _role(program, node)
        if island is not Island.FLOAT or role is None or role in _NEVER_INTEGER:
            continue
        inputs = [slot for slot in input_slots(node) if _is_float(slot)]
        is_absorbed = role is Role.ACTIVATION and all(slot in reads for slot in inputs)
        if is_absorbed or inputs and all(_gives_codes(program, slot, found) for slot in inputs):
            reads.add(node)
    return reads


def _gives_codes(program: Program, slot: fx.Node, found: dict[fx.Node, Island]) -> bool:
    module = program.fake_quant(slot)
    is_in_blocks = module is not None and module.spec.granularity.block is not None
    return found[slot] is Island.QUANTIZER and not is_in_blocks


def _writes_codes(program: Program, found: dict[fx.Node, Island]) -> set[fx.Node]:
    writes: set[fx.Node] = set()
    for node in reversed(list(found)):
        users = list(node.users)
        if users and all(
            found[user] is Island.QUANTIZER or _role(program, user) is Role.ACTIVATION and user in writes
            for user in users
        ):
            writes.add(node)
    return writes
