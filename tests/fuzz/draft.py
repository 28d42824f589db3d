"""A net in the making: what has been chosen so far, and what the next layer may read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor

from tests.fuzz.description import outputs_on_meta
from tests.fuzz.layer import Layer, Values

Choose: TypeAlias = Callable[[int, int], int]
Item = TypeVar("Item")

LARGEST_VALUE = 512  # numbers a sample, no fewer than the largest input: what costs time is capture, not arithmetic
LAYERS, MOST_LAYERS = 12, 16  # in the mean (nearly), at most


class Draft:
    """A net in the making: the layers so far, and a tensor without numbers for each value (batch 2)."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.layers: list[Layer] = []
        self.values: list[Tensor] = []
        self.owners: dict[int, tuple[int, ...]] = {}  # by layer with parameters: shape that it reads

    def pick(self, items: Sequence[Item]) -> Item:
        """One of them; the first is the simplest."""
        return items[self.choose(0, len(items) - 1)]

    def chance(self, one_in: int) -> bool:
        """True once in so many times; False is the simplest."""
        return self.choose(0, one_in - 1) == one_in - 1

    def stops(self) -> bool:
        """True once in LAYERS times; True is the simplest."""
        return self.choose(0, LAYERS - 1) == 0

    def value(self) -> int:
        """A value to read: the last one more often than not."""
        return len(self.values) - 1 - (self.choose(0, len(self.values) - 1) if self.chance(3) else 0)

    def shape(self, value: int) -> tuple[int, ...]:
        """Its sizes, the batch first (2)."""
        return tuple(self.values[value].shape)

    def like(self, value: int, fits: Callable[[tuple[int, ...]], bool]) -> list[int]:
        """The values whose shape fits, the latest first."""
        return [other for other in reversed(range(len(self.values))) if fits(self.shape(other))]

    def add(self, layer: Layer, owner: Layer | None = None) -> bool:
        """Append a layer unless it gives too large a value; whether it did. `owner` is what an Again repeats."""
        inputs: Values = tuple(self.values[read] for read in layer.reads)
        found = outputs_on_meta(owner or layer, inputs)
        if any(math.prod(value.shape[1:]) > LARGEST_VALUE for value in found):
            return False
        if (owner or layer).build(inputs) is not None and owner is None:
            self.owners[len(self.layers)] = tuple(inputs[0].shape)
        self.layers.append(layer)
        self.values += found
        return True
