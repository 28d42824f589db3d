"""capture: a model in, a Program in normal form out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxquant.capture.check import Reference, compare, reference
from fxquant.capture.exporting import Exported, export_in_train_mode, private_copy, quiet, run_export, static_batch_note
from fxquant.capture.functional import make_functional
from fxquant.capture.guards import guard_notes
from fxquant.capture.inline import inline_regions
from fxquant.capture.inputs import Example, as_example
from fxquant.capture.mode_scan import may_depend_on_mode
from fxquant.capture.modes import MAX_NODES, mode_notes, skipped_note, train_override_notes
from fxquant.capture.naming import SizeNames, rebuild
from fxquant.capture.normal_form import detach_notes, normalize
from fxquant.capture.state import build_state, resolve_tensors
from fxquant.capture.stateful import restore_modules
from fxquant.errors import CaptureError
from fxquant.graph.module import ProgramModule
from fxquant.graph.program import Note, Program

_CHECKED_BATCHES = (1, 3)


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
) -> Program:
    """Trace a model with torch.export and bring its graph to the normal form.

    Arguments:
        model: an nn.Module (a GraphModule too) on any device, in any mode; it is not changed. Or an ExportedProgram.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments, with at least one tensor
            (float, integer or bool) in them. For an ExportedProgram they may be left out if it has its own.
        kwargs: keyword arguments besides.
        dynamic_batch: keep axis 0 dynamic for every tensor whose axis 0 is as long as the first tensor's.
        dynamic_shapes: what torch.export.export takes under that name; replaces `dynamic_batch`.

    Returns:
        A Program at stage CAPTURED, in eval mode, with its own parameters and buffers under the model's names. Its
        outputs were compared with the model's on the example inputs and, when the batch is dynamic, at batch 1 and 3,
        and at the batch that was traced.

    Raises:
        CaptureError: the inputs do not fit, the model cannot be exported, or the program's outputs differ from the
            model's by more than 1e-5 of the largest value.
    """
    if isinstance(model, ExportedProgram):
        return _capture_exported(model, example_inputs, kwargs)
    if not isinstance(model, nn.Module):
        raise CaptureError("capture: model", expected="an nn.Module or an ExportedProgram", got=type(model).__name__)
    example = as_example(example_inputs, kwargs)
    notes: list[Note] = []
    with quiet(example.tensors[0].device):
        twin = private_copy(model)
        state_names = type(model).__name__
        build_state(twin)  # refuses reserved names before anything slow
        references = reference(twin, example, _other_batches(example, dynamic_batch, dynamic_shapes))
        exported = run_export(twin, example, dynamic_batch, dynamic_shapes)
        notes += static_batch_note(exported)
        notes += _lost_in_eval(twin, example, exported)
        module = _to_module(exported.program, twin, state_names, notes)
        # A batch-1 example was traced at 2; batch 3 takes the same path, and is checked anyway.
        traced = _CHECKED_BATCHES[-1] if example.batch == 1 and exported.is_dynamic else exported.batch
        compare(module, references if exported.is_dynamic else references[:1], traced)
    return Program(module, name=state_names, notes=tuple(dict.fromkeys(notes)))


def _other_batches(example: Example, dynamic_batch: bool, dynamic_shapes: Any) -> tuple[int, ...]:
    if not dynamic_batch or dynamic_shapes is not None or not example.batch:
        return ()
    return tuple(count for count in _CHECKED_BATCHES if count != example.batch)


def _capture_exported(program: ExportedProgram, example_inputs: Any, kwargs: Mapping[str, Any] | None) -> Program:
    if example_inputs is None and kwargs is None and program.example_inputs is not None:
        example_inputs, kwargs = program.example_inputs
    example = as_example(example_inputs, kwargs)
    notes: list[Note] = []
    with quiet(example.tensors[0].device):
        source = private_copy_of_exported(program)
        references: list[Reference] = reference(source, example, ())
        module = _to_module(program, source, "ExportedProgram", notes)
        compare(module, references, example.batch)
    return Program(module, name="model", notes=tuple(dict.fromkeys(notes)))


def private_copy_of_exported(program: ExportedProgram) -> fx.GraphModule:
    """An exported program as a module with tensors of its own."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    memo: dict[int, Any] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = memo.setdefault(id(tensor), _cloned(tensor))
    return module


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _lost_in_eval(twin: nn.Module, example: Example, exported: Exported) -> list[Note]:
    notes = train_override_notes(twin)
    if not may_depend_on_mode(twin):
        return notes
    nodes = len(exported.program.graph.nodes)
    if nodes > MAX_NODES:
        return [*notes, skipped_note(nodes)]
    return notes + mode_notes(exported.program, export_in_train_mode(twin, example, exported), twin)


def _to_module(program: ExportedProgram, model: nn.Module, class_name: str, notes: list[Note]) -> ProgramModule:
    """The normal form of an exported program, over the tensors of `model`."""
    exported = (
        model
        if isinstance(model, fx.GraphModule) and class_name == "ExportedProgram"
        else program.module(check_guards=False)
    )
    assert isinstance(exported, fx.GraphModule)
    graph = exported.graph
    state = build_state(model)
    inline_regions(exported, notes)
    resolve_tensors(state, exported, graph)
    make_functional(graph, notes)
    notes += detach_notes(graph)
    normalize(graph)
    restore_modules(graph, state, notes)
    sizes = SizeNames()
    final = rebuild(graph, sizes)
    notes += guard_notes(program, final, sizes)
    state.root.eval()
    return ProgramModule(state.root, final, class_name)
