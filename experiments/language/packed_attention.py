"""Pallas kernels for causal attention on GPUs, in rows that contain several texts.

A block of queries visits only the blocks of keys from the beginning of its first text, so that the
work depends on the texts' lengths, not on the row's, and no mask is stored. The kernels are those
of FlashAttention-2 (Dao, 2307.08691), and also return each query's largest logit. They also serve
rows with a single text, and heads that are too wide for cuDNN.

Shapes: B rows, T positions, N query heads, K key heads, H dimensions of a query or key head, V of
a value head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from experiments.experimental import pallas, triton

# Number of positions in a block of queries or keys.
BLOCK = 64
# Smallest number of columns in a matrix product.
_LEAST = 16
# Name, for `jax.checkpoint`, of the results that the backward pass needs.
KEPT = "attention kernel"
_UNSEEN = -1e30  # finite, so that a block without any key for a query gives no NaN
_TO_BITS = math.log2(math.e)  # GPUs compute exponentials in base 2


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes softmax attention of each position to itself and earlier ones in its text.

    Args:
        q: The queries, `(B, T, N, H)`.
        k, v: The keys `(B, T, K, H)` and values `(B, T, K, V)`. K must divide N.
        segments: `(B, T)` int32. Neighbouring positions with equal numbers are one text. None means
            one text per row.
        interpret: Whether to run the kernels in Python, on any platform.

    Returns:
        The outputs `(B, T, N, V)`, and each query's largest logit `(B, N, T)`, float32, without
        gradient.
    """
    length, scale, columns = q.shape[1], q.shape[-1] ** -0.5, v.shape[-1]
    size = -(-length // BLOCK) * BLOCK
    q, k, v = (_padded(x, size) for x in (q, k, v))
    if segments is None:
        starts = jnp.zeros((q.shape[0], size), jnp.int32)
    else:
        rest = jnp.pad(segments, ((0, 0), (0, size - length)), constant_values=-1)
        same = rest[:, :, None] == rest[:, None]
        # XLA fuses this, so that no T × T array is stored.
        starts = jnp.min(jnp.where(same, jnp.arange(size)[None, None], size), axis=2)
    known = segments is None
    mixed, largest = _attend(q, k, v, starts.astype(jnp.int32), scale, known, interpret)
    return mixed[:, :length, :, :columns], jax.lax.stop_gradient(largest[:, :, :length])


def _padded(x: jax.Array, length: int) -> jax.Array:
    """Pads to whole blocks of positions, and to a number of columns that suits `_parts`."""
    columns = -x.shape[3] % _LEAST
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, columns)))


def _parts(columns: int) -> list[slice]:
    """Splits the columns of a head into powers of two, since Triton's arrays need such sizes.

    >>> _parts(192)
    [slice(0, 128, None), slice(128, 192, None)]
    """
    parts, begin = [], 0
    while begin < columns:
        end = begin + (1 << (columns - begin).bit_length() - 1)
        parts.append(slice(begin, end))
        begin = end
    return parts


