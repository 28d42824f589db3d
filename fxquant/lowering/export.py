"""export_onnx: a program, as an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from fxquant.errors import ExportError, FxquantError
from fxquant.graph.program import Program
from fxquant.lowering.lower import lower
from fxquant.lowering.saving import save
from fxquant.ops.base import OpTable
from fxquant.ops.table import TABLE

Check = Callable[[ir.Model], None]


def export_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int = 21,
    external_data: bool | None = None,
    table: OpTable = TABLE,
    check: Check | None = None,
) -> Path:
    """Write `program` to an ONNX file: a float model before `insert-fake-quant`, a QDQ model once it is calibrated.

    Its metadata carry the program's fingerprint. It is checked by onnx.checker, and written whole or not at all.

    Arguments:
        program: at stage captured, assigned, calibrated or finalized; never changed.
        path: the file; its folder is created.
        opset: ONNX opset, 13 or later.
        external_data: whether large tensors go to a file beside it; None: only where the model exceeds 2 GB.
        table: where operations are looked up.
        check: called with the model before anything is written; what it raises prevents the export (a check that
            onnxruntime has every kernel, say).

    Raises:
        ExportError: values without a range (they are listed), a node that cannot be written, a rewrite of onnxruntime
            that would change results (fxquant.lowering.guards), or a file that cannot be written. The old file is then
            unchanged.
    """
    model = lower(program, opset, table)
    check_model(model)
    if check is not None:
        check(model)
    return save_model(model, Path(path), external_data)


def save_model(model: ir.Model, file: Path, external_data: bool | None = None) -> Path:
    """Write a model whole or not at all; its folder is made. ExportError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ExportError(f"export: folder '{file.parent}' cannot be made", got=err.strerror or str(err)) from err
    if file.is_dir():
        raise ExportError(
            f"export: '{file}'", expected="a file", got="a folder", remedy="Give a path such as model.onnx."
        )
    save(model, file, external_data)
    return file


def check_model(model: ir.Model) -> None:
    """Run onnx.checker with shape inference; a failure is a fault of an emitter, and is raised as ExportError."""
    try:
        common.CheckerPass(full_check=True)(model)
    except FxquantError:
        raise
    except Exception as err:
        cause: BaseException = err
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(
            "export: onnx.checker refuses the model",
            got=str(cause).strip().split("\n\n")[0],
            remedy="An operation's emitter wrote something invalid; the node named above is the place to look.",
        ) from err
