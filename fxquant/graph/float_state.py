"""Float checkpoints of the model that a program was captured from: which of its tensors still stand, and loading them.

A tensor of the original model is spent once a pass has overwritten or removed it, has computed something from it that
is kept in its place, or has left nothing that reads it: a checkpoint's values would be wrong there, or do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxquant.errors import FxquantError, clipped
from fxquant.graph.program import FAKE_QUANTS, Program, Stage

if TYPE_CHECKING:
    from fxquant.graph.snapshot import NodeState, Snapshot

_THING = "load_float_state_dict"
_FOLDS = "fold-batch-norm"


@dataclass(frozen=True)
class FloatState:
    """The original model's state.

    Arguments:
        keys: of its state_dict.
        spent: of those, the ones that a pass has changed, with its name.
    """

    keys: tuple[str, ...]
    spent: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> FloatState:
        """All that `module` holds, but for its quantizers."""
        return cls(tuple(key for key in module.state_dict() if not key.startswith(f"{FAKE_QUANTS}.")))

    def after(self, pass_name: str, before: Snapshot, after: Snapshot) -> FloatState:
        """The state once a pass has turned `before` into `after`."""
        read = _read_tensors(before) - _read_tensors(after)
        used = set(_computed_for_good(before, after))
        spent = {
            key: pass_name
            for key in self.keys
            if key not in self.spent
            and key in before.tensors
            and (_is_changed(key, before, after) or id(before.tensors[key].tensor) in read or key in used)
        }
        return FloatState(self.keys, {**self.spent, **spent}) if spent else self


@dataclass(frozen=True)
class LoadedKeys:
    """What `strict=False` let pass: keys of the model that the checkpoint lacks, and keys that the model lacks."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_float_state(program: Program, state_dict: Mapping[str, Any], strict: bool) -> LoadedKeys:
    """See `Program.load_float_state_dict`."""
    if program.stage is Stage.FINALIZED:
        remedy = "Load it before finalize: into a fresh capture, or a copy of the program made earlier."
        raise FxquantError(_THING, expected="a program before finalize", got="a finalized one", remedy=remedy)
    state, spent = program.float_state, program.float_state.spent
    _refuse_wrapped(state_dict, state.keys)
    _refuse_spent({key: name for key, name in spent.items() if strict or key in state_dict})
    own = program.module.state_dict(keep_vars=True)
    held = {id(own[key]) for key in state.keys if key in state_dict and key in own}  # a tied tensor may have one name
    missing = tuple(
        key for key in state.keys if key not in spent and key not in state_dict and id(own[key]) not in held
    )
    wanted = set(state.keys)
    unexpected = tuple(key for key in state_dict if key not in wanted and not key.endswith("_extra_state"))
    problems = list(_mismatches(state_dict, own, state.keys))
    if strict:
        problems += [f"missing '{key}'" for key in missing]
        problems += list(_unexpected(unexpected, missing or state.keys))
    if problems:
        remedy = "" if not (strict and (missing or unexpected)) else "strict=False lets missing and unexpected ones be."
        expected = f"the {len(state.keys)} tensors of {program.name}"
        raise FxquantError(_THING, expected=expected, got="; ".join(problems), remedy=remedy)
    with torch.no_grad():
        for key in state.keys:
            if key in state_dict:
                own[key].copy_(state_dict[key])
    program.module.settle()
    return LoadedKeys(missing, unexpected)


