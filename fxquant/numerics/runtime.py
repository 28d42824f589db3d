"""onnxruntime sessions on the CPU: open, run, see the graph that really runs, and say on what.

Nothing here knows programs: models are ONNX files or their bytes, inputs and outputs are numpy arrays by name.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from fxquant.errors import ParityError

Array = np.ndarray[Any, np.dtype[Any]]
Model = bytes | str | os.PathLike[str]

_PROVIDERS = ["CPUExecutionProvider"]
_FATAL_ONLY = 4  # what goes wrong comes back as an exception; the log would say it twice
_LARGEST_KEPT_BYTES = (
    "1024"  # of initializers inside the saved optimised graph; larger ones go to a file that is not read
)
_CPU_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "avx512f", "avx2", "avx", "sse4_1", "i8mm", "asimddp", "asimd")


class Level(Enum):
    """How far onnxruntime may rewrite the graph; integer kernels exist from EXTENDED on."""

    ALL = "ALL"
    EXTENDED = "EXTENDED"
    BASIC = "BASIC"
    DISABLED = "DISABLED"

    @property
    def fuses(self) -> bool:
        """Whether QuantizeLinear and DequantizeLinear are fused into integer kernels at this level."""
        return self in (Level.ALL, Level.EXTENDED)


_ORT_LEVELS = {
    Level.ALL: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    Level.EXTENDED: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    Level.BASIC: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    Level.DISABLED: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


@dataclass(frozen=True)
class RuntimeOptions:
    """How a session runs.

    Arguments:
        level: how far the graph is optimised.
        threads: threads within an operator; 0 leaves it to onnxruntime (one a core).
        config: further session config entries, as pairs ("session.disable_quant_qdq", "1").
    """

    level: Level = Level.ALL
    threads: int = 0
    config: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ParityError(
                "RuntimeOptions.threads", expected="0 (onnxruntime's choice) or more", got=str(self.threads)
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values."""
        return {"level": self.level.value, "threads": self.threads, "config": dict(self.config)}


class Session:
    """An open session: `run` takes and gives numpy arrays by name."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.input_names: tuple[str, ...] = tuple(value.name for value in session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(value.name for value in session.get_outputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs called `outputs` (all by default); inputs that the model does not have are left out.

        A missing input, or one of the wrong dtype or shape, is a ParityError that names it.
        """
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise ParityError(
                f"model input '{missing[0]}' is not given",
                expected=f"inputs {', '.join(self.input_names)}",
                got=", ".join(inputs) or "none",
            )
        names = list(self.output_names if outputs is None else outputs)
        feed = {name: np.asarray(inputs[name], order="C") for name in self.input_names}
        try:
            return dict(zip(names, self._session.run(names, feed), strict=True))
        except Exception as err:  # onnxruntime's exceptions share no base class
            raise ParityError(
                "onnxruntime could not run the model", got=_first_line(err), remedy=_describe(feed)
            ) from err


@dataclass(frozen=True)
class OptimisedGraph:
    """The graph that onnxruntime runs; `level` is lower than what was asked where the higher one cannot be saved."""

    graph: onnx.GraphProto
    level: Level


def open_session(
    model: Model, options: RuntimeOptions = RuntimeOptions(), *, data_folder: str | os.PathLike[str] | None = None
) -> Session:
    """A session on the CPU for a model's bytes or file.

    A model above 2 GB has its data in files beside it: give its path, or its bytes and the folder of those files.
    An invalid model, or an operator that onnxruntime has no kernel for, is a ParityError with the ONNX node's name.
    """
    return Session(_open(model, _session_options(options, data_folder)))


def optimised_graph(
    model: Model, options: RuntimeOptions = RuntimeOptions(), *, data_folder: str | os.PathLike[str] | None = None
) -> OptimisedGraph:
    """The graph that a session with these options runs; large initializers are left out of it."""
    try:
        return OptimisedGraph(_save_optimised(model, options, data_folder), options.level)
    except ParityError:
        if options.level is not Level.ALL:
            raise
    # Level ALL may compile nodes that no file can hold; fusion into integer kernels is complete at EXTENDED.
    lower = RuntimeOptions(Level.EXTENDED, options.threads, options.config)
    return OptimisedGraph(_save_optimised(model, lower, data_folder), lower.level)


def runtime_version() -> str:
    """Version of onnxruntime."""
    return str(onnxruntime.__version__)


def runtime_build() -> str:
    """What onnxruntime says about its build: commit and build type."""
    return str(onnxruntime.get_build_info()).removeprefix("ORT Build Info: ")


def cpu_flags() -> tuple[str, ...]:
    """This machine's instruction sets that integer kernels choose by, the strongest first; () where unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    present = set(found.group(1).split()) if found else set()
    return tuple(flag for flag in _CPU_FLAGS if flag in present)


def instruction_set() -> str:
    """The machine and its strongest instruction set for integers: "x86_64 avx512_vnni"."""
    flags = cpu_flags()
    return f"{platform.machine()} {flags[0]}" if flags else platform.machine()


def _session_options(options: RuntimeOptions, data_folder: str | os.PathLike[str] | None) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.graph_optimization_level = _ORT_LEVELS[options.level]
    made.intra_op_num_threads = options.threads
    made.inter_op_num_threads = 1
    made.log_severity_level = _FATAL_ONLY
    if data_folder is not None:
        made.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(Path(data_folder).resolve())
        )
    for key, value in options.config:
        made.add_session_config_entry(key, value)
    return made


def _open(model: Model, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=_PROVIDERS)
    except Exception as err:  # onnxruntime's exceptions share no base class
        raise _refusal(err, "" if isinstance(source, bytes) else str(source)) from err


def _save_optimised(
    model: Model, options: RuntimeOptions, data_folder: str | os.PathLike[str] | None
) -> onnx.GraphProto:
    with tempfile.TemporaryDirectory(prefix="fxquant-") as folder:
        path = Path(folder) / "optimised.onnx"
        made = _session_options(options, data_folder)
        made.optimized_model_filepath = str(path)
        made.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        made.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", _LARGEST_KEPT_BYTES
        )
        _open(model, made)
        return onnx.load(path, load_external_data=False).graph


def _refusal(err: Exception, place: str) -> ParityError:
    text = str(err)
    unsupported = re.search(r"Could not find an implementation for (\S+) node with name '([^']*)'", text)
    if unsupported:
        return ParityError(
            f"onnxruntime has no kernel for node '{unsupported[2]}' ({unsupported[1]})",
            place=place,
            remedy="Leave the node in float (a placement rule), export at another opset, or update onnxruntime.",
        )
    node = re.search(r"""(?:In Node, \("|[Nn]ode:? ?\(|Name:')([^"')]+)""", text)
    thing = f"onnxruntime refuses the model at node '{node[1]}'" if node else "onnxruntime cannot load the model"
    remedy = "Check the file with onnx.checker, and export it again."
    return ParityError(thing, place=place, got=_first_line(err), remedy=remedy)


def _first_line(err: Exception) -> str:
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", str(err)).strip().rstrip(".").replace("\n", " ")


def _describe(feed: Mapping[str, Array]) -> str:
    return (
        "Inputs given: " + ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feed.items()) + "."
    )
