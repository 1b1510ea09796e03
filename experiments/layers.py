"""Transformer layers that the studies share: linear maps, norms, RoPE, SwiGLU, attention."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.settings import Count, Positive, check
from muon_jax.variants.max_logits import max_attention_logits

RMS_EPSILON = 1e-5
rms_norm = functools.partial(nnx.RMSNorm, epsilon=RMS_EPSILON)


def fan_in_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Initializes a kernel `(fan_in, fan_out)` as PyTorch: uniformly in ±1/sqrt(fan_in)."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nnx.Linear):
    """`nnx.Linear`, by default without a bias; an `adapter` adds to what the kernel does."""

    adapter: nnx.Module | None = None

    def __init__(
        self, fan_in: int, fan_out: int, *, bias: bool = False, init=fan_in_uniform, rngs: nnx.Rngs
    ):
        super().__init__(fan_in, fan_out, use_bias=bias, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = project(x, self.kernel[...])
        if self.adapter is not None:
            y += self.adapter(x)
        if self.bias is None:
            return y
        # Adding the bias in float32 makes XLA sum its gradient in float32.
        bias = jnp.expand_dims(self.bias[...].astype(jnp.float32), range(y.ndim - 1))
        return (y + bias).astype(y.dtype)


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `x @ kernel`, for shapes `(..., fan_in)` and `(fan_in, fan_out)`.

    The custom gradient avoids JAX's transposed gradient of the kernel, for which XLA transposes the
    activations on a CPU.
    """
    return x @ kernel


def _project_backward(saved, g):
    x, kernel = saved
    tokens = tuple(range(x.ndim - 1))
    return g @ kernel.T, jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))


project.defvjp(lambda x, kernel: (project(x, kernel), (x, kernel)), _project_backward)


class SwiGLU(nnx.Module):
    """The gated MLP `down(silu(gate(x)) * up(x))` (Shazeer, 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, init=fan_in_uniform, rngs: nnx.Rngs):
        self.gate = Linear(width, hidden, init=init, rngs=rngs)
        self.up = Linear(width, hidden, init=init, rngs=rngs)
        self.down = Linear(hidden, width, init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(gated(self.gate(x), self.up(x)))


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns `silu(gate) * up`. The backward pass keeps only these two arrays.

    `jax.checkpoint` would also do this, but prevents XLA from fusing the reads of both arrays with
    the products that write them.
    """
    return _gated(gate, up)


def _gated(gate, up):
    return nnx.silu(gate) * up


def _gated_backward(saved, g):
    # With the barrier XLA computes both gradients in one GPU kernel. Without it, XLA would split
    # them, since `g` is the result of a matrix product.
    return jax.vjp(_gated, *saved)[1](jax.lax.optimization_barrier(g))


gated.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _gated_backward)


class RMSNorm(nnx.RMSNorm):
    """An `nnx.RMSNorm` along the last axis, with fewer passes over memory in the backward pass."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normed(self.epsilon, x, self.scale[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rms_normed(epsilon: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns `x * scale / rms(x)` for each vector (Zhang and Sennrich, 1910.07467).

    The backward pass reuses the inverse root mean square, which JAX's gradient would compute again.
    """
    return _rms_forward(epsilon, x, scale)[0]


def _rms_forward(epsilon, x, scale):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    scaled = wide * (inverse * jnp.expand_dims(scale, range(x.ndim - 1)))
    return scaled.astype(jnp.result_type(x, scale)), (x, scale, inverse)


def _rms_backward(epsilon, saved, g):
    x, scale, inverse = saved
    g, unit = g.astype(jnp.float32), x.astype(jnp.float32) * inverse
    of_unit = g * jnp.expand_dims(scale, range(x.ndim - 1))
    along = jnp.mean(of_unit * unit, axis=-1, keepdims=True)
    of_scale = jnp.sum(g * unit, axis=range(x.ndim - 1))
    return (inverse * (of_unit - unit * along)).astype(x.dtype), of_scale.astype(scale.dtype)


