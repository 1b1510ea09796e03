"""Products of rows with the kernel of their group, on each platform without waste.

Rows are `(rows, fan_in)`, kernels `(groups, fan_in, fan_out)`. XLA expands `jax.lax.ragged_dot` for
CPUs and GPUs to a masked product with every kernel, and its gradient so for TPUs. Here groups begin
at multiples of a block, so that a block of rows has one kernel. A CPU multiplies each with a copy
of it; on a GPU each program of a grid looks its kernel up.
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
# Rows that a TPU multiplies with one kernel at a time, and the largest side of a kernel's tile.
_TPU_ROWS, _TPU_TILE = 256, 1024
# On a GPU: the largest and least side of a tile, what a tile costs beside its columns, as columns,
# and bytes of a row that are added up at a time.
_GPU_TILE, _GPU_LEAST, _GPU_EXTRA, _GPU_BYTES = 256, 16, 24, 128


def block_of(platform: str) -> int:
    """Rows of a block: groups have to begin at multiples of it."""
    return {"cpu": _CPU_BLOCK, "tpu": 1}.get(platform, _GPU_BLOCK)


def grouped_product(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, platform: str, expected: int
) -> jax.Array:
    """`jax.lax.ragged_dot`; what becomes of rows beyond the last group is not defined.

    Args:
        x: `(rows, fan_in)`.
        kernels: `(groups, fan_in, fan_out)`.
        group_sizes: `(groups,)` int32, multiples of `block_of(platform)`.
        platform: of the devices.
        expected: how many rows are likely to have a group, which the program tells of a GPU's
            kernels: these leave the others out.
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
    """Each block of rows with a copy of its kernel."""
    blocks = x.reshape(-1, block, x.shape[-1])
    # Blocks beyond the last group's take any kernel.
    owners = jnp.minimum(_owners(group_sizes, block, len(blocks)), len(kernels) - 1)

    @jax.checkpoint  # each block's copy of a kernel is made again, not kept
    def product(blocks, kernels):
        return jax.vmap(project)(blocks, kernels[owners])

    return product(blocks, kernels).reshape(len(x), -1)


def _owners(group_sizes: jax.Array, block: int, blocks: int) -> jax.Array:
    """The group of each block; the number of groups for one beyond the last."""
    begins = block * jnp.arange(blocks, dtype=jnp.int32)
    ends = jnp.cumsum(group_sizes)
    return jnp.searchsorted(ends, begins, side="right", method="compare_all").astype(jnp.int32)


def tpu_product(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, interpret: bool = False
) -> jax.Array:
    """By JAX's kernels for TPUs, which write no rows beyond the last group."""
    rows = x.shape[0]
    x = jnp.pad(x, ((0, -rows % _TPU_ROWS), (0, 0)))
    return megablox.gmm(x, kernels, group_sizes, x.dtype, _tpu_tiling, interpret=interpret)[:rows]


def _tpu_tiling(rows: int, fan_in: int, fan_out: int) -> tuple[int, int, int]:
    def tile(size: int) -> int:
        """All of it, or equal parts that are multiples of a TPU's 128 lanes."""
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
    """By kernels in Triton's language, which write no rows beyond the last group.

    Both sides of the kernels are multiples of 16; sums are float32.
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
    """Each row with its group's kernel, or the transpose; a program makes some columns of a block.

    A block's programs run side by side, and read it from the cache but for the first.
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
    """Each group's rows of `x`, transposed, with those of `g`; a program makes a group's tile."""
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
    """With the half of each group's last block that is likely to be empty."""
    return min(expected + groups * _GPU_BLOCK // 2, rows)


def _side(size: int) -> int:
    """Of tiles: one costs its columns, of which the last may be none, and some more."""
    sides = [_GPU_TILE >> n for n in range(5)]
    return min(sides, key=lambda side: -(-size // side) * (side + _GPU_EXTRA))


def _part(number: jax.Array, side: int, size: int) -> tuple[Any, jax.Array | None]:
    """A tile's part of an axis, and which of it is there; None if all is."""
    begin = number * side
    inside = None if size % side == 0 else begin + jnp.arange(side) < size
    return pallas.ds(begin, side), inside


def _mask(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    """What of a tile is there; of an axis that is None all is."""
    masks = [rows[:, None]] if rows is not None else []
    masks += [columns[None]] if columns is not None else []
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref: Any, rows: jax.Array | None = None, columns: jax.Array | None = None) -> jax.Array:
    """A tile, zeros where nothing is."""
    mask = _mask(rows, columns)
    return ref[...] if mask is None else triton.load(ref, mask=mask, other=0)


def _launch(
    program: Callable, shape: jax.ShapeDtypeStruct, grid: Sequence[int], flops: int, interpret: bool
) -> Callable:
    """The kernel of these programs; FLOPs are told to whoever reads the compiled text."""
    return pallas.pallas_call(
        program,
        out_shape=shape,
        grid=tuple(grid),
        name="grouped_product",
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        metadata={"flops": str(flops)},
        interpret=interpret,
    )
