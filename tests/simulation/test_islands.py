"""Tables harvested from onnxruntime hold its codes; what OpDefs say of operations in float is so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxquant.graph.program import Program, Stage
from fxquant.lowering.lower import lower
from fxquant.numerics.codes import Grid, codes_from_integers
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.rounding import dequantize
from fxquant.numerics.runtime import Array, Level, RuntimeOptions, open_session
from fxquant.ops.base import FloatForm
from fxquant.ops.float_forms import FORMS, FORMS_OF
from fxquant.ops.table import TABLE
from fxquant.simulation import islands
from fxquant.simulation.executor import Executor
from fxquant.simulation.integer import IntegerArithmetic
from fxquant.simulation.islands import DEFAULT_OPSET, Harvest, harvest
from fxquant.simulation.plan import read_plan
from fxquant.spec import QuantSpec
from tests.helpers import Builder

aten = torch.ops.aten
Nodes = Callable[[Builder, fx.Node], fx.Node]

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "remainder": (0.37,),
    "fmod": (0.37,),
    "softshrink": (0.5,),
    "leaky_relu": (0.13,),
    "threshold": (0.1, 0.3),
    "hardshrink": (0.5,),
    "clamp": (-0.7, 1.3),
    "add": (0.3,),
    "sub": (0.3,),
    "mul": (0.37,),
    "div": (0.37,),
}
POINTWISE = "exp tan sinh cosh asinh erf tanh silu hardswish hardsigmoid gelu expm1 exp2 remainder fmod trunc"
ONLY_POSITIVE = "sqrt rsqrt"  # acosh and atanh have narrower domains yet
AGREE = "relu relu6 hardtanh clamp leaky_relu threshold hardshrink abs neg reciprocal sign floor ceil round"
SPEC = QuantSpec()


def _target(name: str) -> Any:
    overload = (
        "Tensor" if name in ("add", "sub", "mul", "div") else "Scalar" if name in ("remainder", "fmod") else "default"
    )
    return getattr(getattr(aten, name), overload)


def _one(name: str) -> Nodes:
    arguments = ARGUMENTS.get(name, ())
    return lambda build, x: build.call(name, _target(name), x, *arguments)


def _spelled_gelu(build: Builder, x: fx.Node) -> fx.Node:
    erf = build.call("erf", aten.erf.default, build.call("div", aten.div.Tensor, x, 2**0.5))
    product = build.call("mul", aten.mul.Tensor, x, build.call("plus", aten.add.Tensor, erf, 1.0))
    return build.call("halved", aten.mul.Tensor, product, 0.5)


def _silu(build: Builder, x: fx.Node) -> fx.Node:
    return build.call("mul", aten.mul.Tensor, x, build.call("sigmoid", aten.sigmoid.default, x))


def _chosen(build: Builder, x: fx.Node) -> fx.Node:
    mask = build.call("above", aten.gt.Scalar, x, 0.2)
    return build.call("where", aten.where.self, mask, x, build.call("tanh", aten.tanh.default, x))


FUNCTIONS: dict[str, Nodes] = {
    **{name: _one(name) for name in POINTWISE.split()},
    "softshrink": _one("softshrink"),
    "gelu-tanh": lambda build, x: build.call("gelu", aten.gelu.default, x, approximate="tanh"),
    "sqrt-abs": lambda build, x: build.call("sqrt", aten.sqrt.default, build.call("abs", aten.abs.default, x)),
    "spelled-gelu": _spelled_gelu,
    "silu": _silu,
    "where": _chosen,
    "relu-tanh": lambda build, x: build.call("tanh", aten.tanh.default, build.relu("relu", x)),
    "scaled-sum": lambda build, x: build.call("add", aten.add.Tensor, x, 0.3, alpha=0.7),
}


def _quantizer(program: Program, name: str) -> FakeQuant:
    module = program.fake_quant(program.node(f"{name}_fq"))
    assert module is not None
    return module


def _between_grids(function: Nodes, *, moved: bool = False) -> tuple[Program, str]:
    """x on a grid -> function -> [transposition] -> quantizer; the name of the value that is quantized."""
    build = Builder()
    x = build.fake_quant(build.input("x", 16, 17), SPEC, -3.0, 3.0)
    value = function(build, x)
    if moved:
        value = build.call("moved", aten.transpose.int, value, 1, 2)
    build.output(build.fake_quant(value, SPEC, -2.0, 2.0))
    return build.program(stage=Stage.CALIBRATED), value.name


def _both(program: Program, x: torch.Tensor, opset: int = DEFAULT_OPSET) -> tuple[Array, Array]:
    """What the integer simulation and onnxruntime give for x (real values on the last grid)."""
    simulated = Executor(program, IntegerArithmetic(opset)).forward(x).numpy()
    model = ir.serde.serialize_model(lower(program, opset)).SerializeToString()
    session = open_session(model, RuntimeOptions(threads=1))
    return simulated, session.run({"x": x.numpy()})[session.output_names[0]]


def _every_code(module: FakeQuant) -> torch.Tensor:
    """Each code's real value, some of them twice, in an order that is not theirs; of shape [1, 16, 17]."""
    codes = module.spec.qmin + (torch.arange(16 * 17) * 89) % 256
    return module.real(codes.view(1, 16, 17))


