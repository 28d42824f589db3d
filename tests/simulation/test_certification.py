"""Self-tests of kernels: they pass here, fail on every planted rounding, and decide what is promised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fxquant.numerics.codes import Grid
from fxquant.numerics.kernels import elementwise, pooling, softmax, tables
from fxquant.numerics.rounding import dequantize
from fxquant.numerics.runtime import Array, RuntimeOptions, Session, open_session, optimised_graph
from fxquant.ops.table import TABLE
from fxquant.simulation import certification, self_test_model
from fxquant.simulation import self_test as self_tests
from fxquant.simulation.certification import CERTIFIED_ON, CertificationWarning, Platform, certificate, forget
from fxquant.simulation.self_test import SELF_TESTS, model_of, self_test

LISTED = Platform("1.31.1", "x86_64 avx512_vnni")
PRODUCTS = ("QLinearConv", "QGemm", "QLinearMatMul")
Formula = Callable[..., torch.Tensor]
tables_leaky_relu = tables.leaky_relu


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Self-tests run anew, on a listed platform; what they found is forgotten afterwards."""
    monkeypatch.setattr(certification, "here", lambda: LISTED)
    forget()
    yield
    forget()


def test_every_kernel_of_the_table_has_a_self_test() -> None:
    operators = {definition.kernel.operator for definition in TABLE if definition.kernel is not None}
    assert len(operators) >= 10
    assert operators <= set(SELF_TESTS) == set(CERTIFIED_ON)


@pytest.mark.parametrize("operator", SELF_TESTS)
def test_self_test_passes_on_hundreds_of_codes_when_nothing_is_planted(operator: str) -> None:
    outcome = self_test(operator)
    assert outcome.compared >= 256 and outcome.differing == 0 and outcome.failed == ()


@pytest.mark.parametrize("operator", SELF_TESTS)
def test_self_test_runs_the_kernel_that_it_tests(operator: str) -> None:
    ran = [node.op_type for node in optimised_graph(model_of(operator)).graph.node]
    assert operator in ran
    assert {"DequantizeLinear", "Conv", "Gemm", "MatMul", "Add", "Mul", "Softmax"}.isdisjoint(ran)


def shifted(formula: Formula) -> Formula:
    """The formula, but that codes 1, 65, 129 and 193 come out one too low."""

    def planted(*arguments: Any) -> torch.Tensor:
        codes = formula(*arguments)
        return torch.where(codes % 64 == 1, codes - 1, codes)

    return planted


def requantize_with_zero_point_first(accumulator: torch.Tensor, multiplier: torch.Tensor, out: Grid) -> torch.Tensor:
    scaled = accumulator.to(torch.float32) * multiplier + out.zero_point
    return torch.round(scaled).clamp(out.qmin, out.qmax).to(torch.int64)


def add_with_zero_point_last(a: torch.Tensor, b: torch.Tensor, one: Grid, other: Grid, out: Grid) -> torch.Tensor:
    real = dequantize(a, one.scale, one.zero_point) + dequantize(b, other.scale, other.zero_point)
    return tables.on_grid(real, out)


def multiply_with_zero_point_last(a: torch.Tensor, b: torch.Tensor, one: Grid, other: Grid, out: Grid) -> torch.Tensor:
    real = dequantize(a, one.scale, one.zero_point) * dequantize(b, other.scale, other.zero_point)
    return tables.on_grid(real, out)


def average_with_zero_point_last(x: torch.Tensor, grid: Grid, out: Grid, windows: pooling.PoolWindows) -> torch.Tensor:
    real = dequantize(x, grid.scale, grid.zero_point)
    mean = torch.nn.functional.avg_pool2d(
        real, windows.kernel, windows.stride, windows.pads[0], count_include_pad=windows.count_padding
    )
    return tables.on_grid(mean, out)


def global_average_with_zero_point_first(x: torch.Tensor, grid: Grid, out: Grid, axes: int) -> torch.Tensor:
    mean = dequantize(x, grid.scale, grid.zero_point).mean((-2, -1), keepdim=True)
    return torch.round(mean / out.scale + out.zero_point).clamp(0, 255).to(torch.int64)


def softmax_by_division(x: torch.Tensor, grid: Grid, out: Grid, axis: int) -> torch.Tensor:
    return tables.on_grid(torch.softmax(dequantize(x, grid.scale, grid.zero_point), axis), out)


def quantize_with_zero_point_first(real: torch.Tensor, out: Grid) -> torch.Tensor:
    return torch.round(real / out.scale + out.zero_point).clamp(0, 255).to(torch.int64)


