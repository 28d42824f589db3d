"""LoweredModel: a program's ONNX file, called as the program's module is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxquant.graph.batches import flat_arguments
from fxquant.graph.program import Program
from fxquant.lowering.signature import input_nodes, output_leaves
from fxquant.numerics.runtime import RuntimeOptions, open_session

_DEFAULT = RuntimeOptions()


class LoweredModel:
    """Takes and gives what `program.module` does, computed by onnxruntime on the CPU.

    Arguments:
        program: the program that the file was exported from.
        path: the ONNX file.
        options: of the session.
    """

    def __init__(self, program: Program, path: str | os.PathLike[str], options: RuntimeOptions = _DEFAULT) -> None:
        self.program = program
        self.path = Path(path)
        self._session = open_session(path, options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, tensors on the CPU, nested as the module nests them.

        Raises FxquantError if the arguments do not fit the program, ParityError if onnxruntime cannot run them.
        """
        values = flat_arguments(self.program, args, kwargs)
        feed = {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in values.items()}
        outputs = self._session.run({name: feed[name] for name in self._session.input_names})
        return self._nested(outputs)

    def _nested(self, outputs: Mapping[str, Any]) -> Any:
        program = self.program
        names = output_leaves(program, reserved={node.name for node in input_nodes(program)})
        found = iter([torch.from_numpy(outputs[leaf.name]) for leaf in names])
        flat, spec = pytree.tree_flatten(program.graph.output_node().args[0])
        returned = pytree.tree_unflatten([None if leaf is None else next(found) for leaf in flat], spec)
        return program.graph.process_outputs(returned)
