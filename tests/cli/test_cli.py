"""The command line, run as a user would: on a model file and arrays in a folder."""

from __future__ import annotations

import json
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest

from fxquant.cli import commands
from fxquant.cli.main import main, make_parser
from fxquant.parity import check_parity
from fxquant.simulation import certification
from tests.cli.model_file import write_images, write_model_file

MORE = """
def batches():
    torch.manual_seed(1)
    for _ in range(3):
        yield torch.randn(4, 3, 8, 8)

seven = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model file and data, as the working directory."""
    write_model_file(tmp_path, MORE)
    data = write_images(tmp_path / "images.npy")
    np.savez(tmp_path / "images.npz", x=data)
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "parts" / "a.npy", data[:6])
    np.save(tmp_path / "parts" / "b.npy", data[6:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("data", ["images.npy", "images.npz", "parts", "model.py:batches"])
def test_quantize_then_parity_agree_for_every_kind_of_data(
    folder: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "model.py:make_net", "--data", data, "--out", "out"]) == 0
    assert "wrote out/model.onnx" in capsys.readouterr().out
    assert main(["parity", "out/model.onnx", "--data", data, "--json", "report.json"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["worst_local_steps"] <= 1 and report["fault"] == []
    assert capsys.readouterr().out.splitlines()[0] == report["verdict"]


def test_parity_prints_json_alone_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "out"])
    capsys.readouterr()
    assert main(["parity", "out/model.onnx", "--data", "images.npy", "--max-batches", "1", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 1


def test_parity_fails_on_a_planted_weight_code_and_names_the_node(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "out"])
    model = onnx.load("out/model.onnx")
    codes = next(item for item in model.graph.initializer if item.name == "conv_weight.codes")
    values = onnx.numpy_helper.to_array(codes).copy()
    values.flat[5] += 1 if values.flat[5] < 100 else -1
    codes.CopyFrom(onnx.numpy_helper.from_array(values, codes.name))
    onnx.save(model, "out/model.onnx")
    capsys.readouterr()
    assert main(["parity", "out/model.onnx", "--data", "images.npy"]) == 1
    assert capsys.readouterr().out.startswith("FAULT at conv: ")


def plant_bias_code(by: int) -> None:
    """Move one code of the convolution's bias in out/model.onnx."""
    model = onnx.load("out/model.onnx")
    codes = next(item for item in model.graph.initializer if item.name == "conv_bias.codes")
    values = onnx.numpy_helper.to_array(codes).copy()
    values.flat[0] += by
    codes.CopyFrom(onnx.numpy_helper.from_array(values, codes.name))
    onnx.save(model, "out/model.onnx")


@pytest.mark.parametrize("simulation", ["float", "exact", "integer"])
def test_parity_prints_the_verdict_first_for_every_simulation(
    folder: Path, simulation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "out"])
    capsys.readouterr()
    arguments = ["parity", "out/model.onnx", "out/model.fxq", "--data", "images.npy", "--simulation", simulation]
    assert main(arguments) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert f"({simulation} simulation, onnxruntime " in first and "codes differ at " in first


def test_parity_is_of_the_exact_simulation_on_one_thread_when_not_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "out"])
    capsys.readouterr()
    assert main(["parity", "out/model.onnx", "--data", "images.npy"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("exact: 0 of ") and "(exact simulation, " in first and "level ALL, 1 thread)" in first


def test_parity_fails_when_a_single_code_of_a_certified_node_differs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(certification, "here", lambda: certification.CERTIFIED_ON["QLinearConv"][0])
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "out"])
    plant_bias_code(40)
    monkeypatch.setattr(commands, "check_parity", partial(check_parity, check_stored=False))
    capsys.readouterr()
    assert main(["parity", "out/model.onnx", "--data", "images.npy", "--simulation", "float"]) == 0
    assert main(["parity", "out/model.onnx", "--data", "images.npy", "--json", "report.json"]) == 1
    report = json.loads((folder / "report.json").read_text())
    assert report["fault"] == ["conv"] and report["worst_local_steps"] == 1 and report["stored"] == []


@pytest.mark.parametrize(
    ("option", "wrong", "accepted"),
    [
        ("--simulation", "exakt", ("float", "exact", "integer")),
        ("--level", "MOST", ("ALL", "EXTENDED", "BASIC", "DISABLED")),
    ],
)
def test_parity_says_what_is_accepted_when_a_name_is_wrong(
    option: str, wrong: str, accepted: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["parity", "model.onnx", "--data", "images.npy", option, wrong])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and wrong in error and all(name in error for name in accepted)


def test_parity_refuses_two_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "m.onnx", "a.fxq", "--program", "b.fxq", "--data", "images.npy"]) == 2
    assert "expected one program; got a.fxq and --program b.fxq" in capsys.readouterr().err


def test_show_prints_a_saved_program_and_draws_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "out"])
    capsys.readouterr()
    assert main(["show", "out/model.fxq", "--draw", "graph.svg"]) == 0
    assert "conv = aten.convolution" in capsys.readouterr().out
    assert "<svg" in (folder / "graph.svg").read_text()


