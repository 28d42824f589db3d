"""ScheduleRunner: does what a Schedule says, epoch by epoch, in anybody's training loop."""

from __future__ import annotations

import torch

from fxquant.errors import FxquantError
from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Note, NoteKind, Program
from fxquant.schedule import Schedule

FREEZE_BATCH_NORM, FREEZE_ENCODINGS = "freeze-batch-norm", "freeze-observers"


class ScheduleRunner:
    """Counts epochs, freezes what is due, and divides learning rates.

        runner = ScheduleRunner(program, pipeline)
        for epoch in range(runner.schedule.epochs):
            ...                                    # train an epoch
            print(*runner.step(optimizer), sep=", ")

    Freezing rewrites the graph of `program.module` in place: module, parameters and buffers stay the same objects, so
    that optimizers keep their references.

    Arguments:
        program: what is trained.
        pipeline: the catalogue of the freezing passes.
        schedule: None for the pipeline's.
        epoch: how many epochs are done already.
    """

    def __init__(self, program: Program, pipeline: Pipeline, schedule: Schedule | None = None, epoch: int = 0) -> None:
        self.program = program
        self.pipeline = pipeline
        self.schedule = pipeline.schedule if schedule is None else schedule
        self.epoch = epoch

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> tuple[str, ...]:
        """Call it after each epoch; returns in words what it did, which is noted in `program.notes`, too.

        Arguments:
            optimizer: its groups' learning rates are divided when due, each by the same number. Leave it out where a
                scheduler of your own sets them.

        Raises FxquantError for what is no optimizer, and PassError if something cannot be frozen; the epoch does not
        count then.
        """
        _require_optimizer(optimizer)
        done, schedule = self.epoch + 1, self.schedule
        actions: list[str] = []
        if done == schedule.freeze_batch_norm_after:
            actions += self._freeze(FREEZE_BATCH_NORM, "batch norm statistics frozen")
        if done == schedule.freeze_encodings_after:
            actions += self._freeze(FREEZE_ENCODINGS, "encodings frozen")
        if optimizer is not None and schedule.divides_after(done):
            actions.append(_divide(optimizer, schedule.learning_rate_divisor))
        for action in actions:
            self.program.add_note(Note(NoteKind.TRAINING, "", f"after epoch {done}: {action}"))
        self.epoch = done
        return tuple(actions)

    def _freeze(self, name: str, text: str) -> list[str]:
        entry = PassManager([self.pipeline.make_pass(name)]).run(self.program).entry(name)
        return [text] * entry.modified + [miss.reason for miss in entry.misses]


def learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """The learning rate of each parameter group."""
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


def _require_optimizer(optimizer: object) -> None:
    """One that divides its learning rates, or None; what has `param_groups` will do (a wrapped optimizer)."""
    if optimizer is None or isinstance(getattr(optimizer, "param_groups", None), list):
        return
    raise FxquantError(
        "step_epoch",
        expected="a torch optimizer, whose learning rates it divides, or None",
        got=f"{type(optimizer).__name__}: {optimizer!r}"[:200],
        remedy="Pass the optimizer that trains the parameters; the epoch is counted by itself.",
    )


def _divide(optimizer: torch.optim.Optimizer, divisor: float) -> str:
    tensors: dict[int, torch.Tensor] = {}
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # in place, once: compiled optimizers, and groups, share it
            tensors[id(group["lr"])] = group["lr"]
        else:
            group["lr"] /= divisor
    for tensor in tensors.values():
        tensor /= divisor
    rates = dict.fromkeys(f"{rate:g}" for rate in learning_rates(optimizer))
    return f"learning rate divided by {divisor:g}: {', '.join(rates)}"
