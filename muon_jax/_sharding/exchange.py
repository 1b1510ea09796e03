"""The exchange on one device: shards → tiles → orthogonalised tiles → shards.

Everything here runs on local arrays, inside `shard_map` or on a single device.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muon_jax._orthogonalize.iteration import ALONE, Share, split
from muon_jax._orthogonalize.symmetric import joined
from muon_jax._sharding.buckets import Axes, Bucket, Sizes, Span, Stack, by_call

Orthogonalizer = Callable[..., jax.Array]


def orthogonalize_local(
    arrays: Sequence[jax.Array],
    stacks: Sequence[Stack],
    buckets: Sequence[Bucket],
    sizes: Sizes,
    orthogonalizer: Orthogonalizer,
    chunk: int | None = None,
) -> list[jax.Array]:
    """Orthogonalises the matrices of every stack, each on one device or one group of devices.

    `arrays` has the local array of each stack, `(count, local fan_in, local fan_out)`. At most
    `chunk` tiles of a bucket are on a device at once; `None` means all.
    """
    done: dict[int, dict[int, jax.Array]] = defaultdict(dict)
    size = dict(sizes)
    previous = None
    for together in by_call(buckets):
        spans = [span for bucket in together for span in bucket.spans]
        shards = [arrays[span.stack][span.start : span.stop] for span in spans]
        shards = _after(previous if chunk is not None else None, shards)
        exchange = _Exchange(together[0], size, orthogonalizer, chunk)
        moves = bool(exchange.bucket.axes)
        results = exchange.over_devices(shards, stacks) if moves else exchange.in_place(shards)
        for span, result in zip(spans, results, strict=True):
            done[span.stack][span.start] = result.astype(arrays[span.stack].dtype)
        previous = results[-1]
    return [
        joined([done[i][start] for start in sorted(done[i])]) if i in done else array
        for i, array in enumerate(arrays)
    ]


class _Exchange:
    """The work of one device for a bucket, or for several buckets that share a call."""

    def __init__(self, bucket: Bucket, size: dict[str, int], orthogonalizer, chunk: int | None):
        self.bucket = bucket
        self.size = size
        self.orthogonalizer = orthogonalizer
        self.chunk = chunk
        split_axes = bucket.lead_axes + bucket.other_axes
        self.moving = tuple(a for a in bucket.axes if a in split_axes)
        self.still = tuple(a for a in bucket.axes if a not in split_axes)

    def in_place(self, shards: list[jax.Array]) -> list[jax.Array]:
        """Orthogonalises matrices that are whole on this device, in one call for all arrays."""
        form, run = self.bucket.form, self.orthogonalizer
        if form is None:
            run = functools.partial(_stacked, run)
        else:
            run = functools.partial(run.together, form=form)
        if len(shards) == self.bucket.slots == 1:  # a single matrix needs no batch axis
            [y] = run([jnp.squeeze(shards[0], 0)])
            return [jnp.expand_dims(y, 0)]
        if len(shards) > 1:
            shards = [shard.astype(self.bucket.dtype) for shard in shards]
        return orthogonalize_together(run, shards, self.chunk)

    def over_devices(self, shards: list[jax.Array], stacks: Sequence[Stack]) -> list[jax.Array]:
        """Moves shards to the devices that orthogonalise their matrices, and the results back."""
        bucket = self.bucket
        shards_of_tiles = [
            self._to_tiles(shard.astype(bucket.dtype), span, stacks[span.stack])
            for shard, span in zip(shards, bucket.spans, strict=True)
        ]
        tiles = joined(shards_of_tiles, axis=0)
        table, shared = bucket.assign_slots()
        results: list[jax.Array] = []
        chunk = self.chunk or max(bucket.slots, 1)
        for i in range(0, bucket.slots, chunk):
            tiles = _after(results[-1] if results else None, tiles)
            slots = slice(i, i + chunk)
            if bucket.resident:
                results.append(self._orthogonalize(tiles[slots], shared[:, slots]))
            else:
                results.append(self._round(tiles, table[:, slots], shared[:, slots]))
        if bucket.resident:
            tiles = joined(results, axis=0)
        else:
            by_device = joined(results, axis=1)
            flat = by_device.reshape(-1, *by_device.shape[2:])
            tiles = _undo_take(flat, table.ravel(), len(tiles))
        updates, start = [], 0
        for shard, span, before in zip(shards, bucket.spans, shards_of_tiles, strict=True):
            own = tiles[start : start + len(before)]
            updates.append(self._from_tiles(own, span, stacks[span.stack], shard.shape))
            start += len(before)
        return updates

    def _round(self, tiles: jax.Array, table: np.ndarray, shared: np.ndarray) -> jax.Array:
        """Maps the shards `(tiles, ...)` to orthogonalised shards `(devices, slots, ...)`."""
        shards = _take(tiles, table.ravel()).reshape(*table.shape, *tiles.shape[1:])
        x = self._orthogonalize(self._gather(shards), shared)
        return self._scatter(x, shards.shape)

    def _orthogonalize(self, x: jax.Array, shared: np.ndarray) -> jax.Array:
        """Orthogonalises the tiles `(slots, lead, other)`."""
        bucket, run = self.bucket, self.orthogonalizer
        if bucket.cut:
            y = run(x.mT, form=bucket.form, share=self._share(shared)).mT
        else:
            oriented = bucket.form is None or run.is_oriented(bucket.lead, bucket.other)
            run = run if bucket.form is None else functools.partial(run, form=bucket.form)
            turn = oriented and bucket.spans[0].flip
            y = apply_checked(run, x.mT).mT if turn else apply_checked(run, x)
        return y.astype(bucket.dtype)

    # From shards to tiles and back. `shards` is (devices, slots, local lead, local other), this
    # device's shard of every tile; a tile is (lead, other).

    def _gather(self, shards: jax.Array) -> jax.Array:
        moving = self.moving
        shards = self._drop_replicas(shards)
        if moving:
            shards = lax.all_to_all(shards, moving, 0, 0)
        _, slots, lead, other = shards.shape
        x = shards.reshape(*(self.size[a] for a in moving), slots, lead, other)
        n = len(moving)
        leading = [moving.index(a) for a in self.bucket.lead_axes]
        others = [moving.index(a) for a in self.bucket.other_axes]
        x = x.transpose(n, *leading, n + 1, *others, n + 2)
        return x.reshape(slots, self.bucket.lead, self.bucket.other)

    def _scatter(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        moving = self.moving
        _, slots, lead, other = shape
        leading = [self.size[a] for a in self.bucket.lead_axes]
        others = [self.size[a] for a in self.bucket.other_axes]
        x = x.reshape(slots, *leading, lead, *others, other)
        names = [None, *self.bucket.lead_axes, "lead", *self.bucket.other_axes, "other"]
        order = [names.index(a) for a in moving]
        x = x.transpose(*order, 0, names.index("lead"), names.index("other"))
        x = x.reshape(-1, slots, lead, other)
        if moving:
            x = lax.all_to_all(x, moving, 0, 0)
        return self._restore_replicas(x)

    def _drop_replicas(self, shards: jax.Array) -> jax.Array:
        """Keeps the tiles for devices with this device's position along the replicated axes."""
        if not self.still:
            return shards
        x = shards.reshape(*(self.size[a] for a in self.bucket.axes), *shards.shape[1:])
        for axis in reversed(self.bucket.axes):
            if axis in self.still:
                at = self.bucket.axes.index(axis)
                x = lax.dynamic_index_in_dim(x, lax.axis_index(axis), at, keepdims=False)
        return x.reshape(-1, *shards.shape[1:])

    def _restore_replicas(self, x: jax.Array) -> jax.Array:
        if not self.still:
            return x
        everyone = lax.all_gather(x, self.still, axis=0)
        axes = (*self.still, *self.moving)
        y = everyone.reshape(*(self.size[a] for a in axes), *x.shape[1:])
        order = [axes.index(a) for a in self.bucket.axes]
        rest = range(len(order), y.ndim)
        return y.transpose(*order, *rest).reshape(self.bucket.devices, *x.shape[1:])

    # From this device's shards of matrices to its shards of tiles, and back.

    def _to_tiles(self, shard: jax.Array, span: Span, stack: Stack) -> jax.Array:
        """Maps `(matrices, local fan_in, local fan_out)` to `(tiles, local lead, local other)`."""
        x = shard.mT if span.flip else shard
        if not self.bucket.cut:
            return x
        x = self._align(x, span, stack)
        if self.bucket.resident:
            return _pad(x, self.bucket.lead)
        piece = self.bucket.lead // self.bucket.devices
        return _pad(x, span.tiles * piece).reshape(-1, piece, x.shape[2])

    def _from_tiles(
        self, tiles: jax.Array, span: Span, stack: Stack, shape: tuple[int, ...]
    ) -> jax.Array:
        x = tiles
        if self.bucket.cut:
            x = x.reshape(span.matrices, -1, x.shape[2])
            x = self._unalign(x, span, stack, shape[2] if span.flip else shape[1])
        return x.mT if span.flip else x

    def _align(self, x: jax.Array, span: Span, stack: Stack) -> jax.Array:
        """Moves `(matrices, lead, other)` so that lead is split over all axes of the exchange."""
        over_other, still, share = self._alignment(span, stack, x.shape[1])
        x = _pad(x, share * math.prod(self.size[a] for a in over_other + still))
        if over_other:
            x = lax.all_to_all(x, over_other, 1, 2, tiled=True)
        if still:
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(still) * share, share, 1)
        return x

    def _unalign(self, x: jax.Array, span: Span, stack: Stack, lead: int) -> jax.Array:
        over_other, still, share = self._alignment(span, stack, lead)
        x = x[:, :share]
        if still:
            x = lax.all_gather(x, still, axis=1, tiled=True)
        if over_other:
            x = lax.all_to_all(x, over_other, 2, 1, tiled=True)
        return x[:, :lead]

    def _alignment(self, span: Span, stack: Stack, lead: int) -> tuple[Axes, Axes, int]:
        over_other = stack.in_axes if span.flip else stack.out_axes
        split_axes = stack.in_axes + stack.out_axes
        still = tuple(a for a in self.bucket.axes if a not in split_axes)
        return over_other, still, -(-lead // math.prod(self.size[a] for a in over_other + still))

    def _share(self, shared: np.ndarray) -> Share:
        """Returns a function that sums over the devices that hold tiles of the same matrix."""
        bucket = self.bucket
        if bucket.width == 1:
            return ALONE
        groups = np.arange(bucket.devices).reshape(-1, bucket.width).tolist()
        within = None if bucket.width == bucket.devices else groups
        here = jnp.asarray(shared)[lax.axis_index(bucket.axes)][:, None, None]

        def total(x):
            packed = _pack_symmetric(x) if x.shape[-1] > 1 else x
            summed = lax.psum(jnp.where(here, packed, 0), bucket.axes, axis_index_groups=within)
            summed = _unpack_symmetric(summed) if x.shape[-1] > 1 else summed
            return jnp.where(here, summed, x)

        return total


def orthogonalize_chunks(
    orthogonalizer: Orthogonalizer, x: jax.Array, chunk: int | None
) -> jax.Array:
    """Orthogonalises `(*batch, fan_in, fan_out)`, at most `chunk` matrices at once; `None` is all.

    Batch axes are not merged, because that would gather axes that are split over a mesh.
    """
    previous = None

    def run(x: jax.Array) -> jax.Array:
        nonlocal previous
        matrices = math.prod(x.shape[:-2])
        if chunk is None or matrices <= chunk:
            previous = apply_checked(orthogonalizer, _after(previous, x))
            return previous
        axis, size = next((axis, size) for axis, size in enumerate(x.shape) if size > 1)
        step = max(1, chunk * size // matrices)
        starts = range(0, size, step)
        slices = [lax.slice_in_dim(x, i, min(i + step, size), axis=axis) for i in starts]
        return joined([run(part) for part in slices], axis)

    return run(x)


def orthogonalize_together(
    run: Callable[[Any], Sequence[jax.Array]], shards: list[jax.Array], chunk: int | None
) -> list[jax.Array]:
    """Orthogonalises stacks `(count, m, n)`, at most `chunk` matrices at once; `None` is all."""
    if chunk is None:
        return list(run(shards))
    rounds: list[list[tuple[int, jax.Array]]] = []
    room = 0
    for index, shard in enumerate(shards):
        start = 0
        while start < len(shard):
            if not room:
                rounds.append([])
                room = chunk
            part = shard[start : start + room]
            rounds[-1].append((index, part))
            start, room = start + len(part), room - len(part)
    done: list[list[jax.Array]] = [[] for _ in shards]
    previous = None
    for parts in rounds:
        ys = run(_after(previous, [x for _, x in parts]))
        previous = ys[-1]
        for (index, _), y in zip(parts, ys, strict=True):
            done[index].append(y)
    return [joined(results, 0) for results in done]


def _after(previous: jax.Array | None, x: Any) -> Any:
    """Delays `x` until after `previous`, so that XLA does not need the memory of both at once."""
    return x if previous is None else lax.optimization_barrier((x, previous))[0]


def _stacked(orthogonalizer: Orthogonalizer, xs: list[jax.Array]) -> Sequence[jax.Array]:
    """Concatenates arrays of one matrix shape, orthogonalises them and splits the result."""
    return split(apply_checked(orthogonalizer, joined(xs)), [len(x) for x in xs])


def apply_checked(orthogonalizer: Orthogonalizer, x: jax.Array) -> jax.Array:
    """Returns `orthogonalizer(x)` and checks that it has the shape of `x`."""
    y = orthogonalizer(x)
    shape = getattr(y, "shape", None)
    if shape != x.shape:
        returned = f"an array of shape {shape}" if shape is not None else type(y).__name__
        raise ValueError(
            "An orthogonalizer must return an array of the same shape as its argument, (..., "
            f"fan_in, fan_out); for shape {x.shape} it returned {returned}."
        )
    return y


def _pad(x: jax.Array, lead: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, lead - x.shape[1]), (0, 0))) if lead > x.shape[1] else x


