"""decompose-attention: fires in every case, declines with the reason, keeps the outputs, twice is once, golden diff."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.graph.program import Program, value_type
from fxquant.lowering.lower import lower
from fxquant.passes import DecomposeAttention
from tests.helpers import assert_rewrites, run_pass
from tests.ops.harness import compare
from tests.passes.harness import ROUNDING, captured, difference, output, reasons

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randn(2, 5, 32, generator=GENERATOR)
HEADS, LENGTH = 2, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.37},
    "scale of one": {"scale": 1.0},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(LENGTH, LENGTH, generator=GENERATOR).tril() > 0},
    "bool mask with a hidden row": {"attn_mask": torch.arange(LENGTH)[:, None] > torch.arange(LENGTH)},
    "float mask": {"attn_mask": torch.randn(1, HEADS, LENGTH, LENGTH, generator=GENERATOR)},
    "infinite mask with a hidden row": {"attn_mask": torch.full((LENGTH, LENGTH), -math.inf).triu()},
    "mask per head": {"attn_mask": torch.rand(2, HEADS, LENGTH, LENGTH, generator=GENERATOR) > 0.5},
}


class Attention(nn.Module):
    """Multi-head attention as Hugging Face's models write it, or with one layer for q, k and v as timm's do."""

    mask: torch.Tensor | None

    def __init__(self, fused: bool = False, key_heads: int = HEADS, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        mask = options.pop("attn_mask", None)
        self.register_buffer("mask", mask)
        self.options = options
        self.key_heads = key_heads
        width = 16 * key_heads
        if fused:
            self.qkv = nn.Linear(32, 96)
        else:
            self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, width), nn.Linear(32, width, bias=False)
        self.fused = fused

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, 16).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(batch, length, HEADS, 16).transpose(1, 2)
            k, v = (part(x).view(batch, length, self.key_heads, 16).transpose(1, 2) for part in (self.k, self.v))
        mask = self.mask if mask is None else mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def _parts(program: Program) -> list[str]:
    return [node.name for node in program.graph.nodes if "scaled_dot_product_attention" in node.name]


def _decomposed(model: nn.Module, *inputs: torch.Tensor, fold_scale: bool = True) -> Program:
    expected, program = output(model, *inputs), captured(model, *inputs)
    entry = run_pass(DecomposeAttention(fold_scale=fold_scale), program)
    assert reasons(entry) == []
    assert aten.scaled_dot_product_attention.default not in [node.target for node in program.graph.nodes]
    assert difference(program, expected, *inputs) < ROUNDING
    return program


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
def test_attention_keeps_its_output_when_decomposed(case: str, fused: bool) -> None:
    model = Attention(fused, **OPTIONS[case])
    program = _decomposed(model, TOKENS)
    if case != "mask per head":
        one = output(model, TOKENS[:1])
        assert difference(program, one, TOKENS[:1]) < ROUNDING
        compare(program.module, lower(program), [TOKENS], atol=1e-6, rtol=1e-4)


def test_scale_is_folded_into_the_layer_that_makes_the_query() -> None:
    model = Attention()
    program = _decomposed(model, TOKENS)
    assert "scaled_dot_product_attention_scale" not in _parts(program)
    assert torch.equal(program.module.get_parameter("q.weight"), model.q.weight * 0.25)  # head size 16: exact
    assert torch.equal(program.module.get_parameter("k.weight"), model.k.weight)


def test_scale_is_folded_when_heads_are_unflattened() -> None:
    class Unflattened(Attention):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            q, k, v = (part(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v)

    assert "scaled_dot_product_attention_scale" not in _parts(_decomposed(Unflattened(), TOKENS))


def test_scale_multiplies_the_query_when_not_to_be_folded() -> None:
    program = _decomposed(Attention(), TOKENS, fold_scale=False)
    assert program.node("scaled_dot_product_attention_scale").args[1] == 0.25
    assert torch.equal(program.module.get_parameter("q.weight"), Attention().q.weight)


def test_scale_multiplies_the_query_when_one_layer_makes_query_key_and_value() -> None:
    program = _decomposed(Attention(fused=True), TOKENS)
    assert program.node("scaled_dot_product_attention_scale").target is aten.mul.Tensor
    assert torch.equal(program.module.get_parameter("qkv.weight"), Attention(fused=True).qkv.weight)


class Shared(nn.Module):
    """The query's layer is read twice: its output is the key too, or is added behind, or its weight is another's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
        if kind == "tied":
            self.k.weight = self.q.weight
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        attended = F.scaled_dot_product_attention(
            q.unsqueeze(1), (q if self.kind == "key" else self.k(x))[:, None], x[:, None]
        )
        return attended.squeeze(1) + (q if self.kind == "residual" else x)


