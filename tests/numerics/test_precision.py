"""Inside full_precision float32 keeps integers exact whatever was set; afterwards everything is as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxquant.numerics.precision as precision
from fxquant.numerics.precision import full_precision, is_exact_in_float32
from fxquant.simulation import strategies
from tests.simulation.programs import calibrated, noise, outputs

BACKENDS: Any = torch.backends
CPU = torch.device("cpu")


def settings() -> tuple[Any, ...]:
    """All that full_precision changes, as users can read it."""
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = "mixed"
    operations = (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.cuda.matmul)
    return (
        products,
        BACKENDS.fp32_precision,
        BACKENDS.mkldnn.fp32_precision,
        BACKENDS.cudnn.fp32_precision,
        *(operation.fp32_precision for operation in operations),
        _nnpack(),
        BACKENDS.cudnn.enabled,
        torch.is_autocast_enabled("cpu"),
    )


def _nnpack() -> bool:
    (enabled,) = BACKENDS.nnpack.set_flags(False)
    BACKENDS.nnpack.set_flags(enabled)
    return bool(enabled)


def _set_products() -> None:
    torch.set_float32_matmul_precision("medium")


def _set_high() -> None:
    torch.set_float32_matmul_precision("high")


def _set_generic() -> None:
    BACKENDS.fp32_precision = "bf16"


def _set_mkldnn() -> None:
    BACKENDS.mkldnn.set_flags(_fp32_precision="tf32")


def _set_operation() -> None:
    BACKENDS.mkldnn.conv.fp32_precision = "bf16"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def _set_nothing() -> None:
    pass


def _set_cudnn_off() -> None:
    BACKENDS.cudnn.enabled = False
    BACKENDS.nnpack.set_flags(False)


SETTERS = [_set_nothing, _set_products, _set_high, _set_generic, _set_mkldnn, _set_operation, _set_cudnn_off]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.fp32_precision = "none"
    BACKENDS.mkldnn.set_flags(_fp32_precision="none")
    for operation in (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.cuda.matmul):
        operation.fp32_precision = "none"
    BACKENDS.cudnn.enabled = True
    BACKENDS.nnpack.set_flags(True)


@pytest.mark.parametrize("change", SETTERS)
def test_settings_are_full_inside_and_as_before_afterwards(change: Callable[[], None]) -> None:
    change()
    before = settings()
    with full_precision():
        assert [operation.fp32_precision for operation in precision._operations()] == ["ieee"] * 3
        assert not BACKENDS.cudnn.enabled and not _nnpack()
    assert settings() == before


def test_what_was_inherited_is_inherited_afterwards() -> None:
    """An operation's precision that was not set follows the wider setting afterwards, too."""
    BACKENDS.fp32_precision = "tf32"
    with full_precision():
        pass
    BACKENDS.fp32_precision = "none"
    assert BACKENDS.mkldnn.conv.fp32_precision == "none"


def test_settings_are_as_before_after_an_error() -> None:
    _set_products()
    before = settings()
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert settings() == before


def test_settings_hold_until_the_outermost_leaves() -> None:
    _set_products()
    before = settings()
    with full_precision():
        with full_precision():
            pass
        assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
    assert settings() == before


def test_settings_hold_while_another_thread_is_inside() -> None:
    _set_products()
    before = settings()
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with full_precision():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(10)
    with full_precision():
        pass
    assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert settings() == before


def test_autocast_is_off_inside_and_on_afterwards() -> None:
    x = torch.ones(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert (x @ x).dtype is torch.float32
        assert (x @ x).dtype is torch.bfloat16


@pytest.mark.parametrize("change", SETTERS)
def test_codes_are_the_same_whatever_is_set(change: Callable[[], None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 5))
    x = noise(2, 3, 8, 8)
    program = calibrated(model, x)
    with torch.no_grad():
        expected = outputs(program, "integer", x)
        change()
        with torch.autocast("cpu", torch.bfloat16):
            found = outputs(program, "exact", x)
    assert found.dtype is torch.float32 and torch.equal(found, expected)


def test_this_device_is_exact() -> None:
    precision._tested.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_exact_in_float32(CPU)


def test_trials_find_products_of_fewer_bits() -> None:
    """Under autocast each trial is computed in bfloat16; a trial that could not fail would show nothing."""
    with torch.autocast("cpu", torch.bfloat16):
        found = dict(precision._trials(CPU))
    assert found and not any(found.values())


def test_a_device_that_is_not_exact_is_warned_of_once_and_computes_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(2, 4)
    program = calibrated(nn.Linear(4, 3), x)
    monkeypatch.setattr(precision, "_tested", {})
    monkeypatch.setattr(precision, "_trials", lambda device: [("linear", False), ("1x1 convolution", True)])
    with pytest.warns(RuntimeWarning, match=r"not exact on cpu \(linear\): float64 is used"):
        (strategy,) = strategies(program, x).values()
    assert strategy.parts == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (again,) = strategies(program, x).values()
    assert again == strategy


def test_environment_of_onednn_is_found_or_harmless() -> None:
    """A process with ONEDNN_DEFAULT_FPMATH_MODE=BF16 warns, or its sums are exact."""
    code = "import torch; from fxquant.numerics.precision import *; print(is_exact_in_float32(torch.device('cpu')))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert found.stdout.strip() == "True" or "RuntimeWarning" in found.stderr
