"""train_qat: what a run gives and writes, that it is a hand-written loop, and each of its refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxquant.errors import CalibrationError, ConfigError, FxquantError, ScoreError, StorageError
from fxquant.graph.program import Program
from fxquant.graph.storage import load_program
from fxquant.parity import check_parity
from fxquant.parity.lowered_model import LoweredModel
from fxquant.schedule import Schedule
from fxquant.sim import QuantSim, write_pair
from fxquant.train import train_qat
from fxquant.training.distributed import _reach_idle_parameters
from fxquant.training.history import EpochRecord
from fxquant.training.parameter_groups import parameter_groups
from fxquant.training.seeding import seed_epoch
from tests.training.loop_nets import BATCHES, SHORT, Sample, calibrated, differing, loss, samples, shuffled, state

ONE = replace(SHORT, epochs=1)
TRAININGS = ("static", "moving-average", "lsq+")


def accuracy(model: Callable[..., Any]) -> float:
    """Negative loss of a lowered model on other noise."""
    return -float(sum(F.cross_entropy(model(x), y) for x, y in samples(seed=5)))


def nothing(model: nn.Module, batch: Sample) -> torch.Tensor:
    """A loss that is not finite from the second batch of the second epoch on."""
    nothing.calls += 1  # type: ignore[attr-defined]
    return loss(model, batch) * (float("nan") if nothing.calls == BATCHES + 2 else 1.0)  # type: ignore[attr-defined]


# --- what it gives ---------------------------------------------------------------------------------------------------


def test_run_gives_history_and_best_and_leaves_the_sim_at_the_last_epoch(tmp_path: Path) -> None:
    sim = calibrated()
    records: list[EpochRecord] = []
    found = train_qat(sim, samples(), loss, evaluate=accuracy, folder=tmp_path / "run", report=records.append)
    assert [record.epoch for record in found.history] == [1, 2, 3, 4] and tuple(records) == found.history
    assert found.history[0].loss > found.history[-1].loss
    assert [record.learning_rates[0] for record in found.history] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    actions = [record.actions for record in found.history]
    assert actions[1] == ("batch norm statistics frozen", "learning rate divided by 10: 0.001") and not actions[0]
    assert found.best is not None and found.best.score == max(record.score or 0.0 for record in found.history)
    assert sim.epoch == 4 and str(found).endswith(f"best: epoch {found.best.epoch}, score {found.best.score:.6g}")
    assert all(parameter.grad is None for parameter in sim.model.parameters())


def test_files_of_a_run_are_the_best_pair_the_history_and_the_checkpoint(tmp_path: Path) -> None:
    sim = calibrated()
    found = train_qat(sim, samples(), loss, evaluate=accuracy, folder=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best.onnx", "best.fxq", "history.json", "checkpoint.pt"}
    assert found.best is not None and found.best_path == tmp_path / "best.onnx"
    best = load_program(tmp_path / "best.fxq")
    assert check_parity(best, found.best_path, [samples()[0][0]], simulation="exact", progress=False).exact
    assert accuracy(LoweredModel(best, found.best_path)) == found.best.score
    written = json.loads((tmp_path / "history.json").read_text())
    assert written["best_epoch"] == found.best.epoch and len(written["epochs"]) == 4
    assert [EpochRecord.from_dict(record) for record in written["epochs"]] == list(found.history)


def test_best_is_kept_when_later_epochs_are_worse(tmp_path: Path) -> None:
    scores = iter([0.1, 0.7, 0.7, 0.3])
    sim, seen = calibrated(), []

    def evaluate(model: Any) -> float:
        seen.append(model.program.fingerprint())
        return next(scores)

    found = train_qat(sim, samples(), loss, evaluate=evaluate, folder=tmp_path)
    assert found.best is not None and found.best.epoch == 2
    assert load_program(tmp_path / "best.fxq").fingerprint() == seen[1] and len(set(seen)) == 4


def test_without_folder_and_evaluation_nothing_is_written_and_nothing_is_best() -> None:
    found = train_qat(calibrated(), samples(), loss, schedule=ONE)
    assert found.best is None and found.best_path is None and found.checkpoint_path is None
    assert found.history[0].score is None


@pytest.mark.parametrize("training", TRAININGS)
def test_hand_written_loop_with_step_epoch_gives_the_same_weights(training: str) -> None:
    sim, other = calibrated(training), calibrated(training)
    train_qat(sim, shuffled, loss, seed=3)
    optimizer = torch.optim.Adam(parameter_groups(other.program, SHORT.learning_rate))
    for epoch in range(SHORT.epochs):
        seed_epoch(3, epoch)
        other.model.train()
        for batch in shuffled(epoch):
            optimizer.zero_grad()
            loss(other.model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        other.step_epoch(optimizer)
    assert differing(state(sim), state(other)) == []


@pytest.mark.parametrize("training", TRAININGS)
def test_evaluation_does_not_disturb_training(training: str) -> None:
    alone, watched = calibrated(training), calibrated(training)
    train_qat(alone, shuffled, loss)

    def evaluate(model: Any) -> float:
        torch.randn(3), random.random(), np.random.rand()
        return accuracy(model)

    found = train_qat(watched, shuffled, loss, evaluate=evaluate)
    assert found.best is not None and differing(state(alone), state(watched)) == []


def test_exact_evaluation_scores_as_onnxruntime_does() -> None:
    scores = []
    for place in ("onnxruntime", "exact"):
        found = train_qat(calibrated(), samples(), loss, evaluate=accuracy, evaluate_on=place)  # type: ignore[arg-type]
        scores.append([record.score for record in found.history])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_seed_decides_what_is_drawn() -> None:
    sims = [calibrated() for _ in range(3)]
    for sim, seed in zip(sims, (1, 1, 2), strict=True):
        train_qat(sim, samples(), loss, schedule=ONE, seed=seed)
    assert differing(state(sims[0]), state(sims[1])) == []
    assert "conv.weight" in differing(state(sims[0]), state(sims[2]))


def test_loader_with_a_generator_of_its_own_shuffles_by_seed_and_epoch() -> None:
    rows = torch.utils.data.TensorDataset(torch.arange(12))
    loaders = [torch.utils.data.DataLoader(rows, 4, shuffle=True, generator=torch.Generator()) for _ in range(2)]
    list(loaders[0])
    orders = []
    for loader in loaders:
        seed_epoch(4, 7, loader)
        orders.append(torch.cat([batch for (batch,) in loader]).tolist())
    seed_epoch(4, 8, loaders[0])
    assert orders[0] == orders[1] != torch.cat([batch for (batch,) in loaders[0]]).tolist()


def test_loss_that_draws_from_any_generator_draws_by_seed_and_epoch() -> None:
    draws: list[list[float]] = []

    def drawing(model: nn.Module, batch: Sample) -> torch.Tensor:
        draws.append([random.random(), float(np.random.rand()), float(torch.rand(()))])
        return loss(model, batch)

    for _ in range(2):
        train_qat(calibrated(), samples(), drawing, schedule=replace(ONE, epochs=2), seed=5)
    first, second = draws[: 2 * BATCHES], draws[2 * BATCHES :]
    assert first == second
    assert all(a != b for a, b in zip(first[0], first[BATCHES], strict=True))


def test_batch_sampler_with_a_generator_of_its_own_draws_by_seed_and_epoch() -> None:
    class Pairs(torch.utils.data.Sampler[list[int]]):
        generator = torch.Generator()

        def __iter__(self) -> Iterator[list[int]]:
            yield from torch.randperm(12, generator=self.generator).view(-1, 2).tolist()

    rows = torch.utils.data.TensorDataset(torch.arange(12))
    loader = torch.utils.data.DataLoader(rows, batch_sampler=Pairs())
    orders = []
    for epoch in (7, 7, 8):
        seed_epoch(4, epoch, loader)
        orders.append(torch.cat([batch for (batch,) in loader]).tolist())
    assert orders[0] == orders[1] != orders[2]


def test_synchronised_program_is_refused() -> None:
    sim = calibrated()
    sim.model.register_forward_hook(_reach_idle_parameters)
    with pytest.raises(CalibrationError, match="expected a program of one process; .*DistributedDataParallel"):
        train_qat(sim, samples(), loss)


def test_distributed_sampler_is_told_the_epoch() -> None:
    rows = torch.utils.data.TensorDataset(torch.arange(12))
    sampler: Any = torch.utils.data.DistributedSampler(rows, num_replicas=2, rank=0)
    seed_epoch(0, 5, torch.utils.data.DataLoader(rows, 4, sampler=sampler))
    assert sampler.epoch == 5


def test_ranges_have_their_own_learning_rate() -> None:
    found = train_qat(calibrated("lsq"), samples(), loss, schedule=replace(ONE, range_learning_rate=1e-3))
    assert found.history[0].learning_rates == (1e-2, 1e-2, 1e-3)


def test_second_run_begins_the_schedule_anew() -> None:
    sim = calibrated()
    train_qat(sim, samples(), loss, schedule=ONE)
    assert len(train_qat(sim, samples(), loss, schedule=ONE).history) == 1 and sim.epoch == 1


class Pairs(nn.Module):
    """Takes a keyword and gives a dict, None and all."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
        return {"a": self.one(x) * scale, "rest": (self.two(x), None)}


