"""share-encodings: codes pass through grid-preserving operations; concatenations share on request."""

from __future__ import annotations

import torch
from torch import nn

from fxquant.graph.manager import PassManager
from fxquant.passes import InsertFakeQuant, ShareEncodings
from tests.helpers import assert_golden, run_pass
from tests.passes.harness import difference, output, reasons
from tests.passes.pipelines import IMAGE, before, residual


class Concat(nn.Module):
    """Two convolutions joined, then split again."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.cat([self.left(x), torch.relu(self.right(x))], 1).chunk(2, 1)
        return self.last(first) + second  # type: ignore[no-any-return]  # nn.Module calls are untyped


class Nested(nn.Module):
    """A concatenation of concatenations, one of them of a value and a part of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.cat([x, x[:, :1]], 1)
        return torch.cat([inner, inner], 1)


def owners(program_nodes: object) -> dict[str, str]:
    return {n.name: n.meta["shares_encoding_with"] for n in program_nodes if "shares_encoding_with" in n.meta}  # type: ignore[attr-defined]


def test_grid_preserving_values_share_with_their_first_value() -> None:
    program = before(ShareEncodings, residual(), IMAGE)
    run_pass(ShareEncodings(), program)
    assert owners(program.graph.nodes) == {"pool": "relu", "flatten": "adaptive_avg_pool2d"}
    assert program.node("pool").meta["output_spec"] == program.node("relu").meta["output_spec"]


def test_parts_of_a_chunk_share_with_what_was_split() -> None:
    program = before(ShareEncodings, Concat(), IMAGE)
    run_pass(ShareEncodings(), program)
    assert set(owners(program.graph.nodes).values()) == {"cat"} and len(owners(program.graph.nodes)) == 2


def test_concat_shares_on_request_and_declines_another_spec_with_the_reason() -> None:
    program = before(ShareEncodings, Concat(), IMAGE)
    entry = run_pass(ShareEncodings(concat=True), program)
    assert owners(program.graph.nodes)["left"] == "cat"
    assert "relu" not in owners(program.graph.nodes)
    assert [reason for reason in reasons(entry) if reason.startswith("relu keeps its grid: its spec is u8")]


def test_values_share_with_the_last_concat_when_concats_are_nested() -> None:
    program = before(ShareEncodings, Nested(), IMAGE)
    run_pass(ShareEncodings(concat=True), program)
    assert owners(program.graph.nodes) == {"x": "cat_1", "slice_1": "cat_1", "cat": "cat_1"}


def test_shared_values_call_one_fake_quant_that_observes_once() -> None:
    program = before(ShareEncodings, residual(), IMAGE)
    PassManager([ShareEncodings(), InsertFakeQuant()]).run(program)
    owner, shared = program.node("relu_fq"), program.node("pool_fq")
    assert owner.target == shared.target
    assert (owner.kwargs, shared.kwargs) == ({}, {"observe": False})


def test_outputs_are_preserved_and_twice_is_once() -> None:
    model = Concat()
    program = before(ShareEncodings, model, IMAGE)
    run_pass(ShareEncodings(), program, IMAGE)
    assert difference(program, output(model, IMAGE), IMAGE) == 0.0
    assert not run_pass(ShareEncodings(), program).modified


def test_diff_is_golden() -> None:
    program = before(ShareEncodings, residual(), IMAGE)
    assert_golden(run_pass(ShareEncodings(), program).diff(), "share_encodings_residual.diff")
