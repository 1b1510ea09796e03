"""Grouped matrix products, which multiply rows by the kernel of their group.

Rows are `(rows, fan_in)`, kernels `(groups, fan_in, fan_out)`. XLA expands `jax.lax.ragged_dot` for
CPUs and GPUs, and its gradient for TPUs, to a masked product with every kernel. To avoid this
waste, groups here begin at multiples of a block, so that each block of rows has one kernel. A CPU
multiplies each block by a copy of its kernel; on a GPU each program of a grid looks up its kernel.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.experimental import megablox, pallas, triton
from experiments.layers import project

_CPU_BLOCK, _GPU_BLOCK = 64, 128
# Number of rows that a TPU multiplies by one kernel at a time, and maximum side of a kernel's tile.
_TPU_ROWS, _TPU_TILE = 256, 1024
# On a GPU: maximum and minimum side of a tile, the fixed cost of a tile in units of columns, and
# the bytes of a row that are summed at a time.
_GPU_TILE, _GPU_LEAST, _GPU_EXTRA, _GPU_BYTES = 256, 16, 24, 128


def block_of(platform: str) -> int:
    """Returns the number of rows in a block. Groups must begin at multiples of it."""
    return {"cpu": _CPU_BLOCK, "tpu": 1}.get(platform, _GPU_BLOCK)


def grouped_product(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, platform: str, expected: int
) -> jax.Array:
    """Computes `jax.lax.ragged_dot`. Rows beyond the last group are undefined.

    Args:
        x: The rows, `(rows, fan_in)`.
        kernels: The kernels, `(groups, fan_in, fan_out)`.
        group_sizes: `(groups,)` int32, multiples of `block_of(platform)`.
        platform: The platform of the devices.
        expected: The expected number of rows in groups, from which a GPU program states its FLOPs,
            since its kernels skip other rows.
    """
    if platform == "tpu":
        return (jax.lax.ragged_dot if megablox is None else tpu_product)(x, kernels, group_sizes)
    has_tiles = all(size % _GPU_LEAST == 0 for size in kernels.shape[1:])
    if platform != "cpu" and triton is not None and has_tiles:
        return gpu_product(x, kernels, group_sizes, expected)
    return blockwise_product(x, kernels, group_sizes, block_of(platform))


def blockwise_product(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, block: int
) -> jax.Array:
    """Multiplies each block of rows by a copy of its kernel."""
    blocks = x.reshape(-1, block, x.shape[-1])
    # Blocks beyond the last group may use any kernel.
    owners = jnp.minimum(_owners(group_sizes, block, len(blocks)), len(kernels) - 1)

    @jax.checkpoint  # copies of kernels are made again in the backward pass, not stored
    def product(blocks, kernels):
        return jax.vmap(project)(blocks, kernels[owners])

    return product(blocks, kernels).reshape(len(x), -1)


def _owners(group_sizes: jax.Array, block: int, blocks: int) -> jax.Array:
    """Returns the group of each block, and the number of groups for blocks beyond the last."""
    begins = block * jnp.arange(blocks, dtype=jnp.int32)
    ends = jnp.cumsum(group_sizes)
    return jnp.searchsorted(ends, begins, side="right", method="compare_all").astype(jnp.int32)


def tpu_product(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, interpret: bool = False
) -> jax.Array:
    """Computes the product by JAX's TPU kernels, which do not write rows beyond the last group."""
    rows = x.shape[0]
    x = jnp.pad(x, ((0, -rows % _TPU_ROWS), (0, 0)))
    return megablox.gmm(x, kernels, group_sizes, x.dtype, _tpu_tiling, interpret=interpret)[:rows]


