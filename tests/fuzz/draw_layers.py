"""One random layer: what fits the value it reads, by the value's rank and sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tests.fuzz.draft import Draft
from tests.fuzz.layer import Layer, Weights
from tests.fuzz.layers import (
    Again,
    BatchNorm,
    Convolution,
    LayerNorm,
    Linear,
    TransposedConvolution,
    WithParameter,
)
from tests.fuzz.plain_layers import (
    PAIRS,
    UNARY,
    AdaptivePool,
    Attention,
    Clamp,
    Concat,
    Flatten,
    Interpolate,
    Mean,
    NumberOperation,
    Pair,
    Permute,
    Pool,
    Product,
    Slice,
    Softmax,
    Split,
    Unary,
    Unflatten,
    WithNumber,
)

Drawer: TypeAlias = Callable[[Draft, int], Layer]
NUMBER_OPERATIONS: tuple[NumberOperation, ...] = ("add", "multiply", "subtract", "reverse_subtract", "divide")
ACTIVATIONS = ("relu", "relu", "relu", *UNARY)


def draw_layer(draft: Draft) -> None:
    """Append a layer that fits a value of the draft; a relu where what was drawn would be too large."""
    x = draft.value()
    if draft.owners and draft.chance(12) and _repeat(draft):
        return
    layer = draft.pick(_fitting(draft, x))(draft, x)
    if not draft.add(layer):
        draft.add(Unary((x,)))


def _repeat(draft: Draft) -> bool:
    """A layer with parameters once more; False if no value fits any."""
    owner = draft.pick(sorted(draft.owners))
    x = draft.pick(draft.like(0, lambda shape: shape == draft.owners[owner]))
    return draft.add(Again((x,), owner), draft.layers[owner])


def _fitting(draft: Draft, x: int) -> list[Drawer]:
    shape = draft.shape(x)
    rank = len(shape)
    fitting: list[Drawer] = [_unary, _unary, _unary, _linear, _pair, _pair, _with_number, _concat]
    if rank >= 3:
        fitting = [*(_convolution,) * 5, *fitting, _batch_norm, _pool, _pool]
        fitting += [_adaptive_pool, _mean, _product, _permute, _flatten]
    if rank in (3, 4):
        fitting += [_transposed_convolution, _attention]
    if rank == 4:
        fitting += [_interpolate]
    return [*fitting, _unary, _unary, _clamp, _softmax, _split, _slice, _unflatten, _with_parameter, _layer_norm, _pair]


def _weights(draft: Draft) -> Weights:
    return Weights(
        magnitude=draft.pick((0, 0, 0, 0, 0, 0, 0, 1, -1, -3, -6, 3)),
        bias=draft.pick((0, 0, 0, None, -2, 2, 4, -6)),
        dead=draft.pick((0, 0, 0, 0, 0, 1, 2, 99)),
        uneven=draft.chance(5),
        constant=draft.chance(10),
    )


def _axis(draft: Draft, x: int) -> int:
    return draft.choose(1, len(draft.shape(x)) - 1)


def _convolution(draft: Draft, x: int) -> Layer:
    channels, *spatial = draft.shape(x)[1:]
    before = draft.pick((0, 1, 2))
    after = before if not draft.chance(4) else draft.pick((0, 1, 2))
    room = min(spatial) + before + after
    dilation = draft.pick((1, 1, 1, 2, 3))
    kernels = [size for size in (1, 3, 2, 5) if dilation * (size - 1) + 1 <= room]
    kernel = draft.pick(kernels)
    groups = draft.pick([1, 1, *(count for count in (channels, 2, 3) if channels % count == 0)])
    return Convolution(
        (x,),
        channels=groups * draft.pick((1, 2, 3, 4) if groups == 1 else (1, 2)),
        kernel=kernel,
        stride=draft.pick((1, 1, 2, 3)),
        # torch 2.13 crashes in a dilated 1x1 convolution of padded channels-last images of width 1.
        dilation=dilation if kernel > 1 else 1,
        groups=groups,
        before=before,
        after=after,
        weights=_weights(draft),
    )


def _transposed_convolution(draft: Draft, x: int) -> Layer:
    channels, kernel, stride = draft.choose(1, 3), draft.choose(1, 3), draft.choose(1, 2)
    return TransposedConvolution((x,), channels, kernel, stride, _weights(draft))


def _linear(draft: Draft, x: int) -> Layer:
    return Linear((x,), draft.pick((4, 3, 2, 1, 8)), _weights(draft))


def _batch_norm(draft: Draft, x: int) -> Layer:
    return BatchNorm((x,), _weights(draft))


def _layer_norm(draft: Draft, x: int) -> Layer:
    return LayerNorm((x,), _weights(draft))


def _with_parameter(draft: Draft, x: int) -> Layer:
    return WithParameter((x,), draft.pick(("add", "multiply", "where")), _weights(draft))


def _unary(draft: Draft, x: int) -> Layer:
    return Unary((x,), draft.pick(ACTIVATIONS))


def _clamp(draft: Draft, x: int) -> Layer:
    low, high = draft.pick(((0.0, None), (0.0, 6.0), (-1.0, 1.0), (None, 1.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 1e-3)))
    return Clamp((x,), low, high)


def _softmax(draft: Draft, x: int) -> Layer:
    return Softmax((x,), draft.pick((-1, _axis(draft, x))))


def _pair(draft: Draft, x: int) -> Layer:
    own = draft.shape(x)
    other = draft.pick([x, *draft.like(x, lambda shape: _broadcasts(own, shape))])
    reads = (x, other) if not draft.chance(2) else (other, x)
    return Pair(reads, draft.pick(("add", "add", "multiply", *PAIRS)))


def _broadcasts(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two shapes of one rank broadcast (the batch is 2 in both)."""
    pairs = list(zip(first, second, strict=False))
    return len(first) == len(second) and all(a == b or 1 in (a, b) for a, b in pairs)


