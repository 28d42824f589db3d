"""Activations against torch, in each form that an opset has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.ops.activation import ACTIVATION
from fxquant.ops.base import Role
from fxquant.spec import Limits
from tests.ops.harness import assert_emits_like_torch
from tests.ops.inputs import floats, integers, role_of

aten = torch.ops.aten
Function = Callable[..., Any]

F, G = floats(2, 6, 4), floats(2, 6, 4, seed=1)
N = integers(2, 6)

TABLE: list[tuple[str, Function, tuple[torch.Tensor, ...]]] = [
    ("relu", lambda x: aten.relu.default(x), (F,)),
    ("relu-int", lambda x: aten.relu.default(x), (N,)),
    ("relu6", lambda x: aten.relu6.default(4 * x), (F,)),
    ("hardtanh", lambda x: aten.hardtanh.default(x), (F,)),
    ("hardtanh-0-6", lambda x: aten.hardtanh.default(4 * x, 0.0, 6.0), (F,)),
    ("clamp", lambda x: aten.clamp.default(x, -0.5, 1), (F,)),
    ("clamp-min-only", lambda x: aten.clamp.default(x, min=0.25), (F,)),
    ("clamp-max-only", lambda x: aten.clamp.default(x, max=0.25), (F,)),
    ("clamp-int", lambda x: aten.clamp.default(x, -2, 3), (N,)),
    ("clamp-int-float", lambda x: aten.clamp.default(x, -2.5, 3), (N,)),
    ("clamp-uint8", lambda x: aten.clamp.default(x.to(torch.uint8), 3, 100), (N,)),
    ("clamp.Tensor", lambda x, y: aten.clamp.Tensor(x, y, y + 1), (F, G)),
    ("clamp.Tensor-min", lambda x, y: aten.clamp.Tensor(x, min=y), (F, floats(4))),
    ("clamp.Tensor-scalars", lambda x, y: aten.clamp.Tensor(x, y, y + 1), (F, torch.tensor(-0.5))),
    ("clamp_min", lambda x: aten.clamp_min.default(x, 1e-6), (F,)),
    ("clamp_min.Tensor", lambda x, y: aten.clamp_min.Tensor(x, y), (F, G)),
    ("clamp_max", lambda x: aten.clamp_max.default(x, 0.5), (F,)),
    ("clamp_max.Tensor", lambda x, y: aten.clamp_max.Tensor(x, y), (F, G)),
    ("leaky_relu", lambda x: aten.leaky_relu.default(x), (F,)),
    ("leaky_relu-0.1", lambda x: aten.leaky_relu.default(x, 0.1), (F,)),
    ("elu", lambda x: aten.elu.default(x), (F,)),
    ("elu-alpha", lambda x: aten.elu.default(x, 0.5), (F,)),
    ("elu-scales", lambda x: aten.elu.default(x, 0.5, 2.0, 1.5), (F,)),
    ("selu", lambda x: aten.selu.default(x), (F,)),
    ("celu", lambda x: aten.celu.default(x, 0.5), (F,)),
    ("sigmoid", lambda x: aten.sigmoid.default(x), (F,)),
    ("sigmoid-int", lambda x: aten.sigmoid.default(x), (N,)),
    ("tanh", lambda x: aten.tanh.default(x), (F,)),
    ("silu", lambda x: aten.silu.default(x), (F,)),
    ("mish", lambda x: aten.mish.default(x), (F,)),
    ("softplus", lambda x: aten.softplus.default(20 * x), (F,)),
    ("softplus-beta", lambda x: aten.softplus.default(x, 2.0, 1.5), (F,)),
    ("log_sigmoid", lambda x: aten.log_sigmoid.default(x), (F,)),
    ("hardswish", lambda x: aten.hardswish.default(3 * x), (F,)),
    ("hardsigmoid", lambda x: aten.hardsigmoid.default(3 * x), (F,)),
    ("gelu", lambda x: aten.gelu.default(x), (F,)),
    ("gelu-tanh", lambda x: aten.gelu.default(x, approximate="tanh"), (F,)),
    ("softmax", lambda x: aten.softmax.int(x, -1), (F,)),
    ("softmax-1", lambda x: aten.softmax.int(x, 1), (F,)),
    ("softmax-dtype", lambda x: aten.softmax.int(x, 1, torch.float32), (N,)),
    ("_softmax", lambda x: aten._softmax.default(x, 2, False), (F,)),
    ("log_softmax", lambda x: aten.log_softmax.int(x, -1), (F,)),
    ("_log_softmax", lambda x: aten._log_softmax.default(x, 1, False), (F,)),
    ("glu", lambda x: aten.glu.default(x), (F,)),
    ("glu-1", lambda x: aten.glu.default(x, 1), (F,)),
    ("threshold", lambda x: aten.threshold.default(x, 0.1, 20.0), (F,)),
    ("hardshrink", lambda x: aten.hardshrink.default(x, 0.75), (F,)),
    ("softshrink", lambda x: aten.softshrink.default(x, 0.75), (F,)),
]
FORMS = [row for row in TABLE if row[0] in ("hardswish", "gelu", "gelu-tanh", "clamp", "glu", "softmax", "mish")]


@pytest.mark.parametrize(("name", "function", "inputs"), TABLE, ids=[row[0] for row in TABLE])
def test_activation_emission_equals_torch(name: str, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    assert_emits_like_torch(function, inputs, batches=(3,))


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize(("name", "function", "inputs"), FORMS, ids=[row[0] for row in FORMS])
def test_activation_emission_equals_torch_at_earlier_opsets(
    name: str, function: Function, inputs: tuple[torch.Tensor, ...], opset: int
) -> None:
    assert_emits_like_torch(function, inputs, opset=opset)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 6, 5), (3, 6, 5, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_prelu_emission_equals_torch(shape: tuple[int, ...], shared: bool) -> None:
    channels = 1 if shared or len(shape) == 1 else shape[1]
    module = nn.PReLU(channels)
    module.weight.data = floats(channels, seed=3)
    assert_emits_like_torch(module, (floats(*shape),))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_one_operator_from_opset_20(approximate: str) -> None:
    def function(x: torch.Tensor) -> Any:
        return aten.gelu.default(x, approximate=approximate)

    model = assert_emits_like_torch(function, (F,), opset=20, only="Gelu")
    assert len(model.graph) == 1
    below = assert_emits_like_torch(function, (F,), opset=19)
    assert "Gelu" not in {node.op_type for node in below.graph}


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (None, 6.0)])
def test_clip_bounds_are_scalar_initializers(bounds: tuple[Any, Any]) -> None:
    model = assert_emits_like_torch(lambda x: aten.clamp.default(x, *bounds), (F,), only="Clip")
    (clip,) = model.graph
    given = [value for value in clip.inputs[1:] if value is not None]
    assert all(value.const_value is not None and value.const_value.shape == () for value in given)


ROLES: list[tuple[Function, Role]] = [
    (lambda x: aten.relu.default(x), Role.ACTIVATION),
    (lambda x: aten.clamp.default(x, 0, 1), Role.ACTIVATION),
    (lambda x: aten.clamp.Tensor(x, x), Role.FLOAT),
    (lambda x: aten.sigmoid.default(x), Role.FIXED_RANGE),
    (lambda x: aten.softmax.int(x, 1), Role.FIXED_RANGE),
    (lambda x: aten.leaky_relu.default(x), Role.COMPUTE),
    (lambda x: aten.gelu.default(x), Role.FLOAT),
]


@pytest.mark.parametrize(("function", "role"), ROLES)
def test_role_of_activation(function: Function, role: Role) -> None:
    assert role_of(function, (F,)) is role


def test_fixed_ranges_are_the_unit_interval() -> None:
    fixed = {op.name: op.output_range for op in ACTIVATION if op.role is Role.FIXED_RANGE}
    assert fixed == {"sigmoid": Limits(0.0, 1.0), "softmax": Limits(0.0, 1.0)}