@pytest.mark.parametrize("kind", ["key", "residual", "tied"])
def test_scale_is_not_folded_into_what_others_read(kind: str) -> None:
    program = _decomposed(Shared(kind), TOKENS)
    assert "scaled_dot_product_attention_scale" in _parts(program)


def test_scale_is_not_folded_when_query_and_key_are_one_value() -> None:
    class Same(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x)
            return F.scaled_dot_product_attention(q, q, q)

    assert "scaled_dot_product_attention_scale" in _parts(_decomposed(Same("same"), TOKENS))


def test_softmax_is_torchs_safe_one_only_where_a_row_may_be_hidden() -> None:
    def softmax(**options: Any) -> Any:
        return _decomposed(Attention(**options), TOKENS).node("scaled_dot_product_attention_softmax").target

    assert softmax() is softmax(is_causal=True) is aten.softmax.int
    assert softmax(**OPTIONS["bool mask"]) is aten.softmax.int
    assert softmax(**OPTIONS["bool mask with a hidden row"]) is aten._safe_softmax.default
    assert softmax(**OPTIONS["infinite mask with a hidden row"]) is aten._safe_softmax.default


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_that_is_an_input_hides_whole_rows_as_in_torch(kind: str) -> None:
    mask = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, :, 2] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    model = Attention()
    program = _decomposed(model, TOKENS, mask)
    assert bool((output(model, TOKENS, mask)[:, :, 2] == 0).all())
    compare(program.module, lower(program), [TOKENS, mask], atol=1e-6, rtol=1e-4)
    program.module(TOKENS, mask).sum().backward()
    gradients = [parameter.grad for parameter in program.module.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_mask_keeps_the_reason_for_float() -> None:
    for case in ("bool mask", "float mask", "causal"):
        program = _decomposed(Attention(**OPTIONS[case]), TOKENS)
        assert program.node("scaled_dot_product_attention_mask").meta["float_reason"] == "attention mask"


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries_repeat_the_heads_of_keys_and_values(key_heads: int) -> None:
    model = Attention(key_heads=key_heads, enable_gqa=True)
    program = _decomposed(model, TOKENS)
    assert ("scaled_dot_product_attention_key_heads" in _parts(program)) == (key_heads == 1)
    compare(program.module, lower(program), [TOKENS], atol=1e-6, rtol=1e-4)


class Bare(nn.Module):
    """Attention on its inputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def test_causal_mask_follows_lengths_that_are_symbolic() -> None:
    def inputs(length: int, keys: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(length)
        return tuple(torch.randn(2, size, 8, generator=generator) for size in (length, keys, keys))

    model = Bare(is_causal=True)
    length, keys = torch.export.Dim("length", min=2), torch.export.Dim("keys", min=2)
    shapes = ({1: length}, {1: keys}, {1: keys})
    program = capture(model, inputs(5, 7), dynamic_shapes=shapes)
    run_pass(DecomposeAttention(), program)
    causal = value_type(program.node("scaled_dot_product_attention_causal"))
    assert causal is not None and all(isinstance(size, str) for size in causal.shape)
    for sizes in ((5, 7), (3, 9), (6, 4)):
        given = inputs(*sizes)
        assert difference(program, output(model, *given), *given) < ROUNDING
        compare(program.module, lower(program), given, atol=1e-6, rtol=1e-4)


def test_types_are_those_that_torch_computes() -> None:
    for case in OPTIONS:
        program = _decomposed(Attention(**OPTIONS[case]), TOKENS)
        values = _Recorder(program.module)
        values.run(TOKENS)
        for node in program.graph.nodes:
            kind = value_type(node)
            if kind is not None and node.name.startswith("scaled"):
                shape = tuple(2 if size == "s0" else size for size in kind.shape)
                assert (values.found[node].shape, values.found[node].dtype) == (shape, kind.dtype), node.name


class _Recorder(torch.fx.Interpreter):
    """Keeps every value."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


def test_attention_is_left_alone_when_dropout_is_active() -> None:
    program = captured(Bare(), *(torch.randn(2, 3, 5, 8) for _ in range(3)))
    node = program.node("scaled_dot_product_attention")
    node.args = (*node.args, None, 0.1)
    entry = run_pass(DecomposeAttention(), program)
    reason = "scaled_dot_product_attention not decomposed: dropout_p=0.1 is active; capture the model in eval mode"
    assert reasons(entry) == [reason] and not entry.edits


def test_attention_is_left_alone_when_the_number_of_heads_is_symbolic() -> None:
    heads = torch.export.Dim("heads", min=2)
    inputs = tuple(torch.randn(2, 4, 5, 8) for _ in range(3))
    program = capture(Bare(enable_gqa=True), inputs, dynamic_shapes=({1: heads},) * 3)
    entry = run_pass(DecomposeAttention(), program)
    assert reasons(entry) == ["scaled_dot_product_attention not decomposed: the number of heads is symbolic"]


class Products(nn.Module):
    """baddbmm, and what reads it."""

    def __init__(self, softmax: bool = True, **options: float) -> None:
        super().__init__()
        self.softmax, self.options = softmax, options

    def forward(self, mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scores = torch.baddbmm(mask, q, k, **self.options)
        return torch.softmax(scores.unsqueeze(1) / 4, -1) if self.softmax else torch.tanh(scores)


MASK_AND_PRODUCT = tuple(torch.randn(2, *size, generator=GENERATOR) for size in ((5, 5), (5, 8), (8, 5)))


@pytest.mark.parametrize("options", [{}, {"alpha": 0.25}, {"beta": 1.0, "alpha": 2}])
def test_product_with_its_mask_built_in_becomes_a_product_and_a_sum(options: dict[str, float]) -> None:
    model = Products(**options)
    expected, program = output(model, *MASK_AND_PRODUCT), captured(model, *MASK_AND_PRODUCT)
    assert reasons(run_pass(DecomposeAttention(), program)) == []
    assert program.node("baddbmm_scores").target is aten.bmm.default
    assert program.node("baddbmm").target is aten.add.Tensor
    assert program.node("baddbmm").meta["float_reason"] == "attention mask"
    assert ("baddbmm_scale" in str(program)) == (options.get("alpha", 1) != 1)
    assert difference(program, expected, *MASK_AND_PRODUCT) < ROUNDING
    compare(program.module, lower(program), MASK_AND_PRODUCT, atol=1e-6, rtol=1e-4)
    assert not run_pass(DecomposeAttention(), program).edits


def test_product_with_its_mask_built_in_is_left_alone_when_the_mask_is_scaled() -> None:
    program = captured(Products(beta=0.5), *MASK_AND_PRODUCT)
    entry = run_pass(DecomposeAttention(), program)
    reason = "baddbmm not decomposed: beta=0.5, alpha=1: only a mask that is added as it is can be set apart"
    assert reasons(entry) == [reason] and not entry.edits


def test_product_with_something_added_is_left_alone_when_no_softmax_reads_it() -> None:
    program = captured(Products(softmax=False), *MASK_AND_PRODUCT)
    entry = run_pass(DecomposeAttention(), program)
    assert not entry.edits and not entry.misses


def test_twice_is_once() -> None:
    program = captured(Attention(**OPTIONS["causal"]), TOKENS)
    assert run_pass(DecomposeAttention(), program).edits
    before = str(program)
    again = run_pass(DecomposeAttention(), program)
    assert not again.edits and not again.misses and str(program) == before


class Named(nn.Module):
    """Causal attention, called `a`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Bare(is_causal=True)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return self.a(q, k, v)


def test_golden_diff() -> None:
    program = captured(Named(), *(torch.randn(2, 3, 5, 16) for _ in range(3)))
    expected = """
        - a = aten.scaled_dot_product_attention(q, k, v, is_causal=True) : float32[s0, 3, 5, 16]  @a
        + a_scale = aten.mul(q, other=0.25) : float32[s0, 3, 5, 16]  @a
        + a_key = aten.transpose.int(k, dim0=-2, dim1=-1) : float32[s0, 3, 16, 5]  @a
        + a_scores = aten.matmul(a_scale, a_key) : float32[s0, 3, 5, 5]  @a
        + a_query_positions = aten.arange(5, device=device(type='cpu')) : int64[5]  @a
        + a_key_positions = aten.arange(5, device=device(type='cpu')) : int64[5]  @a
        + a_rows = aten.unsqueeze(a_query_positions, dim=1) : int64[5, 1]  @a
        + a_causal = aten.le(a_key_positions, a_rows) : bool[5, 5]  @a
        + a_mask = aten.where.ScalarOther(a_causal, a_scores, other=-inf) : float32[s0, 3, 5, 5]  @a  {float: MASK}
        + a_softmax = aten.softmax.int(a_mask, dim=-1) : float32[s0, 3, 5, 5]  @a
        + a = aten.matmul(a_softmax, v) : float32[s0, 3, 5, 16]  @a
    """
    assert_rewrites(run_pass(DecomposeAttention(), program), expected.replace("MASK", "attention mask"), edits=19)
