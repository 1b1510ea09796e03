"""XXᵀ on TPU by a Pallas kernel that computes the tiles on and below the diagonal only.

Not in use: no TPU was at hand to measure whether it wins. `_symmetric.gram` and `_symmetric.square`
are where it would go. With t tiles a side it takes (t + 1) / (2 t) of the plain product's FLOPs, as
t panels do, but each tile and its mirror image go from the accumulator to memory once, with no
pass to mirror.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128  # every block side is a multiple of the vector registers' length

# A core lends 16 MiB to a kernel by default; two are left to what the compiler adds.
_VMEM_BYTES = 14 << 20


def gram(
    x: jax.Array,
    *,
    tile: int = 512,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """XXᵀ, exactly symmetric.

    Args:
        x: `(..., n, k)`, bfloat16 or float32; sums are float32, float32 products of the highest
            precision.
        tile: side of the output's tiles: 128, 256, 384 or 512. Smaller ones skip more above the
            diagonal, but a step does only `tile` FLOPs for each number it fetches.
        dtype: of the result.
        interpret: run without a TPU, for tests.

    Returns:
        `(..., n, n)` in `dtype`.

    Raises:
        ValueError: no such tile.
    """
    if tile not in (128, 256, 384, 512):
        raise ValueError(f"tile must be 128, 256, 384 or 512; got {tile}.")
    run = functools.partial(_gram, tile=tile, dtype=jnp.dtype(dtype), interpret=interpret)
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], x.shape[-2]), dtype)
    for _ in range(x.ndim - 3):
        run = jax.vmap(run)  # leading axes become grid axes: a sharded one must not be merged
    return run(x) if x.ndim > 2 else run(x[None])[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _gram(x: jax.Array, tile: int, dtype: jnp.dtype, interpret: bool) -> jax.Array:
    """`gram` of `(b, n, k)`."""
    batch, n, k = x.shape
    tile = min(tile, _round_up(n, _LANES))
    tiles = math.ceil(n / tile)
    steps = math.ceil(k / _depth(tile, x.dtype))
    depth = _round_up(math.ceil(k / steps), _LANES)
    x = jnp.pad(x, ((0, 0), (0, tiles * tile - n), (0, steps * depth - k)))
    rows, columns = (jnp.asarray(i, jnp.int32) for i in np.tril_indices(tiles))

    def operand(side: int) -> pl.BlockSpec:
        # The last step writes only: it keeps the block of the step before, which costs no fetch.
        return pl.BlockSpec(
            (None, tile, depth),
            lambda b, pair, step, *indices: (b, indices[side][pair], jnp.minimum(step, steps - 1)),
        )

    def result(b, pair, step, rows, columns):
        mirrored = step == steps
        i, j = rows[pair], columns[pair]
        return b, jnp.where(mirrored, j, i), jnp.where(mirrored, i, j)

    run = pl.pallas_call(
        functools.partial(_kernel, steps=steps),
        out_shape=jax.ShapeDtypeStruct((batch, tiles * tile, tiles * tile), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, len(rows), steps + 1),
            in_specs=[operand(0), operand(1)],
            out_specs=pl.BlockSpec((None, tile, tile), result),
            scratch_shapes=[pltpu.VMEM((tile, tile), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * len(rows) * tile**2 * steps * depth,
            bytes_accessed=x.nbytes * (tiles + 1) + batch * (tiles * tile) ** 2 * dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="gram",
    )
    return run(rows, columns, x, x)[:, :n, :n]


@_gram.defjvp
def _gram_jvp(tile, dtype, interpret, primals, tangents):
    (x,), (dx,) = primals, tangents
    precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None
    half = jnp.matmul(dx, x.mT, precision=precision, preferred_element_type=jnp.float32)
    return _gram(x, tile, dtype, interpret), (half + half.mT).astype(dtype)


def _kernel(rows_ref, columns_ref, x_ref, y_ref, out_ref, sum_ref, *, steps: int):
    """One step of one tile: `sum += x yᵀ`, then the tile, and at the step after it its mirror.

    Args:
        rows_ref, columns_ref: `(pairs,)` int32 in SMEM, the tile's place.
        x_ref, y_ref: `(tile, depth)` blocks of X.
        out_ref: `(tile, tile)`; at step `steps` it is the block across the diagonal.
        sum_ref: `(tile, tile)` float32 scratch.
        steps: of the contraction.
    """
    pair, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step < steps)
    def _():
        sum_ref[...] += jax.lax.dot_general(
            x_ref[...],
            y_ref[...],
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    @pl.when(step == steps - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    @pl.when(step == steps)
    def _():
        tile = sum_ref[...]
        row, column = (jax.lax.broadcasted_iota(jnp.int32, tile.shape, i) for i in (0, 1))
        # The unit does not promise that a tile on the diagonal is symmetric to the last bit.
        lower = (rows_ref[pair] == columns_ref[pair]) & (row >= column)
        out_ref[...] = jnp.where(lower, tile, tile.T).astype(out_ref.dtype)


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def _depth(tile: int, dtype: jnp.dtype) -> int:
    """The most columns of X that a step can take."""
    # Accumulator, two buffers of the result, and temporaries.
    rest = _VMEM_BYTES - 6 * 4 * tile**2
    # Two operands, two buffers each; float32 is split into three bfloat16 for the unit.
    column = 4 * tile * dtype.itemsize + (0 if dtype.itemsize < 4 else 2 * 3 * 2 * tile)
    return rest // column // _LANES * _LANES
