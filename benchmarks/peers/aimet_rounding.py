"""Contender: AIMET's AdaRound on a block, batch norm folded, 4 bits a channel by min-max."""

from __future__ import annotations

import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.aimet_qat import declare_torchvision
from benchmarks.peers.rounding import Rounded, Task, serve

BITS = 4


def learn(task: Task) -> Rounded:
    """Prepare, fold and round; AIMET's own batch size is the benchmark's, its activations are in float."""
    from aimet_common.defs import QuantScheme
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.model_preparer import prepare_model

    example = task.batches[0]
    model: nn.Module = prepare_model(task.block).eval()
    fold_all_batch_norms(model, tuple(example.shape), dummy_input=example)
    loader = torch.utils.data.DataLoader(_Batches(task.batches), batch_size=None)
    parameters = AdaroundParameters(loader, len(task.batches), task.iterations, forward_fn=_forward)
    with tempfile.TemporaryDirectory() as folder:
        rounded: nn.Module = Adaround.apply_adaround(
            model,
            example,
            parameters,
            folder,
            "block",
            default_param_bw=BITS,
            default_quant_scheme=QuantScheme.post_training_tf,
            default_config_file=get_path_for_per_channel_config(),
        )
    return Rounded(rounded.eval())


class _Batches(torch.utils.data.Dataset[Tensor]):
    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index]


def _forward(model: nn.Module, inputs: Tensor | list[Tensor]) -> object:
    return model(inputs[0] if isinstance(inputs, (list, tuple)) else inputs)


if __name__ == "__main__":
    declared = declare_torchvision()
    note = f"AIMET {metadata.version('aimet-torch')}: layers with the relu behind them, activations in float{declared}"
    sys.exit(serve(learn, note))
