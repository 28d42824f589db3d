"""Does the program compute what the model computes? Compare outputs on the example inputs, at several batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxquant.capture.inputs import Example
from fxquant.capture.places import user_frame
from fxquant.errors import CaptureError

TOLERANCE = 1e-5  # of the largest magnitude in the output


@dataclass(frozen=True)
class Reference:
    """An example and the model's flattened outputs on it."""

    example: Example
    outputs: list[Any]


def run(module: nn.Module, example: Example) -> list[Any]:
    """Flattened outputs of one call; the module's buffers, the example and the random state are left as they were."""
    saved = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    call = example.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = pytree.tree_leaves(module(*call.args, **call.kwargs))
    outputs = [out.clone() if isinstance(out, torch.Tensor) else out for out in outputs]
    for tensor, value in saved:
        tensor.detach().copy_(value)
    return outputs


def reference(model: nn.Module, example: Example, batches: tuple[int, ...]) -> list[Reference]:
    """The model's outputs on the example, then at each of `batches` that the model accepts."""
    try:
        found = [Reference(example, run(model, example))]
    except Exception as err:
        raise CaptureError(
            f"capture: {type(model).__name__} does not run on the example inputs",
            place=user_frame(err),
            expected="inputs that model(*args, **kwargs) accepts in eval mode",
            got=f"{type(err).__name__}: {str(err).strip() or 'no message'}"[:400],
            remedy="Check their number, names, shapes and dtypes.",
        ) from err
    for count in batches:
        other = example.at_batch(count)
        try:
            found.append(Reference(other, run(model, other)))
        except Exception:  # the model forbids that batch: nothing to compare with
            continue
    return found


def compare(module: nn.Module, references: list[Reference], traced: int | None) -> None:
    """Raise CaptureError unless `module` gives the model's outputs: bit for bit, or within TOLERANCE.

    `traced` is the batch that was exported. The program must hold there; it is compared there first, so that a
    difference at another batch alone means that the model takes another path.
    """
    for wanted in sorted(references, key=lambda found: found.example.batch != traced):
        batch = wanted.example.batch
        remedy = "This is a defect of the capture; report it with the model."
        if batch != traced:
            remedy = "The model takes another path at that batch size; capture it with dynamic_batch=False."
        try:
            outputs = run(module, wanted.example)
        except Exception as err:
            got = f"{type(err).__name__}: {str(err).strip()}"[:300]
            raise CaptureError(f"capture: the captured program fails at batch {batch}", got=got, remedy=remedy) from err
        _compare(outputs, wanted.outputs, f"batch {batch}", remedy)


def _compare(outputs: list[Any], wanted: list[Any], place: str, remedy: str) -> None:
    if len(outputs) != len(wanted):
        raise CaptureError(
            "capture: number of outputs", place=place, expected=f"{len(wanted)}", got=f"{len(outputs)}", remedy=remedy
        )
    for index, (out, ref) in enumerate(zip(outputs, wanted, strict=True)):
        if (fault := difference(out, ref)) is not None:
            raise CaptureError(
                f"capture: output {index} of the program differs from the model's",
                place=place,
                expected=f"equal within {TOLERANCE:g} of the largest value",
                got=fault,
                remedy=remedy,
            )


def difference(out: Any, ref: Any) -> str | None:
    """How two outputs differ, in words; None if they are equal or within TOLERANCE."""
    if not isinstance(out, torch.Tensor) or not isinstance(ref, torch.Tensor):
        return None if type(out) is type(ref) and out == ref else f"{out!r} instead of {ref!r}"
    if out.shape != ref.shape or out.dtype != ref.dtype:
        return f"{out.dtype}{list(out.shape)} instead of {ref.dtype}{list(ref.shape)}"
    if torch.equal(out, ref):
        return None
    kind = torch.complex128 if out.is_complex() else torch.float64
    a, b = out.to(kind), ref.to(kind)
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return "other non-finite values"
    if not bool(finite.any()):
        return None
    worst = float((a[finite] - b[finite]).abs().max())
    relative = worst / max(float(b[finite].abs().max()), 1e-30)
    return None if relative <= TOLERANCE else f"a difference of {worst:.3g} ({relative:.3g} of the largest value)"
