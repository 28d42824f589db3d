"""AIMET beside the post-training table: its environment, and one process for each of its rows.

The environment is that of the training-step benchmark (`python -m benchmarks.qat_step_peers --make VENVS aimet`);
benchmarks/peers/aimet_ptq.py runs in it, on the same float weights and images, and gives its simulation's logits: its
export does not give the simulation's codes in onnxruntime, so there is nothing exact to compare.
"""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import nn

from benchmarks.ptq_nets import Net, Samples
from benchmarks.ptq_rows import Cell, Method, Outcome
from benchmarks.qat_step_peers import FOLDER, PeerAbsent, command, find
from benchmarks.quality import Logits, judge

PEER, SCRIPT = "aimet", "aimet_ptq.py"
LONGEST_REASON = 200


@dataclass(frozen=True)
class Aimet:
    """How AIMET is started: interpreter and script, or why it cannot be."""

    command: tuple[str, ...] = ()
    absent: str = ""

    @classmethod
    def find(cls, venvs: Path | None) -> "Aimet":
        """In the folder of environments."""
        if venvs is None:
            return cls(
                absent="no environments: make them by 'python -m benchmarks.qat_step_peers --make DIR', --venvs DIR"
            )
        try:
            python = command(find(PEER), venvs)[0]
        except PeerAbsent as absent:
            return cls(absent=str(absent))
        return cls((python, str(FOLDER / SCRIPT)))

    def measure(
        self, net: Net, module: nn.Module, cell: Cell, samples: Samples, reference: Logits, iterations: int
    ) -> Outcome:
        """Run one row in a process of its own; a failure is a skipped row with the reason."""
        if self.absent:
            return Outcome(skipped=self.absent)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            save_job(folder / "job.pt", net, module, samples)
            done = subprocess.run(
                [*self.command, *arguments(folder, cell, iterations)], capture_output=True, text=True, check=False
            )
            path = folder / "answer.json"
            if not path.exists():
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                reason = lines[-1][:LONGEST_REASON] if lines else "nothing was printed"
                return Outcome(skipped=f"ended with {done.returncode}: {reason}")
            answer = json.loads(path.read_text(encoding="utf-8"))
            if "failed" in answer:
                return Outcome(skipped=answer["failed"])
            logits = numpy.load(folder / "logits.npy")
        rounds = iterations if cell.method is Method.ADAROUND else 0
        quality = judge(logits, reference, samples.labels)
        return Outcome(quality, answer["seconds"], note=answer["note"], iterations=rounds)


def arguments(folder: Path, cell: Cell, iterations: int) -> list[str]:
    """The contender's command line for a row."""
    files = ["--job", str(folder / "job.pt"), "--out", str(folder), f"--threads={torch.get_num_threads()}"]
    method = [f"--method={cell.method.value}", f"--bits={cell.bits}", f"--iterations={iterations}"]
    return [*files, *method, *(["--per-channel"] if cell.is_per_channel else [])]


def save_job(path: Path, net: Net, module: nn.Module, samples: Samples) -> None:
    """The float net as it is, and the images."""
    torch.save(
        {
            "net": module,
            "replaces_relu6": net.replaces_relu6,
            "calibration": samples.calibration,
            "judged": samples.judged,
            "batch": samples.batch,
        },
        path,
    )
