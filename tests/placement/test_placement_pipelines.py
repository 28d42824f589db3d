"""Placement files as configs: loaded, written as TOML, given to QuantSim and the command line, exported and run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import fxquant
from fxquant.cli.main import main
from fxquant.errors import ConfigError
from fxquant.graph.pipeline import Pipeline, load_pipeline, packaged_pipelines, parse_pipeline
from fxquant.numerics.runtime import RuntimeOptions, optimised_graph
from fxquant.passes import ApplyPlacement
from fxquant.placement import Rule
from fxquant.spec import SpecOverride, Target
from tests.placement.nets import IMAGE, NETS, ConvBnRelu, on_off, prepared

DATA = Path(__file__).parent / "data"
HTP = [str(path) for path in sorted(DATA.glob("*.json"))]
TWINS = ("aimet_default", "aimet_per_channel")
FUSED = {
    "conv_bn_relu": {"QLinearConv", "QGemm", "QLinearGlobalAveragePool"},
    "residual": {"QLinearConv", "QLinearAdd"},
    "depthwise": {"QLinearConv"},
    "concat": {"QLinearConv", "QLinearConcat", "QLinearMul"},
}
FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "Add", "Relu", "Clip", "GlobalAveragePool", "Concat"}


def passes(pipeline: Pipeline) -> list[object]:
    return [*pipeline.prepare_passes, *pipeline.finalize_passes]


@pytest.mark.parametrize("name", TWINS)
def test_json_and_toml_of_one_preset_say_the_same(name: str) -> None:
    twin = load_pipeline(f"{name}.json")
    assert passes(twin) == passes(load_pipeline(name))
    assert twin.name == name


@pytest.mark.parametrize("net", NETS)
def test_json_and_toml_of_one_preset_give_the_same_map(net: str) -> None:
    for name in TWINS:
        assert on_off(prepared(net, f"{name}.json")) == on_off(prepared(net, name))


@pytest.mark.parametrize("config", ["aimet_default.json", "aimet_per_channel.json", *HTP])
def test_pipeline_of_a_json_file_is_read_back_from_its_toml(config: str) -> None:
    pipeline = load_pipeline(config)
    assert pipeline.target is Target.ONNXRUNTIME_X64
    again = parse_pipeline(pipeline.to_toml(), "again", place="again.toml")
    assert passes(again) == passes(pipeline)
    assert again.to_toml() == pipeline.to_toml()


def test_packaged_names_are_those_of_the_toml_files() -> None:
    names = packaged_pipelines()
    assert set(TWINS) <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if "." in name]


def test_file_in_the_working_folder_comes_before_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aimet_default.json").write_text((DATA / "htp_v66_like.json").read_text())
    monkeypatch.chdir(tmp_path)
    item = next(item for item in load_pipeline("aimet_default.json").prepare_passes if isinstance(item, ApplyPlacement))
    assert item.defaults.hw_version == "V66"


def test_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "mark.json").write_text((DATA / "htp_v66_like.json").read_text(), encoding="utf-8-sig")
    assert passes(load_pipeline(tmp_path / "mark.json")) == passes(load_pipeline(DATA / "htp_v66_like.json"))


def test_grids_are_asymmetric_where_a_json_file_says_nothing(tmp_path: Path) -> None:
    sections = {name: {} for name in ("params", "op_type", "model_input", "model_output")}
    defaults = {"ops": {"is_output_quantized": "True"}, "params": {"is_quantized": "True"}}
    (tmp_path / "few.json").write_text(json.dumps({"defaults": defaults, "supergroups": [], **sections}))
    program = prepared("conv_bn_relu", str(tmp_path / "few.json"))
    assert {module.spec.symmetric for _, module in program.fake_quant_nodes()} == {False}


def test_toml_error_names_the_place_in_the_file() -> None:
    text = '[[prepare]]\npass = "apply-placement"\nop_type.Conv.is_output_quantised = true\n'
    with pytest.raises(ConfigError, match=r"\(my.toml: prepare\[0\] apply-placement.op_type.Conv\). Did you mean"):
        parse_pipeline(text, "my", place="my.toml")
    text = '[[prepare]]\npass = "apply-placement"\nop_type.Cnov.is_output_quantized = true\n'
    with pytest.raises(ConfigError, match=r"op_type.Cnov: .* \(my.toml: prepare\[0\] apply-placement\). Did you mean"):
        parse_pipeline(text, "my", place="my.toml")


def test_notes_name_the_file_also_after_an_override() -> None:
    pipeline = load_pipeline("aimet_default.json").override(activation=SpecOverride(bits=16))
    program = fxquant.capture(ConvBnRelu().eval(), IMAGE)
    pipeline.prepare(program)
    places = [note.place for note in program.notes if note.text.startswith("matches nothing")]
    assert places == ["aimet_default.json"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"weight": SpecOverride(symmetric=False, signed=False)}, "defaults.params.is_symmetric"),
        ({"activation": SpecOverride(symmetric=True)}, "defaults.ops.is_symmetric"),
        ({"weight": SpecOverride(strict=True)}, "defaults.strict_symmetric"),
    ],
)
def test_override_of_what_the_sections_decide_is_refused(change: dict[str, SpecOverride], place: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot be overridden .*which {place} decides; got"):
        load_pipeline("aimet_default.json").override(**change)
    load_pipeline("aimet_default").override(weight=SpecOverride(bits=4, symmetric=True, signed=True))


def test_sim_takes_a_json_file_with_bits_and_estimators() -> None:
    sim = fxquant.QuantSim(
        ConvBnRelu().eval(),
        IMAGE,
        config=DATA / "htp_v73_like.json",
        activation=SpecOverride(bits=16, estimator="tf-enhanced"),
        weight=SpecOverride(bits=4),
    )
    specs = {node.all_input_nodes[0].name: module.spec for node, module in sim.program.fake_quant_nodes()}
    assert (specs["gap"].bits, specs["gap"].estimator) == (16, "tf-enhanced")
    assert (specs["conv_weight"].bits, specs["conv_weight"].granularity.axis) == (4, 0)


def test_sim_leaves_a_pipeline_as_it_is() -> None:
    pipeline = load_pipeline("aimet_default")
    assert fxquant.QuantSim(ConvBnRelu().eval(), IMAGE, pipeline).pipeline is pipeline


def test_rules_join_the_sections_in_toml() -> None:
    item = next(item for item in load_pipeline("aimet_default").prepare_passes if isinstance(item, ApplyPlacement))
    text = load_pipeline("aimet_default").to_toml()
    with_rule = text.replace(
        'pass = "apply-placement"\n', 'pass = "apply-placement"\nrules = [{ module = "conv", quantize = false }]\n'
    )
    again = next(x for x in parse_pipeline(with_rule, "x", place="x").prepare_passes if isinstance(x, ApplyPlacement))
    assert item.rules == ()
    assert again.rules == (Rule(module="conv", quantize=False),)


def test_command_line_takes_a_json_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "images.npy", IMAGE.numpy())
    model = f"{__name__}:make_model"
    config = str(DATA / "htp_v73_like.json")
    status = main(["show", model, "--data", str(tmp_path / "images.npy"), "--config", config])
    assert status == 0
    assert "conv_weight_fq" in capsys.readouterr().out


def make_model() -> torch.nn.Module:
    return ConvBnRelu().eval()


@pytest.mark.parametrize("config", [*TWINS, *HTP], ids=lambda config: Path(config).stem)
@pytest.mark.parametrize("net", NETS)
def test_exported_net_passes_the_checker_and_runs_as_simulated(net: str, config: str, tmp_path: Path) -> None:
    program = prepared(net, config)
    batch = NETS[net][1]
    path = tmp_path / "net.onnx"
    fxquant.calibrate(program, [batch], progress=False)
    load_pipeline(config).finalize(program)
    fxquant.export_onnx(program, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    report = fxquant.check_parity(program, path, [batch], options=RuntimeOptions(threads=1))
    assert report.codes_compared > 0
    assert report.worst_local_steps <= 1
    kernels = {node.op_type for node in optimised_graph(path, RuntimeOptions(threads=1)).graph.node}
    if net in FUSED and config in TWINS:
        assert FUSED[net] <= kernels
        assert not FLOAT & kernels
