"""Splits a leaf into parts, such as heads or fused projections, and merges them again."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from muon_jax._matrix_axes import Interleaved, MatrixAxes
from muon_jax._sharding.buckets import Axes
from muon_jax._sharding.layout import Layout


class Slices(NamedTuple):
    """Consecutive slices of an axis with equal sizes, which become a new axis before it in a part.

    Attributes:
        axis: The axis of the leaf.
        start: The index at which the slices begin.
        number, size: The number of slices, and the size of each.
        whole: Whether the slices cover the whole axis.
    """

    axis: int
    start: int
    number: int
    size: int
    whole: bool


class Rounds(NamedTuple):
    """An axis of a leaf that is reshaped to `(rounds, size)`, because its parts are interleaved."""

    axis: int
    size: int

    def split(self, x: jax.Array) -> jax.Array:
        count = x.shape[self.axis] // self.size
        if not _in_whole_slices(x, self.axis, count):
            x = _gathered(x, self.axis)
        return x.reshape(*x.shape[: self.axis], count, self.size, *x.shape[self.axis + 1 :])

    def merge(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[: self.axis], -1, *x.shape[self.axis + 2 :])


class Part(NamedTuple):
    """Matrices of one shape within a leaf.

    Attributes:
        along_in, along_out: The slices of fan_in and fan_out; `None` for a fan that is not split.
        axes: The matrix axes of the array that `split` returns.
        shape: The shape of that array if the leaf is complete.
        layout: The mesh axes along the axes of that array; `None` if the leaf's are unknown.
        rounds: The axes of the leaf that are first split into rounds.
    """

    along_in: Slices | None
    along_out: Slices | None
    axes: MatrixAxes
    shape: tuple[int, ...]
    layout: Layout | None
    rounds: tuple[Rounds, ...] = ()

    @property
    def slices(self) -> list[Slices]:
        return sorted(each for each in (self.along_in, self.along_out) if each is not None)

    def cuts(self) -> list[tuple[int, int, bool]]:
        """Returns `(axis of the leaf, size, whole)` of all rounds, and of slices outside rounds."""
        cuts = [(r.axis, r.size, True, i) for i, r in enumerate(self.rounds)]
        cuts += [(s.axis, s.size, s.whole, len(self.rounds)) for s in self.slices]
        of_leaf = []
        for axis, size, whole, outer in cuts:
            within = False
            for rounds in reversed(self.rounds[:outer]):
                within |= axis == rounds.axis + 1
                axis -= axis > rounds.axis
            if not within:
                of_leaf.append((axis, size, whole))
        return of_leaf

    @property
    def fans(self) -> tuple[int, int]:
        """`(fan_in, fan_out)`."""
        _, fan_in, fan_out = self.axes.matrix_shape(self.shape)
        return fan_in, fan_out

    def split(self, x: jax.Array) -> jax.Array:
        """Returns this part of a leaf, or inside `shard_map` the device's shard of the part."""
        for rounds in self.rounds:
            x = rounds.split(x)
        for axis, start, number, size, whole in reversed(self.slices):
            count = x.shape[axis] // size if whole else number
            if not (whole and _in_whole_slices(x, axis, count)):
                x = _gathered(x, axis)
            if not whole:
                x = jax.lax.slice_in_dim(x, start, start + count * size, axis=axis)
            x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return x

    def merge(self, y: jax.Array) -> jax.Array:
        """Inverts `split`, except for the rounds, which are common to all parts of a leaf."""
        for axis, *_ in self.slices:
            y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
        return y


def split_into_parts(
    shape: tuple[int, ...],
    axes: MatrixAxes,
    layout: Layout | None = None,
    ways: Callable[[Axes], int] = lambda names: 1,
) -> list[Part]:
    """Returns the parts of a leaf, ordered by fan_in and then by fan_out.

    `shape` is that of the whole leaf. `layout` has the mesh axes along each of its axes, or is
    `None` if they are unknown, and `ways` returns the number of devices along mesh axes.
    """
    for side in ("fan_in", "fan_out"):
        if isinstance(getattr(axes, f"split_{side}"), Interleaved):
            return _split_rounds(shape, axes, side, layout, ways)
    _, *fans = axes.split(shape)
    slices_in = _slices(fans[0][0], shape, axes.split_fan_in)
    slices_out = _slices(fans[1][0], shape, axes.split_fan_out)
    parts = []
    for pair in itertools.product(slices_in, slices_out):
        slices_of = {slices.axis: slices for slices in pair if slices is not None}
        lengths: list[int] = []
        names: list[tuple[str, ...]] = []
        at = {}
        for axis, length in enumerate(shape):
            along = layout[axis] if layout is not None else ()
            if axis in slices_of:
                _, _, count, size, whole = slices_of[axis]
                lengths.append(count)
                names.append(along if whole and count % ways(along) == 0 else ())
                length, along = size, ()
            at[axis] = len(lengths)
            lengths.append(length)
            names.append(along)
        fan_in, fan_out = (tuple(at[axis] for axis in fan) for fan in fans)
        known = None if layout is None else tuple(names)
        parts.append(Part(*pair, MatrixAxes(fan_in, fan_out), tuple(lengths), known))
    return parts


