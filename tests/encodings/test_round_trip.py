"""Encodings go into a file and come back: for every net and every version, no code differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant import Stage, calibrate, load_encodings, save_encodings
from fxquant.encodings.entry import Section, entry_of
from fxquant.encodings.formats import document
from fxquant.encodings.parsing import read_encodings
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.spec import Encoding, Granularity, QuantSpec
from tests.encodings.comparing import differing_bytes, differing_codes
from tests.encodings.nets import CASES, VERSIONS, calibrated, finalized, prepared


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_reloaded_program_has_the_same_codes_and_writes_the_same_file(name: str, version: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.encodings", tmp_path / "second.encodings"
    original = calibrated(name)
    save_encodings(original, first, version)
    reloaded = prepared(name)
    report = load_encodings(reloaded, first)
    assert report.version == version and report.is_complete and report.loaded
    assert report.not_covered == report.not_in_program == report.biases == report.in_float == ()
    save_encodings(reloaded, second, version)
    assert first.read_bytes() == second.read_bytes()
    assert reloaded.stage is Stage.CALIBRATED
    assert differing_codes(original, reloaded, CASES[name].inputs) == 0
    originals, reloads = finalized(original, name), finalized(reloaded, name)
    assert differing_codes(originals, reloads, CASES[name].inputs) == 0
    assert differing_bytes(originals, reloads) == 0


@pytest.mark.parametrize("name", CASES)
def test_every_version_says_the_same(name: str, tmp_path: Path) -> None:
    program = calibrated(name)
    for version in VERSIONS:
        save_encodings(program, tmp_path / version, version)
    said = [{e.name: (e.scales, e.offsets) for e in read_encodings(tmp_path / v).entries} for v in VERSIONS]
    assert said[0] == said[1] == said[2]


def _weight_and_activation(program: object) -> list[tuple[str, FakeQuant]]:
    quants = [(str(n.args[0]), m) for n, m in program.fake_quant_nodes()]  # type: ignore[attr-defined]
    return [next((n, m) for n, m in quants if m.follows is follows) for follows in (False, True)]


@pytest.mark.parametrize("follows", [False, True])
def test_comparison_finds_an_offset_moved_by_one_and_a_scale_by_one_ulp(follows: bool, tmp_path: Path) -> None:
    name = "residual"
    original = calibrated(name)
    save_encodings(original, tmp_path / "e", "1.0.0")
    for fault in ("offset", "scale"):
        content = json.loads((tmp_path / "e").read_text())
        section = "param_encodings" if follows else "activation_encodings"
        entry = next(e for e in content[section] if e["bw"] == 8)
        if fault == "scale":
            entry["scale"][0] = float(torch.nextafter(torch.tensor(entry["scale"][0]), torch.tensor(1.0)))
        elif follows:
            continue  # a symmetric weight's offset is prescribed: test_refusals
        else:
            entry["offset"][0] += 1
        (tmp_path / "f").write_text(json.dumps(content))
        reloaded = prepared(name)
        report = load_encodings(reloaded, tmp_path / "f", strict=False)
        assert report.is_complete and (fault == "offset" or report.biases)  # the bias's scale no longer fits
        found = differing_codes(original, reloaded, CASES[name].inputs)
        stored = differing_bytes(finalized(original, name), finalized(reloaded, name))
        assert found + stored > 0 and (fault == "scale" or found > 0)


def test_partial_file_leaves_the_rest_to_calibration(tmp_path: Path) -> None:
    original, program = calibrated("residual"), prepared("residual")
    save_encodings(original, tmp_path / "e", "1.0.0")
    content = json.loads((tmp_path / "e").read_text())
    kept = content["activation_encodings"].pop(1)["name"]
    content["param_encodings"].pop(0)
    content["activation_encodings"].append(dict(content["activation_encodings"][0], name="nobody"))
    content["activation_encodings"][0]["scale"] = [0.5]
    (tmp_path / "p").write_text(json.dumps(content))
    report = load_encodings(program, tmp_path / "p", strict=False)
    assert not report.is_complete and program.stage is Stage.INSERTED
    assert report.not_covered == ("conv1.weight", kept) and report.not_in_program == ("nobody",)
    assert f"not covered by the file (2): conv1.weight, {kept}" in str(report)
    modes = {str(node.args[0]): module.mode for node, module in program.fake_quant_nodes()}
    assert modes.pop(kept) is Mode.OBSERVE and modes.pop("conv1_weight") is Mode.OBSERVE
    assert set(modes.values()) == {Mode.FROZEN}
    calibrate(program, [CASES["residual"].inputs], progress=False)
    grids = {str(node.args[0]): module for node, module in program.fake_quant_nodes()}
    assert float(grids["x"].scale) == 0.5  # the user's, not calibration's
    twin = {str(node.args[0]): module for node, module in original.fake_quant_nodes()}
    assert torch.equal(grids[kept].scale, twin[kept].scale) and program.stage is Stage.CALIBRATED


def test_weights_missing_from_a_file_are_computed_from_the_weights(tmp_path: Path) -> None:
    original, program = calibrated("linears"), prepared("linears")
    save_encodings(original, tmp_path / "e", "2.0.0")
    content = json.loads((tmp_path / "e").read_text())
    content["encodings"] = [entry for entry in content["encodings"] if not entry["name"].endswith("weight")]
    (tmp_path / "e").write_text(json.dumps(content))
    report = load_encodings(program, tmp_path / "e", strict=False)
    assert report.is_complete and report.not_covered == ("first.weight", "second.weight") and report.biases == ()
    assert differing_codes(original, program, CASES["linears"].inputs) == 0
    assert all(module.mode is Mode.FAKE for _, module in program.fake_quant_nodes())


@pytest.mark.parametrize("freeze", [False, True])
def test_activations_stay_trainable_unless_frozen_and_weights_are_frozen(freeze: bool, tmp_path: Path) -> None:
    program = prepared("linears")
    save_encodings(calibrated("linears"), tmp_path / "e")
    load_encodings(program, tmp_path / "e", freeze=freeze)
    modes = {module.follows: module.mode for _, module in program.fake_quant_nodes()}
    assert modes == {True: Mode.FROZEN, False: Mode.FROZEN if freeze else Mode.FAKE}


def test_weight_grid_of_a_file_survives_finalize_and_a_changed_weight(tmp_path: Path) -> None:
    original, program = calibrated("linears"), prepared("linears")
    save_encodings(original, tmp_path / "e")
    load_encodings(program, tmp_path / "e")
    with torch.no_grad():
        program.module.get_parameter("first.weight").mul_(3.0)
    grids = [module.scale.clone() for _, module in finalized(program, "linears").fake_quant_nodes() if module.follows]
    before = [module.scale for _, module in original.fake_quant_nodes() if module.follows]
    assert all(torch.equal(a, b) for a, b in zip(grids, before, strict=True))


def test_quantizer_that_is_off_has_no_entry_and_needs_none(tmp_path: Path) -> None:
    original, program = calibrated("linears"), prepared("linears")
    for one in (original, program):
        module = next(module for node, module in one.fake_quant_nodes() if str(node.args[0]) == "relu")
        module.mode = Mode.OFF
    save_encodings(original, tmp_path / "e", "0.6.1")
    names = [entry.name for entry in read_encodings(tmp_path / "e").entries]
    assert "relu" not in names and "second.weight" in names
    load_encodings(program, tmp_path / "e")
    assert module.mode is Mode.OFF and program.stage is Stage.CALIBRATED
    assert differing_codes(original, program, CASES["linears"].inputs) == 0


def test_values_that_share_a_grid_have_an_entry_each(tmp_path: Path) -> None:
    save_encodings(calibrated("residual"), tmp_path / "e")
    said = {entry.name: (entry.scales, entry.offsets) for entry in read_encodings(tmp_path / "e").entries}
    assert said["max_pool2d"] == said["hardtanh"]


SHAPES = {None: (), 0: (3,), 1: (2,)}


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    bits, signed, symmetric = draw(st.integers(2, 16)), draw(st.booleans()), draw(st.booleans())
    axis, block = draw(st.sampled_from([(None, None), (0, None), (1, None), (1, 2)]))
    strict = draw(st.booleans()) and signed and symmetric
    spec = QuantSpec(bits, signed, symmetric, strict, Granularity(axis, block))
    shape = spec.granularity.encoding_shape((3, 4))
    count = torch.Size(shape).numel()
    scales = draw(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=count, max_size=count))
    point = st.integers(spec.qmin, spec.qmax) if spec.fixed_zero_point is None else st.just(spec.fixed_zero_point)
    points = draw(st.lists(point, min_size=count, max_size=count))
    return Encoding(torch.tensor(scales).reshape(shape), torch.tensor(points).reshape(shape), spec)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(encoding=encodings())
def test_any_encoding_goes_through_a_file_unchanged(version: str, encoding: Encoding, tmp_path: Path) -> None:
    path = tmp_path / "one"
    text = json.dumps(document([entry_of("t", Section.PARAMETERS, encoding, 2)], version))
    path.write_text(text)
    (entry,) = read_encodings(path).entries
    assert entry.encoding(encoding.spec, tuple(encoding.scale.shape)).same_grid(encoding)
    assert read_encodings(path).version == version
    path.write_text(text.replace(f'"version": "{version}", "producer"', '"producer"', 1))
    assert read_encodings(path).version == version  # seen from its shape