def test_dicts_go_in_and_come_out_of_the_lowered_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 4), "scale": torch.randn(4, 1)}
    sim = QuantSim(Pairs().eval(), batch)
    sim.compute_encodings([batch], progress=False)
    seen = []

    def evaluate(model: Callable[..., Any]) -> float:
        seen.append(model(**batch))
        return 0.0

    train_qat(sim, [batch], lambda model, one: model(**one)["a"].square().mean(), schedule=ONE, evaluate=evaluate)
    sim.model.eval()
    expected = sim.model(**batch)
    assert seen[0].keys() == {"a", "rest"} and seen[0]["rest"][1] is None
    torch.testing.assert_close(seen[0]["a"], expected["a"], atol=0.05, rtol=0.0)
    torch.testing.assert_close(seen[0]["rest"][0], expected["rest"][0], atol=0.05, rtol=0.0)


def test_lowered_model_refuses_what_does_not_fit(tmp_path: Path) -> None:
    program: Program = calibrated().snapshot()
    model = LoweredModel(program, write_pair(program, tmp_path))
    with pytest.raises(FxquantError, match="batch: input 'x'; expected float32"):
        model(torch.randn(8, 2))


# --- what it refuses -------------------------------------------------------------------------------------------------


def refused(kind: type[FxquantError], sim: QuantSim | None = None, **changes: Any) -> str:
    """The text of the error that a run with these changes ends with."""
    arguments: dict[str, Any] = {"batches": samples(), "loss": loss, "schedule": ONE} | changes
    with pytest.raises(kind) as caught:
        train_qat(calibrated() if sim is None else sim, arguments.pop("batches"), arguments.pop("loss"), **arguments)
    assert type(caught.value) is kind
    return str(caught.value)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    nothing.calls = 0  # type: ignore[attr-defined]
    text = refused(FxquantError, loss=nothing, schedule=SHORT, folder=tmp_path)
    assert text == (
        "train_qat: loss in epoch 2, batch 1; expected a finite number; got nan. Lower the learning rate (now 0.01), "
        "or look at that batch. What epoch 1 left is kept."
    )
    assert len(json.loads((tmp_path / "history.json").read_text())["epochs"]) == 1
    again = train_qat(calibrated(), samples(), loss, schedule=SHORT, folder=tmp_path, resume=True)
    assert [record.epoch for record in again.history] == [1, 2, 3, 4]