def _refuse_wrapped(state_dict: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """A prefix that a wrapper put before all names, or a checkpoint that holds more than the state, by name."""
    known = set(keys)
    for outer, value in state_dict.items():
        if isinstance(value, Mapping) and known & set(value):
            remedy = f"Give it checkpoint[{outer!r}]."
            raise FxquantError(_THING, expected="a state_dict", got=f"one below the key '{outer}'", remedy=remedy)
    if known & set(state_dict) or not known:
        return
    for key in state_dict:
        prefix = next((key[: -len(name)] for name in keys if key.endswith(f".{name}")), "")
        if prefix and sum(f"{prefix}{name}" in state_dict for name in keys) * 2 > len(keys):
            remedy = f"Take it off: {{key.removeprefix({prefix!r}): value for key, value in state_dict.items()}}."
            got = f"names that begin with '{prefix}', which a wrapper put there"
            raise FxquantError(_THING, expected="the model's own names", got=got, remedy=remedy)


def _refuse_spent(spent: Mapping[str, str]) -> None:
    if not spent:
        return
    by_pass: dict[str, list[str]] = {}
    for key, name in spent.items():
        by_pass.setdefault(name, []).append(key)
    got = "; ".join(f"'{name}' has changed {', '.join(keys)}" for name, keys in by_pass.items())
    kept = ", or prepare with a '_qat' preset, which keeps batch norms behind their layers" if _FOLDS in by_pass else ""
    remedy = f"Load it right after capture and prepare then{kept}."
    raise FxquantError(_THING, expected="tensors that no pass has changed", got=got, remedy=remedy)


def _mismatches(state_dict: Mapping[str, Any], own: Mapping[str, torch.Tensor], keys: Iterable[str]) -> Iterator[str]:
    first: dict[int, str] = {}
    for key in keys:
        if key not in state_dict or key not in own:
            continue
        value, here = state_dict[key], own[key]
        if not isinstance(value, torch.Tensor):
            yield f"'{key}' is no tensor but a {type(value).__name__}"
        elif value.shape != here.shape:
            yield f"'{key}' has shape {tuple(value.shape)}, not {tuple(here.shape)}"
        elif _kind(value) != _kind(here):
            yield f"'{key}' is {str(value.dtype)}, not {str(here.dtype)}"
        elif (count := int(value.isnan().sum())) and not bool(here.isnan().any()):
            yield f"'{key}' has {count} NaN"
        elif (tie := first.setdefault(id(here), key)) != key and not torch.equal(value, state_dict[tie]):
            yield f"'{key}' and '{tie}' are one tensor, and differ"


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _unexpected(keys: Iterable[str], accepted: Iterable[str]) -> Iterator[str]:
    quantizers = {key for key in keys if key.startswith(f"{FAKE_QUANTS}.")}
    if quantizers:
        yield f"{len(quantizers)} keys of '{FAKE_QUANTS}', which program.module.load_state_dict takes"
    for key in keys:
        if key not in quantizers:
            close = get_close_matches(key, accepted, n=1)
            yield f"unexpected '{clipped(key)}'" + (f" (did you mean '{close[0]}'?)" if close else "")


def _is_changed(key: str, before: Snapshot, after: Snapshot) -> bool:
    old, new = before.tensors[key], after.tensors.get(key)
    return new is None or new.tensor is not old.tensor or (new.version, new.bits) != (old.version, old.bits)


def _read_tensors(snapshot: Snapshot) -> set[int]:
    """Ids of what the graph reads; a frozen batch norm's count of batches goes on standing for itself."""
    found: set[int] = set()
    for state in snapshot.nodes.values():
        if state.op == "get_attr":
            found.add(id(snapshot.tensors[str(state.target)].tensor))
        elif state.op == "call_module":
            called = snapshot.modules[str(state.target)]
            tensors = {**called.parameters, **called.buffers}
            found |= {id(tensor) for name, tensor in tensors.items() if name != "num_batches_tracked"}
    return found


def _computed_for_good(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """Paths of tensors from which a pass that added tensors computed what it erased from the graph."""
    old = {id(state.tensor) for state in before.tensors.values()}
    if all(id(new.tensor) in old for path, new in after.tensors.items() if not path.startswith(f"{FAKE_QUANTS}.")):
        return
    sources: dict[fx.Node, set[str] | None] = {}  # the tensors that a value is computed from alone
    for name, state in before.nodes.items():
        found = sources[state.node] = _sources_of(state, sources)
        if state.op != "get_attr" and found and name not in after.nodes:
            yield from found


def _sources_of(state: NodeState, known: Mapping[fx.Node, set[str] | None]) -> set[str] | None:
    if state.op in ("get_attr", "placeholder"):
        return {str(state.target)} if state.op == "get_attr" else None
    inputs: list[set[str] | None] = []
    fx.node.map_arg((state.args, state.kwargs), lambda node: inputs.append(known.get(node)))
    found: set[str] = set()
    for each in inputs:
        if each is None:
            return None
        found |= each
    return found


def describe_float_state(state: FloatState) -> dict[str, Any]:
    """The record that a program file keeps."""
    return {"keys": list(state.keys), "spent": dict(state.spent)}


def read_float_state(record: Mapping[str, Any]) -> FloatState:
    """The state that `describe_float_state` wrote."""
    return FloatState(tuple(record["keys"]), dict(record["spent"]))
