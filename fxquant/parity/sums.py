"""How the exact simulation added up the products of each layer: float32 by certificate, in parts of it, or float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxquant.simulation.accumulate import Strategy


@dataclass(frozen=True)
class LayerSums:
    """How the sums of one layer were computed.

    Arguments:
        node: the layer's FX node.
        strategy: how, and the largest magnitude that a partial sum may reach.
    """

    node: str
    strategy: Strategy

    def __str__(self) -> str:
        return f"{self.node} ({self.strategy.how}, {self.strategy.share:.2f} of 2^24)"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        strategy = self.strategy
        return {"node": self.node, "how": strategy.how, "parts": strategy.parts, "largest": strategy.largest}


def layer_sums(strategies: Mapping[str, Strategy]) -> tuple[LayerSums, ...]:
    """One a layer, in the order of `strategies`."""
    return tuple(LayerSums(node, strategy) for node, strategy in strategies.items())


def sums_text(sums: Sequence[LayerSums]) -> str:
    """One line: how many layers are added up how, then by name those whose sums may exceed 2^24."""
    beyond = [item for item in sums if item.strategy.share > 1]
    counts = Counter(item.strategy.how for item in sums if item.strategy.share <= 1)
    within = ", ".join(f"{how} at {count} layer{'' if count == 1 else 's'}" for how, count in counts.items())
    named = f"beyond 2^24: {', '.join(map(str, beyond))}" if beyond else "none beyond 2^24"
    return f"sums: {'; '.join(filter(None, (within, named)))}"