def _with_number(draft: Draft, x: int) -> Layer:
    how = draft.pick(NUMBER_OPERATIONS)
    return WithNumber((x,), how, draft.pick((1.0, 0.5, 2.0, -1.0, 3.0, 0.1, 1e-4, 100.0, 1 / 3)))


def _product(draft: Draft, x: int) -> Layer:
    *outer, inner = draft.shape(x)
    transposed = draft.like(x, lambda shape: shape[-1] == inner and shape[:-2] == tuple(outer[:-1]))
    plain = draft.like(x, lambda shape: shape[:-1] == (*outer[:-1], inner) and len(shape) == len(outer) + 1)
    if plain and draft.chance(2):
        return Product((x, draft.pick(plain)), transposed=False)
    return Product((x, draft.pick([x, *(value for value in transposed if len(draft.shape(value)) > 2)])))


def _attention(draft: Draft, x: int) -> Layer:
    same = draft.like(x, lambda shape: shape == draft.shape(x))
    return Attention((x, draft.pick([x, *same]), draft.pick([x, *same])))


def _pool(draft: Draft, x: int) -> Layer:
    side = min(draft.shape(x)[2:])
    kernel = draft.pick([size for size in (2, 3, 1) if size <= side])
    return Pool(
        (x,),
        draft.pick(("maximum", "average")),
        kernel,
        stride=draft.choose(1, 3),
        padding=draft.choose(0, kernel // 2),
        ceil_mode=draft.chance(3),
        count_padding=not draft.chance(3),
    )


def _adaptive_pool(draft: Draft, x: int) -> Layer:
    sizes = draft.shape(x)[2:]
    return AdaptivePool((x,), draft.pick([1, 1, *(size for size in (2, 3) if all(n % size == 0 for n in sizes))]))


def _mean(draft: Draft, x: int) -> Layer:
    rank = len(draft.shape(x))
    spatial = tuple(range(2, rank))
    axes = draft.pick((spatial, spatial, (1,), (rank - 1,), (1, rank - 1)))
    return Mean((x,), tuple(sorted(set(axes))), draft.chance(2) or len(axes) == rank - 1)


def _concat(draft: Draft, x: int) -> Layer:
    axis, own = _axis(draft, x), draft.shape(x)
    fits = draft.like(x, lambda s: len(s) == len(own) and all(s[i] == own[i] for i in range(len(s)) if i != axis))
    others = [draft.pick([*fits, x]) for _ in range(draft.choose(1, 2))]
    return Concat((x, *others), axis)


def _split(draft: Draft, x: int) -> Layer:
    axis = _axis(draft, x)
    size = draft.shape(x)[axis]
    if size < 2:
        return Slice((x,), axis)
    return Split((x,), axis, draft.choose(1, size - 1), chunk=draft.chance(2))


def _slice(draft: Draft, x: int) -> Layer:
    axis = _axis(draft, x)
    size = draft.shape(x)[axis]
    start = draft.choose(0, size - 1)
    return Slice((x,), axis, start, draft.choose(start + 1, size), draft.pick((1, 1, 2)))


def _permute(draft: Draft, x: int) -> Layer:
    rank = len(draft.shape(x))
    if draft.chance(2):
        first = draft.choose(1, rank - 2)
        return Permute((x,), (first, draft.choose(first + 1, rank - 1)), by_transpose=True)
    turn = draft.choose(0, rank - 2)
    axes = list(range(1, rank))
    return Permute((x,), (0, *axes[turn:], *axes[:turn]))


def _flatten(draft: Draft, x: int) -> Layer:
    return Flatten((x,), _axis(draft, x))


def _unflatten(draft: Draft, x: int) -> Layer:
    axis = _axis(draft, x)
    if len(draft.shape(x)) > 4:
        return Flatten((x,), 1)
    size = draft.shape(x)[axis]
    return Unflatten((x,), axis, draft.pick([count for count in (1, 2, 3, size) if size % count == 0]))


def _interpolate(draft: Draft, x: int) -> Layer:
    return Interpolate((x,), draft.pick(("nearest", "bilinear")), draft.pick((2, 3)), draft.chance(4))
