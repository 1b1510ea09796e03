"""Orthogonalises every matrix of a tree only once, on any mesh: layouts → exchange → results."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from muon_jax._matrix_axes import MatrixAxes
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._sharding.assignment import plan_buckets
from muon_jax._sharding.auto_axes import assume_layouts
from muon_jax._sharding.buckets import Bucket, Stack, exchange_dtype
from muon_jax._sharding.exchange import Orthogonalizer, orthogonalize_chunks, orthogonalize_local
from muon_jax._sharding.layout import Layout, PlacedArray, Placing, layout_of, whole_shape
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
    """Orthogonalises every matrix of every leaf only once, on any mesh.

    Args:
        leaves, axes: Arrays or tracers, and their matrix axes.
        orthogonalizer: A function `(..., fan_in, fan_out) -> (..., fan_in, fan_out)`.
        placing: The mesh.
        layouts: The mesh axes along each axis of a leaf, or `None` if the caller does not know.
        like: Arrays with the sharding that the leaves have and the results must have.
        chunk_size: The number of matrices of a bucket that a device holds at once; `None` means
            all.
    """
    if placing.mesh is None and jax.device_count() > 1:
        return _orthogonalize_without_mesh(leaves, axes, orthogonalizer, placing, chunk_size)
    if not placing.available_axes and not any(layouts):
        placing = placing._replace(manual_axes=())  # leaves are not split inside `shard_map`
    known: dict[int, Layout] = {}
    for i, (x, layout) in enumerate(zip(leaves, layouts, strict=True)):
        if layout is None:
            layout = layout_of(x, placing) if placing.available_axes else ((),) * x.ndim
        if layout is not None:
            known[i] = layout
    unknown = [i for i in range(len(leaves)) if i not in known]
    groups = assume_layouts(
        [_match_auto_sharding(leaves[i], like[i], placing) for i in unknown],
        [axes[i] for i in unknown],
        newton_schulz_or_none(orthogonalizer),
        placing,
    )
    arrays = [leaves[i] for i in known]
    placed = [
        PlacedArray(
            whole_shape(x.shape, known[i], placing),
            jnp.dtype(x.dtype),
            known[i],
            axes[i].normalized(x.ndim),
        )
        for i, x in zip(known, arrays, strict=True)
    ]
    for group in groups:
        arrays += group.arrays
        placed += group.placed
    results = iter(_program(tuple(placed), placing, orthogonalizer, chunk_size)(*arrays))
    updates = {i: next(results) for i in known}
    for group in groups:
        own = [next(results) for _ in group.arrays]
        for i, update in zip(group.members, group.restore(own), strict=True):
            updates[unknown[i]] = _match_auto_sharding(update, like[unknown[i]], placing)
    return [updates[i].astype(x.dtype) for i, x in enumerate(leaves)]


def _match_auto_sharding(x: jax.Array, like: jax.Array, placing: Placing) -> jax.Array:
    """Gives `x` the sharding of `like` if XLA chooses the sharding."""
    traced = bool(placing.available_axes) and isinstance(x, jax.core.Tracer)
    return match_sharding(x, like) if traced and layout_of(x, placing) is None else x


def _orthogonalize_without_mesh(
    leaves: Sequence[jax.Array],
    axes: Sequence[MatrixAxes],
    orthogonalizer: Orthogonalizer,
    placing: Placing,
    chunk_size: int | None,
) -> list[jax.Array]:
    """Orthogonalises leaves that only XLA knows to be on one device or split over several.

    Single matrices of a traced program are stacked by shape: a new axis changes no split. Batch
    axes are not merged, and arrays outside of a trace may be on different devices.
    """
    updates = {}
    singles = {
        i: x
        for i, x in enumerate(leaves)
        if isinstance(x, jax.core.Tracer) and not axes[i].split(x.shape)[0]
    }
    if singles:
        placed = tuple(
            PlacedArray(x.shape, jnp.dtype(x.dtype), ((),) * x.ndim, axes[i].normalized(x.ndim))
            for i, x in singles.items()
        )
        results = _program(placed, placing, orthogonalizer, chunk_size)(*singles.values())
        updates = dict(zip(singles, results, strict=True))
    return [
        updates[i].astype(x.dtype)
        if i in updates
        else _orthogonalize_here(x, axes[i], orthogonalizer, placing.platform, chunk_size)
        for i, x in enumerate(leaves)
    ]


def _orthogonalize_here(
    x: jax.Array,
    axes: MatrixAxes,
    orthogonalizer: Orthogonalizer,
    platform: str,
    chunk_size: int | None,
) -> jax.Array:
    """Orthogonalises a leaf whose sharding is left to XLA; batch axes are not merged."""
    matrices = axes.to_matrices(x)
    newton_schulz = newton_schulz_or_none(orthogonalizer)
    if newton_schulz is not None:
        m, n = matrices.shape[-2:]
        form = newton_schulz.form(m, n, x.dtype, platform, local=False)
        orthogonalizer = functools.partial(newton_schulz, form=form)
    done = orthogonalize_chunks(orthogonalizer, matrices, chunk_size)
    return axes.from_matrices(done, x.shape)


def _program(placed, placing, orthogonalizer, chunk_size):
    """Returns the exchange as a function of arrays, the same object for the same arguments."""
    try:
        return _cached_program(placed, placing, orthogonalizer, chunk_size)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _cached_program.__wrapped__(placed, placing, orthogonalizer, chunk_size)


@functools.lru_cache(maxsize=64)
def _cached_program(
    placed: tuple[PlacedArray, ...],
    placing: Placing,
    orthogonalizer: Orthogonalizer,
    chunk_size: int | None,
):
    stacks, buckets = plan_exchange(placed, placing, newton_schulz_or_none(orthogonalizer))

    def local(*arrays):
        matrices = [item.axes.to_matrices(x) for item, x in zip(placed, arrays, strict=True)]
        results = orthogonalize_local(
            [x.reshape(-1, *x.shape[-2:]) for x in matrices],
            stacks,
            buckets,
            placing.sizes,
            orthogonalizer,
            chunk_size,
        )
        return tuple(
            item.axes.from_matrices(y.reshape(x.shape), array.shape)
            for item, array, x, y in zip(placed, arrays, matrices, results, strict=True)
        )

    if not placing.available_axes:
        return local
    specs = tuple(item.spec for item in placed)
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


def plan_exchange(
    placed: Sequence[PlacedArray],
    placing: Placing,
    newton_schulz: NewtonSchulz | None,
    platform: str | None = None,
) -> tuple[tuple[Stack, ...], tuple[Bucket, ...]]:
    """Returns the stacks of these arrays and their buckets on `platform`."""
    sizes = placing.sizes
    if newton_schulz is not None:  # no plan depends on these, which may be tracers
        newton_schulz = dataclasses.replace(newton_schulz, eps=0, absolute_eps=None)
    stacks = tuple(item.stack(sizes, exchange_dtype(item.dtype, newton_schulz)) for item in placed)
    return stacks, plan_buckets(stacks, sizes, newton_schulz, platform or placing.platform)


def newton_schulz_or_none(orthogonalizer: Orthogonalizer) -> NewtonSchulz | None:
    """Returns the orthogonalizer if it is `NewtonSchulz`, whose cost is known, else None."""
    return orthogonalizer if isinstance(orthogonalizer, NewtonSchulz) else None
