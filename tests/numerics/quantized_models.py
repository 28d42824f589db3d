"""ONNX models of one operator between DequantizeLinear and QuantizeLinear, run by onnxruntime on many grids at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from hypothesis import strategies
from onnx import TensorProto, helper, numpy_helper

from fxquant.numerics.codes import Grid
from fxquant.numerics.runtime import Level, RuntimeOptions, open_session, optimised_graph

Array = np.ndarray[Any, np.dtype[Any]]
LEVELS = (Level.ALL, Level.EXTENDED)
OPSET, IR_VERSION = 21, 10

seeds = strategies.integers(0, 2**32 - 1)
decades = strategies.floats(0.0, 5.0)


def grid(scale: float, zero_point: int, qmax: int = 255) -> Grid:
    """A grid of unsigned codes, per tensor."""
    return Grid(torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point), 0, qmax)


def random_grids(count: int, seed: int, decades: float = 1.0) -> list[Grid]:
    """Grids with scales up to `decades` decades above and below 0.01 (every third a multiple of 1/10 of a power of two:
    ties), and zero points at the edges more often than not."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        scale = 0.01 * 10.0 ** generator.uniform(-decades, decades)
        if index % 3 == 2:
            scale = 2.0 ** np.round(np.log2(scale)) * generator.choice([0.1, 0.3, 0.5, 1.0])
        zero = generator.choice([0, 0, 1, 127, 128, 254, 255, *generator.integers(0, 256, 4)])
        found.append(grid(float(scale), int(zero)))
    return found


@dataclass(frozen=True)
class Case:
    """One instance: the grid of each quantized operand, in order, and the output's."""

    operands: tuple[Grid, ...]
    out: Grid


def random_cases(count: int, operands: int, seed: int, decades: float = 1.0) -> list[Case]:
    """Cases on random grids."""
    grids = random_grids(count * (operands + 1), seed, decades)
    groups = [grids[start : start + operands + 1] for start in range(0, len(grids), operands + 1)]
    return [Case(tuple(group[:-1]), group[-1]) for group in groups]


def tied_cases(count: int, operands: int, steps: float, seed: int) -> list[Case]:
    """Cases whose output scale is `steps` of the operands' scales: where real codes are ties, rounding decides them."""
    scales = np.random.default_rng(seed).uniform(0.001, 1.0, count).astype(np.float32)
    outs = (scales * np.float32(steps)).tolist()
    return [Case((grid(one, 7),) * operands, grid(out, 1)) for one, out in zip(scales.tolist(), outs, strict=True)]


def bytes_of(seed: int, *shape: int) -> Array:
    """Random codes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def every_pair() -> tuple[Array, Array]:
    """All pairs of two codes."""
    first, second = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    return first.ravel(), second.ravel()


def tensor(codes: Array) -> torch.Tensor:
    """Codes as the formulas take them."""
    return torch.from_numpy(codes).to(torch.int64)


@dataclass(frozen=True)
class Operator:
    """What stands between Q and DQ, and the kernel that onnxruntime must run for it.

    Arguments:
        onnx_type, attributes: the operator.
        kernel: operator type of the fused kernel.
        plain: positions of the inputs that are not quantized (a condition).
        channels_last: convolutions that change no code stand before and behind, so that level ALL puts channels last.
    """

    onnx_type: str
    kernel: str
    attributes: dict[str, Any] = field(default_factory=dict)
    plain: tuple[int, ...] = ()
    channels_last: bool = False


def run(operator: Operator, inputs: Sequence[Array], cases: Sequence[Case], level: Level = Level.ALL) -> list[Any]:
    """onnxruntime's output codes (int64) of every case, all on the same inputs; the kernel must run in each of them."""
    model = _Model(operator, inputs, cases).serialize()
    options = RuntimeOptions(level, threads=1)
    nodes = optimised_graph(model, options).graph.node
    types = [node.op_type for node in nodes]
    assert types.count(operator.kernel) == len(cases), (operator, level, sorted(set(types)))
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(types), (operator, level, sorted(set(types)))
    if operator.channels_last:  # each has one Transpose at the model's input, which they may share, and one at its end
        assert types.count("Transpose") <= len(cases) + len(inputs), (operator, level, types)
    found = open_session(model, options).run({f"x{position}": value for position, value in enumerate(inputs)})
    return [tensor(found[f"y{index}"]) for index in range(len(cases))]


