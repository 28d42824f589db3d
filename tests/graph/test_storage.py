"""A program file brings back what was saved, and refuses what was altered."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.errors import StorageError
from fxquant.graph.program import Note, NoteKind, Program, Stage, ValueType
from fxquant.graph.render import render
from fxquant.graph.storage import load_program, save_program
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.spec import RANGE_TRAINING, QuantSpec, Target
from tests.helpers import Builder, aten, quantized_program, residual_program

X = torch.linspace(-2.0, 2.0, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def saved(program: Program, tmp_path: Path) -> Program:
    path = tmp_path / "program.fxq"
    program.save(path)
    return load_program(path)


@pytest.mark.parametrize("make", [residual_program, quantized_program])
def test_program_comes_back_whole(make: Callable[[], Program], tmp_path: Path) -> None:
    program = make()
    program.target = Target.TENSORRT
    program.add_note(Note(NoteKind.GUARD, "x", "batch of at least 2"))
    program.node("conv").meta.update(
        {"output_spec": QuantSpec(bits=4), "input_specs": {0: QuantSpec(), 1: QuantSpec(bits=2)}}
    )
    again = saved(program, tmp_path)
    assert (again.name, again.stage, again.target, again.notes) == (
        program.name,
        program.stage,
        program.target,
        program.notes,
    )
    assert render(again) == render(program)
    assert again.fingerprint() == program.fingerprint()
    assert [node.meta for node in again.graph.nodes] == [node.meta for node in program.graph.nodes]
    assert list(again.module.state_dict()) == list(program.module.state_dict())
    assert torch.equal(again.module(X), program.module(X))
    assert repr(again.module) == repr(program.module)


def test_train_and_eval_mode_and_batch_norm_survive(tmp_path: Path) -> None:
    program = residual_program()
    program.module.train()
    program.module.get_submodule("bn").eval()
    again = saved(program, tmp_path)
    assert again.module.training and not again.module.get_submodule("bn").training
    norm = again.module.get_submodule("bn")
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.eps, norm.momentum) == (1e-3, 0.03)


def test_dropout_survives(tmp_path: Path) -> None:
    build = Builder()
    build.output(build.module("drop", "head.drop", nn.Dropout(0.25), build.input("x", 4)))
    drop = saved(build.program(), tmp_path).module.get_submodule("head.drop")
    assert isinstance(drop, nn.Dropout) and drop.p == 0.25


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode not in (Mode.TRACK, Mode.LEARN)])
def test_quantizers_keep_spec_mode_grid_and_observations(mode: Mode, tmp_path: Path) -> None:
    program = quantized_program()
    for _, module in program.fake_quant_nodes():
        module.mode = Mode.OBSERVE
    program.module(X)
    for _, module in program.fake_quant_nodes():
        module.mode = mode
    again = saved(program, tmp_path)
    for (_, old), (_, new) in zip(program.fake_quant_nodes(), again.fake_quant_nodes(), strict=True):
        assert (new.spec, new.mode, new.follows) == (old.spec, old.mode, old.follows)
        assert torch.equal(new.scale, old.scale) and torch.equal(new.zero_point, old.zero_point)
        assert torch.equal(new.estimator.low, old.estimator.low) and old.estimator.has_range
    assert torch.equal(again.module(X), program.module(X))


@pytest.mark.parametrize("training", RANGE_TRAINING)
def test_trained_ranges_survive(training: str, tmp_path: Path) -> None:
    program = quantized_program()
    for node, module in program.fake_quant_nodes():
        spec = (
            module.spec if module.follows and training == "moving-average" else replace(module.spec, training=training)
        )
        twin = FakeQuant(spec, tuple(module.scale.shape), follows=module.follows)
        twin.set_encoding(module.encoding)
        twin.engage()
        program.module.set_submodule(str(node.target), twin)
    program.recompile()
    program.module.train()
    program.module(X)
    again = saved(program, tmp_path)
    ranges = {key: value for key, value in program.module.state_dict().items() if ".range." in key}
    assert bool(ranges) is (training != "static")
    assert all(torch.equal(value, again.module.state_dict()[key]) for key, value in ranges.items())
    kinds = {name: type(value) for name, value in again.module.named_parameters()}
    assert kinds == {name: type(value) for name, value in program.module.named_parameters()}
    assert torch.equal(again.module(X), program.module(X))


def test_uncalibrated_program_survives(tmp_path: Path) -> None:
    program = quantized_program()
    for _, module in program.fake_quant_nodes():
        module.scale.fill_(float("nan"))
        module.mode = Mode.OBSERVE
    again = saved(program, tmp_path)
    assert not any(module.has_encoding for _, module in again.fake_quant_nodes())


def test_biases_are_linked_to_the_loaded_quantizers(tmp_path: Path) -> None:
    again = saved(quantized_program(), tmp_path)
    ((node, bias),) = again.bias_nodes()
    assert bias.sources[0] is again.module.get_submodule("fake_quants.x")


def test_ties_and_shared_modules_survive(tmp_path: Path) -> None:
    program = residual_program()
    weight = program.module.get_parameter("conv.weight")
    program.module.add_submodule("twin", nn.Module())
    program.module.get_submodule("twin").register_parameter("weight", weight)
    program.module._modules["alias"] = program.module.get_submodule("block")
    program.module.get_submodule("bn").register_parameter("nothing", None)
    again = saved(program, tmp_path)
    assert again.module.get_parameter("twin.weight") is again.module.get_parameter("conv.weight")
    assert again.module.get_submodule("alias") is again.module.get_submodule("block")
    assert list(again.module.state_dict()) == list(program.module.state_dict())
    assert dict(again.module.get_submodule("bn").named_parameters(remove_duplicate=False)).keys() == {"weight", "bias"}


def test_requires_grad_dtypes_and_persistence_survive(tmp_path: Path) -> None:
    program = residual_program()
    program.module.get_parameter("fc.weight").requires_grad_(False)
    table = torch.tensor([True, False])
    program.module.register_buffer("literal", torch.tensor([1.5, -2.0], dtype=torch.bfloat16), persistent=False)
    program.module.register_buffer("table", table)
    again = saved(program, tmp_path)
    assert not again.module.get_parameter("fc.weight").requires_grad
    assert again.module.get_parameter("fc.bias").requires_grad
    assert again.module.get_buffer("literal").dtype == torch.bfloat16
    assert torch.equal(again.module.get_buffer("literal"), program.module.get_buffer("literal"))
    assert "literal" not in again.module.state_dict() and "table" in again.module.state_dict()


def test_loaded_program_trains(tmp_path: Path) -> None:
    again = saved(quantized_program(), tmp_path)
    again.module(X).sum().backward()
    assert again.module.get_parameter("conv.weight").grad is not None


def test_tuple_types_and_odd_arguments_survive(tmp_path: Path) -> None:
    build = Builder()
    x = build.input("x", 4)
    split = build.call("split", aten.split.Tensor, x, 2, 1)
    first = build.call("first", __import__("operator").getitem, split, 0)
    build.output(build.call("clamp", aten.clamp.default, first, float("-inf"), 1.0))
    program = build.program()
    again = saved(program, tmp_path)
    assert again.node("split").meta["type"] == (ValueType(("s0", 2), torch.float32),) * 2
    assert torch.equal(again.module(torch.ones(3, 4) * 5), torch.ones(3, 2))


# What is refused


def rewrite_member(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {item: archive.read(item) for item in archive.namelist()}
    members[name] = change(members[name])
    with zipfile.ZipFile(path, "w") as archive:
        for item, data in members.items():
            archive.writestr(item, data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A saved program."""
    place = tmp_path / "program.fxq"
    save_program(quantized_program(), place)
    return place


