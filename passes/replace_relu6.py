"""Make clips at an upper bound relus, so that channels can be rescaled through them; it changes the network."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.errors import PassError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.progress import track

from .chains import find_links, is_clip_above
from .output_change import RELU, Comparison

RANKING_SHARE = 8  # one of so many batches: an order needs fewer than a verdict


@dataclass(frozen=True)
class ReplaceRelu6(Pass):
    """Replace relu6, and any clip(0, b) with a finite b > 0, by relu where 'cross-layer-equalization' needs it, and say
    by how much the program's outputs change.

    A clip at b does not commute with a channel's scale: Nagel et al. 2019 (arXiv:1906.04721), section 5.1.1, replace
    ReLU6 by ReLU in MobileNetV2 before equalizing. What a network does with values above b is then no longer
    undone, so that this is a decision, never a default of another pass: the outputs are compared on the batches of the
    run, and a note has the largest difference and the signal-to-noise ratio.

    Some networks need their clips (EfficientNet-Lite0 loses nearly all it knows without them): with `least_db` the
    clips whose removal hurts least go first, as many as keep the outputs' ratio at that. For this order each is removed
    alone on an eighth of the batches; how many go is decided on all.

    Declines, with the reason: clips that stand between no two layers that could be equalized, unless `everywhere`;
    those that `least_db` keeps. Clips at other lower bounds than 0, or with computed ones, are another matter, and
    nothing is said of them. Contract: CHANGES.

    Arguments:
        everywhere: replace every clip(0, b), between layers that can be equalized or not.
        measure: compare the outputs before and after on the batches of the run; without it none are needed.
        least_db: signal-to-noise ratio that the outputs must keep; None: whatever comes. Where they would not keep it,
            each clip is measured alone first.
    """

    everywhere: bool = False
    measure: bool = True
    least_db: float | None = None

    name: ClassVar[str] = "replace-relu6"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.CHANGES

    def __post_init__(self) -> None:
        if self.least_db is not None and not self.measure:
            raise PassError(f"{self.name}: least_db={self.least_db:g}", expected="measure=True", got="measure=False")

    @property
    def needs_data(self) -> bool:
        """Unless it is told not to measure."""
        return self.measure

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Choose the clips, replace them, compare."""
        clips = [node for node in program.graph.nodes if is_clip_above(node)]
        chosen = self._candidates(program, rewriter, clips)
        change = None
        if chosen and self.measure:
            comparison = Comparison(program, rewriter.data.batches)
            if self.least_db is not None:
                chosen = _spared(rewriter, comparison, chosen, self.least_db)
            change = comparison.without(chosen)
        for node in chosen:
            rewriter.set_target(node, RELU)
            rewriter.set_args(node, node.args[:1])
        if chosen:
            text = f"{len(chosen)} of {len(clips)} clips made relus ({_names(chosen)})"
            rewriter.note(Note(NoteKind.OPTIMIZATION, "", text if change is None else f"{text}: {change}"))

    def _candidates(self, program: Program, rewriter: Rewriter, clips: list[fx.Node]) -> list[fx.Node]:
        if self.everywhere:
            return clips
        needed = {clip for link in find_links(program, through_clips=True) for clip in link.clips}
        for node in clips:
            if node not in needed:
                rewriter.miss(node, f"{node.name} kept: it stands between no two layers that could be equalized")
        return [node for node in clips if node in needed]


def _spared(rewriter: Rewriter, comparison: Comparison, clips: list[fx.Node], least_db: float) -> list[fx.Node]:
    """As many of the clips as can go, those that hurt least first; found by bisection."""
    if comparison.without(clips).sqnr_db >= least_db:
        return clips
    ranked_on = max(1, comparison.batch_count // RANKING_SHARE)
    tracked = track(clips, "replace-relu6: each clip alone", show=rewriter.data.progress)
    alone = {clip: comparison.without([clip], ranked_on).sqnr_db for clip in tracked}
    order = sorted(clips, key=lambda clip: -alone[clip])
    sizes = range(1, len(order) + 1)
    count = bisect_left(sizes, True, key=lambda size: comparison.without(order[:size]).sqnr_db < least_db)
    for clip in order[count:]:
        rewriter.miss(
            clip, f"{clip.name} kept: {count} that matter less are gone, and outputs are to keep {least_db:g} dB"
        )
    return [clip for clip in clips if clip in order[:count]]


def _names(nodes: list[fx.Node]) -> str:
    names = [node.name for node in nodes]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