scales = st.floats(2.0**-9, 2.0**-4, width=32)
zero_points = st.integers(0, 255)


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=4)
@given(grids=st.tuples(scales, zero_points, scales, zero_points))
def test_table_is_onnxruntimes_at_every_code(name: str, grids: tuple[float, int, float, int]) -> None:
    program, last = _between_grids(FUNCTIONS[name])
    for module, scale, zero_point in ((_quantizer(program, "x"), *grids[:2]), (_quantizer(program, last), *grids[2:])):
        module.scale.fill_(scale)
        module.zero_point.fill_(zero_point)
    plan = read_plan(program)
    assert [table.end for table in plan.tables.values()] == [program.node(f"{last}_fq")]
    np.testing.assert_array_equal(*_both(program, _every_code(_quantizer(program, "x"))))


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("name", ["gelu", "gelu-tanh", "hardswish"])
def test_table_is_that_of_the_opset_when_an_operation_is_written_otherwise(name: str, opset: int) -> None:
    program, last = _between_grids(FUNCTIONS[name])
    _quantizer(program, last).scale.fill_(1e-4)  # fine steps, so that different bits are different codes
    np.testing.assert_array_equal(*_both(program, _every_code(_quantizer(program, "x")), opset))


def test_floats_are_tabulated_when_codes_are_moved_behind_the_function() -> None:
    program, _ = _between_grids(_one("gelu"), moved=True)
    plan = read_plan(program)
    assert {table.top.name: table.end for table in plan.tables.values()} == {"gelu": None}
    (function,), grid = plan.tables.values(), _quantizer(program, "x").grid
    real = dequantize(torch.arange(256), grid.scale, grid.zero_point)
    found, torchs = harvest(function, grid, None).codes, torch.nn.functional.gelu(real)
    torch.testing.assert_close(found, torchs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, torchs)
    np.testing.assert_array_equal(*_both(program, _every_code(_quantizer(program, "x"))))


def test_torch_in_place_of_onnxruntime_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above bites: tables of torch's own tanh, one step lower."""

    class Torch:
        input_names, output_names = ("x0",), ("tanh",)

        def run(self, feed: dict[str, Array], outputs: Any) -> dict[str, Array]:
            return {"tanh": np.tanh(feed["x0"]) - np.float32(0.02)}

    monkeypatch.setattr(islands, "open_kept", lambda model: Torch())
    program, _ = _between_grids(_one("tanh"))
    simulated, real = _both(program, _every_code(_quantizer(program, "x")))
    assert (simulated != real).mean() > 0.5


def _grid(scale: float, zero_point: int) -> Grid:
    return Grid(torch.tensor(scale), torch.tensor(zero_point), 0, 255)


def test_table_is_harvested_again_only_where_a_grid_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[float] = []

    def counted(function: Any, grid: Grid, *rest: Any) -> Any:
        runs.append(float(grid.scale))
        return harvest(function, grid, *rest)

    monkeypatch.setattr(islands, "harvest", counted)
    program, _ = _between_grids(_one("tanh"))
    (function,) = read_plan(program).tables.values()
    found, codes, out = Harvest(), torch.tensor([0, 128, 255]), _grid(0.01, 120)
    for scale in (0.02, 0.02, 0.03):
        source = codes_from_integers(codes, _grid(scale, 128))
        found.look_up(function, source, out)
        found.look_up(function, source, out)
    moving = _grid(0.04, 128)
    found.look_up(function, codes_from_integers(codes, moving), out)
    assert [round(scale, 4) for scale in runs] == [0.02, 0.03, 0.04]


