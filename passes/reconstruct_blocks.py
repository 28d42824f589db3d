"""Learn how the weights of a block are rounded, all at once, so that the block's output stays as in float."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fxquant.errors import FxquantError, PassError, nearest
from fxquant.graph.program import Program
from fxquant.graph.rewriter import Rewriter
from fxquant.reconstruction import Settings, Unit

from .adaround import layer_unit
from .blocks import block_of_path, find_blocks
from .quantized_layers import QuantizedLayer
from .rounding_run import LearnsRounding


@dataclass(frozen=True)
class ReconstructBlocks(LearnsRounding):
    """BRECQ (Li 2021, arXiv:2102.05426) with QDrop (Wei 2022, arXiv:2203.05740): block by block, in graph order, each
    on the inputs that the blocks before it, already rounded, give; against the block's output in float. Inside a block
    activations are quantized, but for the elements that pass in float as drawn. Grids stay as calibrated; biases too.

    1. A block is one of `blocks`, or the smallest module with 2 to `largest` layers that is closed (passes/blocks.py),
       or a branch with its sum that dominators cut out.
    2. A layer in no block is rounded by itself, as adaround does it.

    Not done: activations' scales are not learned, and errors are not weighted by second derivatives (BRECQ's Fisher
    information). Declines, with the reason: what adaround declines; a named block that is not closed, whose layers are
    then rounded one by one. Contract: QUANTIZES.

    Arguments:
        drop: probability with which an element of an activation passes in float while rounding is learned.
        blocks: module paths of the blocks; (): they are found.
        largest: layers of a block that is found.
    """

    drop: float = 0.5
    blocks: tuple[str, ...] = ()
    largest: int = 8

    name: ClassVar[str] = "reconstruct-blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest < 1:
            raise FxquantError("option 'largest'", expected="at least 1", got=str(self.largest))

    def settings(self) -> Settings:
        """The options of learning."""
        return replace(super().settings(), drop=self.drop)

    def units(self, program: Program, rewriter: Rewriter, layers: Sequence[QuantizedLayer]) -> Iterable[Unit]:
        """Blocks (case 1), and the layers that are in none (case 2)."""
        found = self._named(program, rewriter, layers) if self.blocks else find_blocks(program, layers, self.largest)
        units = list(found)
        inside = {weight for unit in units for weight in unit.weights}
        units += [layer_unit(program, layer, self.positions) for layer in layers if layer.quantizer not in inside]
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        return sorted(units, key=lambda unit: order[unit.output])

    def _named(self, program: Program, rewriter: Rewriter, layers: Sequence[QuantizedLayer]) -> Iterable[Unit]:
        known = {str(node.meta.get("module_path", "")) for node in program.graph.nodes}
        paths = {".".join(path.split(".")[:end]) for path in known for end in range(1, path.count(".") + 2)}
        taken: dict[object, str] = {}
        for path in self.blocks:
            if path not in paths:
                raise PassError(f"{self.name}: block '{path}' is no module of the graph", remedy=nearest(path, paths))
            unit = block_of_path(program, path, layers)
            if isinstance(unit, str):
                rewriter.miss_option("blocks", path, f"{path} is no block: {unit}")
                continue
            twice = [taken[weight] for weight in unit.weights if weight in taken]
            if twice:
                raise PassError(f"{self.name}: blocks '{twice[0]}' and '{path}' overlap", remedy="Leave one out.")
            taken.update(dict.fromkeys(unit.weights, path))
            yield unit
