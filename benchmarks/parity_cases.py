"""What the parity benchmark compares: a network and the bits it is quantized to, prepared once for all its cells."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import fxquant
from benchmarks import lowered
from benchmarks.networks import MIXED_NETWORKS, NETWORKS, Network, unlabelled_images
from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import Pipeline
from fxquant.graph.program import Program
from fxquant.parity.simulation import RuntimeCodes, Simulation, Step
from fxquant.passes.assign_specs import AssignSpecs

MOST_PHOTOS = 101


@dataclass(frozen=True)
class Case:
    """A network, and the bits of its weights and activations."""

    name: str
    network: Network
    weight_bits: int = 8
    activation_bits: int = 8

    def pipeline(self) -> Pipeline:
        """int8_per_channel with this case's bits."""
        return with_bits(fxquant.load_pipeline(lowered.PIPELINE), self.weight_bits, self.activation_bits)


def _narrow(name: str) -> Iterator[Case]:
    for activation_bits in (8, 4):
        yield Case(f"{name}_w4a{activation_bits}", NETWORKS[name], 4, activation_bits)


CASES = {
    case.name: case
    for case in (
        *(Case(name, network) for name, network in {**NETWORKS, **MIXED_NETWORKS}.items()),
        *_narrow("resnet18"),
        *_narrow("mobilenet_v2"),
    )
}


def with_bits(pipeline: Pipeline, weight_bits: int, activation_bits: int) -> Pipeline:
    """`pipeline` with its assign-specs passes asking for other bits."""
    passes = [
        replace(
            item,
            activation=replace(item.activation, bits=activation_bits),
            weight=replace(item.weight, bits=weight_bits),
        )
        if isinstance(item, AssignSpecs)
        else item
        for item in pipeline.prepare_passes
    ]
    name = f"{pipeline.name}, W{weight_bits}A{activation_bits}"
    return Pipeline(PassManager(passes), pipeline.finalize_passes, pipeline.target, name, pipeline.catalogue)


@dataclass(frozen=True)
class Prepared:
    """A case ready to be compared: `images` (N, 3, H, W) were not calibrated on; `skipped` is "" or a reason."""

    case: Case
    program: Program
    path: Path
    images: Tensor
    skipped: str


def prepare(case: Case, folder: Path, images: int, calibration_images: int, seed: int) -> Prepared:
    """Quantize a case's network and write it to `folder`. Raises AssetAbsent without its weights."""
    model = case.network.load(seed)
    found, absent = unlabelled_images(case.network, calibration_images + images, seed)
    path = folder / f"{case.name}.onnx"
    program = lowered.quantize(model, found[:-images], path, case.pipeline()).program
    skipped = f"photos (synthetic images instead): {absent}" if absent else ""
    return Prepared(case, program, path, found[-images:], skipped)


class Remembered:
    """A simulation that computes once what is asked again: levels and threads change onnxruntime's side alone.

    Fed with codes of onnxruntime it answers from memory where these, and the inputs, are the same bit for bit.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._steps: dict[bytes, list[Step]] = {}

    @property
    def name(self) -> str:
        """The simulation's own."""
        return self._simulation.name

    def run(self, program: Program, inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> Iterator[Step]:
        """See Simulation.run; one program for each object."""
        key = _digest(inputs, teacher)
        if key not in self._steps:
            self._steps[key] = list(self._simulation.run(program, inputs, teacher))
        yield from self._steps[key]


def _digest(inputs: Mapping[str, Any], teacher: Mapping[str, RuntimeCodes]) -> bytes:
    state = hashlib.sha256()
    for name, value in inputs.items():
        _add(state, name, value)
    for name, taught in teacher.items():
        for value in (taught.codes, taught.scale, taught.zero_point):
            _add(state, name, value)
    return state.digest()


def _add(state: "hashlib._Hash", name: str, value: Any) -> None:
    """Hash a tensor with its name, shape and dtype; anything else by its repr."""
    if not isinstance(value, Tensor):
        state.update(f"{name} {value!r};".encode())
        return
    state.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
    state.update(value.detach().cpu().contiguous().numpy().tobytes())
