"""What an eval-mode capture loses: what the model runs in train mode only, found by comparing two exports."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.capture.normal_form import bound
from fxquant.capture.places import place_of
from fxquant.graph.program import Note, NoteKind

aten = torch.ops.aten
MAX_NODES = 1500  # larger graphs are not exported a second time

_IGNORED = frozenset(
    {
        "getitem", "sym_size", "contiguous", "clone", "detach", "detach_", "alias", "copy_", "lift_fresh_copy",
        "_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size",
    }
)  # fmt: skip
_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
_MODE_ARGUMENTS = {
    "scaled_dot_product_attention": "dropout_p",
    "lstm": "train",
    "gru": "train",
    "rnn_tanh": "train",
    "rnn_relu": "train",
    "rrelu": "training",
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
}


def mode_notes(evaluated: ExportedProgram, trained: ExportedProgram | None, model: nn.Module) -> list[Note]:
    """One note for each module whose operations differ between eval mode and train mode."""
    if trained is None:
        text = "the model could not be exported in train mode, so what exists only there is not known"
        return [Note(NoteKind.LOST_IN_EVAL, "", text)]
    before, after = _operations(evaluated, model, is_train=False), _operations(trained, model, is_train=True)
    notes = []
    for path in sorted(before.keys() | after.keys()):
        only_eval, only_train = before[path] - after[path], after[path] - before[path]
        if only_eval or only_train:
            notes.append(Note(NoteKind.LOST_IN_EVAL, path, _text(only_train, only_eval)))
    return notes


def skipped_note(nodes: int) -> Note:
    """The note that says that the comparison was not made."""
    text = f"not compared with train mode: the graph has {nodes} nodes, more than {MAX_NODES}"
    return Note(NoteKind.LOST_IN_EVAL, "", text)


def train_override_notes(model: nn.Module) -> list[Note]:
    """A note for each module whose own train() keeps modules in eval mode; the model is in eval mode afterwards."""
    notes = []
    for path, module in model.named_modules():
        if type(module).train is nn.Module.train or isinstance(module, fx.GraphModule):
            continue
        module.train()
        kept = [name or "itself" for name, part in module.named_modules() if not part.training]
        model.eval()
        if kept:
            text = (
                f"{type(module).__name__}.train() keeps {', '.join(kept)} in eval mode; the program's train() does not"
            )
            notes.append(Note(NoteKind.FROZEN_STATE, path, text))
    return notes


def _text(train: Counter[str], evaluated: Counter[str]) -> str:
    parts = []
    if train:
        parts.append(f"only in train mode: {_list(train)}")
    if evaluated:
        parts.append(f"{'in eval mode instead' if train else 'only in eval mode'}: {_list(evaluated)}")
    return "; ".join(parts)


def _list(names: Counter[str]) -> str:
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in sorted(names.items()))


def _operations(program: ExportedProgram, model: nn.Module, is_train: bool) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    counters = {
        s.arg.name for s in program.graph_signature.input_specs if str(s.target).endswith("num_batches_tracked")
    }
    for node in program.graph.nodes:
        if node.op != "call_function" or any(source.name in counters for source in node.all_input_nodes):
            continue
        path = place_of(node).path
        name = _name(node)
        if name in _IGNORED or name == "batch_norm" and _is_norm_module(model, path):
            continue
        if name.rstrip("_") in _DROPOUTS:
            found[path].update(_dropout(node, name.rstrip("_"), is_train))
        else:
            found[path][name + (_mode_argument(node, name) or _numbers(node))] += 1
    return found


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return str(getattr(node.target, "__name__", node.target))


def _dropout(node: fx.Node, name: str, is_train: bool) -> list[str]:
    """A dropout as the program will run it in train mode (eval's export), or as the model does (train's export).

    Capture makes what eval's export contains active in train mode with its p, whatever its flag; p = 0 does nothing.
    """
    given = bound(node)
    if not given["p"]:
        return []
    switched_off = " switched off" if is_train and not given["train"] else ""
    return [f"{name}(p={given['p']}){switched_off}"]


def _mode_argument(node: fx.Node, name: str) -> str:
    wanted = _MODE_ARGUMENTS.get(name)
    if wanted is None or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == wanted:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(wanted, argument.default_value)
            return f"({wanted}={value})"
    return ""


def _numbers(node: fx.Node) -> str:
    """The real numbers among the arguments: a scale that only train mode applies changes no operation's name."""
    found = [str(value) for value in (*node.args, *node.kwargs.values()) if isinstance(value, float)]
    return f"({', '.join(found)})" if found else ""


def _is_norm_module(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), _BatchNorm)
    except AttributeError:
        return False
