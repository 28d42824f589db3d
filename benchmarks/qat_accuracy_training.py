"""One run of the accuracy benchmark: a float net is trained, quantized, trained on, lowered; onnxruntime classifies.

All quantized methods of a seed start from the same float weights, calibrate on the same images and see the same batches
in the same order; so does "float, trained on", which says what the additional epochs alone are worth.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.labelled_images import Dataset, Images
from benchmarks.qat_accuracy_runs import Method, Outcome, Recipe, Run, Setting, Store, TrainingPlan
from benchmarks.qat_networks import NETWORKS
from fxquant.files import replacement
from fxquant.numerics.runtime import RuntimeOptions, open_session
from fxquant.parity import check_parity
from fxquant.progress import track
from fxquant.sim import QuantSim
from fxquant.training.parameter_groups import parameter_groups

EVALUATION_BATCH = 250
ONE_THREAD = RuntimeOptions(threads=1)


def execute(run: Run, recipe: Recipe, dataset: Dataset, store: Store) -> Outcome:
    """Measure `run`, or read what is there; the float training that it starts from comes first where it is missing."""
    found = store.find(run)
    if found is not None:
        return found
    if run.setting.method is not Method.FLOAT:
        execute(replace(run, setting=Setting(Method.FLOAT)), recipe, dataset, store)
    start = time.monotonic()
    outcome = replace(_measure(run, recipe, dataset, store), seconds=time.monotonic() - start)
    store.keep(run, outcome)
    return outcome


class Batches:
    """The training images of one run, shuffled and flipped left to right by its seed."""

    def __init__(self, dataset: Dataset, run: Run) -> None:
        self.dataset = dataset
        self.title = f"{run.network}, seed {run.seed}, {run.setting}"
        self.generator = torch.Generator().manual_seed(run.seed)

    def per_epoch(self, batch: int) -> int:
        """Steps in an epoch; what fills no batch is left out."""
        return len(self.dataset.train) // batch

    def epochs(self, count: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` epochs of prepared images and labels."""
        train = self.dataset.train
        for _ in range(count):
            order = torch.randperm(len(train), generator=self.generator)
            for chosen in order[: self.per_epoch(batch) * batch].view(-1, batch):
                flips = torch.rand(batch, generator=self.generator)[:, None, None, None] < 0.5
                pixels = train.pixels[chosen]
                yield self.dataset.prepared(torch.where(flips, pixels.flip(3), pixels)), train.labels[chosen]

    def calibration(self, count: int) -> list[Tensor]:
        """`count` training images as they are, in batches."""
        chosen = torch.randperm(len(self.dataset.train), generator=self.generator)[:count]
        return list(torch.split(self.dataset.prepared(self.dataset.train.pixels[chosen]), EVALUATION_BATCH))


def train(
    module: nn.Module, groups: list[dict[str, Any]], plan: TrainingPlan, recipe: Recipe, images: Batches
) -> float:
    """Minimise the cross-entropy; returns its mean over the last 50 steps.

    `groups` are parameter groups with their own highest learning rates, which all follow `plan`.
    """
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    steps = plan.epochs * images.per_epoch(recipe.batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: plan.factor(step, steps))
    losses = []
    module.train()
    for pixels, labels in track(images.epochs(plan.epochs, recipe.batch), images.title, total=steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(pixels), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    module.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def _measure(run: Run, recipe: Recipe, dataset: Dataset, store: Store) -> Outcome:
    torch.manual_seed(run.seed)
    model = NETWORKS[run.network](dataset.channels)
    # Two to three times as fast on a CPU. torch's stubs leave this overload out.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.setting.method is not Method.FLOAT:
        model.load_state_dict(torch.load(store.weights(run), weights_only=True))
    if run.setting.method.is_quantized:
        return _quantized(model.eval(), run, recipe, dataset)
    is_first = run.setting.method is Method.FLOAT
    plan = recipe.float_training if is_first else recipe.quantized_training
    groups = parameter_groups(model, plan.learning_rate, weight_decay=plan.weight_decay)
    loss = train(model, groups, plan, recipe, Batches(dataset, run))
    if is_first:
        with replacement(store.weights(run)) as file:
            torch.save(model.state_dict(), file)
    return Outcome(_correct_in_float(model, dataset), len(dataset.test), loss=loss)


def _quantized(model: nn.Module, run: Run, recipe: Recipe, dataset: Dataset) -> Outcome:
    images = Batches(dataset, run)
    calibration = images.calibration(recipe.calibration_images)
    sim = QuantSim(model, calibration[0], run.setting.pipeline())
    sim.compute_encodings(calibration, progress=False)
    plan, loss = recipe.quantized_training, None
    if run.setting.method is not Method.PTQ:
        groups = parameter_groups(sim.program, plan.learning_rate, plan.range_learning_rate, plan.weight_decay)
        loss = train(sim.model, groups, plan, recipe, images)
    with tempfile.TemporaryDirectory() as folder:
        path = sim.export(folder)
        correct = _correct_in_onnxruntime(path, dataset)
        compared = dataset.prepared(dataset.test.pixels[: recipe.parity_images])
        return _compared(sim, path, compared, Outcome(correct, len(dataset.test), loss=loss))


def _compared(sim: QuantSim, path: Path, images: Tensor, outcome: Outcome) -> Outcome:
    """`outcome` with the codes that differ between `exact` simulation and onnxruntime on `images`.

    All quantized values are compared on a finalized copy, and the logits (real values, bit by bit) on the module that
    was trained, as its last evaluation has them.
    """
    sim.program.simulate = "exact"
    batches = torch.split(images, EVALUATION_BATCH)
    report = check_parity(sim.snapshot(), path, batches, options=ONE_THREAD, simulation="exact", progress=False)
    with torch.no_grad():
        trained = torch.cat([sim.model.eval()(batch) for batch in batches])
    return replace(
        outcome,
        codes_compared=report.codes_compared,
        codes_differing=report.codes_differing,
        logits_differing=int((trained != _logits(path, images)).sum()),
    )


def _correct_in_onnxruntime(path: Path, dataset: Dataset) -> int:
    return _correct(_logits(path, dataset.prepared(dataset.test.pixels)), dataset.test)


@torch.no_grad()
def _correct_in_float(model: nn.Module, dataset: Dataset) -> int:
    batches = torch.split(dataset.prepared(dataset.test.pixels), EVALUATION_BATCH)
    return _correct(torch.cat([model(batch) for batch in batches]), dataset.test)


def _correct(logits: Tensor, images: Images) -> int:
    return int((logits.argmax(dim=1) == images.labels).sum())


def _logits(path: Path, images: Tensor) -> Tensor:
    """What onnxruntime gives for `images`, in batches."""
    session = open_session(path, ONE_THREAD)
    (given,), (wanted,) = session.input_names, session.output_names
    found = [session.run({given: batch.numpy()})[wanted] for batch in torch.split(images, EVALUATION_BATCH)]
    return torch.cat([torch.from_numpy(logits) for logits in found])
