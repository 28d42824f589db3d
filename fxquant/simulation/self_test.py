"""Self-tests: each integer kernel of onnxruntime against its reference formula, on a few hundred codes.

A test is one small ONNX model of all the operator's cases, run at level ALL on one thread; the formulas are those of
numerics/kernels, which the simulations use.

Products have a full-scale case: u8 codes 255 and s8 codes 127 throughout. `vpmaddubsw` adds two such products in 16
bits, 2 * 255 * 127 = 64,770 > 32,767, and saturates where there is no VNNI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fxquant.numerics.runtime import Level, RuntimeOptions, open_session
from fxquant.simulation import self_test_cases as cases
from fxquant.simulation.self_test_model import Bench

SELF_TESTS: dict[str, Callable[[Bench], None]] = {
    "QuantizeLinear": cases.quantize_cases,
    "QLinearConv": cases.convolution_cases,
    "QGemm": cases.gemm_cases,
    "QLinearMatMul": cases.matmul_cases,
    "QLinearAdd": cases.add_cases,
    "QLinearMul": cases.mul_cases,
    "QLinearAveragePool": cases.average_pool_cases,
    "QLinearGlobalAveragePool": cases.global_average_pool_cases,
    "QLinearSigmoid": cases.sigmoid_cases,
    "QLinearLeakyRelu": cases.leaky_relu_cases,
    "QLinearSoftmax": cases.softmax_cases,
    "QLinearConcat": cases.concat_cases,
    "QLinearWhere": cases.where_cases,
}


@dataclass(frozen=True)
class Outcome:
    """What a self-test found.

    Arguments:
        compared, differing: how many codes (or float32 values) were compared, and how many differ.
        failed: the cases in which some differ, each once.
    """

    compared: int
    differing: int
    failed: tuple[str, ...]


def self_test(operator: str, config: tuple[tuple[str, str], ...] = ()) -> Outcome:
    """Compare onnxruntime's kernel with its formula.

    Arguments:
        operator: a key of SELF_TESTS.
        config: session config entries that it runs with.
    """
    bench = Bench()
    SELF_TESTS[operator](bench)
    found = open_session(bench.model(), RuntimeOptions(Level.ALL, 1, config)).run(bench.feed)
    differing = {item.output: int(np.count_nonzero(found[item.output] != item.values)) for item in bench.expected}
    failed = dict.fromkeys(item.case for item in bench.expected if differing[item.output])
    return Outcome(sum(item.values.size for item in bench.expected), sum(differing.values()), tuple(failed))


def model_of(operator: str) -> bytes:
    """The ONNX model of an operator's self-test."""
    bench = Bench()
    SELF_TESTS[operator](bench)
    return bench.model()