def _split_rounds(
    shape: tuple[int, ...],
    axes: MatrixAxes,
    side: str,
    layout: Layout | None,
    ways: Callable[[Axes], int],
) -> list[Part]:
    """Returns the parts of a leaf with an interleaved fan, whose axis becomes `(rounds, size)`."""
    turns = getattr(axes, f"split_{side}")
    _, *fans = axes.split(shape)
    (axis, *_) = fan = fans[0 if side == "fan_in" else 1]
    size = sum(turns.sizes)
    if not turns.sizes or size < 1 or shape[axis] % size:
        raise ValueError(
            f"Axis {axis} of a leaf of shape {shape} must consist of whole rounds of the sizes "
            f"{turns.sizes}, which have {size} entries."
        )
    count = shape[axis] // size
    along = layout[axis] if layout is not None else ()
    if count % ways(along):
        along = ()
    if layout is not None:
        layout = (*layout[:axis], along, (), *layout[axis + 1 :])

    def moved(fan: Sequence[int]) -> tuple[int, ...]:
        return tuple(a + (a > axis) for a in fan)

    others = {"fan_in": moved(fans[0]), "fan_out": moved(fans[1])}
    # The axis within a round comes first, since the first axis of a fan is split into parts. That
    # reorders rows or columns, with which the orthogonal factor is equivariant.
    own = (axis + 1, axis, *moved(fan)[1:]) if turns.together else (axis + 1, *moved(fan)[1:])
    view = axes._replace(**others | {side: own, f"split_{side}": tuple(turns.sizes)})
    parts = split_into_parts((*shape[:axis], count, size, *shape[axis + 1 :]), view, layout, ways)
    return [part._replace(rounds=(Rounds(axis, size), *part.rounds)) for part in parts]


def merge_parts(parts: Sequence[Part], arrays: Sequence[jax.Array]) -> jax.Array:
    """Merges the parts of a leaf into the leaf."""
    merged = list(zip(parts, map(Part.merge, parts, arrays), strict=True))
    bands = []
    for along_in, band in itertools.groupby(merged, key=lambda pair: pair[0].along_in):
        members = list(band)
        bands.append((along_in, _concatenate([(p.along_out, y) for p, y in members])))
    x = _concatenate(bands)
    for rounds in reversed(parts[0].rounds):
        x = rounds.merge(x)
    return x


def _concatenate(parts: Sequence[tuple[Slices | None, jax.Array]]) -> jax.Array:
    slices, only = parts[0]
    if slices is None or len(parts) == 1:
        return only
    return jnp.concatenate([y for _, y in parts], slices.axis)


def _slices(axis: int, shape: tuple[int, ...], parts: Any) -> list[Slices | None]:
    size = shape[axis]
    listed = tuple(parts) if isinstance(parts, Sequence) else (parts,)
    if not listed or any(not isinstance(n, (int, np.integer)) or n < 1 for n in listed):
        raise ValueError(
            "Parts must be given as a positive number of equal parts or a tuple of positive sizes; "
            f"got {parts!r} for axis {axis} of a leaf of shape {shape}."
        )
    if not isinstance(parts, Sequence):
        if parts == 1:
            return [None]
        if size % parts:
            raise ValueError(
                f"Axis {axis} of a leaf of shape {shape} does not split into {parts} equal parts. "
                "Pass the sizes of the parts instead."
            )
        return [Slices(axis, 0, parts, size // parts, True)]
    if sum(parts) != size:
        raise ValueError(
            f"Parts of the sizes {listed} add up to {sum(parts)}, but axis {axis} of a leaf of "
            f"shape {shape} has {size}."
        )
    slices: list[Slices | None] = []
    start = 0
    for length, same in itertools.groupby(parts):
        count = len(list(same))
        slices.append(Slices(axis, start, count, length, count == len(parts)))
        start += count * length
    return slices


def _in_whole_slices(x: jax.Array, axis: int, count: int) -> bool:
    """Whether Explicit axes, which a reshape must respect, split `axis` between slices."""
    names = _spec(x)[axis] if axis < len(_spec(x)) else None
    mesh = jax.typeof(x).sharding.mesh
    ways = [mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ())]
    return count % math.prod(ways) == 0


def _gathered(x: jax.Array, axis: int) -> jax.Array:
    """Gathers `x` along `axis` if Explicit axes split it there."""
    spec = list(_spec(x))
    if axis >= len(spec) or spec[axis] is None:
        return x
    spec[axis] = None
    return jax.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec)))


def _spec(x: jax.Array) -> PartitionSpec:
    """Returns the spec of `x` over Explicit axes, which is empty over others."""
    return getattr(jax.typeof(x).sharding, "spec", PartitionSpec())
