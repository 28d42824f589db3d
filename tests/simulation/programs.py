"""What the tests of the simulations share: quantized programs of small nets, and two ways of comparing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxquant
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.numerics.runtime import Level, RuntimeOptions

CONFIG = Path(fxquant.__file__).parents[1] / "configs" / "int8_per_channel.toml"
OPTIONS = RuntimeOptions(Level.ALL, threads=1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pipeline_of(folder: Path, *, weight: int = 8, activation: int = 8) -> Pipeline:
    """int8_per_channel with other bits."""
    text = CONFIG.read_text(encoding="utf-8")
    for name, bits in (("weight", weight), ("activation", activation)):
        assert text.count(f"{name} = {{ bits = 8,") == 1
        text = text.replace(f"{name} = {{ bits = 8,", f"{name} = {{ bits = {bits},")
    (folder / "config.toml").write_text(text, encoding="utf-8")
    return fxquant.load_pipeline(folder / "config.toml")


def calibrated(model: nn.Module, *inputs: torch.Tensor, pipeline: Pipeline | None = None) -> Program:
    """A program of `model`, calibrated on the inputs; weights' grids still follow the weights."""
    program = fxquant.capture(model.eval(), inputs)
    (pipeline or fxquant.load_pipeline("int8_per_channel")).prepare(program)
    fxquant.calibrate(program, [inputs], progress=False)
    return program


def outputs(program: Program, simulation: str, *inputs: Any) -> torch.Tensor:
    """What the program's module computes in one of its forms; the form stays."""
    program.simulate = simulation
    found: torch.Tensor = program.module(*inputs)
    return found


def counts(program: Program, folder: Path, *inputs: torch.Tensor, simulation: str) -> tuple[int, int]:
    """Codes that were compared with onnxruntime's at all quantized tensors, and how many differ, freely run."""
    path = folder / "model.onnx"
    fxquant.export_onnx(program, path)
    report = fxquant.check_parity(
        program, path, [inputs], simulation=simulation, options=OPTIONS, progress=False, allow_mismatch=True
    )
    rows = [row.overall for row in report.rows]
    return sum(row.compared for row in rows), sum(row.differing for row in rows)


def on_powers_of_two(program: Program) -> Program:
    """The same program on grids where plain fake quantization rounds as onnxruntime does.

    They are frozen; scales are powers of two (the next lower), zero points even.
    """
    for _, module in program.fake_quant_nodes():
        module.scale.copy_(torch.exp2(torch.floor(torch.log2(module.scale))))
        module.zero_point.sub_(module.zero_point % 2)
        module.mode = Mode.FROZEN
    return program


def gradients(program: Program, simulation: str, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output ("") and gradients of all inputs ("0", ...) and parameters (by name) of a loss that weighs all outputs."""
    module = program.module
    module.zero_grad(set_to_none=True)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    found = outputs(program, simulation, *leaves)
    (found * noise(*found.shape, seed=9)).sum().backward()
    named = {name: parameter.grad for name, parameter in module.named_parameters()}
    named.update({str(number): leaf.grad for number, leaf in enumerate(leaves)})
    return {"": found.detach(), **{name: grad.clone() for name, grad in named.items() if grad is not None}}


def largest_error(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient, as a fraction of its largest magnitude; outputs and names must be the same."""
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    assert torch.equal(expected[""], found[""]), "the two do not round alike"
    errors = [_error(expected[name], found[name]) for name in expected if name]
    return max(errors)


def _error(expected: torch.Tensor, found: torch.Tensor) -> float:
    difference, magnitude = (expected - found).abs().max(), expected.abs().max()
    return float(difference / magnitude) if difference else 0.0
