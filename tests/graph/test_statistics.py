"""What fold-batch-norm leaves of a batch norm: mean and deviation of the layer's output."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fxquant.graph.program import Program
from fxquant.graph.statistics import ChannelStatistics, statistics_of
from fxquant.graph.storage import load_program
from fxquant.passes import FoldBatchNorm, FreezeBatchNorm
from tests.helpers import run_pass
from tests.passes.harness import Chain, captured

X = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def trained(**parts: nn.Module) -> Chain:
    """A net whose running statistics are those of X."""
    torch.manual_seed(0)
    model = Chain(**parts)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(X)
    return model


def measured(program: Program, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    from fxquant.graph.segment import values_of

    (values,) = values_of(program, [X], [name])
    return values[name].mean((0, 2, 3)), values[name].std((0, 2, 3), correction=0)


def assert_statistics(program: Program, name: str) -> None:
    found = statistics_of(program.node(name))
    assert found is not None
    mean, std = (part.float() for part in found.tensors())
    expected_mean, expected_std = measured(program, name)
    assert torch.allclose(mean, expected_mean, atol=2e-3) and torch.allclose(std, expected_std, rtol=5e-3, atol=1e-5)


def test_statistics_are_those_of_the_layers_output() -> None:
    program = captured(trained(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), act=nn.ReLU()), X[:2])
    run_pass(FoldBatchNorm(), program)
    assert_statistics(program, "conv")


def test_statistics_of_a_frozen_and_of_a_plain_batch_norm() -> None:
    for affine in (True, False):
        program = captured(trained(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6, affine=affine)), X[:2])
        if affine:
            run_pass(FreezeBatchNorm(), program)
        run_pass(FoldBatchNorm(), program)
        assert_statistics(program, "conv")


def test_a_batch_norm_that_folds_forward_leaves_none() -> None:
    program = captured(trained(act=nn.ReLU(), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 6, 1)), X[:2])
    run_pass(FoldBatchNorm(), program)
    assert all(statistics_of(node) is None for node in program.graph.nodes)


def test_statistics_stay_with_copies_and_files(tmp_path: Path) -> None:
    program = captured(trained(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)), X[:2])
    run_pass(FoldBatchNorm(), program)
    program.save(tmp_path / "a.fxq")
    expected = statistics_of(program.node("conv"))
    assert expected is not None and len(expected.mean) == 6
    assert statistics_of(program.copy().node("conv")) == expected
    assert statistics_of(load_program(tmp_path / "a.fxq").node("conv")) == expected


def test_plain_values_say_all() -> None:
    found = ChannelStatistics.of(torch.tensor([0.1, -2.0]), torch.tensor([1.0, 0.0]))
    assert ChannelStatistics.from_dict(found.to_dict()) == found
