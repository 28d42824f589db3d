"""The demo: train, capture, prepare, calibrate, finalize, lower, run in onnxruntime, compare, report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxquant.calibration import calibrate
from fxquant.capture import capture
from fxquant.demo.digits import Digits, batches_of, load_digits, train
from fxquant.demo.net import DigitsNet
from fxquant.files import make_folder, write_text
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program
from fxquant.lowering.export import export_onnx
from fxquant.numerics.runtime import RuntimeOptions, open_session
from fxquant.parity import ParityReport, check_parity
from fxquant.sim import pair_names, write_pair

CALIBRATION_BATCHES = 8
PARITY_BATCHES = 4
TIMED_RUNS = 200
TIMED_BATCHES = (1, 32)
ONE_THREAD = RuntimeOptions(threads=1)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: accuracies on held-back digits, sizes in bytes, int8 over float latency by batch size."""

    float_accuracy: float
    simulated_accuracy: float
    int8_accuracy: float
    float_bytes: int
    int8_bytes: int
    latency_ratios: dict[int, float]
    parity: ParityReport

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        numbers = {key: value for key, value in vars(self).items() if key != "parity"}
        return {**numbers, "parity": self.parity.to_dict()}


def run_demo(folder: Path, *, epochs: int, seed: int, config: str) -> DemoResult:
    """Run the whole demo; writes both ONNX models, model.fxq, graph.svg, passes/ and report.json into `folder`."""
    pipeline = load_pipeline(config)
    make_folder(folder, (*pair_names("model"), "float.onnx", "graph.svg", "report.json"))
    torch.manual_seed(seed)
    digits = load_digits(seed)
    net = DigitsNet()
    train(net, digits, epochs=epochs, seed=seed)
    program = capture(net, digits.train_images[:2])
    export_onnx(program, folder / "float.onnx")
    _quantize(program, digits, pipeline, folder / "passes")
    write_pair(program, folder)
    program.draw(folder / "graph.svg")
    result = _measure(net, program, digits, folder)
    write_text(folder / "report.json", json.dumps(result.to_dict(), indent=2))
    return result


def _quantize(program: Program, digits: Digits, pipeline: Pipeline, dumps: Path) -> None:
    pipeline.prepare(program).dump(dumps / "prepare")
    calibrate(program, batches_of(digits.train_images)[:CALIBRATION_BATCHES])
    pipeline.finalize(program).dump(dumps / "finalize")


def _measure(net: torch.nn.Module, program: Program, digits: Digits, folder: Path) -> DemoResult:
    float_path, int8_path = folder / "float.onnx", folder / "model.onnx"
    batches = batches_of(digits.test_images)[:PARITY_BATCHES]
    report = check_parity(program, int8_path, batches, options=ONE_THREAD, simulation="exact")
    images = digits.test_images.numpy()
    ratios = {size: _latency_ratio(float_path, int8_path, images[:size]) for size in TIMED_BATCHES}
    with torch.no_grad():
        float_logits, simulated_logits = net(digits.test_images), program.module(digits.test_images)
    return DemoResult(
        float_accuracy=_accuracy(float_logits, digits.test_labels),
        simulated_accuracy=_accuracy(simulated_logits, digits.test_labels),
        int8_accuracy=_accuracy(_run_onnx(int8_path, digits.test_images), digits.test_labels),
        float_bytes=float_path.stat().st_size,
        int8_bytes=int8_path.stat().st_size,
        latency_ratios=ratios,
        parity=report,
    )


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _run_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    outputs = open_session(path, ONE_THREAD).run({"x": images.numpy()})
    return torch.from_numpy(outputs["output"])


def _latency_ratio(float_path: Path, int8_path: Path, images: np.ndarray[Any, Any]) -> float:
    """Median time of the int8 model over that of the float model, the runs taken in turn."""
    sessions = [open_session(path, ONE_THREAD) for path in (float_path, int8_path)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(TIMED_RUNS):
        for session, taken in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run({"x": images})
            taken.append(time.perf_counter() - start)
    return float(np.median(seconds[1]) / np.median(seconds[0]))
