"""collect: inputs of the quantized program, outputs of the float one, as many samples as fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fxquant.errors import PassError
from fxquant.graph.segment import values_of
from fxquant.reconstruction import Samples, collect
from tests.reconstruction.layers import bench, correlated

BATCHES = [correlated(16, 4, 8, 8, seed=index) for index in range(3)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def test_inputs_are_quantized_and_targets_are_float() -> None:
    case = bench(net(), BATCHES, layer=1)
    (node,) = case.unit.inputs
    quantized = torch.cat([row[node.name] for row in values_of(case.program, BATCHES, [node.name])])
    name = case.unit.output.name
    targets = torch.cat([row[name] for row in values_of(case.reference, BATCHES, [name])])
    assert torch.equal(case.samples.inputs[node], quantized) and torch.equal(case.samples.targets, targets)
    plain = torch.cat([row[node.name] for row in values_of(case.reference, BATCHES, [node.name])])
    assert not torch.equal(plain, quantized) and case.samples.count == 48


@pytest.mark.parametrize("megabytes", [1, 2])
def test_memory_bounds_the_samples(megabytes: int) -> None:
    wide = [correlated(16, 4, 48, 48, seed=index) for index in range(4)]
    big = bench(net(), wide, layer=1)
    found = collect(big.program, big.reference, big.unit, wide, megabytes)
    assert isinstance(found, Samples)
    held = found.targets.nbytes + sum(value.nbytes for value in found.inputs.values())
    sample = held // found.count
    assert megabytes * 2**20 - sample < held <= megabytes * 2**20
    assert found.targets.untyped_storage().nbytes() == found.targets.nbytes


def test_one_sample_is_kept_where_none_fits() -> None:
    wide = [correlated(2, 4, 192, 192)]
    case = bench(net(), wide, layer=1)
    found = collect(case.program, case.reference, case.unit, wide, 1)
    assert isinstance(found, Samples) and found.count == 1


def test_values_without_a_common_number_of_samples_are_a_reason() -> None:
    case = bench(net(), BATCHES)
    unit = replace(case.unit, inputs=(case.program.node("_0_weight"),))
    reason = collect(case.program, case.reference, unit, BATCHES, 1)
    assert reason == "_0_weight has not as many samples along axis 0 as its output"


def test_no_batches_are_an_error_that_names_the_unit() -> None:
    case = bench(net(), BATCHES)
    with pytest.raises(PassError, match=case.unit.name):
        collect(case.program, case.reference, case.unit, [], 1)


def test_of_eight_samples_the_second_is_held_back_with_all_that_came_of_it() -> None:
    found = Samples({}, torch.zeros(30, 1), each=3)
    learned_from, checked_on = found.parts(8)
    assert checked_on.tolist() == [3, 4, 5, 27, 28, 29]
    assert sorted([*learned_from.tolist(), *checked_on.tolist()]) == list(range(30))


@pytest.mark.parametrize(("count", "check_every"), [(30, 0), (3, 8)])
def test_all_samples_do_both_where_none_can_or_shall_be_held_back(count: int, check_every: int) -> None:
    for index in Samples({}, torch.zeros(count, 1), each=3).parts(check_every):
        assert index.tolist() == list(range(count))
