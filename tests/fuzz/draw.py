"""Random descriptions, valid by construction, from nothing but whole numbers that somebody chooses.

    choose(low, high)       a number of [low, high]; low is the simplest choice

The same code serves hypothesis (each choice is a draw, so that it shrinks), a seeded random generator, and a shrinker
that replays edited choices.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from hypothesis import strategies as st

from tests.fuzz.description import Description, Recipe, Source
from tests.fuzz.draft import MOST_LAYERS, Choose, Draft
from tests.fuzz.draw_layers import draw_layer


def draw_description(choose: Choose) -> Description:
    """A description: 1 or 2 inputs and up to MOST_LAYERS layers.

    Whether another layer comes is chosen before each, and all else before the first, so that a shrinker that deletes a
    run of choices deletes layers.
    """
    draft = Draft(choose)
    frame = Description(
        sources=(),
        layers=(),
        batch=draft.pick((2, 1, 3, 4)),
        is_dynamic=not draft.chance(6),
        recipe=_draw_recipe(draft),
        seed=choose(0, 999),
    )
    sources = tuple(_draw_sources(draft))
    draft.values = [torch.empty(2, *source.shape, device="meta") for source in sources]
    draw_layer(draft)
    while len(draft.layers) < MOST_LAYERS and not draft.stops():
        draw_layer(draft)
    return replace(frame, sources=sources, layers=tuple(draft.layers))


def _draw_sources(draft: Draft) -> list[Source]:
    rank = draft.pick((3, 3, 3, 3, 2, 2, 1, 4))
    first = _draw_source(draft, _draw_shape(draft, rank))
    if not draft.chance(3):
        return [first]
    other = first.shape if draft.chance(2) else _draw_shape(draft, draft.choose(1, 4))
    return [first, _draw_source(draft, other)]


def _draw_shape(draft: Draft, rank: int) -> tuple[int, ...]:
    sizes = (4, 5, 6, 3, 2, 1) if rank < 4 else (3, 4, 2, 1)
    if rank == 1:
        return (draft.pick((4, 8, 6, 3, 2, 1, 17)),)
    side = draft.pick(sizes)
    spatial = [side if not draft.chance(4) else draft.pick(sizes) for _ in range(rank - 1)]
    return (draft.pick((2, 3, 4, 1, 6, 8)), *spatial)


def _draw_source(draft: Draft, shape: tuple[int, ...]) -> Source:
    if draft.chance(12):
        return Source(shape, constant=draft.pick((0.0, 1.0, -1.0, 1e-30, 1e4)))
    return Source(shape, magnitude=draft.pick((0, 0, 0, 0, 1, -1, 2, -3, -6, 4)))


def _draw_recipe(draft: Draft) -> Recipe:
    return Recipe(
        pipeline=draft.pick(("int8_per_channel", "int8_per_channel", "int8_per_tensor")),
        weight_bits=draft.pick((8, 8, 8, 7, 6, 5, 4, 3, 2)),
        activation_bits=draft.pick((8, 8, 8, 8, 7, 6, 5, 4)),
        shares_concat=draft.chance(3),
    )


@st.composite
def descriptions(draw: st.DrawFn) -> Description:
    """The hypothesis strategy."""
    return draw_description(lambda low, high: draw(st.integers(low, high)))


def random_choices(seed: int, number: int) -> Choose:
    """The choices of program `number` in the run with `seed`."""
    return random.Random(f"{seed}:{number}").randint


def random_description(seed: int, number: int) -> Description:
    """Program `number` of the run with `seed`."""
    return draw_description(random_choices(seed, number))
