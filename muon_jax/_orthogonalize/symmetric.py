"""Matrix products whose result is symmetric, computed on and below the diagonal and mirrored.

For complex matrices the result is Hermitian, and every transpose below is a conjugate transpose. A
symmetric n × n matrix is stored as `Panels`, which are consecutive slices of its rows. Only the
blocks on and below the diagonal are computed, with ordinary matrix products on every backend: two
panels take 75 % of the FLOPs of the plain product, four 62.5 %. Panels are passed from product to
product without concatenation, since the next product reads panels.
"""

import functools
import itertools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from muon_jax._orthogonalize.devices import Kernel, device_of

Panels = tuple[jax.Array, ...]


def panel_count(n: int, dtype: jax.typing.DTypeLike, platform: str) -> int:
    """Returns the fastest number of panels for a symmetric `n × n` product: 1, 2 or 4."""
    if platform == "cpu":
        # Measured for Newton-Schulz as a whole on two cores, in float32 and bfloat16: two panels
        # take 5 to 20 % more time at 128 to 256, no more at 384, and 10 to 20 % less from 768; four
        # save another 5 to 10 % from 2048, but take twice as long to compile.
        return 1 if n < 512 else 2 if n < 2048 else 4
    if platform == "tpu":
        # XLA's estimated cycles for a v5e: in float32 two panels save 5 to 8 % at 1024 to 2048;
        # four save 12 % at 1536 but cost 10 % at 2048. In bfloat16 two cost 36 % at 2048 and 2 % at
        # 8192.
        return 2 if n >= 1024 and jnp.dtype(dtype).itemsize >= 4 else 1
    device = device_of(platform)
    one, two = (
        device.seconds(symmetric_kernels(1, n, n, 2 * n**2, count), dtype) for count in (1, 2)
    )
    return 2 if two < one else 1  # four would save little time, and take long to compile


