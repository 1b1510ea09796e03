"""Every matrix of a tree orthogonalised once, on any mesh: where leaves lie → exchange → back."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from muon_jax._matrix_axes import MatrixAxes
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._sharding.assignment import plan_buckets
from muon_jax._sharding.auto_axes import assume_layouts
from muon_jax._sharding.buckets import Block, Bucket, exchange_dtype
from muon_jax._sharding.exchange import Orthogonalizer, orthogonalize_chunks, orthogonalize_local
from muon_jax._sharding.layout import Entry, Layout, Placing, layout_of, whole_shape
from muon_jax._sharding.match_sharding import match_sharding


def orthogonalize_leaves(
    leaves: Sequence[jax.Array],
    axes: Sequence[MatrixAxes],
    orthogonalizer: Orthogonalizer,
    *,
    placing: Placing,
    layouts: Sequence[Layout | None],
    like: Sequence[jax.Array],
    chunk_size: int | None = None,
) -> list[jax.Array]:
    """Orthogonalises every matrix of every leaf once, wherever the leaves lie.

    Args:
        leaves: arrays or tracers.
        axes: the matrix axes of each.
        orthogonalizer: `(..., fan_in, fan_out) -> (..., fan_in, fan_out)`.
        placing: the mesh.
        layouts: where the caller knows the mesh axes along each axis of a leaf.
        like: arrays that lie like the leaves, and like which the results shall lie.
        chunk_size: how many matrices of a bucket a device holds at once; `None` is all.

    Returns:
        Arrays like `leaves`, sharded like them.
    """
    if placing.mesh is None and jax.device_count() > 1:
        return [
            _orthogonalize_here(x, a, orthogonalizer, placing.platform, chunk_size)
            for x, a in zip(leaves, axes, strict=True)
        ]
    if not placing.free and not any(layouts):
        placing = placing._replace(taken=())  # leaves are whole inside `shard_map`
    found: dict[int, Layout] = {}
    for i, (x, layout) in enumerate(zip(leaves, layouts, strict=True)):
        if layout is None:
            layout = layout_of(x, placing) if placing.free else ((),) * x.ndim
        if layout is not None:
            found[i] = layout
    known = list(found)
    unknown = [i for i in range(len(leaves)) if i not in found]
    groups = assume_layouts(
        [_lie_like(leaves[i], like[i], placing) for i in unknown],
        [axes[i] for i in unknown],
        as_solver(orthogonalizer),
        placing,
    )
    arrays = [leaves[i] for i in known]
    entries = [
        Entry(
            whole_shape(x.shape, found[i], placing),
            jnp.dtype(x.dtype),
            found[i],
            axes[i].normalized(x.ndim),
        )
        for i, x in zip(known, arrays, strict=True)
    ]
    for group in groups:
        arrays += group.arrays
        entries += group.entries
    results = iter(_exchange(tuple(entries), placing, orthogonalizer, chunk_size)(*arrays))
    updates = {i: next(results) for i in known}
    for group in groups:
        own = [next(results) for _ in group.arrays]
        for i, update in zip(group.members, group.restore(own), strict=True):
            updates[unknown[i]] = _lie_like(update, like[unknown[i]], placing)
    return [updates[i].astype(x.dtype) for i, x in enumerate(leaves)]


def _lie_like(x: jax.Array, like: jax.Array, placing: Placing) -> jax.Array:
    """`x`, which XLA shall lay out as it does `like`, where the layout is for XLA to choose."""
    free = placing.free and isinstance(x, jax.core.Tracer) and layout_of(x, placing) is None
    return match_sharding(x, like) if free else x


def _orthogonalize_here(
    x: jax.Array,
    axes: MatrixAxes,
    orthogonalizer: Orthogonalizer,
    platform: str,
    chunk_size: int | None,
) -> jax.Array:
    """A leaf whose spreading is left to XLA: batch axes are not merged."""
    matrices = axes.to_matrices(x)
    solver = as_solver(orthogonalizer)
    if solver is not None:
        m, n = matrices.shape[-2:]
        form = solver.form(m, n, x.dtype, platform, local=False)
        orthogonalizer = functools.partial(solver, form=form)
    done = orthogonalize_chunks(orthogonalizer, matrices, chunk_size)
    return axes.from_matrices(done, x.shape)


def _exchange(entries, placing, orthogonalizer, chunk_size):
    """The exchange as a function of the entries' arrays, the same object for the same arguments."""
    try:
        return _built_exchange(entries, placing, orthogonalizer, chunk_size)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _built_exchange.__wrapped__(entries, placing, orthogonalizer, chunk_size)


@functools.lru_cache(maxsize=64)
def _built_exchange(
    entries: tuple[Entry, ...],
    placing: Placing,
    orthogonalizer: Orthogonalizer,
    chunk_size: int | None,
):
    blocks, buckets = plan_entries(entries, placing, as_solver(orthogonalizer))

    def local(*arrays):
        matrices = [entry.axes.to_matrices(x) for entry, x in zip(entries, arrays, strict=True)]
        results = orthogonalize_local(
            [x.reshape(-1, *x.shape[-2:]) for x in matrices],
            blocks,
            buckets,
            placing.sizes,
            orthogonalizer,
            chunk_size,
        )
        return tuple(
            entry.axes.from_matrices(y.reshape(x.shape), array.shape)
            for entry, array, x, y in zip(entries, arrays, matrices, results, strict=True)
        )

    if not placing.free:
        return local
    specs = tuple(entry.spec for entry in entries)
    return jax.jit(
        jax.shard_map(
            local,
            mesh=None if placing.inherited else placing.mesh,
            in_specs=specs,
            out_specs=specs,
            axis_names=placing.local,
            check_vma=False,
        )
    )


def plan_entries(
    entries: Sequence[Entry],
    placing: Placing,
    solver: NewtonSchulz | None,
    platform: str | None = None,
) -> tuple[tuple[Block, ...], tuple[Bucket, ...]]:
    """The blocks of these entries, and the buckets that they fall into on `platform`."""
    sizes = placing.sizes
    blocks = tuple(entry.block(sizes, exchange_dtype(entry.dtype, solver)) for entry in entries)
    return blocks, plan_buckets(blocks, sizes, solver, platform or placing.platform)


def as_solver(orthogonalizer: Orthogonalizer) -> NewtonSchulz | None:
    return orthogonalizer if isinstance(orthogonalizer, NewtonSchulz) else None
