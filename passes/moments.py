"""Mean and deviation of each channel of a value, as a sum of sources: layers' outputs, and what activations made.

    v = c1 u1 + c2 u2 + ... + shift
    E[v] = c1 E[u1] + ...                            always
    D[v]^2 = (c1 D[u1])^2 + (c2 D[u2])^2 + ...       where no two sources are made of the same layer's output

so that y + y is 2 y, and y - relu(y) has a mean, but a deviation that is not known. An activation needs a known
deviation and a normal argument: one source that is normal, or a sum with such a source, which is taken as normal.

Outputs of different layers count as independent. In a residual net relu(f(x) + x) they are not, nor is the sum normal:
there the mean behind the relu is wrong by a tenth (of its norm over the channels: 8 to 12 % over the five blocks of a
small net, 1 to 3 % behind other relus). Bias correction is the better for it: of the squared mean errors of that
net's layers it leaves 6 %, and 29 % where the layers behind such sums are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .clipped_normal import Pair, clipped


@dataclass(frozen=True, eq=False)
class Source:
    """What sums are of; two that are one object are one value.

    Arguments:
        std: deviation of each channel, float64 of shape (channels,); None: not known.
        roots: the layers of whose outputs it is made, with no other layer between.
        is_normal: whether it is normal (or taken as normal), so that an activation's moments can be said.
    """

    std: torch.Tensor | None
    roots: frozenset[fx.Node]
    is_normal: bool = False


@dataclass(frozen=True, eq=False)
class Clip:
    """That a value is another one clipped to [low, high]."""

    of: Moments
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a value.

    Arguments:
        mean: of each channel, float64 of shape (channels,).
        axis: that of the channels, counted from the front.
        terms: by source, its factor for each channel.
        clip: set where the value is a clip's, so that a clip of it is one clip, too.
    """

    mean: torch.Tensor
    axis: int
    terms: Mapping[Source, torch.Tensor]
    clip: Clip | None = None

    @classmethod
    def of(cls, mean: torch.Tensor, axis: int, source: Source, clip: Clip | None = None) -> Moments:
        """A source itself."""
        return cls(mean, axis, {source: torch.ones_like(mean)}, clip)

    @property
    def roots(self) -> frozenset[fx.Node]:
        """The layers of whose outputs it is made, with no other layer between."""
        return frozenset[fx.Node]().union(*(source.roots for source in self.terms))

    @property
    def std(self) -> torch.Tensor | None:
        """Deviation of each channel, where it is known."""
        if sum(len(source.roots) for source in self.terms) > len(self.roots):
            return None
        total = torch.zeros_like(self.mean)
        for source, factor in self.terms.items():
            if source.std is None:
                return None
            total = torch.hypot(total, factor * source.std)
        return total

    @property
    def is_normal(self) -> bool:
        """Whether one of its sources is."""
        return any(source.is_normal for source in self.terms)

    def scaled(self, factor: torch.Tensor | float) -> Moments:
        """Of factor * x."""
        return Moments(self.mean * factor, self.axis, {source: old * factor for source, old in self.terms.items()})

    def shifted(self, shift: torch.Tensor) -> Moments:
        """Of x + shift."""
        return Moments(self.mean + shift, self.axis, self.terms)

    def plus(self, other: Moments) -> Moments:
        """Of x + y, which have the same channels."""
        terms = dict(self.terms)
        for source, factor in other.terms.items():
            terms[source] = terms[source] + factor if source in terms else factor
        return Moments(self.mean + other.mean, self.axis, terms)

    def averaged(self, axis: int) -> Moments:
        """Of an average over other axes, which moves the channels' to `axis`."""
        return Moments.of(self.mean, axis, Source(None, self.roots))

    def repeated(self, times: int) -> Moments:
        """Of features of which `times` in a row belong to one channel, as flattening lays them out."""
        std = None if self.std is None else self.std.repeat_interleave(times)
        return Moments.of(self.mean.repeat_interleave(times), 1, Source(std, self.roots, self.is_normal))

    def clipped(self, low: float, high: float) -> Moments | str:
        """Of x clipped to [low, high]; or why it is not known. A clip of a clip is one with the bounds clipped."""
        if self.clip is not None:
            bounds = (min(max(bound, low), high) for bound in (self.clip.low, self.clip.high))
            return self.clip.of.clipped(*bounds)
        made = self.activated(lambda mean, std: clipped(mean, std, low, high))
        return made if isinstance(made, str) else Moments(made.mean, made.axis, made.terms, Clip(self, low, high))

    def activated(self, function: Callable[[torch.Tensor, torch.Tensor], Pair]) -> Moments | str:
        """Of an activation's output; or why it is not known. `function`: what it makes of a normal's moments."""
        if self.std is None:
            return "the deviation of what {} reads is not known"
        if not self.is_normal:
            return "what {} reads is no normal variable, as an activation made it"
        mean, std = function(self.mean, self.std)
        return Moments.of(mean, self.axis, Source(std, self.roots))


def joined(parts: list[Moments]) -> Moments:
    """Of values one behind the other along their channels; normal where each of them is."""
    stds = [part.std for part in parts]
    known = [std for std in stds if std is not None]
    roots = frozenset[fx.Node]().union(*(part.roots for part in parts))
    is_normal = all(part.is_normal for part in parts)
    source = Source(torch.cat(known) if len(known) == len(parts) else None, roots, is_normal)
    return Moments.of(torch.cat([part.mean for part in parts]), parts[0].axis, source)