def alter_weights(data: bytes) -> bytes:
    tensors = torch.load(io.BytesIO(data), weights_only=True)
    tensors["conv.weight"][0, 0, 0, 0] += 1.0
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def alter_bits(data: bytes) -> bytes:
    assert data.count(b'"mode": "fake"') == 3
    return data.replace(b'"mode": "fake"', b'"mode": "off"', 1)


@pytest.mark.parametrize("name, change", [("tensors.pt", alter_weights), ("program.json", alter_bits)])
def test_altered_file_is_refused(name: str, change: Callable[[bytes], bytes], path: Path) -> None:
    rewrite_member(path, name, change)
    with pytest.raises(StorageError, match=f"program file was altered.*of {name}"):
        load_program(path)


def test_altered_fingerprint_is_refused(path: Path) -> None:
    def forge(data: bytes) -> bytes:
        manifest = json.loads(data)
        manifest["fingerprint"] = "0" * 64
        return json.dumps(manifest).encode()

    rewrite_member(path, "manifest.json", forge)
    with pytest.raises(StorageError, match="program file was altered.*expected fingerprint 000000000000"):
        load_program(path)


def test_newer_version_is_refused(path: Path) -> None:
    rewrite_member(path, "manifest.json", lambda data: data.replace(b'"version": 3', b'"version": 99'))
    with pytest.raises(
        StorageError, match="expected format version 3; got version 99, written by fxquant .* newer one"
    ):
        load_program(path)


def test_truncated_file_is_refused(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match="program cannot be read .*program.fxq.*copied whole"):
        load_program(path)


def test_flipped_byte_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b'"class_name"') + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="program cannot be read"):
        load_program(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_other_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.fxq").write_bytes(content)
    with pytest.raises(StorageError, match="program cannot be read"):
        load_program(tmp_path / "x.fxq")


def test_other_zip_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(StorageError, match="no program file"):
        load_program(tmp_path / "x.pt")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="program cannot be read .*nowhere.fxq"):
        load_program(tmp_path / "nowhere.fxq")