def _take(x: jax.Array, index: np.ndarray) -> jax.Array:
    """Returns the rows of `x` with these indices, and zeros for negative indices."""
    empty = int((index < 0).sum())
    full = len(index) - empty
    if np.array_equal(index[:full], np.arange(full)) and full == len(x):
        return jnp.pad(x, ((0, empty), *[(0, 0)] * (x.ndim - 1))) if empty else x
    padded = jnp.pad(x, ((0, 1), *[(0, 0)] * (x.ndim - 1))) if empty else x
    return padded[np.where(index < 0, len(x), index)]


def _undo_take(x: jax.Array, index: np.ndarray, count: int) -> jax.Array:
    inverse = np.zeros(count, dtype=int)
    inverse[index[index >= 0]] = np.flatnonzero(index >= 0)
    return x[:count] if np.array_equal(inverse, np.arange(count)) else x[inverse]


def _pack_symmetric(x: jax.Array) -> jax.Array:
    """Packs Hermitian `(..., n, n)` into `(..., n + 1, n / 2)` without repetition; odd n is kept.

    This is rectangular full packed storage: the two diagonal blocks share one square, one as its
    lower and the other as its upper triangle.
    """
    n = x.shape[-1]
    if n % 2:
        return x
    half = n // 2
    first, corner, second = x[..., :half, :half], x[..., half:, :half], x[..., half:, half:]
    lower = np.tri(half, dtype=bool)
    diagonal = jnp.diagonal(second, axis1=-2, axis2=-1)[..., None, :]
    return jnp.concatenate([corner, jnp.where(lower, first, second), diagonal], axis=-2)


def _unpack_symmetric(packed: jax.Array) -> jax.Array:
    if packed.shape[-1] == packed.shape[-2]:
        return packed
    half = packed.shape[-1]
    corner, square, diagonal = jnp.split(packed, [half, 2 * half], axis=-2)
    lower, eye = np.tri(half, dtype=bool), np.eye(half, dtype=bool)
    turned = jnp.conj(square.mT)
    first = jnp.where(lower, square, turned)
    second = jnp.where(eye, diagonal, jnp.where(lower, turned, square))
    return jnp.concatenate(
        [
            jnp.concatenate([first, jnp.conj(corner.mT)], axis=-1),
            jnp.concatenate([corner, second], axis=-1),
        ],
        axis=-2,
    )
