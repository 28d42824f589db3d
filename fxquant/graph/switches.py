"""Quantizers switched off for a while: which of them is it that costs accuracy?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from fxquant.errors import FxquantError, nearest
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant, Mode


@contextmanager
def switched(program: Program, *, weights: bool, activations: bool, only: str) -> Iterator[None]:
    """Program.quantizers."""
    before = [(module, module.mode) for module in _chosen(program, weights, activations, only)]
    for module, _ in before:
        module.mode = Mode.OFF
    try:
        yield
    finally:
        for module, mode in before:
            if module.mode is Mode.OFF:  # what else was done to it meanwhile stays
                module.mode = mode
        program.module.settle()


def _chosen(program: Program, weights: bool, activations: bool, only: str) -> list[FakeQuant]:
    """The FakeQuants to switch off, each once."""
    try:
        pattern = re.compile(only)
    except re.error as err:
        raise FxquantError("program.quantizers: only", expected="a regular expression", got=f"'{only}': {err}") from err
    named = [(node, module) for node, module in program.fake_quant_nodes() if any(map(pattern.fullmatch, _names(node)))]
    if not named:
        names = [str(node.args[0]) for node, _ in program.fake_quant_nodes()]
        remedy = nearest(only, names) if names else "Run the pipeline's prepare passes first."
        raise FxquantError(f"program.quantizers: no quantizer is called '{only}'", remedy=remedy)
    modules = {id(module): module for _, module in named if not (weights if module.follows else activations)}
    return list(modules.values())


def _names(node: fx.Node) -> tuple[str, ...]:
    """What a quantizer goes by: the value that it quantizes, and the path of the module that has or computes it."""
    return str(node.args[0]), str(node.meta.get("module_path", ""))
