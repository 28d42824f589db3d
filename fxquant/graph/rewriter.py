"""The only editor of a graph: it records every edit, and every near miss with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.graph.aliases import Aliases
from fxquant.graph.bias_correction import CORRECTION
from fxquant.graph.pass_data import PassData
from fxquant.graph.program import FAKE_QUANTS, Note, Program, ValueType, describe
from fxquant.graph.snapshot import NodeState, node_state
from fxquant.graph.statistics import STATISTICS, ChannelStatistics
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.spec import QuantSpec


@dataclass(frozen=True)
class Edit:
    """One recorded edit: what was done ("erase", "create", ...), to which node or tensor, in words."""

    action: str
    subject: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.action} {self.subject}" + (f": {self.text}" if self.text else "")


@dataclass(frozen=True)
class Miss:
    """A near miss: the node that a pass looked at and left alone, and why."""

    node: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} ({self.place}): {self.reason}"


class Rewriter:
    """Edits one program on behalf of one pass."""

    def __init__(self, program: Program, pass_name: str, data: PassData | None = None) -> None:
        self.program = program
        self.pass_name = pass_name
        self._data = data
        self.edits: list[Edit] = []
        self.misses: list[Miss] = []
        self.touched: set[str] = set()  # names of nodes, and paths of tensors and modules, that recorded edits changed
        self._aliases = Aliases(program.module)
        self.created: set[str] = set()  # names of nodes that this rewriter created
        self.states: dict[str, NodeState | None] = {}  # each touched node after its last recorded edit; None: erased
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []  # tensors edited in place, with their values before

    def _record(self, action: str, subject: str, text: str = "", node: fx.Node | None = None) -> None:
        self.edits.append(Edit(action, subject, text))
        self.touched.add(subject)
        if node is not None:
            self.states[subject] = node_state(node)

    @property
    def data(self) -> PassData:
        """The batches of this run; the manager refuses to run a pass that says `needs_data` without."""
        assert self._data is not None, f"{self.pass_name} does not say needs_data"
        return self._data

    @property
    def reference(self) -> Program:
        """The float program of this run, from before its first pass; its nodes have the names that the program's have.

        Not to be edited. There is one from stage inserted on.
        """
        assert self.data.reference is not None, f"{self.pass_name} runs before stage inserted"
        return self.data.reference

    @property
    def known_reference(self) -> Program | None:
        """`reference` for passes that can do without: None where no pass of the run measures."""
        return None if self._data is None else self._data.reference

    def miss(self, node: fx.Node, reason: str) -> None:
        """Say why a node that nearly matched was left alone."""
        self.misses.append(Miss(node.name, describe(node), reason))

    def miss_option(self, option: str, place: str, reason: str) -> None:
        """Say why what an option of the pass asks for ("rules[2]", read at `place`) was not done."""
        self.misses.append(Miss(option, place or self.pass_name, reason))

    def note(self, note: Note) -> None:
        """Keep a note in the program (notes are not edits)."""
        self.program.add_note(note)

    def _create(
        self,
        op: str,
        target: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        name: str,
        before: fx.Node,
        like: fx.Node,
    ) -> fx.Node:
        with self.program.graph.inserting_before(before):
            node = self.program.graph.create_node(op, target, tuple(args), kwargs, name=name)
        for key in ("module_path", "module_class", "source", "type"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        self.created.add(node.name)
        self._record("create", node.name, str(target), node)
        return node

    def call_function(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        name: str,
        before: fx.Node,
        like: fx.Node,
        type: ValueType | None = None,
    ) -> fx.Node:
        """Create a call_function node; place (module path, source) and, unless given, type come from `like`."""
        node = self._create("call_function", target, args, kwargs or {}, name, before, like)
        if type is not None:
            self.set_type(node, type)
        return node

    def call_module(
        self,
        path: str,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        name: str,
        before: fx.Node,
        like: fx.Node,
    ) -> fx.Node:
        """Create a call_module node for the submodule at `path` (see `add_module`)."""
        return self._create("call_module", path, args, kwargs or {}, name, before, like)

    def get_attr(self, path: str, *, name: str, before: fx.Node, like: fx.Node) -> fx.Node:
        """Create a get_attr node that reads the parameter or buffer at `path`."""
        node = self._create("get_attr", path, (), {}, name, before, like)
        tensor = self.program.tensor(node)
        self.set_type(node, ValueType(tuple(tensor.shape), tensor.dtype))
        return node

    def set_arg(self, node: fx.Node, index: int, value: Any) -> None:
        """Set positional argument `index` of `node`, padding with None where it had fewer."""
        args = list(node.args) + [None] * (index + 1 - len(node.args))
        args[index] = value
        self.set_args(node, args)

    def set_args(self, node: fx.Node, args: Sequence[Any]) -> None:
        """Replace all positional arguments of `node`."""
        node.args = tuple(args)
        self._record("rewire", node.name, f"args = {node.args}", node)

    def set_target(self, node: fx.Node, target: Callable[..., Any]) -> None:
        """Make `node` call something else with the same arguments."""
        node.target = target
        self._record("retarget", node.name, str(target), node)

    def turn_into_function(self, node: fx.Node, target: Callable[..., Any], args: Sequence[Any]) -> None:
        """Make a call_module node call a function instead, under its own name (an erased node's name is not free
        again).
        """
        node.op, node.target, node.args, node.kwargs = "call_function", target, tuple(args), {}
        self._record("retarget", node.name, str(target), node)

    def replace_input(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Make `node` read `new` wherever it read `old`."""
        node.replace_input_with(old, new)
        self._record("rewire", node.name, f"{old.name} -> {new.name}", node)

    def replace_slot(self, node: fx.Node, slot: int, new: fx.Node) -> None:
        """Make input slot `slot` of `node` (see `input_slots`) read `new`, leaving its other slots alone."""
        seen = -1

        def swap(leaf: fx.Node) -> fx.Node:
            nonlocal seen
            seen += 1
            return new if seen == slot else leaf

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), swap)
        node.args, node.kwargs = args, kwargs
        self._record("rewire", node.name, f"slot {slot} -> {new.name}", node)

    def replace_uses(self, old: fx.Node, new: fx.Node, where: Callable[[fx.Node], bool] | None = None) -> None:
        """Make the users of `old` (all, or those that `where` accepts) read `new`."""
        for user in list(old.users):
            if user is not new and (where is None or where(user)):
                self.replace_input(user, old, new)

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nothing reads."""
        if node.users:
            users = ", ".join(user.name for user in node.users)
            raise PassError(
                f"{self.pass_name}: node '{node.name}' cannot be erased", place=describe(node), got=f"users {users}"
            )
        self.program.graph.erase_node(node)
        self._record("erase", node.name)
        self.states[node.name] = None

    def erase_dead(self, *nodes: fx.Node) -> None:
        """Erase those of `nodes` that nothing reads any more, in the order given."""
        for node in nodes:
            if not node.users and node.op != "placeholder":
                self.erase(node)

    def move(self, node: fx.Node, before: fx.Node) -> None:
        """Move a node to stand right before another one."""
        before.prepend(node)
        self._record("move", node.name, f"before {before.name}")

    def set_tensor(self, path: str, value: torch.Tensor) -> None:
        """Replace the parameter or buffer at `path` and wherever else it is tied; a parameter stays one, with its
        requires_grad.
        """
        owner_path, _, attribute = path.rpartition(".")
        old = getattr(self.program.module.get_submodule(owner_path), attribute)
        if isinstance(old, torch.nn.Parameter):
            value = torch.nn.Parameter(value.detach().to(old.dtype), requires_grad=old.requires_grad)
        for tied in self._aliases.replace_tensor(old, value):
            owner_path, _, attribute = tied.rpartition(".")
            setattr(self.program.module.get_submodule(owner_path), attribute, value)
            self._record("set", tied, f"{tuple(value.shape)}")

    @contextmanager
    def editing(self, path: str, text: str = "") -> Iterator[torch.nn.Module]:
        """Edit the module at `path` in place, its attributes and tensors and all below it: `with rewriter.editing(p)
        as module:`.
        """
        module = self.program.module.get_submodule(path)
        self._save(module)
        self._record("edit", path, text)
        yield module

    def _save(self, module: torch.nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self._saved.append((tensor, tensor.detach().clone()))

    def undo_edits_in_place(self) -> None:
        """Give their values back to the tensors that were edited in place; the manager calls it when a pass failed."""
        with torch.no_grad():
            for tensor, values in reversed(self._saved):
                tensor.copy_(values)

    def add_tensor(self, path: str, value: torch.Tensor, *, parameter: bool, requires_grad: bool = True) -> None:
        """Add a new parameter or buffer at `path`; its owner must exist."""
        owner_path, _, attribute = path.rpartition(".")
        owner = self.program.module.get_submodule(owner_path)
        if hasattr(owner, attribute) and getattr(owner, attribute) is not None:
            raise PassError(f"{self.pass_name}: tensor '{path}' exists already", remedy="Choose another name.")
        aliases = self._aliases.of_module(owner) or [owner_path]
        if parameter:
            owner.register_parameter(attribute, torch.nn.Parameter(value.detach().clone(), requires_grad))
        else:
            owner.register_buffer(attribute, value)
        self._record("add", path, f"{tuple(value.shape)}")
        tied = [f"{alias}.{attribute}" if alias else attribute for alias in aliases]  # under each name of its owner
        self.touched.update(tied)
        self._aliases.add_tensor(getattr(owner, attribute), tied)

    def add_module(self, path: str, module: torch.nn.Module) -> None:
        """Add a submodule at `path`, creating plain containers on the way."""
        if not self.program.module.add_submodule(path, module):
            raise PassError(f"{self.pass_name}: module path '{path}' is taken", remedy="Rename the model's submodule.")
        self._aliases.add_module(path, module)
        self._record("add", path, type(module).__name__)

    def remove_module(self, path: str) -> None:
        """Remove the submodule at `path`, with its parameters and buffers; nothing may use it any more.

        Where its owner has several names (a block that stands at two places of a list), it goes under all of them.
        """
        removed = self.program.module.get_submodule(path)
        owner_path, _, attribute = path.rpartition(".")
        owner = self.program.module.get_submodule(owner_path)
        gone = [f"{alias}.{attribute}" if alias else attribute for alias in self._aliases.of_module(owner)]
        delattr(owner, attribute)
        self._aliases.forget_module(removed, gone)
        for name in dict.fromkeys((path, *gone)):
            self._record("remove", name)

    def replace_module(self, path: str, module: torch.nn.Module) -> None:
        """Put `module` in the place of the one at `path`, under all its names; it holds the same tensors."""
        old = self.program.module.get_submodule(path)
        for name in list(self._aliases.of_module(old)):
            owner_path, _, attribute = name.rpartition(".")
            self.program.module.get_submodule(owner_path)._modules[attribute] = module
            self._record("add", name, type(module).__name__)
        self._aliases.refresh()

    def compute_encoding(self, path: str, follows: torch.Tensor | None = None) -> None:
        """Compute the grid of the FakeQuant at `path`: from the tensor that it follows, or from what its estimator
        saw.
        """
        module = self.program.module.get_submodule(path)
        assert isinstance(module, FakeQuant)
        self._save(module)
        with torch.no_grad():
            module.compute_encoding() if follows is None else module.follow(follows)
        self._record("encode", path)

    def sync(self, path: str) -> None:
        """Compute the grid of the FakeQuant at `path` from its parameters."""
        module = self.program.module.get_submodule(path)
        assert isinstance(module, FakeQuant)
        self._save(module)
        module.sync()
        self._record("encode", path)

    def record(self, path: str, text: str) -> None:
        """Record that engine code, called by the pass, changed the state of the module at `path`."""
        self._record("state", path, text)

    def set_mode(self, path: str, mode: Mode) -> None:
        """Set the mode of the FakeQuant at `path`."""
        module = self.program.module.get_submodule(path)
        assert isinstance(module, FakeQuant)
        if module.mode is not mode:
            module.mode = mode
            self._record("mode", path, mode.value)

    def set_output_spec(self, node: fx.Node, spec: QuantSpec | None, rule: str = "") -> None:
        """Say how a node's own output is to be quantized (None: not)."""
        self._set_meta(node, "output_spec", spec)
        if rule:
            self._set_meta(node, "rule", rule)

    def set_input_spec(self, node: fx.Node, slot: int, spec: QuantSpec | None, rule: str = "") -> None:
        """Say how `node` wants its input slot `slot` quantized (None: not), and which rule wants it ("": as before)."""
        specs: dict[int, QuantSpec] = dict(node.meta.get("input_specs", {}))
        rules: dict[int, str] = dict(node.meta.get("input_rules", {}))
        if spec is None:
            specs.pop(slot, None)
            rules.pop(slot, None)
        else:
            specs[slot] = spec
            rules.update({slot: rule} if rule else {})
        if node.meta.get("input_specs", {}) == specs and node.meta.get("input_rules", {}) == rules:
            return
        for key, value in (("input_specs", specs), ("input_rules", rules)):
            node.meta.pop(key, None)
            node.meta.update({key: value} if value else {})
        self._record("annotate", node.name, f"slot {slot} = {spec}", node)

    def set_type(self, node: fx.Node, type: ValueType | tuple[ValueType, ...] | None) -> None:
        """Say what a node's value is (None: a Python scalar)."""
        self._set_meta(node, "type", type)

    def set_statistics(self, node: fx.Node, statistics: ChannelStatistics | None) -> None:
        """Say what is known of the output channels of a layer (None: nothing any more)."""
        self._set_meta(node, STATISTICS, statistics, STATISTICS)

    def set_bias_correction(self, node: fx.Node, taken: torch.Tensor) -> None:
        """Write down all that was taken off a layer's bias so far, a number for each channel."""
        self._set_meta(node, CORRECTION, taken.detach().cpu().double().tolist(), CORRECTION)

    def set_float_reason(self, node: fx.Node, reason: str) -> None:
        """Say why a node's value stays in float."""
        self._set_meta(node, "float_reason", reason)

    def share_encoding(self, node: fx.Node, owner: str) -> None:
        """Make a value use the FakeQuant of the value called `owner`."""
        self._set_meta(node, "shares_encoding_with", owner)

    def _set_meta(self, node: fx.Node, key: str, value: Any, text: str = "") -> None:
        if node.meta.get(key) == value:
            return
        if value is None:
            del node.meta[key]
        else:
            node.meta[key] = value
        self._record("annotate", node.name, text or f"{key} = {value}", node)

    @staticmethod
    def fake_quant_path(value: str) -> str:
        """Where the FakeQuant of the value called `value` lives; nn.Module has names of its own ("to", "half")."""
        return f"{FAKE_QUANTS}.{value}_" if hasattr(torch.nn.Module, value) else f"{FAKE_QUANTS}.{value}"