def panel_stops(n: int, count: int) -> tuple[int, ...]:
    """Returns the last row, exclusive, of each of at most `count` panels of `n` rows."""
    tile = 128 if n >= 1024 else 16  # a TPU's matrix unit for large matrices, or a CPU's vector
    height = -(-n // (count * tile)) * tile if count > 1 else max(n, 1)
    return tuple(min(start + height, n) for start in range(0, n, height))


def symmetric_kernels(matrices: int, n: int, k: int, read: int, count: int) -> list[Kernel]:
    """Returns the kernels of `gram` on `(matrices, n, k)`, or of `product` if `k` is `n`.

    An accelerator multiplies each of at most `count` panels in one kernel. Mirroring the blocks of
    two panels takes three more, which make five passes over the result, as compiled for an H100
    and a v5e. The operands have `read` entries.
    """
    stops = panel_stops(n, count)
    result = matrices * n**2
    products = [
        Kernel(2 * matrices * (stop - start) * stop * k, (read + result) // len(stops))
        for start, stop in itertools.pairwise((0, *stops))
    ]
    if len(stops) == 1:
        return products
    return products + [Kernel(0, 5 * result // 3)] * 3


def gram(x: jax.Array, count: int, dtype: jax.typing.DTypeLike | None = None) -> Panels:
    """Returns XXᵀ of `(..., n, k)` as at most `count` panels; `dtype` is as in `matmul`."""
    panels = split_panels(x, count)
    return _mirror(_lower_blocks(panels, panels, dtype), x.dtype)


def square(p: Panels, dtype: jax.typing.DTypeLike | None = None) -> Panels:
    """Returns PP of a symmetric matrix; `dtype` is as in `matmul`."""
    if len(p) == 1:
        return (matmul(p[0], p[0], dtype=dtype),)
    return _mirror(_lower_blocks(p, p, dtype), p[0].dtype)


def product(p: Panels, q: Panels, dtype: jax.typing.DTypeLike | None = None) -> Panels:
    """Returns PQ, symmetric like P and Q, if these commute; `dtype` is as in `matmul`."""
    if len(p) == 1:
        return (matmul(p[0], q[0], dtype=dtype),)
    return _mirror(_lower_blocks(p, q, dtype), p[0].dtype, exactly=True)


def split_panels(x: jax.Array, count: int) -> Panels:
    """Splits the rows of `(..., n, k)` like the panels of a symmetric `n × n` matrix."""
    stops = panel_stops(x.shape[-2], count)
    return tuple(x[..., start:stop, :] for start, stop in itertools.pairwise((0, *stops)))


def join_panels(panels: Panels) -> jax.Array:
    """Concatenates panels to a matrix."""
    return joined(panels, axis=-2)


def joined(xs: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    return jnp.concatenate(xs, axis) if len(xs) > 1 else xs[0]


def matmul(
    x: jax.Array,
    y: jax.Array,
    *,
    transposed: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Returns XY, or XYᴴ if `transposed`, in `dtype`, by default that of `accumulator`.

    The transpose is part of the product, because XLA:CPU computes bfloat16 products with a
    previously transposed operand in float32, at half the rate. Its bfloat16 kernels are fast if the
    result is float32.
    """
    y = jnp.conj(y) if transposed else y
    batch = tuple(range(x.ndim - 2))
    contracted = ((x.ndim - 1,), (y.ndim - 1 if transposed else y.ndim - 2,))
    return jax.lax.dot_general(
        x,
        y,
        (contracted, (batch, batch)),
        precision=jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None,
        preferred_element_type=accumulator(x.dtype) if dtype is None else dtype,
    )


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype of sums of `dtype`, which is float32, or `dtype` itself if it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def _lower_blocks(p: Panels, q: Panels, dtype: jax.typing.DTypeLike | None) -> Panels:
    """Returns the blocks (0, 0), (1, 0), (1, 1), (2, 0), ... of PQᵀ."""
    return tuple(
        matmul(p[i], q[j], transposed=True, dtype=dtype)
        for i in range(len(p))
        for j in range(i + 1)
    )


def _mirror(blocks: Panels, dtype: jnp.dtype, *, exactly: bool = False) -> Panels:
    """Returns the panels of a symmetric matrix from its blocks on and below the diagonal.

    With `exactly`, the diagonal blocks are made symmetric too. They are blocks of PQᵀ, and Q is
    symmetric only up to rounding. Its antisymmetric part changes sign in PQᵀ, which an iteration
    would amplify.
    """
    if len(blocks) == 1:
        return blocks
    count = int((2 * len(blocks)) ** 0.5)

    def block(i: int, j: int) -> jax.Array:
        if j > i:
            return jnp.conj(block(j, i).mT)
        lower = blocks[i * (i + 1) // 2 + j]
        if i == j and exactly:
            lower = (lower + jnp.conj(lower.mT)) / 2
        return lower

    return tuple(_beside([block(i, j) for j in range(count)], dtype) for i in range(count))


def _beside(blocks: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Joins blocks side by side, as operands of products in `dtype`.

    XLA:CPU fuses a sum of padded arrays, or a stack, with the arithmetic around it, but not a
    concatenation, so that only half as many kernels are compiled. In low precision padding is a few
    per cent slower, because of the cast in between.
    """
    if dtype.itemsize < 4 and len({block.shape for block in blocks}) == 1:
        return jnp.stack(blocks, axis=-2).reshape(*blocks[0].shape[:-1], -1)
    widths = [block.shape[-1] for block in blocks]
    rest = [(0, 0, 0)] * (blocks[0].ndim - 1)
    zero = jnp.zeros((), blocks[0].dtype)
    return functools.reduce(
        operator.add,
        (
            jax.lax.pad(block, zero, [*rest, (sum(widths[:i]), sum(widths[i + 1 :]), 0)])
            for i, block in enumerate(blocks)
        ),
    )
