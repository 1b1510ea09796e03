"""Causal attention on a GPU of rows that hold several texts one after another: Pallas kernels.

A block of queries meets the blocks of keys from where the first of its texts begins, and no other:
the work is that of the texts, not of the row, and no mask lies in memory. The kernels are those of
FlashAttention-2 (Dao, 2307.08691); beside the mixed values they tell each query's largest logit.

Shapes: B rows, T positions, N query heads, K key heads, H columns of a head.
"""

import functools
import math

import jax
import jax.numpy as jnp

from experiments.experimental import pallas, triton

# Positions of a block of queries, and of keys.
BLOCK = 64
_UNSEEN = -1e30  # finite, so that a block of which a query sees nothing makes no NaN
_TO_BITS = math.log2(math.e)  # a GPU's exponential has base 2


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of each position to itself and those before it in its text.

    Args:
        q: `(B, T, N, H)`.
        k, v: `(B, T, K, H)`; K divides N.
        segments: `(B, T)` int32; neighbours with one number are one text.
        interpret: runs the kernels in Python, on any platform.

    Returns:
        The mixed values `(B, T, N, H)`, and each query's largest logit `(B, N, T)`, float32, which
        has no gradient.
    """
    length, columns = q.shape[1], q.shape[-1]
    size = -(-length // BLOCK) * BLOCK, _columns(columns)
    q, k, v = (_padded(x, size[0], size[1]) for x in (q, k, v))
    positions = jnp.arange(size[0])[None, None]
    rest = jnp.pad(segments, ((0, 0), (0, size[0] - length)), constant_values=-1)
    same = rest[:, :, None] == rest[:, None]
    starts = jnp.min(jnp.where(same, positions, size[0]), axis=2)  # XLA holds no T × T of this
    mixed, largest = _attend(q, k, v, starts.astype(jnp.int32), columns**-0.5, interpret)
    return mixed[:, :length, :, :columns], jax.lax.stop_gradient(largest[:, :, :length])


def _columns(columns: int) -> int:
    """Columns of a head as the kernels have it: a power of two, and no less than their products."""
    return max(1 << (columns - 1).bit_length(), 16)


def _padded(x: jax.Array, length: int, columns: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, columns - x.shape[3])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, starts, scale, interpret):
    return _attend_forward(q, k, v, starts, scale, interpret)[0]


def _attend_forward(q, k, v, starts, scale, interpret):
    (batch, length, heads, _), groups = q.shape, q.shape[2] // k.shape[2]
    told = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    mixed, logsumexp, largest = pallas.pallas_call(
        functools.partial(_forward_kernel, scale=scale),
        grid=(length // BLOCK, batch, heads),
        in_specs=[_block(q), _whole(k, groups), _whole(v, groups), _row(starts)],
        out_specs=[_block(q), _part(), _part()],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), told, told],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="packed_attention",
    )(q, k, v, starts)
    return (mixed, largest / _TO_BITS), (q, k, v, starts, mixed, logsumexp)


def _attend_backward(scale, interpret, saved, g):
    q, k, v, starts, mixed, logsumexp = saved
    g = g[0].astype(q.dtype)
    (batch, length, heads, _), groups = q.shape, q.shape[2] // k.shape[2]
    along = jnp.einsum("btnh,btnh->bnt", g, mixed, preferred_element_type=jnp.float32)
    call = functools.partial(
        pallas.pallas_call,
        grid=(length // BLOCK, batch, heads),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )
    of_q = call(
        functools.partial(_query_kernel, scale=scale),
        in_specs=[_block(q), _whole(k, groups), _whole(v, groups), _row(starts)]
        + [_block(g), _part(), _part()],
        out_specs=_block(q),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="packed_attention_of_q",
    )(q, k, v, starts, g, logsumexp, along)
    # Where the queries end that see some key of a block: texts begin in order.
    last = jnp.arange(1, length // BLOCK + 1) * BLOCK - 1
    ends = jnp.sum(starts[:, None] <= last[None, :, None], axis=2).astype(jnp.int32)
    heads_row = pallas.BlockSpec((None, None, length), lambda i, b, n: (b, n, 0))
    of_k, of_v = call(
        functools.partial(_key_kernel, scale=scale),
        in_specs=[_whole(q), _block(k, groups), _block(v, groups), _row(starts)]
        + [pallas.BlockSpec((None, None), lambda i, b, n: (b, i)), _whole(g)]
        + [heads_row, heads_row],
        out_specs=[_block(q), _block(q)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 2,
        name="packed_attention_of_k",
    )(q, k, v, starts, ends, g, logsumexp, along)

    def shared(x):
        x = x.reshape(*k.shape[:3], groups, -1)
        return jnp.sum(x, axis=3, dtype=jnp.float32).astype(k.dtype)

    return of_q, shared(of_k), shared(of_v), None


_attend.defvjp(_attend_forward, _attend_backward)


def _block(x, groups=1):
    """What one instance has of positions and heads: a block of one head."""
    return pallas.BlockSpec((None, BLOCK, None, x.shape[3]), lambda i, b, n: (b, i, n // groups, 0))


def _whole(x, groups=1):
    """A head in all its positions."""
    shape = (None, x.shape[1], None, x.shape[3])
    return pallas.BlockSpec(shape, lambda i, b, n: (b, 0, n // groups, 0))


def _row(x):
    return pallas.BlockSpec((None, x.shape[1]), lambda i, b, n: (b, 0))


def _part():
    return pallas.BlockSpec((None, None, BLOCK), lambda i, b, n: (b, n, i))


def _seen(queries, keys, starts):
    """Which keys each query sees, of blocks that begin there."""
    queries, keys = (x + jnp.arange(BLOCK) for x in (queries, keys))
    return (keys[None] <= queries[:, None]) & (keys[None] >= starts[:, None])


def _logits(q, k, seen, scale):
    """In bits."""
    return jnp.where(seen, _TO_BITS * scale * _product(q, k.T), _UNSEEN)


def _product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _forward_kernel(
    q_ref, k_ref, v_ref, starts_ref, mixed_ref, logsumexp_ref, largest_ref, *, scale
):
    block = pallas.program_id(0)
    q, starts = q_ref[...], starts_ref[pallas.ds(block * BLOCK, BLOCK)]

    def meet(i, carry):
        mixed, largest, total = carry
        keys = pallas.ds(i * BLOCK, BLOCK)
        logits = _logits(q, k_ref[keys, :], _seen(block * BLOCK, i * BLOCK, starts), scale)
        now = jnp.maximum(largest, jnp.max(logits, axis=1))
        weights, kept = jnp.exp2(logits - now[:, None]), jnp.exp2(largest - now)
        mixed = kept[:, None] * mixed + _product(weights.astype(v_ref.dtype), v_ref[keys, :])
        return mixed, now, kept * total + jnp.sum(weights, axis=1)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(BLOCK, _UNSEEN), jnp.zeros(BLOCK)
    first = starts_ref[block * BLOCK] // BLOCK
    mixed, largest, total = jax.lax.fori_loop(first, block + 1, meet, nothing)
    mixed_ref[...] = (mixed / total[:, None]).astype(mixed_ref.dtype)
    logsumexp_ref[...] = largest + jnp.log2(total)
    largest_ref[...] = largest


def _query_kernel(
    q_ref, k_ref, v_ref, starts_ref, g_ref, logsumexp_ref, along_ref, of_q_ref, *, scale
):
    block = pallas.program_id(0)
    q, g, starts = q_ref[...], g_ref[...], starts_ref[pallas.ds(block * BLOCK, BLOCK)]
    logsumexp, along = logsumexp_ref[...], along_ref[...]

    def meet(i, of_q):
        keys = pallas.ds(i * BLOCK, BLOCK)
        k = k_ref[keys, :]
        logits = _logits(q, k, _seen(block * BLOCK, i * BLOCK, starts), scale)
        weights = jnp.exp2(logits - logsumexp[:, None])
        of_logits = weights * (_product(g, v_ref[keys, :].T) - along[:, None])
        return of_q + _product(of_logits.astype(k.dtype), k)

    first = starts_ref[block * BLOCK] // BLOCK
    of_q = jax.lax.fori_loop(first, block + 1, meet, jnp.zeros(q.shape, jnp.float32))
    of_q_ref[...] = (scale * of_q).astype(of_q_ref.dtype)


def _key_kernel(
    q_ref,
    k_ref,
    v_ref,
    starts_ref,
    end_ref,
    g_ref,
    logsumexp_ref,
    along_ref,
    of_k_ref,
    of_v_ref,
    *,
    scale,
):
    block = pallas.program_id(0)
    k, v = k_ref[...], v_ref[...]

    def meet(i, carry):
        of_k, of_v = carry
        queries = pallas.ds(i * BLOCK, BLOCK)
        q, g = q_ref[queries, :], g_ref[queries, :]
        logits = _logits(q, k, _seen(i * BLOCK, block * BLOCK, starts_ref[queries]), scale)
        weights = jnp.exp2(logits - logsumexp_ref[queries][:, None])
        of_logits = weights * (_product(g, v.T) - along_ref[queries][:, None])
        of_k += _product(of_logits.astype(q.dtype).T, q)
        return of_k, of_v + _product(weights.astype(g.dtype).T, g)

    nothing = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    end = (end_ref[...] + BLOCK - 1) // BLOCK
    of_k, of_v = jax.lax.fori_loop(block, end, meet, nothing)
    of_k_ref[...] = (scale * of_k).astype(of_k_ref.dtype)
    of_v_ref[...] = of_v.astype(of_v_ref.dtype)
