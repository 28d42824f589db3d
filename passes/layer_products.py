"""Layers in graph order, each as a matrix product with the inputs that the layers before it leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fxquant.errors import PassError
from fxquant.graph.frontier import Frontier
from fxquant.graph.program import Note, NoteKind, Program, describe
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.numerics.rounding import along_axis
from fxquant.progress import track
from fxquant.reconstruction.gain import gain_text
from fxquant.reconstruction.gptq import MatrixGrid
from fxquant.reconstruction.product import LayerProduct, SecondMoment
from fxquant.reconstruction.samples import is_held_back

from .quantized_layers import Change, QuantizedLayer, quantized_layers

MEBIBYTE, GIBIBYTE = 2**20, 2**30


@dataclass(frozen=True, eq=False)
class MeasuredLayer:
    """A quantized layer, its product, and where its inputs are.

    Arguments:
        layer: what it is.
        product: the matrix product that it computes.
        quantizer: of its weight, with a grid that is up to date.
        weight: its float weight, as it is now.
        frontier: of the program, with the layers that lead to this one as they are to be.
    """

    layer: QuantizedLayer
    product: LayerProduct
    quantizer: FakeQuant
    weight: torch.Tensor
    frontier: Frontier

    @property
    def kernel(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.weight.shape)

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as [groups, outputs, columns]."""
        return self.product.matrix(self.weight)

    @property
    def moment_gib(self) -> float:
        """Memory of the second moment of its inputs, in GiB."""
        groups, _, columns = self.matrix.shape
        return groups * columns * columns * 8 / GIBIBYTE

    def visit(self, see: Callable[[torch.Tensor], None]) -> None:
        """Show its inputs, unfolded, to `see`: float32 [groups, rows, columns], in pieces; PassError without any."""

        def unfold(x: torch.Tensor) -> None:
            for rows in self.product.rows(x, self.kernel):
                see(rows)

        self._advance(unfold)

    def _advance(self, see: Callable[[torch.Tensor], None]) -> None:
        if not self.frontier.advance(self.layer.input, see):
            raise PassError(f"inputs of layer '{self.layer.node.name}'", expected="at least one batch", got="none")

    def moment(self) -> torch.Tensor:
        """The second moment of its inputs, float64 [groups, columns, columns]; PassError if it is not finite."""
        moment = SecondMoment()
        self.visit(moment.add)
        return self._checked(moment)

    def moments(self, check_every: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """That of the samples to learn from, and of those held back (samples.py); None: of these there are none."""
        parts = SecondMoment(), SecondMoment()
        seen = 0

        def divide(x: torch.Tensor) -> None:
            nonlocal seen
            x = x if x.ndim > 1 else x.unsqueeze(0)
            index = torch.arange(seen, seen + len(x), device=x.device)
            is_check = is_held_back(index, check_every)
            seen += len(x)
            for part, chosen in zip(parts, (~is_check, is_check), strict=True):
                for rows in self.product.rows(x[chosen], self.kernel) if chosen.any() else ():
                    part.add(rows)

        self._advance(divide)
        return self._checked(parts[0]), None if parts[1].total is None else self._checked(parts[1])

    def _checked(self, moment: SecondMoment) -> torch.Tensor:
        found = moment.total
        if found is None or not bool(torch.isfinite(found).all()):
            raise PassError(
                f"inputs of layer '{self.layer.node.name}'",
                place=describe(self.layer.node),
                expected="finite numbers whose squares float32 holds",
                got="NaN, Inf or an overflow",
            )
        return found

    def grid(self) -> MatrixGrid:
        """The grid of each element of the weight's matrix."""
        spec = self.quantizer.spec
        parts = [part.expand(self.kernel) for part in self.quantizer.grid_for(len(self.kernel))]
        scale, zero_point = (self.product.matrix(part) for part in parts)
        return MatrixGrid(scale, zero_point, spec.qmin, spec.qmax)

    def owner(self) -> torch.Tensor:
        """Which encoding each element of the weight's matrix belongs to, by flat index."""
        scale = self.quantizer.scale
        index = torch.arange(scale.numel(), device=scale.device).view(scale.shape)
        spread = along_axis(index, self.quantizer.spec.granularity, len(self.kernel))
        return self.product.matrix(spread.expand(self.kernel))


def measured_layers(program: Program, rewriter: Rewriter, change: Change, cache_mb: int) -> Iterator[MeasuredLayer]:
    """The layers that may be changed so, in the order of their inputs in the graph, under a progress bar.

    Change a layer before taking the next: what it puts out then is what those behind it see. Grids that follow a weight
    or a constant are brought up to date with it, as in every forward; these are edits.
    """
    data = rewriter.data
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    layers = sorted(quantized_layers(program, rewriter, change), key=lambda layer: place[layer.input])
    if not layers:
        return
    frontier = Frontier(program, [layer.input for layer in layers], data.batches, cache_mb * MEBIBYTE)
    for node, module in program.fake_quant_nodes():
        if module.follows and not module.mode.is_settled:
            with rewriter.editing(str(node.target), "brought up to date with the weight"):
                pass
    now = [layers[0].node.name]
    for layer in track(layers, lambda: f"{rewriter.pass_name}: {now[0]}", show=data.progress):
        now[0] = layer.node.name
        quantizer, weight = layer.fake_quant(program), program.tensor(layer.weight).detach()
        with torch.no_grad():
            quantizer.refresh(weight)
        yield MeasuredLayer(layer, LayerProduct(layer.node), quantizer, weight, frontier)


def note_gain(rewriter: Rewriter, measured: MeasuredLayer, signal: float, before: float, after: float) -> None:
    """Keep a note of what was won for a layer; sums of squares over its outputs."""
    text = f"{rewriter.pass_name}: {gain_text(signal, before, after)}"
    rewriter.note(Note(NoteKind.OPTIMIZATION, measured.layer.node.name, text))
