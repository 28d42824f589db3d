"""ProgramModule survives copying, pickling and moving: names, meta, ties, calling convention and numbers."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable

import pytest
import torch
from nets import ConvNet, Pair, Result, Shared, Structured, TiedLanguageModel
from torch import fx, nn

from fxquant.capture import capture
from fxquant.errors import FxquantError
from fxquant.graph.module import ProgramModule, graph_from_records, graph_to_records


def through_torch_save(module: ProgramModule) -> ProgramModule:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded, ProgramModule)
    return loaded


WAYS: list[Callable[[ProgramModule], ProgramModule]] = [
    copy.deepcopy,
    lambda module: pickle.loads(pickle.dumps(module)),
    through_torch_save,
]


def dump(module: ProgramModule) -> list[str]:
    return [f"{n.op} {n.name} {n.target} {n.args} {n.kwargs} {n.meta}" for n in module.graph.nodes]


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("model", [ConvNet(), Shared(), TiedLanguageModel()], ids=["conv", "shared", "tied"])
def test_module_when_copied_keeps_graph_meta_and_numbers(
    model: nn.Module, way: Callable[[ProgramModule], ProgramModule]
) -> None:
    shapes = {ConvNet: torch.randn(2, 3, 8, 8), Shared: torch.randn(2, 4)}
    x = shapes.get(type(model), torch.randint(0, 11, (2, 5)))
    module = capture(model, x).module
    twin = way(module)
    assert type(twin).__mro__[1] is ProgramModule and type(twin).__name__ == type(model).__name__
    assert dump(twin) == dump(module) and twin.graph is not module.graph and twin.graph.owning_module is twin
    assert list(twin.state_dict()) == list(module.state_dict()) and torch.equal(twin(x), module(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in module.parameters()}
    assert dump(way(twin)) == dump(module)


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle", "torch.save"])
def test_ties_and_aliases_when_copied_stay(way: Callable[[ProgramModule], ProgramModule]) -> None:
    tied = way(capture(TiedLanguageModel(), torch.randint(0, 11, (2, 5))).module)
    assert tied.head.weight is tied.embed.weight and isinstance(tied.head.weight, nn.Parameter)
    shared = way(capture(Shared(), torch.randn(2, 4)).module)
    assert shared.get_submodule("body") is shared.get_submodule("twin")
    assert [n.target for n in shared.graph.nodes if n.op == "get_attr"] == ["body.0.weight", "body.0.bias"]


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize(("kind", "type_"), [("dict", dict), ("namedtuple", Pair), ("dataclass", Result)])
def test_calling_convention_when_copied_stays(
    kind: str, type_: type, way: Callable[[ProgramModule], ProgramModule]
) -> None:
    inputs = {"x": torch.randn(2, 4), "scale": torch.randn(2, 4)}
    module = capture(Structured(kind), inputs).module
    out, ref = way(module)(**inputs), module(**inputs)
    assert type(out) is type_
    first = {"dict": lambda o: o["logits"], "namedtuple": lambda o: o.first, "dataclass": lambda o: o.logits}[kind]
    assert torch.equal(first(out), first(ref))


def test_copy_when_shallow_shares_tensors_but_not_the_graph() -> None:
    module = capture(Shared(), torch.randn(2, 4)).module
    twin = copy.copy(module)
    assert next(twin.parameters()) is next(module.parameters()) and twin.graph is not module.graph


def test_training_flag_and_user_attributes_when_copied_stay() -> None:
    module = capture(ConvNet(), torch.randn(2, 3, 8, 8)).module
    module.train()
    module.note = {"a": [1]}
    twin = copy.deepcopy(module)
    assert twin.training and twin.bn1.training and twin.note == {"a": [1]} and twin.note is not module.note


def odd_graph() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.ops.aten.to.dtype, (x, torch.float16), {"memory_format": torch.preserve_format})
    b = graph.call_function(
        torch.ops.aten.zeros.default, ([2, 3],), {"device": torch.device("cpu"), "layout": torch.strided}
    )
    c = graph.call_function(torch.ops.aten.full.default, ([1], float("-inf")), {"pin_memory": None})
    d = graph.call_function(dict, (), {"k": (a, [b, {"z": c}]), "s": slice(None, 3, None), "e": ..., "c": 1 + 2j})
    graph.output((d, float("inf"), True))
    a.meta["source"] = "model.py:3"
    return graph


def test_records_when_values_are_odd_round_trip_through_json() -> None:
    records = graph_to_records(odd_graph())
    again = graph_from_records(json.loads(json.dumps(records)))
    again.lint()
    assert [n.format_node() for n in again.nodes] == [n.format_node() for n in odd_graph().nodes]
    assert graph_to_records(again) == records


def test_records_when_a_value_cannot_be_written_name_the_node() -> None:
    graph = fx.Graph()
    graph.call_function(torch.add, (object(), 1), name="bad")
    with pytest.raises(FxquantError, match="node 'bad' cannot be written"):
        graph_to_records(graph)


def test_records_when_an_operator_is_unknown_say_so() -> None:
    records = graph_to_records(odd_graph())
    records[1]["target"] = "nowhere.nothing.default"
    with pytest.raises(FxquantError, match="'nowhere.nothing.default' is not registered"):
        graph_from_records(records)


def test_device_literals_when_the_module_moves_follow_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + torch.arange(3, device=x.device)

    module = capture(Net(), torch.randn(2, 3)).module
    arange = next(n for n in module.graph.nodes if "arange" in str(n.target))
    assert arange.kwargs["device"] == torch.device("cpu")
    module.to("meta")
    assert arange.kwargs["device"] == torch.device("meta") and "meta" in module.code