def test_show_prints_a_model_before_and_after_prepare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "model.py:make_net", "--data", "images.npy"]) == 0
    assert "bn = BatchNorm2d" in capsys.readouterr().out
    arguments = ["show", "model.py:make_net", "--data", "images.npy", "--config", "int8_per_channel", "--passes"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "fold-batch-norm" in printed and "relu_fq = FakeQuant(relu)" in printed


def test_show_prints_the_coverage_of_a_saved_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "out"])
    capsys.readouterr()
    assert main(["show", "out/model.fxq", "--coverage", "--json", "coverage.json"]) == 0
    printed, report = capsys.readouterr().out, json.loads((folder / "coverage.json").read_text())
    assert printed.startswith("coverage of 'Net' (stage finalized): ") and report["summary"] in printed.splitlines()[0]
    assert "conv = aten.convolution" not in printed and "s8 strict symmetric per-channel(0)" in printed
    assert {item["value"] for item in report["values"]} >= {"x", "conv_weight", "relu", "fc"}
    assert main(["show", "out/model.fxq", "--coverage", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_show_prints_the_coverage_of_a_model_under_a_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = 'rules = [{ op = "Gemm", quantize = false }]'
    text = (resources.files("fxquant.configs") / "int8_per_channel.toml").read_text()
    (folder / "mine.toml").write_text(text.replace('pass = "assign-specs"', f'pass = "assign-specs"\n{rule}'))
    arguments = ["show", "model.py:make_net", "--data", "images.npy", "--config", "mine.toml", "--coverage"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "not yet" in printed and "float: excluded by rule op 'Gemm' (mine.toml: prepare[" in printed


@pytest.mark.parametrize("extra", [[], ["--coverage"], ["--coverage", "--json", "-"]])
def test_show_tells_which_rules_decided_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    rule = 'rules = [{ op = "Softmax", quantize = false }]'
    text = (resources.files("fxquant.configs") / "int8_per_channel.toml").read_text()
    (folder / "mine.toml").write_text(text.replace('pass = "assign-specs"', f'pass = "assign-specs"\n{rule}'))
    assert main(["show", "model.py:make_net", "--data", "images.npy", "--config", "mine.toml", *extra]) == 0
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--config", "mine.toml", "--out", "out"])
    first = capsys.readouterr()
    assert main(["show", "out/model.fxq", *extra]) == 0
    second = capsys.readouterr()
    for printed in (first, second):
        notes = [line for line in (printed.err if "-" in extra else printed.out).splitlines() if "Softmax" in line]
        assert any(line.startswith("note: other: mine.toml: prepare[") for line in notes)
    assert json.loads(second.out) if "-" in extra else second.out


def test_show_refuses_json_without_coverage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "model.py:make_net", "--data", "images.npy", "--json", "a.json"]) == 2
    assert "expected --json with --coverage" in capsys.readouterr().err


def test_diff_shows_what_a_pass_changed_and_what_two_programs_differ_in(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["diff", "model.py:make_net", "--data", "images.npy", "--pass", "fold-batch-norm"]
    assert main(arguments) == 0
    assert "-bn = BatchNorm2d" in capsys.readouterr().out
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--out", "a"])
    main(["quantize", "model.py:make_net", "--data", "images.npy", "--config", "int8_per_tensor", "--out", "b"])
    capsys.readouterr()
    assert main(["diff", "a/model.fxq", "b/model.fxq"]) == 0
    assert "per-channel(0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "model.py:make_nett", "--data", "images.npy", "--out", "o"], "make_net"),
        (["quantize", "model", "--data", "images.npy", "--out", "o"], "package.module:callable"),
        (["quantize", "absent.py:f", "--data", "images.npy", "--out", "o"], "does not exist"),
        (["quantize", "no_such_package:f", "--data", "images.npy", "--out", "o"], "cannot be imported"),
        (["quantize", "model.py:seven", "--data", "images.npy", "--out", "o"], "nn.Module"),
        (["quantize", "model.py:make_net", "--data", "absent.npy", "--out", "o"], "does not exist"),
        (["quantize", "model.py:make_net", "--data", "model.py:seven", "--out", "o"], "iterable"),
        (
            ["quantize", "model.py:make_net", "--data", "images.npy", "--config", "int8_per_chanel", "--out", "o"],
            "int8_per_channel",
        ),
        (["quantize", "model.py:make_net", "--data", "images.npy", "--opset", "12", "--out", "o"], "13"),
        (["parity", "absent.onnx", "--data", "images.npy"], "ONNX file 'absent.onnx' does not exist"),
        (["show", "absent.fxq"], "absent.fxq"),
        (["diff", "absent.fxq"], "two .fxq files"),
        (["show", "model.py:make_net"], "--data"),
        (
            ["show", "images.npy"],
            "expected a .fxq file, package.module:callable, file.py:callable or an exported .pt2 file",
        ),
        (["show", "net.onnx"], "give the .fxq file beside it"),
        (["diff", "images.npy"], "got a .npy file"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_was_expected(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fxquant: ") and message in error and "Traceback" not in error


def test_unknown_pass_in_diff_gets_the_nearest_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "model.py:make_net", "--data", "images.npy", "--pass", "fold-batchnorm"]) == 2
    assert "fold-batch-norm" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "show", "diff", "quantize", "parity"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert f"examples:\n  fxquant {command}" in capsys.readouterr().out


def test_demo_writes_everything_and_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "0 Q/DQ left inside" in printed and "accuracy, int8 (onnxruntime)" in printed
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["int8_accuracy"] > 0.8 and abs(report["int8_accuracy"] - report["float_accuracy"]) < 0.05
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert written == {"model.onnx", "model.fxq", "float.onnx", "graph.svg", "passes", "report.json"}


def test_quantize_writes_the_float_model_and_the_encodings_in_the_version_asked_for(folder: Path) -> None:
    arguments = ["quantize", "model.py:make_net", "--data", "images.npy", "--encodings", "2.0.0", "--out", "all"]
    assert main(arguments) == 0
    written = {path.name for path in Path("all").iterdir()}
    assert written == {"model.onnx", "model.fxq", "model_float.onnx", "model.encodings", "model_state_dict.pth"}
    assert json.loads(Path("all/model.encodings").read_text())["version"] == "2.0.0"