def test_gradient_is_that_of_fake_quantization() -> None:
    program, last = _between_grids(_one("gelu"))
    _quantizer(program, last).set_range(torch.tensor(-0.1), torch.tensor(1.5))
    x = (2 * torch.randn(1, 16, 17, generator=torch.Generator().manual_seed(0))).requires_grad_()
    gradients = []
    for simulation in ("float", "exact"):
        program.simulate = simulation
        (found,) = torch.autograd.grad((program.module(x) ** 2).sum(), x)
        gradients.append(found)
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def _float_session(function: Nodes, inputs: int = 1, level: Level = Level.ALL) -> tuple[Program, Any]:
    build = Builder()
    build.output(function(build, *(build.input(name) for name in ("x", "y")[:inputs])))
    program = build.program()
    model = ir.serde.serialize_model(lower(program)).SerializeToString()
    return program, open_session(model, RuntimeOptions(level, threads=2))


def _bits(session: Any, *inputs: Array) -> Array:
    feed = dict(zip(("x", "y"), inputs, strict=False))
    found: Array = session.run(feed)[session.output_names[0]].view(np.int32)
    return found


def _runs(x: Array) -> Iterator[slice]:
    """Slices that start and end anywhere in a vector register, single elements, and all of it."""
    yield slice(0, len(x))
    for length in (1, 3, 15, 16, 17, 31, 40):
        for start in (0, 1, 5, 18):
            yield slice(start, start + length)


def _normal(seed: int, count: int = 300) -> Array:
    generator = np.random.default_rng(seed)
    scale = generator.choice([0.1, 1.0, 4.0], count)
    return (generator.standard_normal(count) * scale).astype(np.float32)


@pytest.mark.parametrize("name", [*POINTWISE.split(), *ONLY_POSITIVE.split(), "sigmoid", "softshrink"])
def test_pointwise_operation_is_the_same_wherever_an_element_stands(name: str) -> None:
    build = Builder()
    node = _one(name)(build, build.input("x"))
    definition = TABLE.find(node)
    assert definition is not None and definition.float_form_for(node) is FloatForm.POINTWISE
    _, session = _float_session(_one(name))
    x = np.abs(_normal(1)) + np.float32(0.01) if name in ONLY_POSITIVE.split() else _normal(1)
    assert _position_dependent(session, x) == 0


def _position_dependent(session: Any, x: Array) -> int:
    single = np.concatenate([_bits(session, x[i : i + 1]) for i in range(len(x))])
    return sum(int((_bits(session, x[part]) != single[part]).sum()) for part in _runs(x))


def test_position_dependence_is_found() -> None:
    class Drifting:
        output_names = ("y",)

        def run(self, feed: dict[str, Array]) -> dict[str, Array]:
            x = feed["x"].copy()
            x[len(x) - len(x) % 16 :] *= np.float32(1 + 2**-23)
            return {"y": x}

    assert _position_dependent(Drifting(), _normal(1)) > 0


def _special(seed: int) -> Array:
    """Normal, subnormal and zero numbers of both signs."""
    x = _normal(seed, 20000)
    kind = np.random.default_rng(seed).integers(0, 20, len(x))
    x[kind == 0], x[kind == 1] = 0.0, -0.0
    x[kind == 2] *= np.float32(1e-39)
    return x


PAIRS: dict[str, Callable[..., fx.Node]] = {
    **{
        name: lambda build, x, y, name=name: build.call(name, _target(name), x, y)
        for name in ("add", "sub", "mul", "div", "maximum", "minimum")
    },
    "product-sum": lambda build, x, y: build.call(
        "sum", aten.add.Tensor, build.call("product", aten.mul.Tensor, x, y), 0.613
    ),
    "quotients": lambda build, x, y: build.call(
        "second", aten.div.Tensor, build.call("first", aten.div.Tensor, x, 3.0), y
    ),
    "squares": lambda build, x, y: build.call(
        "sum", aten.add.Tensor, build.call("square", aten.pow.Tensor_Scalar, x, 2), build.relu("relu", y)
    ),
}


@pytest.mark.parametrize("level", [Level.ALL, Level.EXTENDED], ids=lambda level: level.value)
@pytest.mark.parametrize("name", [*AGREE.split(), *PAIRS])
def test_operation_that_agrees_is_torchs_bit_for_bit(name: str, level: Level) -> None:
    function, inputs = (PAIRS[name], 2) if name in PAIRS else (_one(name), 1)
    program, session = _float_session(function, inputs, level)
    values = [_special(seed) for seed in range(inputs)]
    expected = program.module(*map(torch.from_numpy, values)).numpy()
    is_number = ~np.isnan(expected)
    assert is_number.mean() > 0.9
    np.testing.assert_array_equal(_bits(session, *values)[is_number], expected.view(np.int32)[is_number])


def test_forms_name_operations_that_exist() -> None:
    assert (set(FORMS) | set(FORMS_OF)) - set(TABLE.names()) == set()
    assert not set(FORMS) & set(FORMS_OF)
