"""Running statistics of batch norms, estimated again with the quantizers on.

    running_mean = mean over batches of mean(z)        running_var = mean over batches of var(z), unbiased

z is what a batch norm normalises in training mode: computed from weights as they are quantized, and from values that
the batch norms in front of it have normalised by the same batch. Averages over many batches, not the exponential
ones that training leaves: Wu and Johnson, 2021 (arXiv:2105.07576, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.errors import CalibrationError, FxquantError
from fxquant.graph.batches import Batch, as_arguments, placeholder_values
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.progress import track

_NAME = "reestimate_batch_norm"


@dataclass(frozen=True)
class ReestimatedStatistics:
    """What `reestimate_batch_norm` changed.

    Arguments:
        batches: how many were averaged.
        before: by path of a batch norm, its running mean and variance as they were.
    """

    program: Program
    batches: int
    before: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def undo(self) -> None:
        """Put the statistics back as they were, in the batch norms that are still there."""
        modules = dict(self.program.module.named_modules())
        for path, statistics in self.before.items():
            if path in modules:
                _write(modules[path], statistics)
        self.program.module.settle()


def reestimate_batch_norm(
    program: Program, batches: Iterable[Batch], *, max_batches: int = 100, progress: bool = True
) -> ReestimatedStatistics:
    """Replace the running statistics of every live batch norm by averages over `batches`, with the quantizers on.

    Batch norms normalise by each batch's own statistics meanwhile; dropout is off, and ranges that move stand still.
    Parameters, momenta, num_batches_tracked, modes and training flags are then as before; what quantizes follows the
    new statistics from the next forward on. A batch norm that is called several times gets the average over its calls.
    After `fxquant.synchronise` the statistics are those of all processes, which must give equally many batches.

    Arguments:
        batches: any iterable of tensors, tuples or lists of tensors, or dicts of keywords; as large as in training,
            as a batch's own statistics depend on its size.
        max_batches: stop after so many.
        progress: show a progress bar when standard error is a terminal.

    Returns what undoes it. Raises CalibrationError: max_batches below 1, no live batch norm (folded, or frozen), a
    value that still observes, no batches, a batch that does not fit or has one value a channel, statistics that are
    not finite. The program is then as before.
    """
    if max_batches < 1:
        raise CalibrationError(f"{_NAME}: max_batches", expected="1 or more", got=str(max_batches))
    norms = _live_norms(program)
    _require_ready(program, norms)
    before = {path: _read(norm) for path, norm in norms.items()}
    sums = {path: _Sum() for path in norms}
    count = 0
    with _gathering(program, norms, before, sums), torch.no_grad():
        total = min(max_batches, len(batches)) if isinstance(batches, Sized) else max_batches
        for batch in track(islice(batches, max_batches), "batch norms", total=total, show=progress):
            _run(program, batch, count)
            for path, found in sums.items():
                _require_finite(path, found, count)
            count += 1
    if count == 0:
        raise CalibrationError(_NAME, expected="at least one batch", got="none", remedy="Is the iterator used up?")
    for path, norm in norms.items():
        if sums[path].count:
            _write(norm, sums[path].average())
    program.module.settle()
    return ReestimatedStatistics(program, count, before)


@dataclass
class _Sum:
    """Sums (float64) of a batch norm's statistics over its calls."""

    count: int = 0
    totals: list[torch.Tensor] = field(default_factory=list)

    def add(self, statistics: tuple[torch.Tensor, torch.Tensor]) -> None:
        new = [one.double() for one in statistics]
        self.totals = [total + one for total, one in zip(self.totals, new, strict=True)] if self.count else new
        self.count += 1

    def average(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, var = (total / self.count for total in self.totals)
        return mean, var


def _live_norms(program: Program) -> dict[str, _BatchNorm]:
    """The batch norms that the graph calls and that keep running statistics, by path, each once."""
    found: dict[int, tuple[str, _BatchNorm]] = {}
    for node in program.graph.nodes:
        module = program.submodule(node) if node.op == "call_module" else None
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            found.setdefault(id(module), (str(node.target), module))
    return dict(found.values())


def _require_ready(program: Program, norms: Mapping[str, _BatchNorm]) -> None:
    if not norms:
        kept = [path for path, module in program.module.named_modules() if isinstance(module, _BatchNorm)]
        got = f"none that is live: {', '.join(kept)}" if kept else "none: the model has none, or they were folded"
        remedy = "Call it before batch norms are frozen, on a pipeline that keeps them live (a ..._qat preset)."
        raise CalibrationError(_NAME, expected="a live batch norm with running statistics", got=got, remedy=remedy)
    observing = [
        str(node.args[0])
        for node, module in program.fake_quant_nodes()
        if module.mode in (Mode.OBSERVE, Mode.OBSERVE_FAKE)
    ]
    if observing:
        names = ", ".join(observing[:8]) + (f" and {len(observing) - 8} more" if len(observing) > 8 else "")
        raise CalibrationError(_NAME, expected="a grid for every value", got=f"none for {names}", remedy="Calibrate.")


@contextmanager
def _gathering(
    program: Program,
    norms: Mapping[str, _BatchNorm],
    before: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    sums: Mapping[str, _Sum],
) -> Iterator[None]:
    """Batch norms in training mode, all else in eval mode; each call adds to its sum and leaves the statistics alone.

    The program's own flag says training, so that no forward settles grids; on leaving all is as before.
    """
    flags = [(module, module.training) for module in program.module.modules()]
    momenta = {path: norm.momentum for path, norm in norms.items()}
    tracked = {path: _cloned(norm.num_batches_tracked) for path, norm in norms.items()}
    with ExitStack() as stack:
        try:
            for path, norm in norms.items():
                stack.callback(norm.register_forward_hook(_gather(before[path], sums[path])).remove)
            program.module.train()
            for module, _ in flags[1:]:
                module.training = False
            for norm in norms.values():
                norm.train().momentum = 1.0
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            for path, norm in norms.items():
                norm.momentum = momenta[path]
                _write(norm, before[path])
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.copy_(tracked[path])
            program.module.settle()


def _gather(before: tuple[torch.Tensor, torch.Tensor], total: _Sum) -> Any:
    def hook(norm: nn.Module, *_: Any) -> None:
        total.add(_read(norm))
        _write(norm, before)

    return hook


def _run(program: Program, batch: Batch, index: int) -> None:
    try:
        placeholder_values(program, batch)
        args, kwargs = as_arguments(batch)
        program.module(*args, **kwargs)
    except (FxquantError, ValueError) as err:  # torch's, of a batch with one value a channel
        raise CalibrationError(f"{_NAME}: batch {index}", got=str(err), remedy="Check the batch.") from err


def _require_finite(path: str, found: _Sum, batch: int) -> None:
    if not all(bool(torch.isfinite(total).all()) for total in found.totals):
        raise CalibrationError(
            f"{_NAME}: statistics of '{path}' are not finite in batch {batch}", remedy="Check the batch."
        )


def _read(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.get_buffer("running_mean").clone(), norm.get_buffer("running_var").clone()


@torch.no_grad()
def _write(norm: nn.Module, statistics: tuple[torch.Tensor, torch.Tensor]) -> None:
    for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
        norm.get_buffer(name).copy_(value)


def _cloned(tensor: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(()) if tensor is None else tensor.clone()
