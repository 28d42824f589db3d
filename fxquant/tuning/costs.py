"""What a configuration costs: bit-operations counted in its graph, or the latency of its file in onnxruntime.

    bit-ops = sum over products of   MACs x bits of the first factor x bits of the second

MACs (multiplications) of one sample, from the shapes in the graph:

    convolution               output elements x input channels / groups x kernel elements
    transposed convolution    input elements x output channels / groups x kernel elements
    linear, matrix product    output elements x elements of the axis that is summed over
    einsum                    the product of the sizes of all its axes

A product that has a factor in float is one in float: 32 x 32. Nothing else counts: sums, pooling and activations
multiply nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no annotations
import torch
from torch import fx

from fxquant.graph.batches import Batch, placeholder_values
from fxquant.graph.program import Program, value_type
from fxquant.lowering.signature import input_nodes
from fxquant.numerics.fake_quant import Mode
from fxquant.numerics.runtime import RuntimeOptions, Session, open_session
from fxquant.ops._emit import argument
from fxquant.ops.convolution import is_transposed
from fxquant.ops.kernels import ProductKernel
from fxquant.tuning.groups import definition_of

FLOAT_BITS = 32
ROUNDS = 30
WARM_UP = 3


@dataclass(frozen=True)
class Sizes:
    """Numbers for the symbols in a program's shapes, with a batch of one; `batch` is the size of a fixed batch."""

    symbols: tuple[tuple[str, int], ...]
    batch: int

    @classmethod
    def of(cls, program: Program, batch: Batch) -> Sizes:
        """From one batch: the first size of an input is the batch's."""
        given, fixed = placeholder_values(program, batch), 1
        symbols: dict[str, int] = {}
        for number, node in enumerate(input_nodes(program)):
            kind, value = value_type(node), given[node.name]
            if kind is None or not isinstance(value, torch.Tensor):
                continue
            for axis, (size, found) in enumerate(zip(kind.shape, value.shape, strict=True)):
                if isinstance(size, str):
                    symbols.setdefault(size, 1 if axis == 0 else int(found))
                elif axis == number == 0:
                    fixed = size
        return cls(tuple(symbols.items()), fixed)

    def shape(self, value: Any) -> tuple[int, ...]:
        """A tensor's shape for one sample; as it is where the batch is fixed."""
        assert isinstance(value, fx.Node)
        kind = value_type(value)
        assert kind is not None, value.format_node()
        return tuple(size if isinstance(size, int) else self._number(size) for size in kind.shape)

    def _number(self, size: str) -> int:
        return int(sympy.sympify(size).subs(dict(self.symbols)))


def macs(program: Program, sizes: Sizes) -> dict[str, int]:
    """MACs of one sample for every product, by node name, at any stage."""
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        definition = definition_of(program, node)
        count = None if definition is None else _count(definition.name, node, sizes)
        if count is not None:
            found[node.name] = count
    is_whole = all(count % sizes.batch == 0 for count in found.values())
    return {name: count // sizes.batch for name, count in found.items()} if is_whole else found


def _count(name: str, node: fx.Node, sizes: Sizes) -> int | None:
    if name == "convolution":
        per_element = math.prod(sizes.shape(node.args[1])[1:])  # both forms: channels of one group x kernel
        return math.prod(sizes.shape(node.args[0] if is_transposed(node) else node)) * per_element
    if name in ("linear", "matmul"):
        return math.prod(sizes.shape(node)) * sizes.shape(node.args[0])[-1]
    if name == "addmm":
        return math.prod(sizes.shape(node)) * sizes.shape(argument(node, "mat1"))[-1]
    if name == "baddbmm":
        return math.prod(sizes.shape(node)) * sizes.shape(argument(node, "batch1"))[-1]
    return _count_einsum(node, sizes) if name == "einsum" else None


def _count_einsum(node: fx.Node, sizes: Sizes) -> int | None:
    inputs = str(argument(node, "equation")).replace(" ", "").partition("->")[0].split(",")
    if "." in "".join(inputs):
        return None
    tensors = argument(node, "tensors")
    pairs = [
        pair
        for names, value in zip(inputs, tensors, strict=True)
        for pair in zip(names, sizes.shape(value), strict=True)
    ]
    return math.prod(dict(pairs).values())


def bit_ops(program: Program, counts: Mapping[str, int]) -> dict[str, int]:
    """Bit-operations of every product of a program with FakeQuants, by node name; `counts` are its MACs."""
    return {name: count * bit_product(program, program.node(name)) for name, count in counts.items()}


def bit_product(program: Program, node: fx.Node) -> int:
    """Bits of the first factor x bits of the second; 32 x 32 if one of them is in float."""
    definition = definition_of(program, node)
    kernel = None if definition is None else definition.kernel
    if not isinstance(kernel, ProductKernel):
        return FLOAT_BITS**2
    bits = [value_bits(program, node.args[position]) for position in (kernel.left, kernel.right)]
    return FLOAT_BITS**2 if FLOAT_BITS in bits else bits[0] * bits[1]


def value_bits(program: Program, value: Any) -> int:
    """Bits of an argument: its FakeQuant's, 32 without one that is on."""
    quant = program.fake_quant(value) if isinstance(value, fx.Node) else None
    return FLOAT_BITS if quant is None or quant.mode is Mode.OFF else quant.spec.bits


@dataclass(frozen=True)
class Latency:
    """A file's latency beside another's, run in turns, which takes out what slows the machine down for both.

    Arguments:
        milliseconds: median of a run.
        ratio: median, over the turns, of its time by the other's.
        spread: half the range between the quartiles of these ratios, as a fraction of `ratio`.
    """

    milliseconds: float
    ratio: float
    spread: float


def latency(path: Path, other: Path, program: Program, batch: Batch, rounds: int = ROUNDS) -> Latency:
    """The latency of the ONNX file `path` beside that of `other`, on one batch, with onnxruntime's own threads."""
    given = placeholder_values(program, batch)
    feed = {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in given.items()}
    sessions = [open_session(file, RuntimeOptions()) for file in (path, other)]
    times = [[_run(session, feed) for session in sessions] for _ in range(WARM_UP + rounds)][WARM_UP:]
    ratios = [one / reference for one, reference in times]
    middle, (low, _, high) = statistics.median(ratios), statistics.quantiles(ratios, n=4)
    return Latency(1000 * statistics.median(one for one, _ in times), middle, (high - low) / 2 / middle)


def _run(session: Session, feed: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    session.run({name: feed[name] for name in session.input_names})
    return time.perf_counter() - start
