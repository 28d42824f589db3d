"""Operations that the table does not know: through torch.onnx and inlined, or refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxquant.errors import ExportError
from fxquant.lowering.export import check_model
from fxquant.lowering.fallback import evaluate
from fxquant.lowering.lower import lower
from fxquant.ops.base import OpTable, table_of
from fxquant.ops.table import TABLE
from tests.lowering.programs import S8_PER_CHANNEL, U8, calibrate_on, float_program, insert
from tests.ops.harness import assert_emits_like_torch, compare

aten = torch.ops.aten


def without(*targets: Any) -> OpTable:
    """The default table, less the operations that spell `targets`."""
    return table_of([[entry for entry in TABLE if not set(entry.targets) & set(targets)]])


class Recurrent(nn.Module):
    """A GRU with weights of its own between other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states, last = self.gru(torch.tanh(x))
        return states * 2, last


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export about nn.GRU's flat weights
@pytest.mark.parametrize("opset", [18, 21])
def test_recurrent_layer_is_inlined_when_exported(opset: int) -> None:
    torch.manual_seed(0)
    model = assert_emits_like_torch(Recurrent(), (torch.randn(2, 7, 6),), opset=opset, only="GRU")
    check_model(model)
    inlined = [node.name for node in model.graph if str(node.name).startswith("gru.")]
    assert inlined and "gru" in {node.name for node in model.graph}
    assert all(str(value.name).startswith(("gru", "const", "zeros")) for value in model.graph.initializers.values())


def test_unknown_operation_is_inlined_when_it_reads_a_quantized_value() -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(torch.tril(x), self.weight)

    x = torch.randn(5, 3)
    program = float_program(Model(), x)
    insert(program, program.node("x"), U8)
    insert(program, program.node("weight"), S8_PER_CHANNEL)
    program.recompile()
    calibrate_on(program, x)
    model = lower(program, 21, without(aten.linear.default, aten.tril.default))
    check_model(model)
    names = {node.name: node.op_type for node in model.graph}
    assert names["tril"] == "Trilu" and "linear" in names and names["weight_fq"] == "DequantizeLinear"
    for batch in (1, 3, 7):
        compare(program.module, model, [torch.randn(batch, 3)], atol=1e-5, rtol=1e-5)


def test_two_unknown_operations_keep_their_names_apart_when_inlined() -> None:
    def function(x: torch.Tensor) -> Any:
        return torch.linalg.cross(torch.linalg.cross(x, x + 1), x)

    model = assert_emits_like_torch(function, (torch.randn(4, 3),))
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names)) and {"linalg_cross", "linalg_cross_1"} <= set(names)


def test_size_argument_stays_dynamic_when_inlined() -> None:
    class Grow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_full([x.shape[0] * 2, 3], 2.5)

    x = torch.randn(4, 2)
    program = float_program(Grow(), x)
    model = lower(program, 21, without(aten.new_full.default))
    for batch in (1, 4, 6):
        compare(program.module, model, [torch.randn(batch, 2)], atol=0, rtol=0)


def test_operation_is_refused_when_torch_onnx_cannot_write_it_either() -> None:
    program = float_program(_Bessel(), torch.randn(4, 3))
    program.node("special_i0").meta.update(module_path="head.window", module_class="Window", source="model.py:31")
    with pytest.raises(ExportError) as error:
        lower(program)
    text = str(error.value)
    assert "node 'special_i0' calls 'aten.special_i0.default'" in text
    assert "Window at head.window, model.py:31" in text
    assert "fxquant.ops.table.TABLE.register(OpDef(name, targets=(torch.ops.aten.special_i0.default,)" in text
    assert "No ONNX function found" in text


class _Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.special.i0(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_operation_is_refused_when_torch_onnx_lacks_the_opset() -> None:
    program = float_program(Recurrent(), torch.randn(2, 7, 6))
    with pytest.raises(ExportError, match="node 'gru'.*opset 18, where the export is at opset 13"):
        lower(program, 13)


@pytest.mark.parametrize(
    ("text", "value"),
    [("s0", 6), ("2*s0 + 1", 13), ("s0//4", 1), ("-s0", -6), ("Max(1, s0 - 9)", 1), ("(s0**2) % 5", 1)]
    + [("FloorDiv(s0, s1)", 2)],
)
def test_sizes_are_evaluated_when_symbolic(text: str, value: int) -> None:
    assert evaluate(text, {"s0": 6, "s1": 3}) == value


@pytest.mark.parametrize("text", ["__import__('os')", "s0.real", "s2", "[s0]", "1.5*s0"])
def test_size_is_refused_when_it_is_not_arithmetic(text: str) -> None:
    with pytest.raises(ValueError, match="is not arithmetic"):
        evaluate(text, {"s0": 6})