def _call(kernel, q, v, products, known, interpret, **options):
    """Returns a `pallas_call` with an instance for each block of positions, row and head.

    `products` are the numbers of matrix products for a pair of blocks: over key and over value
    columns. If every row is `known` to be one text, the compiled program states their FLOPs.
    """
    batch, length, heads, _ = q.shape
    blocks = length // BLOCK
    columns = products[0] * q.shape[3] + products[1] * v.shape[3]
    flops = batch * heads * (blocks * (blocks + 1) // 2) * 2 * BLOCK**2 * columns
    warps = 4 if q.shape[3] + v.shape[3] <= 256 else 8  # the accumulators fill the registers
    return pallas.pallas_call(
        kernel,
        grid=(blocks, batch, heads),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
        metadata={"flops": str(flops)} if known else None,
        interpret=interpret,
        **options,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, starts, scale, known, interpret):
    return _attend_forward(q, k, v, starts, scale, known, interpret)[0]


def _attend_forward(q, k, v, starts, scale, known, interpret):
    (batch, length, heads, _), groups = q.shape, q.shape[2] // k.shape[2]
    mixed = jax.ShapeDtypeStruct((batch, length, heads, v.shape[3]), q.dtype)
    told = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    mixed, logsumexp, largest = _call(
        functools.partial(_forward_kernel, scale=scale),
        *(q, v, (1, 1), known, interpret),
        in_specs=[_block(q), _whole(k, groups), _whole(v, groups), _row(starts)],
        out_specs=[_block(mixed), _part(), _part()],
        out_shape=[mixed, told, told],
        name="packed_attention",
    )(q, k, v, starts)
    mixed, logsumexp = (checkpoint_name(x, KEPT) for x in (mixed, logsumexp))
    return (mixed, largest / _TO_BITS), (q, k, v, starts, mixed, logsumexp)


def _attend_backward(scale, known, interpret, saved, g):
    q, k, v, starts, mixed, logsumexp = saved
    g = g[0].astype(q.dtype)
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    along = jnp.einsum("btnh,btnh->bnt", g, mixed, preferred_element_type=jnp.float32)
    of_q = _call(
        functools.partial(_query_kernel, scale=scale),
        *(q, v, (2, 1), known, interpret),
        in_specs=[_block(q), _whole(k, groups), _whole(v, groups), _row(starts)]
        + [_block(g), _part(), _part()],
        out_specs=_block(q),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="packed_attention_of_q",
    )(q, k, v, starts, g, logsumexp, along)
    # The end of the queries that see a key of each block, since texts begin in order.
    last = jnp.arange(1, length // BLOCK + 1) * BLOCK - 1
    ends = jnp.sum(starts[:, None] <= last[None, :, None], axis=2).astype(jnp.int32)
    heads_row = pallas.BlockSpec((None, None, length), lambda i, b, n: (b, n, 0))
    of_k, of_v = _call(
        functools.partial(_key_kernel, scale=scale),
        *(q, v, (2, 2), known, interpret),
        in_specs=[_whole(q), _block(k, groups), _block(v, groups), _row(starts)]
        + [pallas.BlockSpec((None, None), lambda i, b, n: (b, i)), _whole(g)]
        + [heads_row, heads_row],
        out_specs=[_block(q), _block(g)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, g)],
        name="packed_attention_of_k",
    )(q, k, v, starts, ends, g, logsumexp, along)

    def shared(x):
        x = x.reshape(*k.shape[:3], groups, -1)
        return jnp.sum(x, axis=3, dtype=jnp.float32).astype(k.dtype)

    return of_q, shared(of_k), shared(of_v), None


_attend.defvjp(_attend_forward, _attend_backward)


def _block(x, groups=1):
    """Returns the spec of an instance's block of positions of one head."""
    return pallas.BlockSpec((None, BLOCK, None, x.shape[3]), lambda i, b, n: (b, i, n // groups, 0))


def _whole(x, groups=1):
    """Returns the spec of all positions of one head."""
    shape = (None, x.shape[1], None, x.shape[3])
    return pallas.BlockSpec(shape, lambda i, b, n: (b, 0, n // groups, 0))


def _row(x):
    return pallas.BlockSpec((None, x.shape[1]), lambda i, b, n: (b, 0))


def _part():
    return pallas.BlockSpec((None, None, BLOCK), lambda i, b, n: (b, n, i))


def _seen(queries, keys, starts):
    """Returns which keys each query sees, for blocks that begin at these positions."""
    queries, keys = (x + jnp.arange(BLOCK) for x in (queries, keys))
    return (keys[None] <= queries[:, None]) & (keys[None] >= starts[:, None])


def _read(ref, begin=None):
    """Reads the block of positions at `begin`, split by `_parts`. None reads all positions."""
    rows = slice(None) if begin is None else pallas.ds(begin, BLOCK)
    return [ref[rows, part] for part in _parts(ref.shape[1])]


def _write(ref, values):
    for part, value in zip(_parts(ref.shape[1]), values, strict=True):
        ref[:, part] = value.astype(ref.dtype)


def _zeros(ref):
    """Returns float32 accumulators for the values that `_write` writes."""
    shapes = ((BLOCK, part.stop - part.start) for part in _parts(ref.shape[1]))
    return [jnp.zeros(shape, jnp.float32) for shape in shapes]


def _against(a, b):
    """Returns `a @ b.T` of two arrays that are split into parts."""
    return sum(_product(x, y.T) for x, y in zip(a, b, strict=True))


def _added(sums, weights, values):
    """Adds `weights @ values`, computed in the values' dtype, to the sums of the parts."""
    weights = weights.astype(values[0].dtype)
    return [x + _product(weights, y) for x, y in zip(sums, values, strict=True)]


def _logits(q, k, seen, scale):
    """Returns the logits in base 2."""
    return jnp.where(seen, _TO_BITS * scale * _against(q, k), _UNSEEN)


def _product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _forward_kernel(
    q_ref, k_ref, v_ref, starts_ref, mixed_ref, logsumexp_ref, largest_ref, *, scale
):
    block = pallas.program_id(0)
    q, starts = _read(q_ref), starts_ref[pallas.ds(block * BLOCK, BLOCK)]

    def meet(i, carry):
        mixed, largest, total = carry
        seen = _seen(block * BLOCK, i * BLOCK, starts)
        logits = _logits(q, _read(k_ref, i * BLOCK), seen, scale)
        now = jnp.maximum(largest, jnp.max(logits, axis=1))
        weights, kept = jnp.exp2(logits - now[:, None]), jnp.exp2(largest - now)
        mixed = _added([kept[:, None] * x for x in mixed], weights, _read(v_ref, i * BLOCK))
        return mixed, now, kept * total + jnp.sum(weights, axis=1)

    nothing = _zeros(mixed_ref), jnp.full(BLOCK, _UNSEEN), jnp.zeros(BLOCK)
    first = starts_ref[block * BLOCK] // BLOCK
    mixed, largest, total = jax.lax.fori_loop(first, block + 1, meet, nothing)
    _write(mixed_ref, [x / total[:, None] for x in mixed])
    logsumexp_ref[...] = largest + jnp.log2(total)
    largest_ref[...] = largest


def _query_kernel(
    q_ref, k_ref, v_ref, starts_ref, g_ref, logsumexp_ref, along_ref, of_q_ref, *, scale
):
    block = pallas.program_id(0)
    q, g, starts = _read(q_ref), _read(g_ref), starts_ref[pallas.ds(block * BLOCK, BLOCK)]
    logsumexp, along = logsumexp_ref[...], along_ref[...]

    def meet(i, of_q):
        k = _read(k_ref, i * BLOCK)
        logits = _logits(q, k, _seen(block * BLOCK, i * BLOCK, starts), scale)
        weights = jnp.exp2(logits - logsumexp[:, None])
        of_logits = weights * (_against(g, _read(v_ref, i * BLOCK)) - along[:, None])
        return _added(of_q, of_logits, k)

    first = starts_ref[block * BLOCK] // BLOCK
    of_q = jax.lax.fori_loop(first, block + 1, meet, _zeros(of_q_ref))
    _write(of_q_ref, [scale * x for x in of_q])


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
    k, v = _read(k_ref), _read(v_ref)

    def meet(i, carry):
        of_k, of_v = carry
        queries = pallas.ds(i * BLOCK, BLOCK)
        q, g = _read(q_ref, i * BLOCK), _read(g_ref, i * BLOCK)
        logits = _logits(q, k, _seen(i * BLOCK, block * BLOCK, starts_ref[queries]), scale)
        weights = jnp.exp2(logits - logsumexp_ref[queries][:, None])
        of_logits = weights * (_against(g, v) - along_ref[queries][:, None])
        return _added(of_k, of_logits.T, q), _added(of_v, weights.T, g)

    nothing = _zeros(of_k_ref), _zeros(of_v_ref)
    end = (end_ref[...] + BLOCK - 1) // BLOCK
    of_k, of_v = jax.lax.fori_loop(block, end, meet, nothing)
    _write(of_k_ref, [scale * x for x in of_k])
    _write(of_v_ref, of_v)


def texts(segments_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A number of each text, 0 for padding, and each token's position in its text."""
    before = jnp.pad(segments_BxT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    places = jnp.broadcast_to(jnp.arange(segments_BxT.shape[1]), segments_BxT.shape)

    def further(i: jax.Array, first: jax.Array) -> jax.Array:
        back = places - 2**i
        return jnp.maximum(first, jnp.take_along_axis(first, jnp.maximum(back, 0), axis=1))

    # The largest so far, by a loop that doubles how far it looks: a cumulative maximum XLA would
    # fuse into the mask, and compute for every logit anew.
    first = jnp.where(segments_BxT != before, places, 0)
    first = jax.lax.fori_loop(0, segments_BxT.shape[1].bit_length(), further, first)
    return jnp.where(segments_BxT > 0, first + 1, 0), places - first
