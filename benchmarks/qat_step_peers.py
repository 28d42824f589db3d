"""The peers of the training step benchmark: who they are, where their environments lie, and what starts each.

Peers contradict each other in what they require, so each has a virtual environment `<venvs>/<peer>` of its own, and is
driven through the pipes of a process there (`benchmarks/peers/contender.py` has the protocol). torch's FX mode needs
none: it is part of torch. An environment that could not be made says why in `<venvs>/<peer>/absent.txt`; a peer is
left out with that reason, and never fails the benchmark.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxquant.errors import ConfigError, nearest

FOLDER = Path(__file__).resolve().parent / "peers"
TORCH = "torch==2.13.0"
INSTALLED, ABSENT = "installed.txt", "absent.txt"
SECONDS_TO_INSTALL = 1800.0
LONGEST_REASON = 200
MAKE = "python -m benchmarks.qat_step_peers --make"
EXAMPLES = f"""examples:
  {MAKE} ~/peers                    an environment for each peer that needs one
  {MAKE} ~/peers brevitas aimet     for these two
  python -m benchmarks.qat_step_peers --list ~/peers   who can run, and why the others cannot
"""


@dataclass(frozen=True)
class Peer:
    """A contender: its script in benchmarks/peers, and the file there with what it requires beside torch, if any."""

    name: str
    script: str
    requirements: str | None = None

    def wanted(self) -> str:
        """What its environment has to have been made from; it is made anew when this changes."""
        assert self.requirements is not None
        return f"{TORCH}\n{(FOLDER / self.requirements).read_text()}"

    def python(self, venvs: Path) -> Path:
        """The interpreter that runs it: of its environment, or this one where it needs none."""
        if self.requirements is None:
            return Path(sys.executable)
        inside = Path("Scripts", "python.exe") if sys.platform == "win32" else Path("bin", "python")
        return venvs.absolute() / self.name / inside


PEERS = (
    Peer("torch-fx", "torch_fx.py"),
    Peer("torchao-pt2e", "torchao_pt2e.py", "requirements-torchao-pt2e.txt"),
    Peer("brevitas", "brevitas_qat.py", "requirements-brevitas.txt"),
    Peer("aimet", "aimet_qat.py", "requirements-aimet.txt"),
)


class PeerAbsent(Exception):
    """An environment cannot be had here; its text is the reason, on one line."""


def peers(venvs: Path) -> list[tuple[str, list[str] | str]]:
    """For each peer its name, and either the command that starts it, less its options, or why it cannot run."""
    found: list[tuple[str, list[str] | str]] = []
    for peer in PEERS:
        try:
            found.append((peer.name, command(peer, venvs)))
        except PeerAbsent as absent:
            found.append((peer.name, str(absent)))
    return found


def command(peer: Peer, venvs: Path) -> list[str]:
    """Interpreter and script of `peer`; ``--net`` and the other options of a contender follow.

    Raises:
        PeerAbsent: its environment is not there, could not be made, or was made from other requirements.
    """
    if peer.requirements is not None:
        _check(peer, venvs)
    return [str(peer.python(venvs)), str(FOLDER / peer.script)]


def _check(peer: Peer, venvs: Path) -> None:
    folder = venvs / peer.name
    remedy = f"make it with '{MAKE} {venvs} {peer.name}'"
    if (folder / ABSENT).is_file():
        raise PeerAbsent((folder / ABSENT).read_text().strip())
    if not (folder / INSTALLED).is_file():
        raise PeerAbsent(f"no environment in {folder}; {remedy}")
    if (folder / INSTALLED).read_text() != peer.wanted():
        raise PeerAbsent(f"the environment in {folder} was made from other requirements; {remedy}")
    if not peer.python(venvs).exists():
        raise PeerAbsent(f"the environment in {folder} has lost its interpreter; {remedy} after deleting it")


def find(name: str) -> Peer:
    """The peer of this name.

    Raises:
        ConfigError: there is none; the nearest name is in the message.
    """
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise ConfigError(f"no peer '{name}'", remedy=nearest(name, [peer.name for peer in PEERS]))


def make(peer: Peer, venvs: Path) -> None:
    """Make the environment of `peer`, telling what is done; one that is there as wanted stays.

    Raises:
        PeerAbsent: it could not be made; the reason is also left in its folder.
    """
    if peer.requirements is None:
        print(f"{peer.name}: needs no environment, it is part of torch")
        return
    folder = venvs.absolute() / peer.name
    if (folder / INSTALLED).is_file() and (folder / INSTALLED).read_text() == peer.wanted():
        print(f"{peer.name}: is there, in {folder}")
        return
    _check_is_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for outdated in (INSTALLED, ABSENT):
        (folder / outdated).unlink(missing_ok=True)
    try:
        _install(peer, folder)
    except PeerAbsent as absent:
        (folder / ABSENT).write_text(f"{absent}\n")
        raise
    (folder / INSTALLED).write_text(peer.wanted())


def _check_is_ours(folder: Path) -> None:
    """Refuse a folder that holds something else than an environment, for making one empties it."""
    others = [path.name for path in folder.iterdir() if path.name != ABSENT] if folder.is_dir() else []
    if others and "pyvenv.cfg" not in others:
        raise PeerAbsent(f"{folder} holds something else than an environment ({others[0]}); choose another place")


def _install(peer: Peer, folder: Path) -> None:
    """torch first, and named again beside the rest, so that no requirement exchanges it."""
    pip = [str(peer.python(folder.parent)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    requirements = str(FOLDER / str(peer.requirements))
    for step in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, TORCH],
        [*pip, TORCH, "--requirement", requirements],
    ):
        print(f"{peer.name}: {' '.join(step)}", flush=True)
        _run(step)


def _run(step: Sequence[str]) -> None:
    try:
        subprocess.run(step, check=True, capture_output=True, text=True, timeout=SECONDS_TO_INSTALL)
    except subprocess.CalledProcessError as error:
        raise PeerAbsent(_reason(step, error.stdout + error.stderr)) from error
    except subprocess.TimeoutExpired as error:
        raise PeerAbsent(f"'{' '.join(step[1:4])}' took longer than {SECONDS_TO_INSTALL:.0f} s") from error
    except OSError as error:
        raise PeerAbsent(f"'{step[0]}' cannot be started: {error.strerror}") from error


def _reason(step: Sequence[str], output: str) -> str:
    """The last line that names an error, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    said = (errors or lines or ["nothing was printed"])[-1]
    return f"'{' '.join(step[1:4])}' failed: {said[:LONGEST_REASON]}"


def make_all(wanted: Sequence[Peer], venvs: Path) -> None:
    """Make each environment in turn; what cannot be made is reported and left out."""
    for peer in wanted:
        try:
            make(peer, venvs)
        except PeerAbsent as absent:
            print(f"{peer.name}: skip {absent}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make environments or list them; the exit code is 0 also where a peer cannot be had."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qat_step_peers",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--make", type=Path, metavar="VENVS", help="make the environments in this folder")
    what.add_argument("--list", type=Path, metavar="VENVS", help="tell which peers can run")
    parser.add_argument("peers", nargs="*", metavar="PEER", help="make these (default: all)")
    options = parser.parse_args(arguments)
    try:
        wanted = [find(name) for name in options.peers] or list(PEERS)
    except ConfigError as error:
        parser.error(str(error))
    if options.make is not None:
        make_all(wanted, options.make)
    for name, found in peers(options.make or options.list):
        print(f"{name}: {found if isinstance(found, str) else 'can run'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
