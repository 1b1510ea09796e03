"""Which axes of a leaf lie along which axes of an array made of it, through reshapes and slices.

An axis of the array is a product of factors, the slowest first; each knows its size and the leaf's
axes it runs along. A factor along no axis of the leaf comes from a broadcast or from other arrays.
"""

import math
from collections.abc import Iterable, Sequence

LeafAxes = frozenset[int]
Axis = tuple[tuple[LeafAxes, int], ...]
Axes = tuple[Axis, ...]

NONE: LeafAxes = frozenset()


def leaf_axes(shape: Sequence[int]) -> Axes:
    """Those of the leaf itself."""
    return tuple(((frozenset((i,)), size),) for i, size in enumerate(shape))


def blank(size: int) -> Axis:
    return ((NONE, size),)


def along(axes: Iterable[Axis]) -> LeafAxes:
    """The leaf's axes that lie along any of these."""
    return frozenset().union(*(which for axis in axes for which, _ in axis))


def length(axis: Axis) -> int:
    return math.prod(size for _, size in axis)


def resize(axis: Axis, size: int) -> Axis:
    """A slice, a shard, a padded axis, or several joined end to end."""
    if length(axis) == size:
        return axis
    if not along([axis]):
        return blank(size)
    faster = math.prod(n for _, n in axis[1:])
    if faster and size % faster == 0:
        return ((axis[0][0], size // faster), *axis[1:])
    return ((along([axis]), size),)


def fit(axes: Axes, shape: Sequence[int]) -> Axes:
    """Broadcast to a shape of the same number of axes (a scalar: to any)."""
    if len(axes) != len(shape):
        return tuple(map(blank, shape))
    return tuple(
        axis if length(axis) == size else blank(size)
        for axis, size in zip(axes, shape, strict=True)
    )


def mix(axes: Axes, shape: Sequence[int]) -> Axes:
    """Where nothing is known: every axis may run along all that the array holds of the leaf."""
    return tuple(((along(axes), size),) for size in shape)


def reshape(axes: Axes, shape: Sequence[int]) -> Axes:
    """Factors are split and merged as the sizes tell."""
    factors = [factor for axis in reversed(axes) for factor in reversed(axis) if factor[1] != 1]
    reshaped = []
    for size in shape:
        parts = []
        wanted = size
        while wanted > 1 and factors:
            which, n = factors.pop()
            if wanted % n == 0:
                parts.append((which, n))
                wanted //= n
            elif n % wanted == 0:
                parts.append((which, wanted))
                factors.append((which, n // wanted))
                wanted = 1
            else:
                return mix(axes, shape)
        reshaped.append(tuple(parts) or blank(size))
    return tuple(reshaped)
