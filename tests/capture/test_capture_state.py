"""Names, state, notes, errors, and what capture may not do to the user's model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import BatchNormAct, ConvNet, InPlace, Shared, Structured, TiedLanguageModel
from torch import nn

from fxquant.capture import api, capture
from fxquant.capture.check import difference
from fxquant.errors import CaptureError
from fxquant.graph.program import NoteKind, Stage, ValueType

X = torch.randn(2, 3, 8, 8)


def test_names_when_captured_twice_are_paths_and_stable() -> None:
    programs = [capture(ConvNet(), X) for _ in range(2)]
    names = [[node.name for node in program.graph.nodes] for program in programs]
    assert names[0] == names[1]
    assert (
        names[0]
        == (
            "x conv1_weight conv1_bias conv1 bn1 relu conv2_weight conv2 bn2 add hardtanh max_pool2d mean drop "
            "fc_weight fc_bias fc output"
        ).split()
    )
    assert programs[0].stage is Stage.CAPTURED and str(programs[0].node("hardtanh").args[1:]) == "(0.0, 6.0)"


def test_names_when_a_module_is_called_again_skip_those_of_others() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.f[1](self.f[0](self.f[0](x)))

    program = capture(Net(), torch.randn(2, 4))
    assert [n.name for n in program.graph.nodes if n.op == "call_function"] == ["f_0", "f_0_1", "f_1"]


def test_meta_when_captured_has_the_four_keys_only() -> None:
    program = capture(ConvNet(), X)
    for node in program.graph.nodes:
        assert set(node.meta) <= {"type", "module_path", "module_class", "source"}
    conv = program.node("conv2")
    assert conv.meta["type"] == ValueType(("s0", 8, 8, 8), torch.float32)
    assert (conv.meta["module_path"], conv.meta["module_class"]) == ("conv2", "Conv2d")
    assert conv.meta["source"].startswith("nets.py:")


def test_state_dict_when_tensors_are_unused_aliased_or_plain_keeps_the_models_keys() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(2, 2)
            self.alias = self.used
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("spare", torch.zeros(2))
            self.register_buffer("hidden", torch.ones(4), persistent=False)
            self.plain = torch.full((4,), 2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.alias(x)) * self.plain + self.hidden + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model = Net()
    program = capture(model, torch.randn(2, 4))
    assert list(program.module.state_dict()) == list(model.state_dict())
    other = Net().eval()
    program.module.load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(3, 4)
    assert difference(program.module(x), other(x)) is None
    program.module.double()
    assert program.module(x.double()).dtype is torch.float64


@pytest.mark.parametrize("model", [ConvNet(), TiedLanguageModel(), InPlace(), BatchNormAct(3)])
def test_model_when_captured_is_left_as_it_was(model: nn.Module) -> None:
    example = {TiedLanguageModel: torch.zeros(2, 3, dtype=torch.long), InPlace: torch.randn(2, 4, 4)}.get(
        type(model), X
    )
    kept, before = example.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    calls: list[str] = []
    hook = model.register_forward_hook(lambda *_: calls.append("called"))
    program = capture(model, example)
    assert torch.equal(example, kept) and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not program.module.training and list(model._forward_hooks) == [hook.id]
    mine, theirs = {id(p) for p in program.module.parameters()}, {id(p) for p in model.parameters()}
    assert not mine & theirs


def test_exported_program_when_given_equals_its_source() -> None:
    model = ConvNet(momentum=0.03).eval()
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, when it copies its pytree specs
        decomposed = exported.run_decompositions({})
    for source in (exported, decomposed):
        program = capture(source)
        x = torch.randn(3, 3, 8, 8)
        assert difference(program.module(x), model(x)) is None
        bn = program.module.get_submodule("bn1")
        assert isinstance(bn, nn.BatchNorm2d) and bn.momentum == 0.03 and bn.eps == 1e-3
        assert list(program.module.state_dict()) == list(model.state_dict())


def test_graph_module_when_given_equals_its_source() -> None:
    model = torch.fx.symbolic_trace(ConvNet().eval())
    program = capture(model, X)
    assert difference(program.module(X), model(X)) is None


def test_mode_notes_when_depth_is_stochastic_name_the_module() -> None:
    class DropPath(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.bernoulli(torch.full((x.shape[0], 1), 0.5)) if self.training else x

    program = capture(nn.Sequential(nn.Linear(3, 3), DropPath()), torch.randn(2, 3))
    lost = [note for note in program.notes if note.kind is NoteKind.LOST_IN_EVAL]
    assert [note.place for note in lost] == ["1"] and "bernoulli" in lost[0].text
    assert not [n for n in capture(ConvNet(), X).notes if n.kind is NoteKind.LOST_IN_EVAL]


def test_train_override_when_it_freezes_is_noted() -> None:
    class Frozen(ConvNet):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.bn1.eval()
            return self

    notes = [note for note in capture(Frozen(), X).notes if note.kind is NoteKind.FROZEN_STATE]
    assert len(notes) == 1 and "keeps bn1 in eval mode" in notes[0].text


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 12)


def test_static_batch_when_the_model_fixes_it_is_noted() -> None:
    program = capture(FixedBatch(), torch.randn(2, 3, 4))
    notes = [note for note in program.notes if note.kind is NoteKind.STATIC_BATCH]
    assert len(notes) == 1 and "fixes its batch" in notes[0].text
    assert program.node("x").meta["type"].shape == (2, 3, 4)


def test_batch_when_asked_to_be_static_stays_at_the_example() -> None:
    program = capture(ConvNet(), X[:1], dynamic_batch=False)
    assert program.node("x").meta["type"].shape == (1, 3, 8, 8)
    assert not [note for note in program.notes if note.kind is NoteKind.STATIC_BATCH]


def test_guards_when_sizes_are_fixed_are_noted() -> None:
    notes = [str(note) for note in capture(ConvNet(), X).notes]
    assert "guard: x: fixed sizes: axis 1 is 3, axis 2 is 8, axis 3 is 8" in notes


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Autocast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, torch.ones(3, 3))


def named(name: str) -> nn.Module:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 3))
    return model


@pytest.mark.parametrize(
    ("model", "inputs", "kwargs", "texts"),
    [
        (nn.Linear(3, 3), 7, None, ["example_inputs", "got int"]),
        (nn.Linear(3, 3), (), None, ["at least one tensor"]),
        (nn.Linear(3, 3), torch.randn(2, 4), None, ["does not run on the example inputs", "shapes"]),
        (nn.Linear(3, 3), (torch.randn(2, 3), torch.randn(2, 3)), None, ["does not run", "TypeError"]),
        (nn.Linear(3, 3), torch.randn(2, 3), {"nope": 1}, ["does not run", "nope"]),
        (nn.Linear(3, 3), torch.ones(2, 3, dtype=torch.long), None, ["does not run", "dtype"]),
        (named("graph"), torch.randn(2, 3), None, ["Sequential.graph", "Rename"]),
        (named("code"), torch.randn(2, 3), None, ["Sequential.code", "Rename"]),
        (named("fake_quants"), torch.randn(2, 3), None, ["Sequential.fake_quants", "Rename"]),
        (
            nn.Sequential(Autocast()),
            torch.randn(2, 3),
            None,
            ["autocast(enabled=True)", "at 0", "test_capture_state.py"],
        ),
        (Branch(), torch.randn(2, 3), None, ["cannot trace Branch", "test_capture_state.py", "torch.where"]),
        ("model", torch.randn(2, 3), None, ["expected an nn.Module", "got str"]),
    ],
)
def test_capture_when_it_cannot_says_what_where_and_why(
    model: Any, inputs: Any, kwargs: dict[str, Any] | None, texts: list[str]
) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs, kwargs)
    for text in texts:
        assert text in str(caught.value), str(caught.value)


def test_check_when_the_program_is_wrong_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    real = api.normalize

    def broken(graph: torch.fx.Graph) -> None:
        real(graph)
        for node in graph.nodes:
            if node.target is torch.ops.aten.hardtanh.default:
                node.args = (node.args[0], 0.0, 0.5)

    monkeypatch.setattr(api, "normalize", broken)
    for example, batch in ((X, 2), (X[:1], 3)):
        with pytest.raises(CaptureError, match=rf"output 0 of .* differs.*\(batch {batch}\).*defect of the capture"):
            capture(ConvNet(), example)


@pytest.mark.parametrize("batch", [1, 2])
def test_check_when_batch_one_takes_another_path_raises(batch: int) -> None:
    class Squeeze(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] > 1 else x * 3

    with pytest.raises(CaptureError, match="batch 1.*dynamic_batch=False"):
        capture(Squeeze(), torch.randn(batch, 3))
    program = capture(Squeeze(), torch.ones(batch, 3), dynamic_batch=False)
    assert torch.equal(program.module(torch.ones(batch, 3)), Squeeze()(torch.ones(batch, 3)))


def test_capture_when_a_branch_depends_on_values_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match="torch.where"):
        capture(Branch(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


def test_kwargs_when_only_structured_inputs_are_given_keep_their_names() -> None:
    program = capture(Structured("dict"), {"x": torch.randn(2, 4), "scale": torch.randn(2, 4)})
    assert [n.name for n in program.graph.nodes if n.op == "placeholder"] == ["x", "scale"]


def test_shared_module_when_it_stands_at_two_paths_stays_one() -> None:
    module = capture(Shared(), torch.randn(2, 4)).module
    assert module.get_submodule("body") is module.get_submodule("twin")
