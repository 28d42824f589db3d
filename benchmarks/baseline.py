"""The float ONNX file and what ``onnxruntime.quantization`` makes of it: the baseline of every comparison."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

INPUT, OUTPUT = "input", "logits"


def export_float(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write `model` as a float ONNX file with a dynamic batch: ``torch.onnx.export``, its default (dynamo) exporter.

    It folds explicit padding into the convolutions, which the older exporter does not: the float file is then as fast
    as onnxruntime can make it, and a ratio to it flatters nobody.
    """
    # A batch of 1 would be taken for a constant.
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    with quiet_exporter():
        torch.onnx.export(
            model,
            (example,),
            path,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )


def quantize_statically(float_path: Path, path: Path, images: Tensor, per_channel: bool = True) -> None:
    """onnxruntime's own post-training quantization, at its best known setting for this processor.

    Shape inference and graph optimisation first, QDQ format, u8 activations and s8 weights, per channel unless told
    otherwise, min-max over `images` one by one.
    """
    prepared = path.with_suffix(".prepared.onnx")
    with quiet_quantizer():
        quant_pre_process(float_path, prepared)
        quantize_static(
            prepared,
            path,
            ImageReader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            calibration_providers=["CPUExecutionProvider"],
        )
    prepared.unlink(missing_ok=True)


class ImageReader:
    """Hands the images (N, 3, H, W) to onnxruntime's calibrator, one by one (its CalibrationDataReader's interface)."""

    def __init__(self, images: Tensor) -> None:
        self._images = iter([images[index : index + 1] for index in range(len(images))])

    def get_next(self) -> dict[str, NDArray[numpy.float32]] | None:
        """The next feed, or None at the end."""
        image = next(self._images, None)
        return None if image is None else {INPUT: image.numpy()}


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide torch.onnx's notices about a missing torchvision and its deprecation warnings while exporting."""
    with quiet_logger("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_quantizer() -> Iterator[None]:
    """Hide the root logger's advice of onnxruntime.quantization, which speaks of steps that are taken here."""
    with quiet_logger(None):
        yield


@contextlib.contextmanager
def quiet_logger(name: str | None) -> Iterator[None]:
    """Let only errors of one logger through."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
