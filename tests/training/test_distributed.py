"""Two gloo processes with half a batch each do what one process does with the whole of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.training.distributed import _reach_idle_parameters
from tests import preset_nets
from tests.training import shared_jobs as jobs
from tests.training.processes import Failure, Processes
from tests.training.shared_jobs import Grids, Plan, Trained

# Sums in another order, and the few codes that they flip: learned ranges move further by each of those.
WEIGHTS, SCALES = 1e-3, 5e-3
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("group")) as processes:
        yield processes


def same(one: Grids, other: Grids) -> bool:
    """Bitwise; NaN (what never saw data) is itself."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor.nan_to_num(nan=-7.0), other[name].nan_to_num(nan=-7.0)) for name, tensor in one.items()
    )


def largest_difference_of_scales(one: Trained, other: Trained) -> float:
    """Relative."""
    pairs = [(grid[0], other.grids[name][0]) for name, grid in one.grids.items()]
    return max(float(((a - b).abs() / b).max()) for a, b in pairs)


def largest_difference_of_weights(one: Trained, other: Trained) -> float:
    """Of parameters and statistics, relative to the largest value of each tensor."""
    names = [name for name, tensor in other.state.items() if tensor.is_floating_point() and "fake_quants" not in name]
    pairs = [(one.state[name], other.state[name]) for name in names]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "through", "counts"),
    [
        ("min-max", True, (3, 3)),
        ("moving-average", False, (1, 3)),
        ("percentile", False, (3, 3)),
        ("mse", True, (3, 2)),
        pytest.param("tf-enhanced", False, (1, 3), marks=slow),
        pytest.param("entropy", True, (3, 3), marks=slow),
        pytest.param("min-max", False, (1, 3), marks=slow),
        pytest.param("moving-average", True, (3, 3), marks=slow),
    ],
)
def test_calibration_is_bit_for_bit_that_of_one_process_when_shards_are_interleaved(
    pair: Processes, estimator: str, through: bool, counts: tuple[int, int]
) -> None:
    first, second = pair.run(jobs.calibrate, estimator, through, counts)
    assert same(first, second)
    assert same(first, jobs.calibrate(estimator, through, counts, together=False))


def test_calibrations_differ_when_nothing_is_synchronised(pair: Processes) -> None:
    first, second = pair.run(jobs.calibrate, "min-max", False, (3, 3), False)
    assert not same(first, second)


@pytest.mark.parametrize(
    ("kinds", "texts"),
    [
        (("nan", "fine"), ("'x' is not finite in batch 1", "'x' is not finite in batch 1")),
        (("fine", "misfit"), ("batches of process 1", "batch 1: batch: input 'x'")),
        (("raising", "fine"), ("OSError: the disk is gone", "batches of process 0")),
        (("none", "none"), ("at least one batch", "at least one batch")),
    ],
)
def test_calibration_fails_in_all_processes_when_it_fails_in_one(
    pair: Processes, kinds: tuple[str, str], texts: tuple[str, str]
) -> None:
    errors = pair.run(jobs.fail_to_calibrate, kinds)
    for error, text in zip(errors, texts, strict=True):
        assert text in error


# --- batch norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["live", "plain", "plain-1d", "live-empty", "plain-empty"])
def test_batch_norm_has_statistics_and_gradients_of_the_whole_batch_when_synchronised(
    pair: Processes, kind: str
) -> None:
    shards = pair.run(jobs.norms, kind)
    whole = jobs.norms(kind.removesuffix("-empty"), together=False)
    for index, wanted in enumerate(whole[:2]):  # output, gradient of the input
        parts = [shard[index] for shard in shards]
        found = torch.cat(parts) if "empty" in kind else torch.stack(parts, dim=1).flatten(0, 1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for index in range(2, len(whole)):
        assert torch.equal(shards[0][index], shards[1][index])
        torch.testing.assert_close(shards[0][index], whole[index], rtol=1e-5, atol=1e-5)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        Plan("moving-average"),
        Plan("lsq+", "lsq", frozen_after=2),
        Plan("static", preset="unfolded"),
        pytest.param(Plan("static"), marks=slow),
        pytest.param(Plan("lsq", "lsq"), marks=slow),
        pytest.param(Plan("lsq+", "lsq", sync_buffers=False), marks=slow),
        pytest.param(Plan("moving-average", sync_buffers=False), marks=slow),
        pytest.param(Plan("min-max", "min-max"), marks=slow),
        pytest.param(Plan("log2", "log2"), marks=slow),
        pytest.param(Plan("lsq+", "lsq", preset="int8_per_channel"), marks=slow),
        pytest.param(Plan("lsq", frozen_after=2, frozen="encodings"), marks=slow),
        pytest.param(Plan("lsq", frozen_after=2, frozen="batch norm"), marks=slow),
        pytest.param(Plan("lsq+", "lsq", simulate="exact", frozen_after=2), marks=slow),
    ],
    ids=str,
)
def test_training_is_that_of_one_process_when_synchronised(pair: Processes, plan: Plan) -> None:
    first, second = pair.run(jobs.train, plan)
    assert same(first.state, second.state)
    assert same(first.grids, second.grids)
    assert torch.equal(first.logits, second.logits)
    one = jobs.train(plan.in_one_process())
    assert largest_difference_of_weights(first, one) < WEIGHTS
    assert largest_difference_of_scales(first, one) < SCALES
    torch.testing.assert_close(torch.tensor(first.losses), torch.tensor(one.losses), rtol=1e-3, atol=0)