def test_parameters_that_the_last_step_broke_are_not_kept(tmp_path: Path) -> None:
    def explode(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{**group, "lr": 1e38} for group in groups])

    def steep(model: nn.Module, batch: Sample) -> torch.Tensor:
        return loss(model, batch) * 1e3

    text = refused(FxquantError, batches=samples()[:1], loss=steep, optimizer=explode, folder=tmp_path)
    assert text.startswith("train_qat: parameter '") and "' after epoch 1; expected finite numbers; got NaN or" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (lambda model, batch: 3.0, "got float."),
        (lambda model, batch: model(batch[0]), "got shape (8, 3)."),
        (lambda model, batch: model(batch[0]).detach().mean(), "got shape (), without gradient."),
    ],
)
def test_loss_that_is_no_scalar_with_gradient_is_refused(bad: Callable[..., Any], got: str) -> None:
    text = refused(FxquantError, loss=bad)
    assert text.startswith("train_qat: loss in epoch 1, batch 0; expected a scalar tensor with gradient; ")
    assert got in text


def test_iterator_is_refused_before_it_is_used_up() -> None:
    text = refused(ConfigError, batches=iter(samples()))
    assert "train_qat: batches; expected what can be iterated anew" in text and "list_iterator" in text


def test_epoch_without_batches_is_refused() -> None:
    assert refused(FxquantError, batches=[]) == (
        "train_qat: epoch 1; expected batches; got none. Give what can be iterated anew for each epoch."
    )


