"""Program: one torch.fx graph, the stage it is at, and what is known about it.

Nothing else holds state: specs and types are in `node.meta`, encodings in the FakeQuant submodules.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxquant.errors import CalibrationError, FxquantError, SpecError, nearest
from fxquant.graph.module import FLOAT, FORMS, ProgramModule, graph_to_records
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant, Mode
from fxquant.spec import QuantSpec, Target

if TYPE_CHECKING:
    from fxquant.graph.coverage import CoverageReport
    from fxquant.graph.float_state import FloatState, LoadedKeys

FAKE_QUANTS = "fake_quants"
_WORDS = ("rule", "input_rules", "float_reason")  # of a node's meta: which rule decided, and in which file
_HISTORY = re.compile(rf"{FAKE_QUANTS}\..+\.(estimator\..+|range\..+|scale_floor)")


class Stage(IntEnum):
    """How far a program has come; each pass says at which stages it runs and which one it leaves."""

    CAPTURED = 0
    ASSIGNED = 1
    INSERTED = 2
    CALIBRATED = 3
    FINALIZED = 4

    def __str__(self) -> str:
        return self.name.lower()


class NoteKind(Enum):
    """What a note is about."""

    GUARD = "guard"  # a decision that capture took from shapes
    STATIC_BATCH = "static batch"  # why the batch could not stay dynamic
    LOST_IN_EVAL = "lost in eval"  # what exists only in training mode in the user's code
    FROZEN_STATE = "frozen state"  # functional batch norm, train() overrides
    FLOAT = "float"  # what stays in float, and why
    BIAS = "bias"  # a weight scale that was raised for its bias
    TRAINING = "training"  # what was frozen in training, and when
    OPTIMIZATION = "optimization"  # what a post-training algorithm measured
    OTHER = "other"


@dataclass(frozen=True)
class Note:
    """One thing a user should know: `place` is a node name or module path, "" for the whole program."""

    kind: NoteKind
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.place}: {self.text}" if self.place else f"{self.kind.value}: {self.text}"


@dataclass(frozen=True)
class ValueType:
    """Shape and dtype of a tensor value; a symbolic size is its expression ("s0", "2*s0")."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def is_float(self) -> bool:
        """Whether the value is of a floating dtype."""
        return self.dtype.is_floating_point

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


def value_type(node: fx.Node) -> ValueType | None:
    """Type of a node's single tensor output; None for scalars, tuples and what is not a tensor."""
    found = node.meta.get("type")
    return found if isinstance(found, ValueType) else None