def test_processes_end_with_other_grids_when_nothing_is_synchronised(pair: Processes) -> None:
    plan = Plan("moving-average", together=False)
    first, second = pair.run(jobs.train, plan)
    assert not same(first.grids, second.grids)
    one = jobs.train(plan)
    assert largest_difference_of_weights(first, one) > 10 * WEIGHTS
    assert largest_difference_of_scales(first, one) > 10 * SCALES


def test_statistics_stay_each_process_s_own_when_batch_norm_is_false(pair: Processes) -> None:
    first, second = pair.run(jobs.train, Plan("static", steps=1, options={"batch_norm": False}))
    assert not torch.equal(first.state["n0.running_mean"], second.state["n0.running_mean"])


def test_distributed_data_parallel_refuses_frozen_ranges_when_nothing_is_synchronised(pair: Processes) -> None:
    plan = Plan("lsq", frozen_after=1, frozen="encodings", together=False)
    assert all("find_unused_parameters" in error for error in pair.run(jobs.error_of_training, plan))


def test_one_process_can_evaluate_and_copy_alone_when_synchronised(pair: Processes) -> None:
    assert pair.run(jobs.alone_in_first, Plan("moving-average")) == [True, True]


@pytest.mark.parametrize("what", ["weights", "specs"])
def test_synchronise_refuses_programs_when_they_differ(pair: Processes, what: str) -> None:
    for error in pair.run(jobs.refused, what):
        assert "the programs of processes 0 and 1; expected the same graph, weights, grids and modes" in error


def test_synchronise_leaves_no_peers_when_the_group_is_one_process(pair: Processes) -> None:
    assert pair.run(jobs.peers_in_groups_of_one) == [([], False), ([], False)]


def test_batch_norms_are_each_process_s_own_again_when_synchronised_again_without_them(pair: Processes) -> None:
    assert pair.run(jobs.peers_of_norms_when_synchronised_again) == [[True, False], [True, False]]


def test_synchronise_says_what_is_missing_when_there_is_no_process_group() -> None:
    sim = jobs.simulation(Plan(together=False))
    with pytest.raises(fxquant.FxquantError, match="expected a process group; got none.*init_process_group"):
        fxquant.synchronise(sim.program)


def test_synchronise_refuses_a_program_when_it_has_no_quantizers() -> None:
    program = fxquant.capture(jobs.Net().eval(), jobs.batches(1, seed=0)[0][0])
    with pytest.raises(fxquant.FxquantError, match="expected a program at stage inserted or calibrated; got captured"):
        fxquant.synchronise(program)


@pytest.mark.parametrize("training", ["static", "lsq+", "min-max"])
@pytest.mark.parametrize("preset", ["int8_per_channel", "int8_per_channel_qat"])
def test_every_parameter_gets_a_gradient_when_ranges_learn_and_when_they_are_frozen(preset: str, training: str) -> None:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for net in (preset_nets.Plain(), preset_nets.Residual(), preset_nets.Depthwise()):
        specs = {key: fxquant.SpecOverride(training=training) for key in ("activation", "weight")}
        sim = fxquant.QuantSim(net.train(), x, preset, **specs)
        sim.model.register_forward_hook(_reach_idle_parameters)
        sim.compute_encodings([x])
        sim.model.train()
        for freeze in (list, sim.freeze_encodings, sim.freeze_batch_norm):
            freeze()
            sim.model.zero_grad()
            sim.model(x).square().sum().backward()
            learning = {name: tensor for name, tensor in sim.model.named_parameters() if tensor.requires_grad}
            assert [name for name, tensor in learning.items() if tensor.grad is None] == []


# --- the helper ------------------------------------------------------------------------------------------------------


@slow
def test_processes_fail_by_name_when_a_job_hangs_and_run_the_next_one(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        with pytest.raises(Failure, match="process 0: no answer in time"):
            processes.run(time.sleep, 300, timeout=1.0)
        assert processes.run(abs, -3) == [3, 3]