def test_arguments_that_contradict_or_say_nothing_are_refused(tmp_path: Path) -> None:
    assert refused(ConfigError, evaluate_on="exakt").startswith("train_qat: evaluate_on='exakt'. Did you mean 'exact'?")
    assert refused(ConfigError, resume=True, overwrite=True, folder=tmp_path) == (
        "train_qat; expected resume or overwrite; got both. Choose one of them."
    )
    assert refused(ConfigError, resume=True) == "train_qat: resume=True; expected folder=; got none"


@pytest.mark.parametrize("seed", [-1, 0.5, True, "3", 2**64])
def test_seed_that_is_none_is_refused(seed: Any) -> None:
    text = refused(ConfigError, seed=seed)
    assert text == f"train_qat: seed; expected an integer from 0 to 2^64 - 1; got {seed!r}"


def test_score_that_is_not_finite_is_refused() -> None:
    text = refused(ScoreError, evaluate=lambda model: float("nan"))
    assert text.startswith("train_qat: score after epoch 1; expected a finite number; got nan. ")


def test_optimizer_of_other_parameters_is_refused() -> None:
    stale = calibrated()
    text = refused(FxquantError, optimizer=lambda groups: torch.optim.SGD(stale.model.parameters(), lr=0.1))
    assert text.startswith("train_qat: optimizer; expected parameters of sim.model; got 5 others, the first of shape")


@pytest.mark.parametrize("stage", ["inserted", "finalized"])
def test_program_that_cannot_be_trained_is_refused(stage: str) -> None:
    sim = calibrated()
    if stage == "finalized":
        sim.pipeline.finalize(sim.program)
        remedy = "Train before finalize."
    else:
        sim = QuantSim(nn.Linear(2, 2).eval(), (torch.randn(2, 2),))
        remedy = "Call sim.compute_encodings(batches) first."
    assert refused(CalibrationError, sim) == f"train_qat; expected a calibrated program; got {stage}. {remedy}"


def test_folder_with_an_earlier_run_is_refused_unless_it_may_go(tmp_path: Path) -> None:
    train_qat(calibrated(), samples(), loss, schedule=ONE, evaluate=accuracy, folder=tmp_path)
    assert refused(StorageError, folder=tmp_path) == (
        f"train_qat: '{tmp_path}/checkpoint.pt' is there already; expected a folder without an earlier run. "
        "resume=True continues that run, overwrite=True removes it; or train into another folder."
    )
    train_qat(calibrated(), samples(), loss, schedule=ONE, folder=tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"history.json", "checkpoint.pt"}


def test_default_schedule_of_a_plain_preset_is_the_documented_one() -> None:
    assert calibrated().schedule == SHORT
    model = nn.Linear(2, 2).eval()
    assert QuantSim(model, (torch.randn(2, 2),)).schedule == Schedule()
