"""A search in a process of its own, to be killed: python -m tests.tuning.killed_search FOLDER [adaround]."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxquant.tuning.auto_quant import auto_quantize
from fxquant.tuning.auto_quant_result import AutoQuantResult
from fxquant.tuning.auto_quant_steps import AddedPass, Step
from tests.tuning.auto_quant_nets import count, estimator, images, nudge, pipeline, plain_net

STEPS = (
    Step("as configured"),
    estimator("mse"),
    Step("fails", optimize=(AddedPass("fail-always"),)),
    nudge("nudged", -1.0),
    Step("in layers", optimize=(AddedPass("nudge-in-layers"),)),
    Step("idle", optimize=(AddedPass("fail-always", {"fails": False}),)),
)
ROUNDING = (
    Step("as configured"),
    Step("AdaRound", optimize=(AddedPass("adaround", {"iterations": 400, "seed": 3}),)),
)


def bias_seen(folder: Path, scores: list[float]) -> Callable[..., float]:
    """An evaluate whose score grows with the classifier's bias, and that counts its calls in a file."""

    def evaluate(model: Callable[..., Any]) -> float:
        count("evaluate", folder)
        scores.append(float(torch.cat([model(batch) for batch in images()]).mean()))
        return scores[-1]

    return evaluate


def search(folder: Path, evaluate: Callable[..., float] | None = None, **changes: Any) -> AutoQuantResult:
    """The search, begun or resumed."""
    torch.set_num_threads(1)
    batches = images()
    return auto_quantize(
        plain_net(),
        (batches[0],),
        batches,
        evaluate or bias_seen(folder, []),
        target=1e9,
        config=pipeline(),
        folder=folder,
        progress=False,
        **{"steps": STEPS, "resume": True, **changes},
    )


if __name__ == "__main__":
    search(Path(sys.argv[1]), steps=ROUNDING if "adaround" in sys.argv else STEPS)
