"""Causal attention, with latent (DeepSeek-V2, 2405.04434) or grouped-query keys and values.

Shapes: B sequences, T positions, D width, N query heads, K key and value heads, H dimensions of a
query or key head, V of a value head.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.experimental import splash_attention, triton
from experiments.language import packed_attention
from experiments.language.sharding import constrain, spec
from experiments.layers import Linear, RMSNorm, RopeScaling, fan_in_uniform, rotate
from muon_jax import max_attention_logits

# Maximum number of query positions at a time; also the side of the splash kernel's blocks.
BLOCK = 512
# Maximum dimensions of a head for cuDNN's kernel and its gradient on some of JAX's GPUs.
_CUDNN_COLUMNS = 128
# The splash kernel requires lengths that are multiples of a vector.
_LANES = 128

Heads = tuple[jax.Array, jax.Array, jax.Array]

# Policy for `jax.checkpoint` that stores the results of our kernels and of the splash kernel, which
# are costly to recompute and no larger than a layer's input. JAX does not allow it for cuDNN's.
KEEP_KERNELS = jax.checkpoint_policies.save_only_these_names(packed_attention.KEPT)


def causal_attention(
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxV: jax.Array,
    segments_BxT: jax.Array | None = None,
    threshold: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes softmax attention of each position to itself and earlier ones in its segment.

    On a GPU this uses cuDNN's kernel, or our own for segments, float32 or wider heads; on a TPU the
    splash kernel; elsewhere blocks of queries in turn, each with the keys that it sees, so that few
    logits are in memory at a time.

    Args:
        q_BxTxNxH, k_BxTxKxH, v_BxTxKxV: Queries, keys and values. K must divide N; each key head
            serves N / K query heads.
        segments_BxT: Neighbouring positions with equal numbers are one text; each text has its own
            number. 0 is padding, whose outputs are finite but meaningless. None means one text per
            sequence.
        threshold: Largest logits up to this value may be replaced by an upper bound, which kernels
            return at no cost. None means exact logits, infinity always the bound.

    Returns:
        The outputs `(B, T, N, V)`, and each head's largest logit `(N,)`, float32.
    """
    length = q_BxTxNxH.shape[1]
    packed = segments_BxT is not None
    columns, dtype = q_BxTxNxH.shape[-1], q_BxTxNxH.dtype
    kernel = _kernel(jax.sharding.get_abstract_mesh(), length, columns, dtype, packed)
    if kernel is not None:
        return kernel(q_BxTxNxH, k_BxTxKxH, v_BxTxKxV, segments_BxT, threshold)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BxTxNxH, k_BxTxKxH, v_BxTxKxV))
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    # Eight blocks skip nearly half of the pairs; products of blocks smaller than 64 are slow.
    block = min(max(-(-length // 8), 64), BLOCK)
    starts = list(range(0, length, block))
    # Split, not sliced, since the gradient of slices is a sum of padded arrays.
    q, k, v = (jnp.split(x, starts[1:], axis=2) for x in (q, k, v))
    mixed, largest = [], []
    for i, queries in enumerate(q):
        seen = (jnp.concatenate(x[: i + 1], axis=2) for x in (k, v))
        segments = None if segments_BxT is None else segments_BxT[:, : starts[i] + block]
        found = _block(queries, *seen, segments)
        mixed.append(found[0])
        largest.append(found[1])
    return jnp.swapaxes(jnp.concatenate(mixed, 2), 1, 2), jnp.max(jnp.stack(largest), axis=0)


def shows_logits(
    mesh: jax.sharding.Mesh,
    length: int,
    columns: int,
    dtype: jax.typing.DTypeLike,
    packed: bool = False,
) -> bool:
    """Returns whether attention on this mesh returns exact largest logits at no cost.

    Kernels other than ours do not return them; they take another product of queries and keys.
    """
    return _kernel(mesh.abstract_mesh, length, columns, dtype, packed) in (None, _by_packed)


def largest_known(max_logits: dict[str, jax.Array], threshold: float | None) -> jax.Array:
    """Returns the largest logit of all heads; NaN if it is only an upper bound."""
    if not max_logits:
        return jnp.full([], jnp.nan)
    largest = jnp.max(jnp.stack([jnp.max(of_heads) for of_heads in max_logits.values()]))
    return largest if threshold is None else jnp.where(largest > threshold, largest, jnp.nan)


def _kernel(
    mesh: jax.sharding.AbstractMesh,
    length: int,
    columns: int,
    dtype: jax.typing.DTypeLike,
    packed: bool,
) -> Callable[..., Any] | None:
    platform = mesh.abstract_device.platform
    if platform == "gpu":
        is_narrow = jnp.dtype(dtype).itemsize == 2  # as cuDNN requires
        if triton is not None and (packed or columns > _CUDNN_COLUMNS or not is_narrow):
            return _by_packed
        return _by_cudnn if is_narrow else None
    if platform == "tpu" and length % _LANES == 0 and splash_attention is not None:
        return _by_splash
    return None


@jax.checkpoint
def _block(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Computes the attention of the last t positions, the queries `(B, N, t, H)`, to all keys."""
    logits = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)
    logits *= q.shape[-1] ** -0.5
    positions = jnp.arange(k.shape[2])
    hidden = positions[None] > positions[-q.shape[2] :, None]
    if segments is not None:
        own = segments[:, None, -q.shape[2] :, None]
        hidden = hidden[None, None] | (own != segments[:, None, None])
    logits = jnp.where(hidden, -jnp.inf, logits)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divides after the product, since the outputs have fewer entries than the weights.
    mixed = jnp.einsum("bnts,bnsv->bntv", weights.astype(v.dtype), v) / total.astype(v.dtype)
    if segments is not None:
        largest = jnp.where(own > 0, largest, -jnp.inf)
    return mixed, jnp.max(largest, axis=(0, 2, 3))


# Each takes `(q, k, v, segments, threshold)` and returns what `causal_attention` does.


def _by_cudnn(q, k, v, segments, threshold):
    padding = q.shape[-1] - v.shape[-1]
    padded = jnp.pad(v, ((0, 0),) * 3 + ((0, padding),))  # cuDNN requires heads of equal size
    mask = None
    if segments is not None:
        mask = segments[:, None, :, None] == segments[:, None, None]
    mixed, logsumexp = jax.nn.dot_product_attention(
        q, k, padded, mask=mask, is_causal=True, implementation="cudnn", return_residual=True
    )
    return mixed[..., : v.shape[-1]], _largest(q, k, segments, logsumexp, threshold)


def _by_packed(q, k, v, segments, threshold):
    heads = spec("batch", "heads", None)
    mixed, largest = _on_devices(packed_attention.attend, q, k, v, segments, heads)
    if segments is not None:
        largest = jnp.where(segments[:, None] > 0, largest, -jnp.inf)
    return mixed, jnp.max(largest, axis=(0, 2))


def _by_splash(q, k, v, segments, threshold):
    heads = spec("batch", None, "heads")
    mixed, logsumexp = _on_devices(splash, q, k, v, segments, heads)
    return mixed, _largest(q, k, segments, logsumexp, threshold)


def _on_devices(kernel, q, k, v, segments, heads):
    """Runs a kernel, which XLA cannot partition, on each device's own sequences and heads."""
    place = spec("batch", None, "heads", None)
    return jax.shard_map(
        kernel,
        in_specs=(place, place, place, None if segments is None else spec("batch", None)),
        out_specs=(place, heads),
        check_vma=False,
    )(q, k, v, segments)


def _largest(q, k, segments, logsumexp, threshold):
    """Returns each head's largest logit, or its upper bound, for a kernel; −∞ for padding."""
    mask = None
    if threshold == math.inf:
        if segments is not None:
            logsumexp = jnp.where(segments[..., None] > 0, logsumexp, -jnp.inf)
        return jax.lax.stop_gradient(jnp.max(logsumexp, axis=(0, 1)).astype(jnp.float32))
    if segments is not None:
        own = segments[:, None, :, None]
        mask = (own == segments[:, None, None]) & (own > 0)
        logsumexp = jnp.where(segments[..., None] > 0, logsumexp, jnp.finfo(jnp.float32).min / 2)
    return max_attention_logits(
        q, k, is_causal=True, mask=mask, logsumexp=logsumexp, threshold=threshold
    )


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes causal attention of one device's heads, and its log-sum-exp `(B, T, N)`.

    The log-sum-exp has no gradient. It takes another forward pass, since the kernel that JAX can
    differentiate does not return it.
    """
    length, heads = q.shape[1:3]
    sides = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = dict.fromkeys(sides, math.gcd(length, BLOCK))
    make = functools.partial(
        splash_attention.make_splash_mha,
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention.BlockSizes(**sizes),
        residual_checkpoint_name=packed_attention.KEPT,
        interpret=interpret,
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    of = None if segments is None else splash_attention.SegmentIds(segments, segments)
    mixed = jax.vmap(make())(q, k, v, of)
    told = jax.vmap(make(save_residuals=True))
    _, (logsumexp,) = told(*jax.lax.stop_gradient((q, k, v)), of)
    return jnp.swapaxes(mixed, 1, 2), jnp.swapaxes(logsumexp, 1, 2)


class _Attention(nnx.Module):
    """Causal attention with an output projection, `out`. Subclasses say how heads are made."""

    out: Linear

    def project(self, x_BxTxD: jax.Array, positions: jax.Array) -> Heads:
        """Returns queries, keys and values, as `causal_attention` takes them."""
        raise NotImplementedError

    def __call__(
        self,
        x_BxTxD: jax.Array,
        threshold: float | None = None,
        segments_BxT: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        if positions is None:
            positions = jnp.arange(x_BxTxD.shape[1])
        heads = self.project(x_BxTxD, positions)
        mixed, largest = causal_attention(*heads, segments_BxT, threshold)
        return self.out(join_heads(mixed)), largest


class GroupedQuery(_Attention):
    """Grouped-query attention with RoPE.

    Args:
        width: The width of the residual stream.
        heads: The number of query heads.
        kv_heads: The number of key and value heads, a divisor of `heads`.
        columns: The number of dimensions of a head.
        rope_base: The base of RoPE's wavelengths.
        norm_epsilon: The epsilon of an RMSNorm of each query and key head before RoPE. None means
            no norm.
        bias: Whether the projections to queries, keys and values have biases.
        rope_scaling: The scaling of RoPE's frequencies.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        columns: int,
        rope_base: float,
        norm_epsilon: float | None = None,
        *,
        bias: bool = False,
        rope_scaling: RopeScaling | None = None,
        init=fan_in_uniform,
        rngs: nnx.Rngs,
    ):
        self.heads, self.kv_heads = heads, kv_heads
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self.query = Linear(width, heads * columns, bias=bias, init=init, rngs=rngs)
        self.key = Linear(width, kv_heads * columns, bias=bias, init=init, rngs=rngs)
        self.value = Linear(width, kv_heads * columns, bias=bias, init=init, rngs=rngs)
        self.out = Linear(heads * columns, width, init=init, rngs=rngs)
        self.normed = norm_epsilon is not None
        if self.normed:
            self.query_norm = RMSNorm(columns, epsilon=norm_epsilon, rngs=rngs)
            self.key_norm = RMSNorm(columns, epsilon=norm_epsilon, rngs=rngs)

    def project(self, x_BxTxD: jax.Array, positions: jax.Array) -> Heads:
        q = split_heads(self.query(x_BxTxD), self.heads)
        k = split_heads(self.key(x_BxTxD), self.kv_heads)
        v = split_heads(self.value(x_BxTxD), self.kv_heads)
        if self.normed:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = (rotate_heads(x, positions, self.rope_base, self.rope_scaling) for x in (q, k))
        return q, k, v


class Latent(_Attention):
    """Latent attention: keys and values from a short latent, one key with RoPE for all heads."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        latent: int,
        nope: int,
        rope: int,
        value: int,
        rope_base: float,
        init,
        rngs: nnx.Rngs,
    ):
        self.heads, self.latent_size, self.rope_base = heads, latent, rope_base
        self.nope, self.rope = nope, rope
        self.query = Linear(width, heads * (nope + rope), init=init, rngs=rngs)
        self.latent = Linear(width, latent + rope, init=init, rngs=rngs)
        # DeepSeek's own code and transformers fix this epsilon, whatever the other norms have.
        self.latent_norm = RMSNorm(latent, epsilon=1e-6, rngs=rngs)
        self.key_value = Linear(latent, heads * (nope + value), init=init, rngs=rngs)
        self.out = Linear(heads * value, width, init=init, rngs=rngs)

    def project(self, x_BxTxD: jax.Array, positions: jax.Array) -> Heads:
        q = split_heads(self.query(x_BxTxD), self.heads)
        latent, shared_key = jnp.split(self.latent(x_BxTxD), [self.latent_size], axis=-1)
        key_value = split_heads(self.key_value(self.latent_norm(latent)), self.heads)
        k, v = jnp.split(key_value, [self.nope], axis=-1)
        q, q_rotated = jnp.split(q, [self.nope], axis=-1)
        q_rotated = rotate_heads(q_rotated, positions, self.rope_base)
        k_rotated = rotate_heads(shared_key[:, :, None], positions, self.rope_base)
        k_rotated = jnp.broadcast_to(k_rotated, (*k.shape[:-1], self.rope))
        q = jnp.concatenate([q, q_rotated], axis=-1)
        return q, jnp.concatenate([k, k_rotated], axis=-1), v


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    x = x.reshape(*x.shape[:-1], heads, -1)
    return constrain(x, "batch", None, "heads", None)


def join_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], math.prod(x.shape[-2:]))


def rotate_heads(
    x: jax.Array, positions: jax.Array, base: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Applies RoPE, with angles in float32, and returns the dtype of `x`."""
    return rotate(x.astype(jnp.float32), positions, base, scaling).astype(x.dtype)
