"""Random sections on a small net, against a reference that goes value by value through a table written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.program import Program
from fxquant.passes import ApplyPlacement, InsertFakeQuant, ShareEncodings
from fxquant.placement.sections import Defaults, ModelInput, ModelOutput, OpSettings, OpType, Supergroup
from tests.helpers import Builder
from tests.placement.nets import on_off

aten = torch.ops.aten

# value: (type, the values that it reads, whether it only moves codes)
NET: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "x": ("", (), False),
    "conv1": ("Conv", ("x",), False),
    "relu1": ("Relu", ("conv1",), False),
    "conv2": ("Conv", ("relu1",), False),
    "add": ("Add", ("conv2", "relu1"), False),
    "relu2": ("Relu", ("add",), False),
    "pool": ("MaxPool", ("relu2",), True),
    "conv3": ("Conv", ("pool",), False),
    "gelu": ("Gelu", ("conv3",), False),
}
LAST = "gelu"
TYPES = ("Conv", "Relu", "Add", "MaxPool", "Gelu")


def net() -> Program:
    build = Builder()
    x = build.input("x", 3, 8, 8)
    relu1 = build.relu("relu1", build.conv("conv1", x, 4))
    relu2 = build.relu("relu2", build.add("add", build.conv("conv2", relu1, 4), relu1))
    pool = build.call("pool", aten.max_pool2d.default, relu2, [2, 2])
    build.output(build.call(LAST, aten.gelu.default, build.conv("conv3", pool, 4)))
    return build.program()


class Contradiction(Exception):
    """Two writes of one section differ."""


def reference(sections: dict[str, Any]) -> dict[str, str]:
    """What is on, and what passes codes on, straight from the grammar's words."""
    on = dict.fromkeys(NET, False)
    ops: OpSettings = sections["defaults"].ops
    outputs = {name: ops.is_output_quantized for name, (kind, _, moves) in NET.items() if kind and not moves}
    inputs = {name: ops.is_input_quantized for name, (kind, _, _) in NET.items() if kind}
    write(on, [*outputs.items(), *read_by(inputs)])
    listed: dict[str, OpType] = sections["op_type"]
    entries = {name: listed.get(kind, OpType()) for name, (kind, _, _) in NET.items()}
    outputs = {name: entry.is_output_quantized for name, entry in entries.items()}
    inputs = {name: entry.is_input_quantized for name, entry in entries.items()}
    write(on, [*outputs.items(), *read_by(inputs)])
    inner = inside([group.op_list for group in sections["supergroups"]])
    on.update(dict.fromkeys(inner, False))
    write(on, [("x", sections["model_input"].is_input_quantized)])
    write(on, [(LAST, sections["model_output"].is_output_quantized)])
    codes: dict[str, str] = {}
    for name, (_, reads, moves) in NET.items():
        if moves and reads[0] in codes and name not in inner:
            codes[name] = "on" if on[name] else "codes"
        elif on[name]:
            codes[name] = "on"
    return codes


def read_by(inputs: dict[str, bool | None]) -> list[tuple[str, bool | None]]:
    """Each value that an operation reads, seen through what only moves codes."""
    found = []
    for name, is_on in inputs.items():
        for value in NET[name][1]:
            while NET[value][2]:
                (value,) = NET[value][1]
            found.append((value, is_on))
    return found


def write(on: dict[str, bool], writes: list[tuple[str, bool | None]]) -> None:
    said: dict[str, bool] = {}
    for name, is_on in writes:
        if is_on is not None and said.setdefault(name, is_on) is not is_on:
            raise Contradiction(name)
    on.update(said)


def inside(groups: list[tuple[str, ...]]) -> set[str]:
    """Values between the operations of supergroups: longest first, then by the file's order, no operation twice."""
    readers = {name: [user for user, (_, reads, _) in NET.items() for value in reads if value == name] for name in NET}
    taken: set[str] = set()
    inner: set[str] = set()
    for length in range(max(map(len, groups), default=0), 1, -1):
        for group in (group for group in groups if len(group) == length):
            for start in NET:
                chain = [start]
                while len(chain) < length and len(readers[chain[-1]]) == 1:
                    chain.append(readers[chain[-1]][0])
                if tuple(NET[name][0] for name in chain) == group and not taken & set(chain):
                    taken |= set(chain)
                    inner |= set(chain[:-1])
    return inner


MAYBE = st.sampled_from([None, None, True, False])
ENTRY = st.builds(OpType, is_input_quantized=MAYBE, is_output_quantized=MAYBE)
GROUP = st.lists(st.sampled_from(TYPES), min_size=2, max_size=4).map(lambda names: Supergroup(tuple(names)))
LIKELY = st.sampled_from(
    [("Conv", "Relu"), ("Add", "Relu"), ("Conv", "Add"), ("Conv", "Add", "Relu"), ("Relu", "MaxPool")]
)
SECTIONS = st.fixed_dictionaries(
    {
        "defaults": st.builds(
            Defaults, ops=st.builds(OpSettings, is_output_quantized=MAYBE, is_input_quantized=st.just(None) | MAYBE)
        ),
        "op_type": st.dictionaries(st.sampled_from(TYPES), ENTRY, max_size=3),
        "supergroups": st.lists(GROUP | LIKELY.map(Supergroup), max_size=4).map(tuple),
        "model_input": st.builds(ModelInput, MAYBE),
        "model_output": st.builds(ModelOutput, MAYBE),
    }
)


@settings(max_examples=150, deadline=None)
@given(SECTIONS)
def test_map_agrees_with_a_reference_that_goes_value_by_value(sections: dict[str, Any]) -> None:
    program = net()
    manager = PassManager([ApplyPlacement(**sections), ShareEncodings(), InsertFakeQuant()])
    try:
        expected = reference(sections)
    except Contradiction as err:
        with pytest.raises(PassError, match=f"contradicts .* at the value of node '{err}'"):
            manager.run(program)
        return
    manager.run(program)
    assert on_off(program) == expected