def differing(
    operator: Operator,
    inputs: Sequence[Array],
    cases: Sequence[Case],
    formula: Callable[[Case], torch.Tensor],
    levels: Sequence[Level] = LEVELS,
) -> int:
    """Number of codes that differ between onnxruntime, at each level, and a formula."""
    expected = [formula(case) for case in cases]
    assert all(codes.dtype == torch.int64 for codes in expected)
    count = 0
    for level in levels:
        found = run(operator, inputs, cases, level)
        assert [codes.shape for codes in found] == [codes.shape for codes in expected]
        count += sum(int(one.ne(other).sum()) for one, other in zip(found, expected, strict=True))
    return count


def _parts(weight: Array) -> list[tuple[str, Any]]:
    return [("weight", weight), ("weight_scale", np.float32(1.0)), ("weight_zero", np.int8(0))]


class _Model:
    def __init__(self, operator: Operator, inputs: Sequence[Array], cases: Sequence[Case]) -> None:
        self._operator, self._inputs = operator, inputs
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        for index, case in enumerate(cases):
            self._add(index, case)
        self._outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.UINT8, None) for i in range(len(cases))]

    def serialize(self) -> bytes:
        values = [
            helper.make_tensor_value_info(f"x{position}", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for position, value in enumerate(self._inputs)
        ]
        graph = helper.make_graph(self._nodes, "kernel", values, self._outputs, self._constants)
        opsets = [helper.make_opsetid("", OPSET)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())

    def _add(self, index: int, case: Case) -> None:
        operator, grids = self._operator, iter(case.operands)
        names = []
        for position in range(len(self._inputs)):
            name = f"x{position}"
            if position not in operator.plain:
                name = self._node("DequantizeLinear", name, *self._grid(f"{index}_{position}", next(grids)))
                if operator.channels_last:
                    name = self._convolution(name, f"{index}_{position}", self._inputs[position])
            names.append(name)
        name = self._node(operator.onnx_type, *names, **operator.attributes)
        name = self._node("QuantizeLinear", name, *self._grid(f"{index}_out", case.out))
        if operator.channels_last:
            name = self._node("DequantizeLinear", name, f"scale_{index}_out", f"zero_{index}_out")
            self._convolution(name, f"{index}_out", max(self._inputs, key=lambda x: x.shape[1]), moves_on=False)
        if case.out.qmax < 255:
            bounds = [self._constant(f"{bound}_{index}", np.uint8(bound)) for bound in (0, case.out.qmax)]
            name = self._node("Clip", name, *bounds)
        self._nodes[-1].output[0] = f"y{index}"

    def _convolution(self, name: str, of: str, like: Array, moves_on: bool = True) -> str:
        """A 1 x 1 convolution with the identity, on the grid called `of`: output codes are input codes."""
        channels = like.shape[1]
        identity = np.eye(channels, dtype=np.int8).reshape(channels, channels, *[1] * (like.ndim - 2))
        weight = [self._constant(f"{part}_{of}_{moves_on}", value) for part, value in _parts(identity)]
        name = self._node("Conv", name, self._node("DequantizeLinear", *weight))
        name = self._node("QuantizeLinear", name, f"scale_{of}", f"zero_{of}")
        return self._node("DequantizeLinear", name, f"scale_{of}", f"zero_{of}") if moves_on else name

    def _grid(self, name: str, of: Grid) -> tuple[str, str]:
        zero_point = of.zero_point.numpy().astype(np.uint8)
        return self._constant(f"scale_{name}", of.scale.numpy()), self._constant(f"zero_{name}", zero_point)

    def _constant(self, name: str, value: Any) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, onnx_type: str, *inputs: str, **attributes: Any) -> str:
        output = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(onnx_type, list(inputs), [output], **attributes))
        return output
