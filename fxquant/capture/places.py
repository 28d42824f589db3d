"""Where a node comes from: module path, class and source line, read from what torch.export leaves in `meta`."""

from __future__ import annotations

import os
import re
import traceback
from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.program import describe

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_NESTED_CALL = re.compile(r"@\d+$")


@dataclass(frozen=True)
class Place:
    """Path ("" is the root) and class of the module that called an operation, which call, and the user's line."""

    path: str
    module_class: str
    call: str
    source: str


def place_of(node: fx.Node) -> Place:
    """Read a node's place; what is unknown is ""."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    call, (path, module_class) = stack[-1] if stack else ("", ("", ""))
    if node.target is torch.ops.aten.sym_size.int:  # torch.export gives size nodes a made-up stack
        path, module_class, call = "", "", ""
    if not isinstance(module_class, str):
        module_class = module_class.__name__
    return Place(_NESTED_CALL.sub("", path), module_class.rsplit(".", 1)[-1], call, source_of(node))


def source_of(node: fx.Node) -> str:
    """The innermost line of user code that made a node, as "model.py:31"."""
    for file, line in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        if is_user_file(file):
            return f"{os.path.basename(file)}:{line}"
    return ""


def is_user_file(file: str) -> bool:
    """Whether a source file belongs to neither torch nor fxquant nor generated code."""
    return not file.startswith((_TORCH, _HERE, "<"))


def user_frame(err: BaseException) -> str:
    """The innermost line of user code in an error's traceback, as "model.py:31 in forward"; "" if there is none."""
    for frame in reversed(traceback.extract_tb(err.__traceback__)):
        if is_user_file(frame.filename) and f"{os.sep}bin{os.sep}" not in frame.filename:
            return f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
    return ""


def annotate(node: fx.Node) -> None:
    """Write a node's place into the meta keys that fxquant keeps."""
    place = place_of(node)
    node.meta.update(module_path=place.path, module_class=place.module_class, source=place.source)


def describe_raw(node: fx.Node) -> str:
    """`describe` for a node that is still as torch.export left it."""
    annotate(node)
    return describe(node)
