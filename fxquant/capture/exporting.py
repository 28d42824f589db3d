"""Run torch.export on a private copy of the model, and say what went wrong in the user's terms."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.capture.inputs import Example
from fxquant.capture.places import user_frame
from fxquant.errors import CaptureError
from fxquant.graph.program import Note, NoteKind


@dataclass(frozen=True)
class Exported:
    """What torch.export gave: the program, the batch it was traced at (None: the example has none), and why the model
    made its batch static ("" when it did not)."""

    program: ExportedProgram
    batch: int | None
    static_reason: str = ""
    is_dynamic: bool = True


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """No gradients, warnings, logs or ambient autocast, and no fast path that would hide attention's operations."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    logged = logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.CRITICAL)  # torch.export logs whole graphs before it raises what is reported here
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logged)
        torch.backends.mha.set_fastpath_enabled(fastpath)


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode; computed tensors that modules keep (old-style weight norm) become plain values."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as err:
        raise CaptureError(
            f"capture: {type(model).__name__} cannot be copied",
            place=user_frame(err),
            got=_first_line(err),
            remedy="Capture works on a deep copy, so that your model stays as it is; make copy.deepcopy(model) work.",
        ) from err
    return twin.eval()


def run_export(model: nn.Module, example: Example, dynamic_batch: bool, dynamic_shapes: Any) -> Exported:
    """Export `model`, with a dynamic batch if that is asked for and the model permits it.

    A batch of 1 is repeated to 2 first, because torch.export makes a constant of a size that is 1.
    """
    if dynamic_shapes is not None:
        return Exported(_export(model, example, dynamic_shapes), example.batch)
    if not dynamic_batch or not example.batch:
        return Exported(_export(model, example, None), example.batch, is_dynamic=False)
    pair = example if example.batch > 1 else example.at_batch(2)
    try:
        return Exported(_try_export(model, pair, pair.dynamic_axes()), pair.batch)
    except Exception as err:
        reason = f"{user_frame(err) or 'torch.export'}: {_first_line(err)}"
        return Exported(_export(model, example, None), example.batch, reason, is_dynamic=False)


def export_in_train_mode(model: nn.Module, example: Example, like: Exported) -> ExportedProgram | None:
    """The same export with the model in train mode, or None if that fails. The model is in eval mode afterwards.

    Batch norm modules stay in eval mode: what they do otherwise is known, and momentum=None cannot be exported there.
    """
    pair = example if not like.is_dynamic or (example.batch or 2) > 1 else example.at_batch(2)
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return _try_export(model, pair, pair.dynamic_axes() if like.is_dynamic else None)
    except Exception:
        return None
    finally:
        model.eval()


def _try_export(model: nn.Module, example: Example, shapes: Any) -> ExportedProgram:
    call = example.clone() if shapes is None else example
    with redirect_stderr(io.StringIO()):  # torch.export prints its unfinished graph there before it raises
        return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)


def _export(model: nn.Module, example: Example, shapes: Any) -> ExportedProgram:
    try:
        return _try_export(model, example, shapes)
    except Exception as err:
        raise CaptureError(
            f"capture: torch.export cannot trace {type(model).__name__}",
            place=user_frame(err),
            got=f"{type(err).__name__}: {_first_line(err)}",
            remedy=_remedy(err),
        ) from err


def _remedy(err: BaseException) -> str:
    name, text = type(err).__name__, str(err)
    if "DataDependent" in name or "data-dependent" in text or "DynamicControlFlow" in text:
        return "Replace the branch on tensor values by torch.where, or capture the parts of the model around it."
    if "Constraints violated" in text or "dynamic" in text.lower() and "shape" in text.lower():
        return "Give dynamic_shapes that the model permits, or none with dynamic_batch=False."
    return "Change that line to operations that torch.export traces, or capture the part of the model that it traces."


def _first_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return (lines[0] if lines else type(err).__name__)[:300]


def static_batch_note(exported: Exported) -> list[Note]:
    """The note that says why the batch is static, if the model made it so."""
    if not exported.static_reason:
        return []
    return [Note(NoteKind.STATIC_BATCH, "", f"the model fixes its batch size ({exported.static_reason})")]
