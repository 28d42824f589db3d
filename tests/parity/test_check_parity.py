"""check_parity on good files, and on what it must refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch

from fxquant.errors import ParityError
from fxquant.graph.batches import Batch
from fxquant.parity import Level, RuntimeOptions, Verdict, check_parity
from tests.lowering import programs
from tests.lowering.programs import fake_quant_of, float_program, image, quantized
from tests.parity.files import ONE_THREAD, Tokens, compare, export, residual_program, tokens, tokens_program


def test_parity_is_exact_when_nothing_was_changed(tmp_path: Path) -> None:
    program = residual_program()
    report = compare(program, export(program, tmp_path), seeds=3)
    assert report.exact and report.fault == () and report.worst_local_steps == 0
    assert report.batches == 3
    codes = 3 * 4 * (3 * 64 + 3 * 8 * 64 + 8 * 16 + 8 + 8 + 5)
    assert report.codes_compared == codes
    assert report.verdict.startswith(f"exact: 0 of {codes:,} codes differ at 8 quantized tensors (float simulation, ")
    assert {row.verdict for row in report.rows} == {Verdict.EXACT}


@pytest.mark.parametrize("level", list(Level))
def test_no_local_difference_exceeds_a_step_when_any_level_runs(tmp_path: Path, level: Level) -> None:
    program = tokens_program()
    options = RuntimeOptions(level, threads=1)
    report = check_parity(program, export(program, tmp_path), [tokens(4)], options=options, progress=False)
    assert report.worst_local_steps <= 1 and report.fault == ()
    assert report.fusion.level is level


def test_report_is_json_and_text_when_asked(tmp_path: Path) -> None:
    program = tokens_program()
    report = compare(program, export(program, tmp_path))
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["verdict"] == report.verdict
    assert [row["value"] for row in loaded["rows"]] == [row.value for row in report.rows]
    assert loaded["environment"]["options"] == {"level": "ALL", "threads": 1, "config": {}}
    text = str(report)
    assert text.splitlines()[0] == report.verdict
    assert "gelu (Gelu): float: onnxruntime has no integer kernel for Gelu" in text
    assert all(row.value in text for row in report.rows)


def test_inherited_rows_name_their_origin_when_an_earlier_node_rounds(tmp_path: Path) -> None:
    program = tokens_program()
    report = compare(program, export(program, tmp_path))
    softmax = next(row for row in report.rows if row.value == "softmax")
    assert softmax.verdict is Verdict.ROUNDING  # floor(1 / scale) in the runtime's kernel
    assert next(row for row in report.rows if row.value == "matmul_1").verdict_text == "inherited from softmax"


def test_inputs_are_as_in_calibrate_when_tuples_lists_or_dicts_come(tmp_path: Path) -> None:
    program = residual_program()
    path = export(program, tmp_path)
    batches: list[Batch] = [image(2), (image(2),), [image(2)], {"x": image(2)}]
    report = check_parity(program, path, batches, options=ONE_THREAD, progress=False)
    assert report.exact and report.batches == 4


def test_batches_are_read_one_at_a_time_when_limited(tmp_path: Path) -> None:
    read = []

    def batches() -> Iterator[torch.Tensor]:
        for seed in range(10):
            read.append(seed)
            yield image(1, seed)

    program = residual_program()
    report = check_parity(program, export(program, tmp_path), batches(), max_batches=3, progress=False)
    assert report.batches == 3 and read == [0, 1, 2]


def test_nothing_is_changed_when_parity_was_checked(tmp_path: Path) -> None:
    program = residual_program()
    path = export(program, tmp_path)
    program.module.train()
    fake_quant_of(program, "conv1_weight").scale.mul_(1.0)
    before, data = program.fingerprint(), path.read_bytes()
    compare(program, path)
    assert program.fingerprint() == before and path.read_bytes() == data
    assert program.module.training


def test_outputs_are_compared_when_nothing_is_quantized(tmp_path: Path) -> None:
    program = float_program(Tokens(), tokens())
    report = compare(program, export(program, tmp_path))
    (row,) = report.rows
    assert row.is_output and row.verdict in (Verdict.EXACT, Verdict.ROUNDING)
    assert report.verdict.startswith("nothing quantized") and report.fault == ()
    json.dumps(report.to_dict(), allow_nan=False)


def test_narrow_grids_are_compared_when_codes_are_clipped(tmp_path: Path) -> None:
    from fxquant.spec import QuantSpec

    torch.manual_seed(0)
    values = ("x", "linear", "linear_1", "matmul")
    program = quantized(float_program(Tokens(), tokens()), values, tokens(8), spec=QuantSpec(4))
    report = compare(program, export(program, tmp_path))
    assert [row.value for row in report.code_rows] == list(values)
    assert report.fault == () and report.worst_local_steps <= 1


def test_file_of_another_program_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    path, other = export(residual_program(), tmp_path), residual_program(seed=1)
    with pytest.raises(ParityError, match="was not lowered from program") as caught:
        check_parity(other, path, [image()])
    assert other.fingerprint() in caught.value.expected
    assert residual_program().fingerprint() in caught.value.got
    assert "allow_mismatch" in caught.value.remedy


def test_file_of_another_program_is_compared_when_allowed(tmp_path: Path) -> None:
    path, other = export(residual_program(), tmp_path), residual_program(seed=1)
    report = check_parity(other, path, [image()], allow_mismatch=True, progress=False)
    assert {"conv2d", "conv2d_1", "linear"} <= set(report.fault)


def test_file_without_fingerprint_is_refused(tmp_path: Path) -> None:
    program = residual_program()
    path = export(program, tmp_path)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(ParityError, match="a file without fingerprint"):
        check_parity(program, path, [image()])


def test_no_batches_are_refused(tmp_path: Path) -> None:
    program = residual_program()
    with pytest.raises(ParityError, match="at least one batch; got none"):
        check_parity(program, export(program, tmp_path), [])


def test_nan_input_is_refused_with_its_batch_and_name(tmp_path: Path) -> None:
    program = residual_program()
    bad = image(2)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ParityError, match=r"batch 1: input 'x'; expected no NaN; got 1 NaN of 384 values"):
        check_parity(program, export(program, tmp_path), [image(2), bad], progress=False)


def test_infinite_input_is_compared_when_it_saturates(tmp_path: Path) -> None:
    program = residual_program()
    bright = image(2)
    bright[0, 0, 0, 0] = float("inf")
    assert check_parity(program, export(program, tmp_path), [bright], options=ONE_THREAD, progress=False).exact


def test_batch_of_another_shape_is_refused_with_the_input_named(tmp_path: Path) -> None:
    program = residual_program()
    with pytest.raises(ParityError, match="batch 0: batch: input 'x'"):
        check_parity(program, export(program, tmp_path), [torch.zeros(1, 4, 8, 8)], progress=False)


def test_uncalibrated_program_is_refused_with_its_values(tmp_path: Path) -> None:
    path = export(residual_program(), tmp_path)
    program = programs.residual_program(calibrate=False)
    with pytest.raises(ParityError, match="none for conv1_weight"):
        check_parity(program, path, [image()], allow_mismatch=True)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    program = residual_program()
    with pytest.raises(ParityError, match="does not exist"):
        check_parity(program, tmp_path / "none.onnx", [image()])
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ParityError, match="is no ONNX model"):
        check_parity(program, tmp_path / "broken.onnx", [image()])


def test_unknown_simulation_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    program = residual_program()
    with pytest.raises(ParityError, match="simulation 'flaot' is unknown. Did you mean 'float'"):
        check_parity(program, export(program, tmp_path), [image()], simulation="flaot")


def test_constants_outside_the_file_are_found_when_the_data_is_external(tmp_path: Path) -> None:
    program = residual_program()
    model = onnx.load(export(program, tmp_path))
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    report = compare(program, folder / "model.onnx")
    assert report.exact