def input_slots(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's args, then kwargs, in order and with duplicates: slot i is the i-th."""
    slots: list[fx.Node] = []

    def visit(leaf: fx.Node) -> fx.Node:
        slots.append(leaf)
        return leaf

    fx.node.map_arg((node.args, node.kwargs), visit)
    return slots


def describe(node: fx.Node) -> str:
    """A node's place for messages: "BatchNorm2d at layer1.bn1, model.py:31"."""
    kind = node.meta.get("module_class", "") or str(node.target)
    path = node.meta.get("module_path", "")
    source = node.meta.get("source", "")
    where = f"{kind} at {path}" if path else kind
    return f"{where}, {source}" if source else where


def input_spec(node: fx.Node, slot: int) -> QuantSpec | None:
    """The spec that `node` wants for its input slot `slot`."""
    specs: Mapping[int, QuantSpec] = node.meta.get("input_specs", {})
    return specs.get(slot)


def output_spec(node: fx.Node) -> QuantSpec | None:
    """The spec that a node's own output is to have."""
    spec: QuantSpec | None = node.meta.get("output_spec")
    return spec


class Program:
    """A captured model: `module` computes, `graph` is what passes rewrite (through a Rewriter only)."""

    def __init__(
        self,
        module: ProgramModule,
        *,
        name: str = "model",
        stage: Stage = Stage.CAPTURED,
        target: Target = Target.ONNXRUNTIME_X64,
        notes: tuple[Note, ...] = (),
        float_state: FloatState | None = None,
    ) -> None:
        self.module = module
        self.name = name
        self.stage = stage
        self.target = target
        self.notes = notes
        self._float_state = float_state

    @property
    def float_state(self) -> FloatState:
        """The state of the original model, and what passes changed of it; unless given, what `module` holds when this
        is first asked for, which the PassManager does.
        """
        from fxquant.graph.float_state import FloatState

        if self._float_state is None:
            self._float_state = FloatState.of(self.module)
        return self._float_state

    @float_state.setter
    def float_state(self, state: FloatState) -> None:
        self._float_state = state

    @property
    def graph(self) -> fx.Graph:
        """The torch.fx graph of `module`."""
        return self.module.graph

    @property
    def simulate(self) -> str:
        """What `module` computes: "float" (fake quantization), "exact" or "integer" (onnxruntime's codes).

        All three share the module's parameters and buffers; `exact` trains (first derivatives only), `integer` has no
        gradients. Both run kernels, not modules: forward hooks on FakeQuants do not fire there. They compute in
        float32: inputs, or a module, of half or double precision are an FxquantError. NaN has the lowest code, as in
        onnxruntime. On the CPU every change of a grid is seen; on a GPU one through `.data` is not. Setting an unknown
        name is an FxquantError.
        """
        return self.module.simulation

    @simulate.setter
    def simulate(self, name: str) -> None:
        known = (FLOAT, *FORMS)
        if name not in known:
            raise FxquantError(
                "program.simulate", expected=", ".join(known), got=repr(name), remedy=nearest(name, known)
            )
        self.module.simulation, self.module.target = name, self.target

    def node(self, name: str) -> fx.Node:
        """The node called `name`; an unknown name is an error with the nearest one."""
        found: fx.Node | None = next((node for node in self.graph.nodes if node.name == name), None)
        if found is not None:
            return found
        raise FxquantError(
            f"node '{name}' is not in the graph", remedy=nearest(name, (n.name for n in self.graph.nodes))
        )

    def submodule(self, node: fx.Node) -> torch.nn.Module:
        """The module that a call_module node calls."""
        assert node.op == "call_module", node.format_node()
        return self.module.get_submodule(str(node.target))

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The parameter or buffer that a get_attr node reads."""
        assert node.op == "get_attr", node.format_node()
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, torch.Tensor)
        return value

    def fake_quant(self, node: fx.Node) -> FakeQuant | None:
        """The FakeQuant that `node` calls, or None if it calls none."""
        if node.op != "call_module":
            return None
        module = self.submodule(node)
        return module if isinstance(module, FakeQuant) else None

    def bias_fake_quant(self, node: fx.Node) -> BiasFakeQuant | None:
        """The BiasFakeQuant that `node` calls, or None if it calls none."""
        if node.op != "call_module":
            return None
        module = self.submodule(node)
        return module if isinstance(module, BiasFakeQuant) else None

    def fake_quant_nodes(self) -> Iterator[tuple[fx.Node, FakeQuant]]:
        """Every node that calls a FakeQuant (weights and activations; not biases), in graph order."""
        for node in self.graph.nodes:
            module = self.fake_quant(node)
            if module is not None:
                yield node, module

    def bias_nodes(self) -> Iterator[tuple[fx.Node, BiasFakeQuant]]:
        """Every node that calls a BiasFakeQuant, in graph order."""
        for node in self.graph.nodes:
            module = self.bias_fake_quant(node)
            if module is not None:
                yield node, module

    def adopt_encodings(self) -> None:
        """Use the grids that a state_dict brought: the program, at stage INSERTED, is then CALIBRATED.

        A state_dict holds grids, but neither the stage nor the modes of the FakeQuants, which would go on observing:

            pipeline.prepare(program)
            program.module.load_state_dict(calibrated.module.state_dict())
            program.adopt_encodings()

        Raises CalibrationError at another stage, or listing the values whose FakeQuant has no grid; the program is then
        as before. (`fxquant.load_program` needs none of this: a program file holds stage and modes.)
        """
        if self.stage is not Stage.INSERTED:
            remedy = "Run the pipeline's prepare passes first." if self.stage < Stage.INSERTED else "Nothing to adopt."
            expected = "a program at stage inserted"
            raise CalibrationError("adopt encodings", expected=expected, got=str(self.stage), remedy=remedy)
        quants = list(self.fake_quant_nodes())
        missing = [str(node.args[0]) for node, module in quants if not module.has_encoding]
        if missing:
            names = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            remedy = "Load the state_dict of a calibrated program first, or calibrate (fxquant.calibrate)."
            raise CalibrationError(
                "adopt encodings", expected="a grid for every value", got=f"none for {names}", remedy=remedy
            )
        for _, module in quants:
            if module.mode is Mode.OBSERVE:
                module.engage()
        self.stage = Stage.CALIBRATED

    def link_biases(self) -> None:
        """Point every BiasFakeQuant at the two FakeQuants that its node names: the graph is the truth."""
        for node, module in self.bias_nodes():
            _, x_node, weight_node = node.args
            assert isinstance(x_node, fx.Node) and isinstance(weight_node, fx.Node)
            x_quant, weight_quant = self.fake_quant(x_node), self.fake_quant(weight_node)
            assert x_quant is not None and weight_quant is not None
            if weight_quant.spec.granularity.block is not None:
                raise SpecError(
                    f"bias '{node.args[0]}' is quantized to int32",
                    place=describe(node),
                    expected="a weight per tensor or per channel: the bias's scale is its scale times the input's",
                    got=f"a weight {weight_quant.spec.granularity}",
                    remedy="Leave that bias in float, as 'quantize-bias' does.",
                )
            module.link(x_quant, weight_quant)

    def recompile(self) -> None:
        """Make `module` compute what the graph says; the manager calls it after a pass that edited."""
        self.link_biases()
        self.module.recompile()

    def add_note(self, note: Note) -> None:
        """Keep a note, once."""
        if note not in self.notes:
            self.notes = (*self.notes, note)

    def copy(self) -> Program:
        """A copy that shares nothing with this one."""
        return self.with_module(copy.deepcopy(self.module))

    def with_module(self, module: ProgramModule) -> Program:
        """A program like this one around a copy of its module, which it takes over: an average, one that was unpickled.

        ema = torch.optim.swa_utils.AveragedModel(program.module, multi_avg_fn=..., use_buffers=True)
        averaged = program.with_module(ema.module)
        averaged.module.eval()
        """
        if graph_to_records(module.graph) != graph_to_records(self.graph):
            raise FxquantError(
                "with_module",
                expected="a copy of this program's module",
                got="a module with another graph",
                remedy="Copy the module again: a pass has changed the program since, or it is another program's.",
            )
        twin = Program(
            module,
            name=self.name,
            stage=self.stage,
            target=self.target,
            notes=self.notes,
            float_state=self._float_state,
        )
        twin.link_biases()
        return twin

    def load_float_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        """Load a float checkpoint of the original model, by its own names, into the program's parameters and buffers.

        Values are copied in place, so parameters keep their identity: optimizers and groups go on. Weights' grids
        follow; learned ranges, activations' grids and what is frozen stay as they are: calibrate again if the
        checkpoint is another training's.

        Arguments:
            state_dict: of the model that was captured. One name of a tied tensor is enough.
            strict: False lets missing and unexpected keys be, and returns them.

        Raises FxquantError that lists what is missing, unexpected, of another shape or kind; and, by name, the tensors
        that a pass has changed (folded, removed), of which nothing can be loaded any more. The program is then as
        before. After finalize nothing can be loaded.
        """
        from fxquant.graph.float_state import load_float_state

        return load_float_state(self, state_dict, strict)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of graph, parameters, buffers, specs and grids; the ONNX file lowered from it carries it.

        What led to a grid (estimators' statistics, floors for biases) does not count: equal grids are equal codes. Nor
        do the words that say which rule of which file decided.
        """
        digest = hashlib.sha256()
        records = [{**item, "meta": _without_words(item.get("meta", {}))} for item in graph_to_records(self.graph)]
        digest.update(json.dumps(records, sort_keys=True, default=str).encode())
        for node, module in self.fake_quant_nodes():
            digest.update(f"{node.name}:{module.spec!r}:{module.mode is Mode.OFF}".encode())
        for key, tensor in sorted(self.module.state_dict().items()):
            if _HISTORY.fullmatch(key):
                continue
            raw = tensor.detach().cpu().contiguous().flatten()
            digest.update(f"{key}:{raw.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
        return digest.hexdigest()

    def quantizers(
        self, *, weights: bool = True, activations: bool = True, only: str = ".*"
    ) -> AbstractContextManager[None]:
        """Switch quantizers off inside a `with`: is accuracy limited by the weights or by the activations?

            with program.quantizers(activations=False):
                accuracy = evaluate(program.module)

        False switches a group off; True leaves each of it as it is, so that contexts nest, and what was off stays off.
        On leaving, also by an exception, every quantizer has its mode back: calibrating, learned, moving or frozen.
        One whose mode was changed inside keeps it; freezing passes leave those that are off as they are, so call them
        outside. A bias is on the grid of its layer's input and weight, and in float where either is off. All
        simulations know it. Training inside is training without these quantizers: gradients pass them as if they were
        not there, and ranges that are learned get none.

        Arguments:
            weights, activations: whether these are to quantize.
            only: a regular expression that a value's name ("conv1_weight") or module path must match in full.

        Raises FxquantError if no quantizer's name matches.
        """
        from fxquant.graph.switches import switched

        return switched(self, weights=weights, activations=activations, only=only)

    def coverage(self) -> CoverageReport:
        """Each float value with its spec, encoding and rule, or the reason why it stays in float; at any stage."""
        from fxquant.graph.coverage import coverage

        return coverage(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program to one file (fxquant.load_program reads it); a kill midway leaves the old file."""
        from fxquant.graph.storage import save_program

        save_program(self, Path(path))

    def diff(self, other: Program) -> str:
        """A unified diff of the two printed graphs; "" when they are the same."""
        from fxquant.graph.render import diff

        return diff(self, other)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the graph to `path` (.svg or .dot): integer and float islands in different colours."""
        from fxquant.graph.draw import draw

        draw(self, Path(path))

    def __str__(self) -> str:
        from fxquant.graph.render import render

        return render(self)


def _without_words(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if key not in _WORDS}
