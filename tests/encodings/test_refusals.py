"""What an encodings file must not say: each fault is one error that names file, place, and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant import FxquantError, Stage, load_encodings, save_encodings
from fxquant.encodings.fitting import broken_rule
from fxquant.errors import CalibrationError, ConfigError, StorageError
from fxquant.numerics.fake_quant import Mode
from fxquant.spec import Encoding, Limits, QuantSpec
from tests.encodings.nets import VERSIONS, calibrated, finalized, prepared

Edit = Callable[[dict[str, Any]], None]


def faulty(tmp_path: Path, edit: Edit, version: str = "1.0.0", name: str = "linears") -> Path:
    path = tmp_path / "faulty.encodings"
    save_encodings(calibrated(name), path, version)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def put(*path: Any) -> Edit:
    """Put the last item at the path of the others."""

    def edit(content: Any) -> None:
        for key in path[:-2]:
            content = content[key]
        content[path[-2]] = path[-1]

    return edit


def drop(*path: Any) -> Edit:
    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return edit


A, P = "activation_encodings", "param_encodings"
OLD: tuple[tuple[Edit, str], ...] = (
    (put(A, "relu", {}), rf"{A}.relu\); expected a list of grids; got an object. .*_torch.encodings"),
    (put(A, "relu", []), "at least one grid; got an empty list"),
    (put(A, "relu", 0, "is_symmetric", "yes"), rf'{A}.relu\[0\].is_symmetric\); expected true, false, "True"'),
    (put(P, "first.weight", 3, "bitwidth", 4), "one 'bitwidth' for all grids of a tensor; got 4, 8"),
    (put(A, "relu", 0, "max", 99.0), r"relu\[0\].max\); expected .* as scale and offset say; got 99"),
    (drop(A, "relu", 0, "scale"), r"relu\[0\]\); expected a field 'scale'; got fields bitwidth"),
    (drop(P, "first.weight", 3), r"first.weight.*expected 16 grids \(s8 strict symmetric per-channel\(0\)\); got 15"),
)
MIDDLE: tuple[tuple[Edit, str], ...] = (
    (put("version", "1.5.0"), r'version\); expected "0.6.1" or "1.0.0" or "2.0.0"; got "1.5.0"'),
    (put("version", "2.0.0"), r"expected a field 'encodings' \(version 2.0.0\)"),
    (put(A, {}), rf"{A}\); expected a list; got an object"),
    (put(A, 1, "scale", [0.0]), rf"{A}\[1\].scale\[0\]\); expected a finite float32 scale above 0"),
    (put(A, 1, "scale", [-1.0]), "above 0"),
    (put(A, 1, "scale", [1e-60]), "above 0"),
    (put(A, 1, "scale", [1e60]), "finite float32"),
    (put(A, 1, "scale", [float("nan")]), r"scale\[0\]\); expected a finite number; got nan"),
    (put(A, 1, "scale", [10**400]), r"a finite number; got inf"),
    (put(A, 1, "scale", ["0.1"]), r'expected a number; got "0.1"'),
    (put(A, 1, "scale", []), "as many scales as offsets, and at least one; got 0 and 1"),
    (put(A, 1, "offset", [-0.5]), r"offset\[0\]\); expected an integer from -255 to 0; got -0.5"),
    (put(A, 1, "offset", [-256]), "an integer from -255 to 0"),
    (put(A, 1, "offset", [1]), "an integer from -255 to 0"),
    (put(A, 1, "offset", [True]), "expected a number; got true"),
    (put(A, 1, "bw", 4), r"entry 'relu' at .*\[1\].*; expected 8 bits \(u8 asymmetric per-tensor.*\); got 4"),
    (put(A, 1, "bw", 64), "an integer from 2 to 32"),
    (put(A, 1, "is_sym", True), "expected an asymmetric grid .* got a symmetric grid"),
    (put(P, 0, "is_sym", False), "entry 'first.weight' .* expected a symmetric grid .* got an asymmetric grid"),
    (put(P, 0, "offset", 3, -127), r"expected offset -128 .*; got offset -127 at \[3\]"),
    (put(A, 1, "enc_type", "LPBQ"), '"PER_TENSOR" or "PER_CHANNEL" or "PER_BLOCK"; got "LPBQ"'),
    (put(A, 1, "enc_type", "PER_CHANNEL"), "expected PER_TENSOR .* got PER_CHANNEL"),
    (put(A, 1, "dtype", "INT8"), '"INT" or "FLOAT"; got "INT8"'),
    (put(A, 1, "name", "x"), rf"{A}\[1\]\); expected one entry for each tensor; got 'x' again, first at {A}\[0\]"),
    (put(A, 1, "offset", [-3]), r"entry 'relu'.*expected offset 0"),
    (put(P, 1, "scale", 0, 0.5), r"entry 'first.bias'.*the product of input's and weight's.*got scale 0.5.* at \[0\]"),
    (drop(A, 1), "1 values that the file lacks: relu"),
    (put(A, 1, "name", "nobody"), "1 values that the file lacks: relu; 1 entries without a value: nobody"),
)
NEW: tuple[tuple[Edit, str], ...] = (
    (put("encodings", 0, "output_dtype", "int99"), r'encodings\[0\].output_dtype\); expected "int8", "uint8"'),
    (put("encodings", 0, "output_dtype", "q8"), '"float16" or "float32"; got "q8"'),
    (put("encodings", 0, "y_zero_point", 256), "an integer from 0 to 255; got 256"),
    (put("encodings", 0, "y_zero_point", [1]), r"the shape of y_scale, \[\]; got \[1\]"),
    (put("encodings", 0, "y_scale", []), "at least one scale"),
    (put("encodings", 0, "axis", 0), "entry 'x' .* expected no axis: one grid; got axis 0"),
    (put("encodings", 1, "axis", 1), "entry 'first.weight' .* expected axis 0; got axis 1"),
    (put("encodings", 1, "block_size", 4), "entry 'first.weight' .* expected no blocks; got blocks of 4"),
    (put("encodings", 1, "per_block_int_scale", [1]), "LPBQ"),
)
FAULTS = [(version, *one) for version, group in zip(VERSIONS, (OLD, MIDDLE, NEW), strict=True) for one in group]


@pytest.mark.parametrize(("version", "edit", "message"), FAULTS, ids=[f"{v}-{m[:40]}" for v, _, m in FAULTS])
def test_faulty_file_is_one_error_and_changes_nothing(version: str, edit: Edit, message: str, tmp_path: Path) -> None:
    path, program = faulty(tmp_path, edit, version), _PREPARED.copy()
    before = _state(program)
    with pytest.raises((StorageError, ConfigError), match=message) as caught:
        load_encodings(program, path)
    assert str(path) in str(caught.value)
    assert before == _state(program)


_PREPARED = prepared("linears")


def _state(program: Any) -> tuple[Any, ...]:
    modes = [module.mode for _, module in program.fake_quant_nodes()]
    return program.stage, modes, program.fingerprint(), program.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": ', "line 1, column"),
        ("[]", "top level.; expected an object; got a list"),
        ("{}", "a field 'version'"),
        ('{"version": "1.0.0", "version": "1.0.0"}', "the key 'version' twice"),
        ("[" * 100_000, "RecursionError|recursion"),
        ('{"version": 1}', "version.; expected a string; got 1"),
    ],
)
def test_text_that_is_no_encodings_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "e").write_text(text)
    with pytest.raises(StorageError, match=message):
        load_encodings(_PREPARED.copy(), tmp_path / "e")


def test_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    save_encodings(calibrated("linears"), tmp_path / "e")
    (tmp_path / "e").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "e").read_bytes())
    assert load_encodings(_PREPARED.copy(), tmp_path / "e").is_complete


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "binary"):
        with pytest.raises(StorageError, match="cannot be read"):
            load_encodings(_PREPARED.copy(), path)


def test_stages_that_take_no_encodings_are_refused(tmp_path: Path) -> None:
    program = calibrated("linears")
    save_encodings(program, tmp_path / "e")
    with pytest.raises(CalibrationError, match="got finalized. Load before finalize"):
        load_encodings(finalized(program, "linears"), tmp_path / "e")
    with pytest.raises(FxquantError, match="values have no range"):
        save_encodings(_PREPARED, tmp_path / "e")
    with pytest.raises(ConfigError, match="Did you mean '1.0.0'"):
        save_encodings(program, tmp_path / "e", "1.0")
    load_encodings(program, tmp_path / "e")  # afresh
    assert program.stage is Stage.CALIBRATED


def test_shared_grid_must_be_the_same_in_all_its_entries(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        entry = next(entry for entry in content[A] if entry["name"] == "max_pool2d")
        entry["scale"][0] *= 0.5

    with pytest.raises(ConfigError, match="expected the grid of 'hardtanh' at .* which shares it; got another grid"):
        load_encodings(prepared("residual"), faulty(tmp_path, edit, name="residual"))


def test_grid_beyond_its_limits_is_refused(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for entry in content[A]:
            if entry["name"] in ("hardtanh", "max_pool2d"):
                entry["scale"] = [6.1 / 255]

    with pytest.raises(ConfigError, match=r"entry 'hardtanh'.* within \[0, 6\].*; got \[0, 6.09"):
        load_encodings(prepared("residual"), faulty(tmp_path, edit, name="residual"))


def _with_spec(value: str, **changes: Any) -> Any:
    program = _PREPARED.copy()
    module = next(module for node, module in program.fake_quant_nodes() if str(node.args[0]) == value)
    module.spec = replace(module.spec, **changes)
    return program


@pytest.mark.parametrize(("low", "high"), [(-0.5, None), (None, 0.5)])
def test_grid_beyond_one_limit_is_refused(low: float | None, high: float | None, tmp_path: Path) -> None:
    save_encodings(calibrated("linears"), tmp_path / "e")
    with pytest.raises(ConfigError, match="entry 'x'.* a grid of u8 asymmetric per-tensor within"):
        load_encodings(_with_spec("x", limits=Limits(low, high)), tmp_path / "e")
    load_encodings(_with_spec("x", limits=Limits(-100.0, None)), tmp_path / "e")


def test_grid_that_is_not_the_fixed_range_is_refused(tmp_path: Path) -> None:
    save_encodings(calibrated("linears"), tmp_path / "e")
    with pytest.raises(ConfigError, match=r"entry 'x'.*fixed \[-4, 4\]: \[-3.98"):
        load_encodings(_with_spec("x", fixed=(-4.0, 4.0)), tmp_path / "e")


@pytest.mark.parametrize(("beyond", "is_broken"), [(0.0, False), (0.4, False), (0.6, True), (4.0, True)])
@pytest.mark.parametrize("is_low", [True, False])
def test_grid_may_exceed_one_limit_by_half_a_step(is_low: bool, beyond: float, is_broken: bool) -> None:
    """The zero point is rounded."""
    limit = (-100.0 + beyond) * 0.5 if is_low else (155.0 - beyond) * 0.5
    spec = QuantSpec(limits=Limits(limit, None) if is_low else Limits(None, limit))
    encoding = Encoding(torch.tensor(0.5), torch.tensor(100), spec)
    assert (broken_rule(encoding) is not None) is is_broken


@pytest.mark.parametrize(("factor", "is_broken"), [(1.0, False), (1 + 5e-6, False), (1 - 2e-5, True), (1.001, True)])
def test_scale_of_a_fixed_range_may_differ_by_its_decimals(factor: float, is_broken: bool) -> None:
    encoding = Encoding(torch.tensor(8 / 255 * factor), torch.tensor(64), QuantSpec(fixed=(-2.0, 6.0)))
    assert (broken_rule(encoding) is not None) is is_broken


@pytest.mark.parametrize("version", VERSIONS)
def test_float_entry_turns_its_quantizer_off(version: str, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        if version == "0.6.1":
            content[A]["relu"] = [{"bitwidth": 16, "dtype": "float"}]
        elif version == "1.0.0":
            content[A][1] = {"name": "relu", "dtype": "FLOAT", "bw": 16}
        else:
            index = next(i for i, entry in enumerate(content["encodings"]) if entry["name"] == "relu")
            content["encodings"][index] = {"name": "relu", "output_dtype": "float16"}

    program = _PREPARED.copy()
    report = load_encodings(program, faulty(tmp_path, edit, version))
    assert report.in_float == ("relu",) and report.is_complete
    modes = {str(node.args[0]): module.mode for node, module in program.fake_quant_nodes()}
    assert modes["relu"] is Mode.OFF and modes["x"] is Mode.FAKE
    assert torch.isfinite(program.module(torch.randn(2, 4, 8))).all()


def test_file_as_aimet_writes_it_is_read(tmp_path: Path) -> None:
    """Strings for booleans, no biases, a producer of its own, fields that nothing here knows."""
    content: dict[str, Any] = {
        "version": "0.6.1",
        "producer": {"package": "aimet_torch", "version": "2.42.0"},
        "excluded_layers": [],
        "quantizer_args": {"activation_bitwidth": 8, "quant_scheme": "min_max"},
    }
    wanted = {"bitwidth": 8, "dtype": "int", "is_symmetric": "False", "min": -1.0039, "max": 2.9961}
    grid = wanted | {"scale": 0.015686, "offset": -64}
    relu = grid | {"min": 0.0, "max": 4.0, "offset": 0}
    weight = {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "scale": 0.01, "offset": -128}
    content[A] = {"x": [grid], "relu": [relu], "output": [grid]}
    content[P] = {"first.weight": [weight] * 16, "second.weight": [weight] * 8}
    (tmp_path / "e").write_text(json.dumps(content))
    program = _PREPARED.copy()
    report = load_encodings(program, tmp_path / "e")
    assert report.is_complete and len(report.loaded) == 5
    x = next(module for node, module in program.fake_quant_nodes() if str(node.args[0]) == "x")
    assert (int(x.zero_point), float(x.scale)) == (64, pytest.approx(0.015686, abs=1e-9))
