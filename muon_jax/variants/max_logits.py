"""The largest attention logit of every head, for attention that does not return its logits."""

import jax
import jax.numpy as jnp
import numpy as np

from muon_jax._checks import check_integer, check_number


def max_attention_logits(
    query: jax.Array,
    key: jax.Array,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = False,
    mask: jax.Array | None = None,
    logsumexp: jax.Array | None = None,
    threshold: float | jax.Array | None = None,
    block_size: int = 128,
) -> jax.Array:
    """Returns the maximum of `scale * q · k` over batch and positions for each head.

    `qk_clip` needs these. They are computed in blocks of query positions, so that no `T × S` array
    exists. The cost is that of the attention's first product. A `threshold` reduces it: a block is
    skipped if a cheap bound shows that no head exceeds the threshold. The bound is the attention's
    log-sum-exp if it is given, which is at most log S above the maximum. Otherwise it is the
    product of the largest norms, which needs no product of queries and keys but is much looser.

    Gradients are stopped. On a mesh with Auto or Explicit axes the maximum is global. Inside
    `shard_map` it is the device's own, and the caller applies `jax.lax.pmax`. Under `vmap` with
    `threshold`, every block is computed.

    Args:
        query: The queries `(B, T, N, H)` as the attention multiplies them, normalised and rotated.
        key: The keys `(B, S, K, H)`. Query head `n` reads key head `n // (N // K)`.
        scale: The scale of the logits. `None` means `1 / sqrt(H)`.
        is_causal: Whether query position `t` attends only to key positions up to `t`.
        mask: A bool array that broadcasts to `(B, N, T, S)`. `False` means no attention.
        logsumexp: An array `(B, T, N)`, the second result of
            `jax.nn.dot_product_attention(..., return_residual=True)` for the same logits.
        threshold: Maxima up to this value may be replaced by upper bounds. `None` means never.
        block_size: The number of query positions in a block. The memory needed is that of
            `(B, N, block_size, S)` in float32.

    Returns:
        `(N,)` float32, accumulated in float32. With `threshold`, values above it are the maxima,
        and others are upper bounds of them. A head that attends to nothing has `-inf` or a bound.

    Example:
        >>> import jax
        >>> query, key = jax.random.normal(jax.random.key(0), (2, 3, 64, 4, 16))
        >>> max_attention_logits(query, key, is_causal=True).shape
        (4,)
    """
    check_number("scale", scale, optional=True)
    check_number("threshold", threshold, finite=False, optional=True)
    check_integer("block_size", block_size, at_least=1)
    _check_shapes(query, key, mask, logsumexp)
    query, key = jax.lax.stop_gradient((query, key))
    scale = query.shape[-1] ** -0.5 if scale is None else jax.lax.stop_gradient(scale)
    (batch, length, heads, _), (_, keys, kv_heads, _) = query.shape, key.shape
    block_size = min(block_size, length)
    # The last block may overlap the one before it, which does not change a maximum.
    starts = np.minimum(np.arange(0, length, block_size), length - block_size)

    def by_key_head(x):
        return x.reshape(*x.shape[:2], kv_heads, heads // kv_heads, *x.shape[3:])

    def largest(start):
        """Returns the maxima `(B, N)` of the block that begins at `start`."""
        block = jax.lax.dynamic_slice_in_dim(query, start, block_size, axis=1)
        logits = scale * jnp.einsum(
            "btkgh,bskh->bkgts", by_key_head(block), key, preferred_element_type=jnp.float32
        )
        logits = logits.reshape(batch, heads, block_size, keys)
        if is_causal:
            position = start + jax.lax.broadcasted_iota(jnp.int32, (1, 1, block_size, keys), 2)
            seen = position >= jax.lax.broadcasted_iota(jnp.int32, position.shape, 3)
            logits = jnp.where(seen, logits, -jnp.inf)
        if mask is not None:
            seen = mask
            if mask.shape[2] > 1:
                seen = jax.lax.dynamic_slice_in_dim(mask, start, block_size, axis=2)
            logits = jnp.where(seen, logits, -jnp.inf)
        return jnp.max(logits, axis=(2, 3))

    # The batch is reduced last, so that a mesh needs one reduction for all blocks.
    if threshold is None:
        return jnp.max(jax.lax.map(largest, starts), axis=(0, 1))

    if logsumexp is None:
        norms = by_key_head(_norm(query)) * jnp.max(_norm(key), axis=1)[:, None, :, None]
        bounds = jnp.abs(scale) * norms.reshape(batch, length, heads)
    else:
        bounds = jax.lax.stop_gradient(logsumexp).astype(jnp.float32)
        # It was rounded to its dtype, and is -inf for positions that attend to nothing.
        bounds *= 1 + jnp.sign(bounds) * jnp.finfo(logsumexp.dtype).eps
    padding = len(starts) * block_size - length
    bounds = jnp.pad(bounds, ((0, 0), (0, padding), (0, 0)), constant_values=-jnp.inf)
    bounds = jnp.max(bounds.reshape(batch, len(starts), block_size, heads), axis=2)
    exceeds = jnp.any(bounds > threshold, axis=(0, 2))

    def largest_or_bound(block):
        start, exceeds, bound = block
        return jax.lax.cond(exceeds, largest, lambda _: bound, start)

    blocks = starts, exceeds, jnp.moveaxis(bounds, 1, 0)
    return jnp.max(jax.lax.map(largest_or_bound, blocks), axis=(0, 1))


def _norm(x: jax.Array) -> jax.Array:
    """Returns norms along the last axis, rounded up to bound the rounding of products as well."""
    x = x.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(x * x, axis=-1)) * (1 + x.shape[-1] * jnp.finfo(jnp.float32).eps)


def _check_shapes(query, key, mask, logsumexp) -> None:
    shapes = f"query {query.shape}, key {key.shape}"
    if not (query.ndim == key.ndim == 4):
        raise ValueError(f"query must be (B, T, N, H) and key (B, S, K, H); got {shapes}.")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same B and H; got {shapes}.")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"The number N of query heads must be a multiple of K; got {shapes}.")
    whole = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    if mask is not None and (
        mask.ndim != 4 or any(a not in (1, b) for a, b in zip(mask.shape, whole, strict=True))
    ):
        raise ValueError(f"mask must broadcast to (B, N, T, S) = {whole}; got {mask.shape}.")
    if logsumexp is not None and logsumexp.shape != query.shape[:3]:
        expected = query.shape[:3]
        raise ValueError(f"logsumexp must be (B, T, N) = {expected}; got {logsumexp.shape}.")
