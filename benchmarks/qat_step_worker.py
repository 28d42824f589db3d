"""A contender of `benchmarks/qat_step.py`: the float network, or one form of fxquant's training.

`benchmarks/peers/contender.py` has the protocol that it speaks on its pipes.

    python -m benchmarks.qat_step_worker --form live --net resnet18 --batch 8 --size 224 --threads 1
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.peers.contender import Prepared, serve
from fxquant.graph.program import Program


@dataclass(frozen=True)
class Form:
    """One way to train: with which preset (None: the float network), and in which simulation."""

    preset: str | None
    simulation: str = "float"


FORMS = {
    "float": Form(None),
    "live": Form("int8_per_channel_qat"),
    "folded": Form("int8_per_channel"),
    "learned": Form("int8_per_channel_lsq_qat"),
    "exact": Form("int8_per_channel_qat", "exact"),
}


def prepare(net: nn.Module, images: Tensor, form: Form, is_compiled: bool) -> Prepared:
    """The network as `form` trains it, calibrated on the batch."""
    module, note = net.train(), f"torch {torch.__version__}"
    if form.preset is not None:
        program = _program(net, images, form.preset)
        program.simulate = form.simulation
        module, note = program.module.train(), f"fxquant {form.preset} {form.simulation}: {_count(program)}"
    if is_compiled:
        module = torch.compile(module)  # type: ignore[assignment]
    return Prepared(module, f"{note}{', compiled' * is_compiled}")


def _program(net: nn.Module, images: Tensor, preset: str) -> Program:
    program = fxquant.capture(net, images)
    fxquant.load_pipeline(preset).prepare(program)
    fxquant.calibrate(program, [images], progress=False)
    return program


def _count(program: Program) -> str:
    follows = [module.follows for _, module in program.fake_quant_nodes()]
    return f"{len(follows) - sum(follows)} activation and {sum(follows)} weight quantizations a step"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the form that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", required=True, choices=list(FORMS), help="what to train")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    options, rest = parser.parse_known_args(arguments)
    return serve(partial(prepare, form=FORMS[options.form], is_compiled=options.compile), rest)


if __name__ == "__main__":
    sys.exit(main())