@pytest.mark.parametrize(
    ("operator", "module", "name", "wrong"),
    [
        *((operator, self_test_model, "requantize", requantize_with_zero_point_first) for operator in PRODUCTS),
        ("QLinearAdd", elementwise, "add", add_with_zero_point_last),
        ("QLinearMul", elementwise, "multiply", multiply_with_zero_point_last),
        ("QLinearAveragePool", pooling, "average_pool", average_with_zero_point_last),
        ("QLinearGlobalAveragePool", pooling, "global_average_pool", global_average_with_zero_point_first),
        ("QLinearSoftmax", softmax, "softmax", softmax_by_division),
        ("QuantizeLinear", tables, "on_grid", quantize_with_zero_point_first),
        ("QLinearSigmoid", tables, "sigmoid", shifted(tables.sigmoid)),
        ("QLinearLeakyRelu", tables, "leaky_relu", lambda slope: shifted(tables_leaky_relu(slope))),
        ("QLinearConcat", tables, "regrid", shifted(tables.regrid)),
        ("QLinearWhere", tables, "regrid", shifted(tables.regrid)),
    ],
)
def test_self_test_fails_when_the_reference_rounds_wrongly(
    monkeypatch: pytest.MonkeyPatch, operator: str, module: Any, name: str, wrong: Formula
) -> None:
    monkeypatch.setattr(module, name, wrong)
    assert self_test(operator).differing > 0
    with pytest.warns(
        CertificationWarning, match=f"kernel {operator} is uncertified: .* of {operator}'s self-test differ"
    ):
        found = certificate(operator)
    assert not found.holds and found.outcome.differing > 0


def test_certificate_holds_when_the_platform_is_listed_and_the_self_test_passes() -> None:
    found = certificate("QLinearAdd")
    assert found.holds and found.reason == ""


@pytest.mark.parametrize("platform", [Platform("1.30.0", "x86_64 avx512_vnni"), Platform("1.31.1", "x86_64 avx2")])
def test_certificate_does_not_hold_on_an_unlisted_platform_and_says_what_the_self_test_found(
    platform: Platform,
) -> None:
    found = certificate("QLinearMul", platform=platform)
    assert not found.holds
    assert f"certified on {LISTED}, not on {platform}" in found.reason
    assert "(0 of 1,280 codes of QLinearMul's self-test differ)" in found.reason


def test_kernel_without_a_self_test_is_not_certified() -> None:
    found = certificate("QLinearOfAUser")
    assert not found.holds and "no self-test" in found.reason


def test_self_test_runs_once_a_process_for_each_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[RuntimeOptions] = []

    def counting(model: bytes, options: RuntimeOptions) -> Session:
        opened.append(options)
        return open_session(model, options)

    monkeypatch.setattr(self_tests, "open_session", counting)
    for _ in range(3):
        certificate("QLinearAdd")
        certificate("QLinearAdd", platform=Platform("2.0", "riscv64"))
    config = (("session.x64quantprecision", "1"),)
    assert certificate("QLinearAdd", config).holds
    assert [options.config for options in opened] == [(), config]
    assert {options.threads for options in opened} == {1}


class WithoutVnni:
    """Opens sessions of a machine whose pairs of full-scale products saturate: (255 * 127) * 2 becomes 32,767.

    Every second product of such a pair is lost, and a little more: as if codes of 127 were 64.
    """

    def __call__(self, model: bytes, options: RuntimeOptions) -> Session:
        found = onnx.load_from_string(model)
        for tensor in found.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.int8 and values.size > 1 and (values == 127).all():
                tensor.CopyFrom(numpy_helper.from_array(np.full_like(values, 64), tensor.name))
        return open_session(found.SerializeToString(), options)


@pytest.mark.parametrize("operator", PRODUCTS)
def test_saturating_pairs_are_named_with_their_remedy_when_there_is_no_vnni(
    monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    monkeypatch.setattr(self_tests, "open_session", WithoutVnni())
    with pytest.warns(CertificationWarning, match="saturate at 16 bits.*without VNNI.*7 bits.*x64quantprecision"):
        found = certificate(operator, platform=Platform("1.31.1", "x86_64 avx2"))
    assert not found.holds and found.outcome.failed == ("full-scale pairs",)


def test_other_kernels_stay_certified_when_there_is_no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_tests, "open_session", WithoutVnni())
    assert all(certificate(operator).holds for operator in SELF_TESTS if operator not in PRODUCTS)


def test_cause_is_the_cases_that_failed_when_it_is_not_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(Session):
        def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
            found = super().run(inputs, outputs)
            first = next(iter(found))
            return {**found, first: found[first] ^ 1}

    def faulty(model: bytes, options: RuntimeOptions) -> Session:
        session = open_session(model, options)
        return Faulty(session._session)

    monkeypatch.setattr(self_tests, "open_session", faulty)
    with pytest.warns(CertificationWarning, match="256 of 512 codes .* in: all codes$"):
        assert not certificate("QLinearSigmoid").holds
