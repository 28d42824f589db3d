"""The grids that the file gives activations: what onnxruntime's codes mean, and where they are not the program's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import fx

from fxquant.graph.program import Program
from fxquant.numerics.runtime import Array
from fxquant.parity.onnx_file import FileQuantizer, GridNames, OnnxFile
from fxquant.parity.simulation import RuntimeCodes


def runtime_codes(
    program: Program, file: OnnxFile, quantizer: FileQuantizer, node: fx.Node, computed: Array
) -> RuntimeCodes:
    """onnxruntime's codes at a FakeQuant node, on the grid of the file's DequantizeLinear."""
    module = program.fake_quant(node)
    assert module is not None
    codes = torch.from_numpy(computed.astype(np.int32)).to(module.scale.device)
    found = _per_tensor(file, quantizer.dequantize)
    if found is None:
        return RuntimeCodes(codes, *module.grid_for(codes.ndim))
    scale, zero_point = found
    return RuntimeCodes(codes, module.scale.new_tensor(scale), module.zero_point.new_tensor(zero_point))


def outside_grid(program: Program, node: fx.Node, computed: Array) -> int:
    """How many of onnxruntime's codes at a FakeQuant node are none of its grid: a bound of narrow codes got lost."""
    module = program.fake_quant(node)
    assert module is not None
    return int(np.count_nonzero((computed < module.spec.qmin) | (computed > module.spec.qmax)))


def foreign_grids(
    program: Program, file: OnnxFile, quantizers: Mapping[str, list[FileQuantizer]], names: Iterable[str]
) -> frozenset[fx.Node]:
    """Of the FakeQuant nodes called `names`, those per tensor whose grid in the file is not the program's."""
    found = []
    for node in map(program.node, names):
        module = program.fake_quant(node)
        assert module is not None
        if module.scale.ndim:
            continue
        own = (float(module.scale), int(module.zero_point))
        quantizer = quantizers[node.name][0]
        grids = [quantizer.dequantize] + ([quantizer.quantize] if quantizer.quantize is not None else [])
        if any(_per_tensor(file, grid) not in (None, own) for grid in grids):
            found.append(node)
    return frozenset(found)


def _per_tensor(file: OnnxFile, grid: GridNames) -> tuple[float, int] | None:
    """Scale and zero point; None where the file has no constant of one element each."""
    scale, zero_point = file.constant(grid.scale), file.constant(grid.zero_point)
    if scale is None or scale.size > 1 or (zero_point is not None and zero_point.size > 1):
        return None
    return float(scale.ravel()[0]), 0 if zero_point is None else int(zero_point.ravel()[0])
