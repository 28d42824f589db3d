"""What eval() computes in the `exact` simulation after real training is what onnxruntime computes, code for code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.errors import ExportError
from tests.training.exactness import (
    BATCH_NORMS,
    BITS,
    HELD_BACK,
    RANGES,
    TRAINED,
    Difference,
    Recipe,
    compare,
    prepared,
    trained,
)
from tests.training.nets import NETS, WITHOUT_STATISTICS, examples

# One of each kind that breaks elsewhere; the others are slow.
QUICK = (
    Recipe("zero-init residual", "lsq+"),
    Recipe("all gammas 0", "static", "live", "W4A4"),
    Recipe("shared conv, two norms", "static", "frozen half way"),
    Recipe("two norms on one conv", "lsq+", "folded", "W4A8", "sgd"),
    Recipe("nested", "log2", "frozen half way", "W4A8", simulate="exact"),
    Recipe("tiny variance", "moving-average", "frozen half way"),
)


def cover() -> list[Recipe]:
    """Every net once, all else in turn (`benchmarks.qat_exactness` has the full product)."""
    norms, bits = [*BATCH_NORMS], [*BITS]
    made = [
        Recipe(
            name,
            ranges := [*RANGES][i % len(RANGES)],
            norms[i // len(RANGES) % len(norms)],
            bits[(i + i // len(RANGES)) % len(bits)],
            ("adam", "sgd")[i // 3 % 2],
            "exact" if i // 2 % 2 and ranges != "moving-average" else "float",
        )
        for i, name in enumerate(NETS)
    ]
    # Calibration gives "tiny variance" ranges of 1e8: with most recipes nothing is learned from there.
    return [recipe for recipe in made if recipe not in QUICK and recipe.net != "tiny variance"]


def assert_exact(recipe: Recipe, folder: Path) -> None:
    """It learns, and no code differs."""
    found = trained(recipe)
    assert found.has_learned, (found.losses, found.moved)
    images, _ = examples(recipe.net, HELD_BACK, TRAINED)
    difference = compare(found.sim, images, folder)
    assert difference.compared > 10_000
    assert difference.differing == {} and difference.uncertified == ()


@pytest.mark.parametrize("recipe", QUICK, ids=str)
def test_no_code_differs_after_training(recipe: Recipe, tmp_path: Path) -> None:
    assert_exact(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", cover(), ids=str)
def test_no_code_of_any_net_differs_after_training(recipe: Recipe, tmp_path: Path) -> None:
    assert_exact(recipe, tmp_path)


def test_cover_has_every_pair_of_ranges_and_batch_norm_and_of_batch_norm_and_bits() -> None:
    recipes = [*QUICK, *cover()]
    assert {recipe.net for recipe in recipes} == set(NETS)
    assert {(r.batch_norm, r.bits) for r in recipes} == {(norm, bits) for norm in BATCH_NORMS for bits in BITS}
    assert {(r.ranges, r.batch_norm) for r in recipes} == {(one, norm) for one in RANGES for norm in BATCH_NORMS}


def test_float_islands_excuse_exact_alone() -> None:
    counts = {"exact: mean_fq": 2, "integer: fc_fq": 3}
    assert Difference(100, counts).broken == 5
    assert Difference(100, counts, islands=("mean",)).broken == 3


@pytest.mark.parametrize("fault", ["scale", "weight"])
def test_differences_are_counted_when_a_fault_is_planted(fault: str, tmp_path: Path) -> None:
    found = trained(Recipe("conv1d"))
    images, _ = examples("conv1d", HELD_BACK, TRAINED)
    snapshot = found.sim.snapshot

    def faulty() -> fxquant.Program:
        twin = snapshot()
        if fault == "weight":
            (node, _), *_ = [pair for pair in twin.fake_quant_nodes() if pair[1].follows]
            weight = twin.tensor(node.all_input_nodes[0])
            weight.data[0, 0] *= -1.0
        else:
            (_, module), *_ = [pair for pair in twin.fake_quant_nodes() if not pair[1].follows]
            module.scale.mul_(1 + 2.0**-7)
        return twin

    found.sim.snapshot = faulty  # type: ignore[method-assign]
    difference = compare(found.sim, images, tmp_path)
    assert difference.total > 0 and any(name.startswith("exact: ") for name in difference.differing)
    assert "finalized outputs" not in difference.differing


def test_batch_norm_without_statistics_is_refused_by_name_when_exported(tmp_path: Path) -> None:
    model, (images, _) = WITHOUT_STATISTICS.make().eval(), examples("residual", 32)
    sim = fxquant.QuantSim(model, (images[:2],), "int8_per_channel_qat")
    sim.compute_encodings([images], progress=False)
    sim.model.train()(images).square().mean().backward()
    with pytest.raises(ExportError, match="'norm1' cannot be written.*track_running_stats=True"):
        sim.export(tmp_path)


def test_uncertified_values_are_named(tmp_path: Path) -> None:
    sim = prepared(Recipe("attention"))
    images, _ = examples("attention", 16)
    with torch.no_grad():
        sim.model.eval()(images)
    sim.program.simulate = "exact"
    path = sim.export(tmp_path)
    report = sim.check_parity(path, [images])
    assert report.exact and all(row.value in report.verdict for row in report.rows if "uncertified" in row.reason)
