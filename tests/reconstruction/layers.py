"""What the tests of reconstruction share: one layer that is calibrated, as a unit with its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fxquant.calibration import calibrate
from fxquant.capture import capture
from fxquant.graph.pass_data import float_twin
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program
from fxquant.passes.adaround import layer_unit
from fxquant.passes.quantized_layers import quantized_layers
from fxquant.passes.rounding_run import settle
from fxquant.reconstruction import Samples, Unit, collect


@dataclass(frozen=True, eq=False)
class Bench:
    """A calibrated program with its float twin, one unit of it and the unit's samples."""

    program: Program
    reference: Program
    unit: Unit
    samples: Samples


def correlated(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose channels go together, as activations do: without that, rounding to nearest would be best."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, *(1 for _ in shape), generator=generator)
    return torch.relu(common + 0.3 * torch.randn(count, *shape, generator=generator))


def calibrated(model: nn.Module, batches: list[torch.Tensor], pipeline: Pipeline | str = "w4a8") -> Program:
    """The calibrated program of a model."""
    found = load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    program = capture(model.eval(), (batches[0],))
    found.prepare(program)
    calibrate(program, batches)
    return program


def bench(model: nn.Module, batches: list[torch.Tensor], layer: int = 0, pipeline: Pipeline | str = "w4a8") -> Bench:
    """A layer of a model, ready to be learned."""
    program = calibrated(model, batches, pipeline)
    reference = float_twin(program)
    unit = layer_unit(program, list(quantized_layers(program))[layer])
    settle(program)
    samples = collect(program, reference, unit, batches, cache_mb=64)
    assert isinstance(samples, Samples)
    return Bench(program, reference, unit, samples)