def _tpu_tiling(rows: int, fan_in: int, fan_out: int) -> tuple[int, int, int]:
    def tile(size: int) -> int:
        """Returns the whole size, or that of equal parts that are multiples of 128 TPU lanes."""
        parts = -(-size // _TPU_TILE)
        return size if parts == 1 else -(-size // (128 * parts)) * 128

    return _TPU_ROWS, tile(fan_in), tile(fan_out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gpu_product(
    x: jax.Array,
    kernels: jax.Array,
    group_sizes: jax.Array,
    expected: int,
    interpret: bool = False,
) -> jax.Array:
    """Computes the product by Triton kernels, which do not write rows beyond the last group.

    fan_in and fan_out must be multiples of 16. Sums are float32.
    """
    return _rows(x, kernels, group_sizes, expected, interpret)


def _gpu_forward(x, kernels, group_sizes, expected, interpret):
    return _rows(x, kernels, group_sizes, expected, interpret), (x, kernels, group_sizes)


def _gpu_backward(expected, interpret, saved, g):
    x, kernels, group_sizes = saved
    dx = _rows(g, kernels, group_sizes, expected, interpret, transposed=True)
    return dx, _kernels(x, g, group_sizes, expected, interpret), None


gpu_product.defvjp(_gpu_forward, _gpu_backward)


def _rows(
    x: jax.Array,
    kernels: jax.Array,
    group_sizes: jax.Array,
    expected: int,
    interpret: bool,
    transposed: bool = False,
) -> jax.Array:
    """Multiplies rows by their group's kernel or its transpose; a program makes a block's tile.

    The programs of a block run side by side, so that all but the first read its rows from cache.
    """
    (rows, fan_in), groups = x.shape, len(kernels)
    fan_out = kernels.shape[1 if transposed else 2]
    width, depth = _side(fan_out), math.gcd(fan_in, _GPU_BYTES // x.dtype.itemsize)
    grid = -(-fan_out // width), rows // _GPU_BLOCK

    def program(x, kernels, owners, y):
        block = pallas.program_id(1)
        group, here = owners[block], pallas.ds(block * _GPU_BLOCK, _GPU_BLOCK)
        columns, inside = _part(pallas.program_id(0), width, fan_out)

        @pallas.when(group < groups)
        def _():
            def add(step, total):
                terms = pallas.ds(step * depth, depth)
                if transposed:
                    kernel = _load(kernels.at[group, columns, terms], rows=inside).T
                else:
                    kernel = _load(kernels.at[group, terms, columns], columns=inside)
                return total + triton.dot(x[here, terms], kernel)

            zeros = jnp.zeros((_GPU_BLOCK, width), jnp.float32)
            total = jax.lax.fori_loop(0, fan_in // depth, add, zeros).astype(y.dtype)
            triton.store(y.at[here, columns], total, mask=_mask(None, inside))

    owners = _owners(group_sizes, _GPU_BLOCK, rows // _GPU_BLOCK)
    shape = jax.ShapeDtypeStruct((rows, fan_out), x.dtype)
    flops = 2 * _in_use(expected, groups, rows) * fan_in * grid[0] * width
    return _launch(program, shape, grid, flops, interpret)(x, kernels, owners)


def _kernels(
    x: jax.Array, g: jax.Array, group_sizes: jax.Array, expected: int, interpret: bool
) -> jax.Array:
    """Multiplies each group's transposed rows of `x` by those of `g`; a program makes a tile."""
    (rows, fan_in), (groups, fan_out) = x.shape, (len(group_sizes), g.shape[1])
    height, width = min(_side(fan_in), _GPU_BLOCK), _side(fan_out)
    depth = _GPU_BYTES // x.dtype.itemsize
    grid = -(-fan_out // width), -(-fan_in // height), groups

    def program(x, g, begins, ends, sums):
        columns, inside = _part(pallas.program_id(0), width, fan_out)
        down, above = _part(pallas.program_id(1), height, fan_in)
        group = pallas.program_id(2)

        def add(step, total):
            terms = pallas.ds(step * depth, depth)
            left = _load(x.at[terms, down], columns=above)
            right = _load(g.at[terms, columns], columns=inside)
            return total + triton.dot(left, right, trans_a=True)

        zeros = jnp.zeros((height, width), jnp.float32)
        steps = begins[group] // depth, ends[group] // depth
        total = jax.lax.fori_loop(*steps, add, zeros).astype(sums.dtype)
        triton.store(sums.at[group, down, columns], total, mask=_mask(above, inside))

    ends = jnp.cumsum(group_sizes)
    shape = jax.ShapeDtypeStruct((groups, fan_in, fan_out), x.dtype)
    flops = 2 * _in_use(expected, groups, rows) * grid[0] * width * grid[1] * height
    return _launch(program, shape, grid, flops, interpret)(x, g, ends - group_sizes, ends)


def _in_use(expected: int, groups: int, rows: int) -> int:
    """Returns the rows expected to be in use, with half a block of padding per group."""
    return min(expected + groups * _GPU_BLOCK // 2, rows)


def _side(size: int) -> int:
    """Returns the side of tiles of least cost: their columns, with padding, and a fixed cost."""
    sides = [_GPU_TILE >> n for n in range(5)]
    return min(sides, key=lambda side: -(-size // side) * (side + _GPU_EXTRA))


def _part(number: jax.Array, side: int, size: int) -> tuple[Any, jax.Array | None]:
    """Returns a tile's slice of an axis, and a mask of indices within bounds; None if all are."""
    begin = number * side
    inside = None if size % side == 0 else begin + jnp.arange(side) < size
    return pallas.ds(begin, side), inside


def _mask(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    """Returns the mask of a tile from the masks of its axes. None means that all is in bounds."""
    masks = [rows[:, None]] if rows is not None else []
    masks += [columns[None]] if columns is not None else []
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref: Any, rows: jax.Array | None = None, columns: jax.Array | None = None) -> jax.Array:
    """Loads a tile, with zeros out of bounds."""
    mask = _mask(rows, columns)
    return ref[...] if mask is None else triton.load(ref, mask=mask, other=0)


def _launch(
    program: Callable, shape: jax.ShapeDtypeStruct, grid: Sequence[int], flops: int, interpret: bool
) -> Callable:
    """Returns the kernel of these programs. The compiled program's text states its FLOPs."""
    return pallas.pallas_call(
        program,
        out_shape=shape,
        grid=tuple(grid),
        name="grouped_product",
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        metadata={"flops": str(flops)},
        interpret=interpret,
    )
