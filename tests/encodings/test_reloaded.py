"""A program that took its grids from a file stands for the exported one: nets that gave trouble."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant.encodings import VERSIONS
from fxquant.sim import QuantSim


class ZeroChannel(nn.Module):
    """A batch norm whose channel 3 is switched off: weight and bias of the folded layer are 0 there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        with torch.no_grad():
            self.bn.weight[3] = 0.0
            self.bn.bias[3] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolution, batch norm, relu."""
        return torch.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize("version", VERSIONS)
def test_reloaded_program_passes_the_parity_check_of_the_exported_file(version: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = ZeroChannel().eval(), torch.randn(4, 3, 8, 8)
    sim = QuantSim(model, x)
    sim.compute_encodings([x], progress=False)
    path = sim.export(tmp_path, encodings_version=version)
    again = QuantSim(model, x)
    assert again.load_encodings(tmp_path / "model.encodings").not_covered == ()
    assert again.snapshot().fingerprint() == sim.snapshot().fingerprint()
    report = again.check_parity(path, [x])
    assert not report.fault and report.worst_local_steps == 0


def test_fingerprint_changes_when_a_quantizer_is_switched_off_or_a_grid_moves() -> None:
    from fxquant.numerics.fake_quant import Mode

    x = torch.randn(4, 3, 8, 8)
    sim = QuantSim(ZeroChannel().eval(), x)
    sim.compute_encodings([x], progress=False)
    before = sim.program.fingerprint()
    _, module = next(sim.program.fake_quant_nodes())
    mode, module.mode = module.mode, Mode.OFF
    assert sim.program.fingerprint() != before
    module.mode = mode
    assert sim.program.fingerprint() == before
    module.scale.copy_(torch.nextafter(module.scale, torch.ones(())))
    assert sim.program.fingerprint() != before
