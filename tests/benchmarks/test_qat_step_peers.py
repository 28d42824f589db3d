"""Peers of the step benchmark: the protocol of their processes, absent ones with reasons, and their environments."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import qat_step_peers
from benchmarks.peers.contender import LONGEST_REASON, count_quantizations, one_line
from benchmarks.qat_step_peers import ABSENT, INSTALLED, PEERS, TORCH, PeerAbsent, find, make, peers
from fxquant.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
VENVS = "FXQUANT_PEER_VENVS"
SMALL = ["--net", "mobilenet_v2", "--batch", "2", "--size", "32", "--threads", "1"]
FAKE = """
import sys
sys.path.insert(0, {root!r})
from torch import nn
from benchmarks.peers.contender import Prepared, serve

def prepare(net, images):
    print("chatter of a peer")
    {body}

sys.exit(serve(prepare))
"""
TINY = 'return Prepared(nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 4)), "4 classes")'


def talk(command: Sequence[str], requests: str) -> tuple[int, list[str]]:
    """Exit status and replies of a contender that reads `requests`."""
    done = subprocess.run([*command, *SMALL], input=requests, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout.splitlines()


def fake(folder: Path, body: str) -> list[str]:
    script = folder / "fake.py"
    script.write_text(FAKE.format(root=str(ROOT), body=body))
    return [sys.executable, str(script)]


class Steps:
    """Stands for the processes that make an environment: what was run, and which of them fails."""

    def __init__(self, fails: str = "", output: str = "") -> None:
        self.fails, self.output = fails, output
        self.run: list[str] = []

    def __call__(self, step: Sequence[str], **options: object) -> None:
        self.run.append(" ".join(step))
        if self.fails and self.fails in self.run[-1]:
            raise subprocess.CalledProcessError(1, list(step), self.output, "")
        if "venv" in step:
            python = find("brevitas").python(Path(step[-1]).parent)
            python.parent.mkdir(parents=True)
            python.touch()


def test_contender_answers_each_request_with_one_line_whatever_the_peer_prints(tmp_path: Path) -> None:
    status, replies = talk(fake(tmp_path, TINY), "step\npeak\nstep\nquit\nstep\n")
    assert status == 0
    ready, first, peak, second = replies
    assert ready == "READY 4 classes"
    assert 0 < float(first) < 60 and 0 < float(second) < 60
    assert 2**24 < int(peak) < 2**36


def test_contender_fails_with_a_reason_on_one_line_when_preparing_fails(tmp_path: Path) -> None:
    status, replies = talk(fake(tmp_path, 'raise RuntimeError("no\\n  such operator")'), "step\n")
    assert (status, replies) == (1, ["FAILED RuntimeError: no such operator"])


def test_contender_fails_when_a_request_is_unknown(tmp_path: Path) -> None:
    status, replies = talk(fake(tmp_path, TINY), "stop\n")
    assert status == 1
    assert replies[1:] == ["FAILED ValueError: unknown request 'stop'; known are step, peak, quit"]


def test_reason_is_shortened_when_it_is_long() -> None:
    reason = one_line(RuntimeError("x" * 1000))
    assert len(reason) == LONGEST_REASON and reason.endswith("...")


def test_count_is_of_calls_when_tensors_share_a_quantizer() -> None:
    shared, weight = nn.Identity(), nn.Identity()
    model = nn.Sequential(shared, nn.ReLU(), shared, weight)
    said = count_quantizations(model, torch.ones(1), [shared], [weight])
    assert said == "2 activation and 1 weight quantizations a step"
    assert not shared._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: str(peer.name))
def test_peer_trains_a_step_where_it_is_installed(peer: qat_step_peers.Peer) -> None:
    found = dict(peers(Path(os.environ.get(VENVS, "no-venvs"))))[peer.name]
    if isinstance(found, str):
        pytest.skip(f"{found} (environments are looked for in ${VENVS})")
    status, replies = talk(found, "step\npeak\nquit\n")
    assert status == 0 and replies[0].startswith("READY "), replies
    assert "weight quantizations a step" in replies[0] and " 0 " not in replies[0]
    assert float(replies[1]) > 0


def test_peers_have_a_reason_and_a_remedy_when_nothing_is_made(tmp_path: Path) -> None:
    found = dict(peers(tmp_path))
    assert list(found) == ["torch-fx", "torchao-pt2e", "brevitas", "aimet"]
    assert found["torch-fx"] == [sys.executable, str(ROOT / "benchmarks" / "peers" / "torch_fx.py")]
    for name in ("torchao-pt2e", "brevitas", "aimet"):
        assert found[name] == (
            f"no environment in {tmp_path / name}; "
            f"make it with 'python -m benchmarks.qat_step_peers --make {tmp_path} {name}'"
        )


def test_every_peer_has_its_files_with_pinned_requirements() -> None:
    for peer in PEERS:
        assert (qat_step_peers.FOLDER / peer.script).is_file()
        if peer.requirements is not None:
            assert all("==" in line for line in peer.wanted().splitlines())


def test_peer_runs_in_its_own_interpreter_when_its_environment_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps()
    monkeypatch.setattr(subprocess, "run", steps)
    make(find("brevitas"), tmp_path)
    venv, torch_first, rest = steps.run
    assert venv.endswith(f"-m venv --clear {tmp_path / 'brevitas'}")
    assert torch_first.endswith(TORCH) and f"{TORCH} --requirement" in rest
    found = dict(peers(tmp_path))["brevitas"]
    assert isinstance(found, list) and found[0].startswith(str(tmp_path / "brevitas"))


def test_nothing_is_made_again_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    monkeypatch.setattr(subprocess, "run", steps)
    for _ in range(2):
        make(find("brevitas"), tmp_path)
    assert len(steps.run) == 3


def test_peer_is_outdated_when_its_requirements_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Steps())
    make(find("brevitas"), tmp_path)
    (tmp_path / "brevitas" / INSTALLED).write_text("torch==1.0\n")
    assert "was made from other requirements" in dict(peers(tmp_path))["brevitas"]


def test_peer_is_absent_when_its_interpreter_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Steps())
    make(find("brevitas"), tmp_path)
    find("brevitas").python(tmp_path).unlink()
    assert "has lost its interpreter" in dict(peers(tmp_path))["brevitas"]


def test_reason_of_pip_is_kept_and_others_go_on_when_one_cannot_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "Collecting\nERROR: No matching distribution found for brevitas==0.13.4\n[notice] of pip\n"
    monkeypatch.setattr(subprocess, "run", Steps("requirements-brevitas", said))
    assert qat_step_peers.main(["--make", str(tmp_path), "brevitas", "torch-fx"]) == 0
    reason = "failed: ERROR: No matching distribution found for brevitas==0.13.4"
    assert reason in str(dict(peers(tmp_path))["brevitas"])
    assert (tmp_path / "brevitas" / ABSENT).read_text().strip().endswith(reason)
    printed = capsys.readouterr().out
    assert f"brevitas: skip '-m pip install' {reason}" in printed
    assert "torch-fx: needs no environment" in printed and "torch-fx: can run" in printed


def test_failed_environment_is_made_when_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Steps("venv", "Error: no ensurepip"))
    with pytest.raises(PeerAbsent, match="no ensurepip"):
        make(find("brevitas"), tmp_path)
    monkeypatch.setattr(subprocess, "run", Steps())
    make(find("brevitas"), tmp_path)
    assert isinstance(dict(peers(tmp_path))["brevitas"], list)


def test_folder_is_left_alone_when_it_is_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    monkeypatch.setattr(subprocess, "run", steps)
    (tmp_path / "brevitas").mkdir()
    (tmp_path / "brevitas" / "thesis.tex").touch()
    with pytest.raises(PeerAbsent, match="holds something else than an environment .thesis.tex."):
        make(find("brevitas"), tmp_path)
    assert steps.run == [] and [path.name for path in (tmp_path / "brevitas").iterdir()] == ["thesis.tex"]


def test_unknown_peer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no peer 'brevita'.*Did you mean 'brevitas'"):
        find("brevita")


def test_command_line_refuses_an_unknown_peer_before_making_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        qat_step_peers.main(["--make", str(tmp_path), "brevitas", "aime"])
    assert refused.value.code == 2
    assert "Did you mean 'aimet'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
