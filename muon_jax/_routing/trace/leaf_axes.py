"""The axes of an array in terms of the axes of the leaf that it was made from.

An axis of the array is a product of factors, the slowest first. Each factor has a size and the axes
of the leaf that it runs along. A factor without axes comes from a broadcast or from other arrays.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence

LeafAxes = frozenset[int]
Axis = tuple[tuple[LeafAxes, int], ...]
Axes = tuple[Axis, ...]

NONE: LeafAxes = frozenset()


def leaf_axes(shape: Sequence[int]) -> Axes:
    """Returns the axes of the leaf itself."""
    return tuple(((frozenset((i,)), size),) for i, size in enumerate(shape))


def blank(size: int) -> Axis:
    return ((NONE, size),)


def along(axes: Iterable[Axis]) -> LeafAxes:
    """Returns the leaf's axes that lie along any of these."""
    return frozenset().union(*(which for axis in axes for which, _ in axis))


def length(axis: Axis) -> int:
    return math.prod(size for _, size in axis)


def resize(axis: Axis, size: int) -> Axis:
    """Returns the axis with another size: a slice, a shard, a padded or a concatenated axis."""
    if length(axis) == size:
        return axis
    if not along([axis]):
        return blank(size)
    faster = math.prod(n for _, n in axis[1:])
    if faster and size % faster == 0:
        return ((axis[0][0], size // faster), *axis[1:])
    return ((along([axis]), size),)


def resize_all(axes: Axes, shape: Sequence[int]) -> Axes:
    return tuple(map(resize, axes, shape))


def pick(axes: Axes, source: Mapping[int, int], shape: Sequence[int]) -> Axes:
    """Returns axes of this shape, of which `i` is `source[i]` of the given ones or a blank one."""
    return tuple(
        resize(axes[source[i]], size) if i in source else blank(size)
        for i, size in enumerate(shape)
    )


def without(axes: Axes, gone: Container[int]) -> Axes:
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


def fit(axes: Axes, shape: Sequence[int]) -> Axes:
    """Broadcasts the axes to a shape with the same number of axes, or a scalar to any shape."""
    if len(axes) != len(shape):
        return tuple(map(blank, shape))
    return tuple(
        axis if length(axis) == size else blank(size)
        for axis, size in zip(axes, shape, strict=True)
    )


def reshape(axes: Axes, shape: Sequence[int]) -> Axes:
    """Splits and merges factors according to the sizes.

    If they do not divide, each axis may run along all axes of the leaf in the array.
    """
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
                return tuple(((along(axes), size),) for size in shape)
        reshaped.append(tuple(parts) or blank(size))
    return tuple(reshaped)
