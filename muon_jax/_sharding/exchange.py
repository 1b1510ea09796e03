"""The exchange on one device: tiles → cells → orthogonalised cells → tiles.

Everything here runs on local arrays, inside `shard_map` or on a single device.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muon_jax._orthogonalize.iteration import ALONE, Share
from muon_jax._sharding.buckets import Axes, Block, Bucket, Part, Sizes

Orthogonalizer = Callable[..., jax.Array]


def orthogonalize_local(
    arrays: Sequence[jax.Array],
    blocks: Sequence[Block],
    buckets: Sequence[Bucket],
    sizes: Sizes,
    orthogonalizer: Orthogonalizer,
    chunk: int | None = None,
) -> list[jax.Array]:
    """Orthogonalises the matrices of every block, each of them on one device or one group.

    Args:
        arrays: a block each, `(count, local fan_in, local fan_out)`.
        blocks, buckets, sizes: what `plan_buckets` took and gave.
        orthogonalizer: `(..., fan_in, fan_out) -> (..., fan_in, fan_out)`.
        chunk: how many cells of a bucket a device holds at once; `None` is all.

    Returns:
        Arrays like `arrays`.
    """
    done: dict[int, list[tuple[int, jax.Array]]] = defaultdict(list)
    size = dict(sizes)
    previous = None
    calls: dict[int, list[Bucket]] = defaultdict(list)
    for index, bucket in enumerate(buckets):
        calls[bucket.call or -1 - index].append(bucket)
    for together in calls.values():
        parts = [part for bucket in together for part in bucket.parts]
        tiles = [arrays[p.block][p.start : p.stop] for p in parts]
        if chunk is not None and previous is not None:
            tiles, _ = lax.optimization_barrier((tiles, previous))
        run = _Run(together[0], size, orthogonalizer, chunk)
        results = run.exchange(tiles, blocks) if run.bucket.axes else run.whole_here(tiles)
        for part, result in zip(parts, results, strict=True):
            done[part.block].append((part.start, result.astype(arrays[part.block].dtype)))
        previous = results[-1]
    outputs = []
    for index, array in enumerate(arrays):
        pieces = [piece for _, piece in sorted(done[index], key=lambda item: item[0])]
        joined = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces) if pieces else array
        outputs.append(joined)
    return outputs


class _Run:
    def __init__(self, bucket: Bucket, size: dict[str, int], orthogonalizer, chunk: int | None):
        self.bucket = bucket
        self.size = size
        self.orthogonalizer = orthogonalizer
        self.chunk = chunk

    def whole_here(self, tiles: list[jax.Array]) -> list[jax.Array]:
        """Matrices that this device has whole: those of several arrays in one call."""
        form, run = self.bucket.form, self.orthogonalizer
        if len(tiles) > 1:
            tiles = [tile.astype(self.bucket.dtype) for tile in tiles]
            if form is None:
                return orthogonalize_together(functools.partial(_stacked, run), tiles, self.chunk)
            run = functools.partial(run.together, form=form)
            return orthogonalize_together(run, tiles, self.chunk)
        run = functools.partial(run, form=form) if form is not None else run
        if self.bucket.slots == 1:  # a loop over matrices needs none
            return [jnp.expand_dims(apply_checked(run, jnp.squeeze(tiles[0], 0)), 0)]
        return [orthogonalize_chunks(run, tiles[0], self.chunk)]

    def exchange(self, tiles: list[jax.Array], blocks: Sequence[Block]) -> list[jax.Array]:
        bucket = self.bucket
        cut = [
            self._to_cells(tile.astype(bucket.dtype), part, blocks[part.block])
            for tile, part in zip(tiles, bucket.parts, strict=True)
        ]
        cells = jnp.concatenate(cut) if len(cut) > 1 else cut[0]
        table, shared = bucket.deal()
        results: list[jax.Array] = []
        chunk = self.chunk or max(bucket.slots, 1)
        for i in range(0, bucket.slots, chunk):
            if results:
                cells, _ = lax.optimization_barrier((cells, results[-1]))
            slots = slice(i, i + chunk)
            if bucket.resident:
                results.append(self._solve(cells[slots], shared[:, slots]))
            else:
                results.append(self._round(cells, table[:, slots], shared[:, slots]))
        if bucket.resident:
            cells = _joined(results, axis=0)
        else:
            tiles_of_all = _joined(results, axis=1)
            flat = tiles_of_all.reshape(-1, *tiles_of_all.shape[2:])
            cells = _undo_take(flat, table.ravel(), len(cells))
        found, start = [], 0
        for tile, part, piece in zip(tiles, bucket.parts, cut, strict=True):
            own = cells[start : start + len(piece)]
            found.append(self._from_cells(own, part, blocks[part.block], tile.shape))
            start += len(piece)
        return found

    def _round(self, cells: jax.Array, table: np.ndarray, shared: np.ndarray) -> jax.Array:
        """Tiles `(cells, ...)` -> orthogonalised `(devices, slots, ...)`, for the table's slots."""
        tiles = _take(cells, table.ravel()).reshape(*table.shape, *cells.shape[1:])
        x = self._solve(self._gather(tiles), shared)
        return self._scatter(x, tiles.shape)

    def _solve(self, x: jax.Array, shared: np.ndarray) -> jax.Array:
        """Cells `(slots, lead, other)`."""
        bucket, run = self.bucket, self.orthogonalizer
        if bucket.cut:
            y = run(x.mT, form=bucket.form, share=self._share(shared)).mT
        else:
            told = bucket.form is None or run.tells_sides(bucket.lead, bucket.other)
            run = run if bucket.form is None else functools.partial(run, form=bucket.form)
            turn = told and bucket.parts[0].flip
            y = apply_checked(run, x.mT).mT if turn else apply_checked(run, x)
        return y.astype(bucket.dtype)

    # Tiles to whole cells and back. `tiles` is (devices, slots, lead here, other here): what this
    # device holds of every cell; a cell is (lead, other).

    def _gather(self, tiles: jax.Array) -> jax.Array:
        moving, still = self._moving(), self._still()
        tiles = self._drop_replicas(tiles, still)
        if moving:
            tiles = lax.all_to_all(tiles, moving, 0, 0)
        _, slots, lead, other = tiles.shape
        x = tiles.reshape(*(self.size[a] for a in moving), slots, lead, other)
        n = len(moving)
        leading = [moving.index(a) for a in self.bucket.lead_axes]
        others = [moving.index(a) for a in self.bucket.other_axes]
        x = x.transpose(n, *leading, n + 1, *others, n + 2)
        return x.reshape(slots, self.bucket.lead, self.bucket.other)

    def _scatter(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        moving, still = self._moving(), self._still()
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
        return self._restore_replicas(x, moving, still)

    def _moving(self) -> Axes:
        lie = self.bucket.lead_axes + self.bucket.other_axes
        return tuple(a for a in self.bucket.axes if a in lie)

    def _still(self) -> Axes:
        lie = self.bucket.lead_axes + self.bucket.other_axes
        return tuple(a for a in self.bucket.axes if a not in lie)

    def _drop_replicas(self, tiles: jax.Array, still: Axes) -> jax.Array:
        """Of the cells, those for devices whose place along the replicated axes is this one's."""
        if not still:
            return tiles
        x = tiles.reshape(*(self.size[a] for a in self.bucket.axes), *tiles.shape[1:])
        for axis in reversed(self.bucket.axes):
            if axis in still:
                at = self.bucket.axes.index(axis)
                x = lax.dynamic_index_in_dim(x, lax.axis_index(axis), at, keepdims=False)
        return x.reshape(-1, *tiles.shape[1:])

    def _restore_replicas(self, x: jax.Array, moving: Axes, still: Axes) -> jax.Array:
        if not still:
            return x
        everyone = lax.all_gather(x, still, axis=0)
        sizes = [self.size[a] for a in (*still, *moving)]
        y = everyone.reshape(*sizes, *x.shape[1:])
        order = [(*still, *moving).index(a) for a in self.bucket.axes]
        rest = range(len(order), y.ndim)
        return y.transpose(*order, *rest).reshape(self.bucket.devices, *x.shape[1:])

    # A matrix's tile to the tiles of its cells, and back.

    def _to_cells(self, tile: jax.Array, part: Part, block: Block) -> jax.Array:
        """`(matrices, local fan_in, local fan_out)` -> `(cells, lead here, other here)`."""
        x = tile.mT if part.flip else tile
        if not self.bucket.cut:
            return x
        x = self._align(x, part, block)
        if self.bucket.resident:
            return _pad(x, self.bucket.lead)
        piece = self.bucket.lead // self.bucket.devices
        return _pad(x, part.cells * piece).reshape(-1, piece, x.shape[2])

    def _from_cells(
        self, cells: jax.Array, part: Part, block: Block, shape: tuple[int, ...]
    ) -> jax.Array:
        x = cells
        if self.bucket.cut:
            x = x.reshape(part.matrices, -1, x.shape[2])
            x = self._unalign(x, part, block, shape[2] if part.flip else shape[1])
        return x.mT if part.flip else x

    def _align(self, x: jax.Array, part: Part, block: Block) -> jax.Array:
        """Moves `(matrices, lead, other)` so that all axes of the exchange lie along lead."""
        over_other, still, share = self._alignment(part, block, x.shape[1])
        x = _pad(x, share * math.prod(self.size[a] for a in over_other + still))
        if over_other:
            x = lax.all_to_all(x, over_other, 1, 2, tiled=True)
        if still:
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(still) * share, share, 1)
        return x

    def _unalign(self, x: jax.Array, part: Part, block: Block, lead: int) -> jax.Array:
        over_other, still, share = self._alignment(part, block, lead)
        x = x[:, :share]
        if still:
            x = lax.all_gather(x, still, axis=1, tiled=True)
        if over_other:
            x = lax.all_to_all(x, over_other, 2, 1, tiled=True)
        return x[:, :lead]

    def _alignment(self, part: Part, block: Block, lead: int) -> tuple[Axes, Axes, int]:
        over_other = block.in_axes if part.flip else block.out_axes
        lie = block.in_axes + block.out_axes
        still = tuple(a for a in self.bucket.axes if a not in lie)
        return over_other, still, -(-lead // math.prod(self.size[a] for a in over_other + still))

    def _share(self, shared: np.ndarray) -> Share:
        """Sums over the devices that hold cells of the same matrix."""
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

        return Share(total)


def orthogonalize_chunks(
    orthogonalizer: Orthogonalizer, x: jax.Array, chunk: int | None
) -> jax.Array:
    """`(*batch, fan_in, fan_out)` orthogonalised, at most `chunk` matrices at once; `None` is all.

    Batch axes are not merged: what is split over a mesh would be put together.
    """
    previous = None

    def run(x: jax.Array) -> jax.Array:
        nonlocal previous
        matrices = math.prod(x.shape[:-2])
        if chunk is None or matrices <= chunk:
            if previous is not None:
                x, _ = lax.optimization_barrier((x, previous))
            previous = apply_checked(orthogonalizer, x)
            return previous
        axis, size = next((axis, size) for axis, size in enumerate(x.shape) if size > 1)
        step = max(1, chunk * size // matrices)
        starts = range(0, size, step)
        slices = [lax.slice_in_dim(x, i, min(i + step, size), axis=axis) for i in starts]
        return _joined([run(piece) for piece in slices], axis)

    return run(x)


def orthogonalize_together(
    run: Callable[[list[jax.Array]], Sequence[jax.Array]], tiles: list[jax.Array], chunk: int | None
) -> list[jax.Array]:
    """Stacks `(count, m, n)` orthogonalised, at most `chunk` matrices at once; `None` is all."""
    most = chunk or sum(map(len, tiles))
    rounds: list[list[tuple[int, jax.Array]]] = []
    room = 0
    for index, tile in enumerate(tiles):
        start = 0
        while start < len(tile):
            if not room:
                rounds.append([])
                room = most
            piece = tile[start : start + room]
            rounds[-1].append((index, piece))
            start, room = start + len(piece), room - len(piece)
    done: list[list[jax.Array]] = [[] for _ in tiles]
    previous = None
    for pieces in rounds:
        xs = [x for _, x in pieces]
        if previous is not None:
            xs, _ = lax.optimization_barrier((xs, previous))
        ys = run(xs)
        previous = ys[-1]
        for (index, _), y in zip(pieces, ys, strict=True):
            done[index].append(y)
    return [_joined(found, 0) for found in done]


def _stacked(orthogonalizer: Orthogonalizer, xs: list[jax.Array]) -> Sequence[jax.Array]:
    """Arrays of one shape as one."""
    y = apply_checked(orthogonalizer, jnp.concatenate(xs))
    return jnp.split(y, np.cumsum([len(x) for x in xs])[:-1])


def apply_checked(orthogonalizer: Orthogonalizer, x: jax.Array) -> jax.Array:
    """`orthogonalizer(x)`, which must have the shape of `x`.

    Raises:
        ValueError: it has another one, or none.
    """
    y = orthogonalizer(x)
    shape = getattr(y, "shape", None)
    if shape != x.shape:
        returned = f"an array of shape {shape}" if shape is not None else type(y).__name__
        raise ValueError(
            "An orthogonalizer must return an array of its argument's shape, (..., fan_in, "
            f"fan_out); for {x.shape} it returned {returned}."
        )
    return y


def _joined(arrays: list[jax.Array], axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)


def _pad(x: jax.Array, lead: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, lead - x.shape[1]), (0, 0))) if lead > x.shape[1] else x


def _take(x: jax.Array, index: np.ndarray) -> jax.Array:
    """Rows of `x` by index, zeros where it is negative."""
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
    """`(..., n, n)` Hermitian -> `(..., n + 1, n / 2)`, every number once; odd n stays.

    Rectangular full packed storage: the two diagonal blocks share one square, one as its lower and
    the other as its upper triangle.
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