def forged(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter program.json and make the digest agree: what someone would do who wants to be loaded."""
    import hashlib

    with zipfile.ZipFile(path) as archive:
        content, manifest = json.loads(archive.read("program.json")), json.loads(archive.read("manifest.json"))
    change(content)
    data = json.dumps(content).encode()
    manifest["sha256"]["program.json"] = hashlib.sha256(data).hexdigest()
    rewrite_member(path, "program.json", lambda _: data)
    rewrite_member(path, "manifest.json", lambda _: json.dumps(manifest).encode())


def record(content: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in content["graph"] if item.get("name") == name)
    return found


def calls_system(content: dict[str, Any]) -> None:
    record(content, "sigmoid").update({"target": "posix:system", "args": {"tuple": ["touch /tmp/fxquant_was_here"]}})


def names_code(content: dict[str, Any]) -> None:
    record(content, "x")["target"] = "x=__import__('os').getpid()"


def reads_class(content: dict[str, Any]) -> None:
    record(content, "conv_weight")["target"] = "__class__.__init__"


def calls_unknown_module(content: dict[str, Any]) -> None:
    record(content, "x_fq")["target"] = "nowhere"


def keyword_code(content: dict[str, Any]) -> None:
    record(content, "sigmoid")["kwargs"] = {"dict": [["a=print(1), b", 1]]}


def module_code(content: dict[str, Any]) -> None:
    content["modules"].append({"path": "a'b", "kind": "container", "options": {}, "training": False})


@pytest.mark.parametrize(
    "change, said",
    [
        (calls_system, "node 'sigmoid' of a program file.*expected a registered operator.*trusted=\\['posix'\\]"),
        (names_code, "node 'x' of a program file.*expected a name"),
        (reads_class, "node 'conv_weight' of a program file.*expected a tensor of the file"),
        (calls_unknown_module, "node 'x_fq' of a program file.*expected a module of the file"),
        (keyword_code, "node 'sigmoid' of a program file.*expected keyword names"),
        (module_code, "expected legal module names"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_file_cannot_smuggle_code_in(change: Callable[[dict[str, Any]], None], said: str, path: Path) -> None:
    forged(path, change)
    with pytest.raises(StorageError, match=said):
        load_program(path)
    assert not Path("/tmp/fxquant_was_here").exists()


def twice(x: torch.Tensor) -> torch.Tensor:
    """A Python function that a graph calls."""
    return 2 * x


def test_own_function_needs_trust(tmp_path: Path) -> None:
    build = Builder()
    build.output(build.call("twice", twice, build.input("x", 4)))
    path = tmp_path / "own.fxq"
    save_program(build.program(), path)
    with pytest.raises(StorageError, match="trusted="):
        load_program(path)
    again = load_program(path, trusted=["tests"])
    assert torch.equal(again.module(torch.ones(2, 4)), 2 * torch.ones(2, 4))


def test_called_module_of_another_kind_is_refused_when_saving(tmp_path: Path) -> None:
    build = Builder()
    build.output(build.module("act", "act", nn.ReLU(), build.input("x", 4)))
    with pytest.raises(StorageError, match="module 'act' cannot be saved .called by node 'act'.*got ReLU"):
        save_program(build.program(), tmp_path / "x.fxq")
    assert list(tmp_path.iterdir()) == []


def test_meta_that_is_no_plain_value_is_refused_when_saving(tmp_path: Path) -> None:
    program = residual_program()
    program.node("relu").meta["mine"] = {"ok": [1, "two"]}
    save_program(program, tmp_path / "x.fxq")
    assert load_program(tmp_path / "x.fxq").node("relu").meta["mine"] == {"ok": [1, "two"]}
    program.node("relu").meta["mine"] = object()
    with pytest.raises(StorageError, match="node 'relu': meta 'mine' cannot be saved"):
        save_program(program, tmp_path / "x.fxq")


def test_failed_write_leaves_the_old_file(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="program cannot be written.*No space left on device"):
        save_program(residual_program(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="program cannot be written .*nowhere"):
        save_program(residual_program(), tmp_path / "nowhere" / "x.fxq")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX")
def test_file_has_ordinary_permissions(path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@dataclass
class Result:
    """An output with names."""

    first: torch.Tensor
    second: torch.Tensor


torch.export.register_dataclass(Result, serialized_type_name="tests.graph.Result")


class Both(nn.Module):
    """Returns a dataclass."""

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> Result:
        return Result(first=x * scale, second=torch.relu(x))


def test_captured_program_with_keywords_and_dataclass_output_comes_back(tmp_path: Path) -> None:
    from fxquant.capture import capture

    x, scale = torch.linspace(-1, 1, 6).reshape(2, 3), torch.full((2, 3), 2.0)
    program = capture(Both(), (x,), {"scale": scale})
    again = saved(program, tmp_path)
    result = again.module(x, scale=scale)
    assert isinstance(result, Result)
    assert torch.equal(result.first, 2 * x) and torch.equal(result.second, x.relu())
    assert again.stage is Stage.CAPTURED


def test_fake_quant_module_is_the_engines_own(path: Path) -> None:
    assert type(load_program(path).module.get_submodule("fake_quants.x")) is FakeQuant
