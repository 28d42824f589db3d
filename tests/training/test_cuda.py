"""Training on a GPU: skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from tests.training.residual import WAYS, assert_ends_where_it_trained, batches, loss_of, simulated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("preset", "training"), [*WAYS, ("int8_per_channel_qat", "moving-average(0.01)")])
def test_training_on_cuda_ends_in_exact_codes_on_the_cpu(
    preset: str, training: str | None, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    sim = simulated(preset, training)
    module = sim.model.to("cuda").train()
    optimizer = torch.optim.AdamW(fxquant.parameter_groups(sim.program, 1e-3, 1e-4))
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    for batch in batches():
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype or torch.float32, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(
                module(batch.to("cuda")).float(), torch.arange(len(batch), device="cuda") % 5
            )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.isfinite(loss)
    module.to("cpu")
    assert_ends_where_it_trained(sim, sim.program, tmp_path)


def test_calibrated_on_cuda_has_the_grids_of_the_cpu() -> None:
    sim, other = simulated(), simulated()
    other.model.to("cuda")
    other.compute_encodings([batch.to("cuda") for batch in batches()], progress=False)
    for (node, one), (_, two) in zip(sim.program.fake_quant_nodes(), other.program.fake_quant_nodes(), strict=True):
        torch.testing.assert_close(two.scale.cpu(), one.scale, rtol=1e-3, atol=0.0, msg=node.name)
    x = batches()[0]
    assert float(loss_of(sim.model.eval(), x)) == pytest.approx(
        float(torch.nn.functional.cross_entropy(other.model.eval()(x.to("cuda")).cpu(), torch.arange(4) % 5)), abs=0.05
    )