rms_normed.defvjp(_rms_forward, _rms_backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The scaling of RoPE's frequencies for a longer context in Llama 3.1 (2407.21783).

    Fast frequencies, with many turns in the original context, are unchanged. Slow ones are divided
    by `factor`. The scale in between is interpolated linearly. Names are those of `config.json`.

    Attributes:
        factor: The divisor of slow frequencies.
        low_freq_factor: The number of turns in the original context up to which a frequency is
            slow.
        high_freq_factor: The number of turns from which it is fast.
        original_max_position_embeddings: The number of positions of the original context.

    Raises:
        ValueError: A number is out of range.
    """

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count

    def __post_init__(self) -> None:
        check(self, named=str)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor must be greater than low_freq_factor; got "
                f"{self.high_freq_factor} and {self.low_freq_factor}."
            )

    def __call__(self, frequency: jax.Array) -> jax.Array:
        turns = frequency * (self.original_max_position_embeddings / (2 * math.pi))
        width = self.high_freq_factor - self.low_freq_factor
        kept = jnp.clip((turns - self.low_freq_factor) / width, 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


def rotate(
    x: jax.Array, position: int | jax.Array, base: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Applies rotary position embeddings (Su et al., 2104.09864), pairing the halves of each head.

    Args:
        x: Vectors `(..., heads, head_dim)`, with an even head_dim.
        position: The position of each vector, broadcastable to `x.shape[:-2]`.
        base: The base of the geometric series of wavelengths.
        scaling: The scaling of the frequencies, by default none.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half) / half)
    frequency = frequency if scaling is None else scaling(frequency)
    angle = jnp.multiply.outer(jnp.asarray(position), frequency)[..., None, :]
    angle = jnp.expand_dims(angle, range(x.ndim - angle.ndim))
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    # The gradient of a split is one concatenation; that of slices is a sum of padded arrays.
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Causal multi-head attention with rotary position embeddings."""

    def __init__(self, width: int, heads: int, rope_base: float, *, rngs: nnx.Rngs):
        self.heads, self.rope_base = heads, rope_base
        self.query = Linear(width, width, rngs=rngs)
        self.key = Linear(width, width, rngs=rngs)
        self.value = Linear(width, width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)

    def split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def __call__(
        self, x_BxTxD: jax.Array, *, return_max_logits: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Returns the output, and if asked for, the largest logit of each head, `(heads,)`."""
        positions = jnp.arange(x_BxTxD.shape[1])
        q = rotate(self.split_heads(self.query(x_BxTxD)), positions, self.rope_base)
        k = rotate(self.split_heads(self.key(x_BxTxD)), positions, self.rope_base)
        v = self.split_heads(self.value(x_BxTxD))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        out = self.out(mixed.reshape(x_BxTxD.shape))
        return (out, max_attention_logits(q, k, is_causal=True)) if return_max_logits else out


class Block(nnx.Module):
    """A pre-norm layer: `x += attention(norm(x))`, then `x += feed_forward(norm(x))`.

    `hidden` is the width inside the feed-forward part, `norm` a function `(width, rngs=) -> layer`,
    and `dropout` a probability at the outputs of both parts.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        rope_base: float,
        *,
        norm: Callable[..., Callable] = rms_norm,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = norm(width, rngs=rngs)
        self.attention = Attention(width, heads, rope_base, rngs=rngs)
        self.feed_forward_norm = norm(width, rngs=rngs)
        self.feed_forward = SwiGLU(width, hidden, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self, x: jax.Array, rngs: nnx.Rngs | None = None, *, return_max_logits: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Returns the new `x`, and if asked for, the largest attention logit of each head."""
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        mixed = self.attention(self.attention_norm(x), return_max_logits=return_max_logits)
        if return_max_logits:
            mixed, max_logits = mixed
        x = x + drop(mixed)
        x = x + drop(self.feed_forward(self.feed_forward_norm(x)))
        return (x, max_logits) if return_max_logits else x
