"""full_precision: float32 arithmetic that keeps integers exact, whatever the user set for speed; and its self-test.

Sums of integers below 2^24 are exact in float32, in any order, if every product and every partial sum is an integer.
Three things break this:

    fewer bits        autocast; TF32 and bfloat16 products (`torch.set_float32_matmul_precision`, `fp32_precision`)
    transforms        Winograd and FFT convolutions multiply fractions: NNPACK on the CPU, cuDNN on CUDA
    environment       settings of libraries that torch does not know of (ONEDNN_DEFAULT_FPMATH_MODE)

`full_precision` takes the first two away: NNPACK and cuDNN are switched off, because cuDNN chooses its algorithm by
shape and none of its settings forbids transforms. What is left, `is_exact_in_float32` finds, once per process and
device. All but autocast are settings of the process, not of a thread: while any thread is inside,
they hold for all of them. A backward pass runs outside, with the user's settings: gradients are real numbers anyway.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
_UNSET, _FULL = "none", "ieee"


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 convolutions and products of integers are exact as far as float32 is; then all is as it was.

    It may be nested, and entered by several threads at once.
    """
    with ExitStack() as stack:
        for kind in _DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_PROCESS.held())
        yield


@dataclass(frozen=True)
class _Settings:
    """What the process had set: `operations` are the precisions of _operations(), as set there and not inherited."""

    nnpack: bool
    cudnn: bool
    products: str | None
    generic: str
    mkldnn: str
    cuda: str
    operations: tuple[str, ...]


class _Process:
    """The process's settings, held at full precision while anyone needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before: _Settings | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._before = _take()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0 and self._before is not None:
                    _restore(self._before)


_PROCESS = _Process()


def _operations() -> tuple[Any, ...]:
    backends: Any = torch.backends  # its settings have no annotations
    return backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul


def _take() -> _Settings:
    """Set full precision; returns what was set. A precision that is not set reads as the next wider one."""
    backends: Any = torch.backends
    products = _product_precision()
    generic = backends.fp32_precision
    backends.fp32_precision = _UNSET
    mkldnn = backends.mkldnn.set_flags(_fp32_precision=_UNSET)[-1]
    cuda = backends.cudnn.set_flags(_fp32_precision=_UNSET)[5]
    operations = tuple(operation.fp32_precision for operation in _operations())
    before = _Settings(
        backends.nnpack.set_flags(False)[0], backends.cudnn.enabled, products, generic, mkldnn, cuda, operations
    )
    backends.cudnn.enabled = False
    if products not in (None, "highest"):
        torch.set_float32_matmul_precision("highest")
    for operation in _operations():
        operation.fp32_precision = _FULL
    return before


def _restore(before: _Settings) -> None:
    backends: Any = torch.backends
    if before.products not in (None, "highest"):
        torch.set_float32_matmul_precision(before.products)
    for operation, precision in zip(_operations(), before.operations, strict=True):
        operation.fp32_precision = precision
    backends.cudnn.set_flags(_fp32_precision=before.cuda)
    backends.mkldnn.set_flags(_fp32_precision=before.mkldnn)
    backends.fp32_precision = before.generic
    backends.cudnn.enabled = before.cudnn
    backends.nnpack.set_flags(before.nnpack)


def _product_precision() -> str | None:
    """`torch.get_float32_matmul_precision()`; None where it refuses, because `fp32_precision` says otherwise."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_tested: dict[torch.device, bool] = {}


def is_exact_in_float32(device: torch.device) -> bool:
    """Whether sums of integers up to 2^24 are exact in float32 on a device, inside full_precision: tried, once.

    A device that fails is warned of (RuntimeWarning): its sums are then computed in float64.
    """
    if device not in _tested:
        with full_precision(), torch.no_grad():
            wrong = [name for name, is_right in _trials(device) if not is_right]
        if wrong:
            named = ", ".join(wrong)
            remedy = "unset ONEDNN_DEFAULT_FPMATH_MODE and the like if they are set"
            text = f"float32 sums of integers below 2^24 are not exact on {device} ({named}): float64 is used; {remedy}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        _tested[device] = not wrong
    return _tested[device]


def _trials(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Operations by name, and whether they computed on the device what float64 computes on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).double()

    convolve: Callable[..., torch.Tensor] = torch.nn.functional.conv2d
    image, wide = integers(128, 256, 2, 64, 12, 12), integers(128, 256, 2, 512, 4, 4)
    trials: tuple[tuple[str, Callable[..., torch.Tensor], torch.Tensor, torch.Tensor], ...] = (
        ("3x3 convolution", lambda x, w: convolve(x, w, padding=1), image, integers(-40, 128, 16, 64, 3, 3)),
        ("1x1 convolution", convolve, wide, integers(64, 128, 16, 512, 1, 1)),
        (
            "depthwise convolution",
            lambda x, w: convolve(x, w, padding=1, groups=64),
            image,
            integers(3000, 7000, 64, 1, 3, 3),
        ),
        ("linear", torch.nn.functional.linear, integers(128, 256, 32, 512), integers(64, 128, 48, 512)),
        ("matrix product", torch.matmul, integers(0, 128, 2, 8, 64), integers(2000, 2400, 2, 64, 8)),
    )
    for name, operation, x, w in trials:
        expected = operation(x, w)
        found = operation(x.to(torch.float32).to(device), w.to(torch.float32).to(device))
        yield name, torch.equal(found.cpu().double(), expected)
