"""A decoder layer with any attention and feed-forward part."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.language.attention import causal_attention, join_heads
from experiments.language.sharding import constrain
from experiments.layers import RMSNorm


class Cache(NamedTuple):
    """What later positions need of a layer: keys `(B, S, K, H)` and values `(B, S, K, V)`."""

    keys: jax.Array
    values: jax.Array


class Layer(nnx.Module):
    """A pre-norm layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Args:
        width: The width of the residual stream.
        epsilon: The epsilon of both norms.
        attention, feed_forward: Make the two parts from `rngs`.
    """

    def __init__(
        self,
        width: int,
        epsilon: float,
        attention: Callable[..., nnx.Module],
        feed_forward: Callable[..., nnx.Module],
        *,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.feed_forward_norm = RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.attention, self.feed_forward = attention(rngs=rngs), feed_forward(rngs=rngs)

    def __call__(
        self, x_BxTxD: jax.Array, *attended: Any, bias_E: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        """Returns the output, the largest logits of the heads, and the routing.

        Args:
            x_BxTxD: The residual stream.
            *attended: Further arguments of the attention.
            bias_E: The selection bias, if the feed-forward part has experts.
        """
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        mixed, max_logits = self.attention(self.attention_norm(x_BxTxD), *attended)
        x_BxTxD, routed = self._fed_forward(x_BxTxD + mixed, bias_E)
        return x_BxTxD, (max_logits, routed)

    def _fed_forward(self, x_BxTxD: jax.Array, bias_E: jax.Array | None) -> tuple[jax.Array, Any]:
        normed = self.feed_forward_norm(x_BxTxD)
        if bias_E is None:
            y, routed = self.feed_forward(normed), None
        else:
            y, routed = self.feed_forward(normed, bias_E)
        return constrain(x_BxTxD + y, "batch", None, None), routed

    def continued(
        self,
        x_BxTxD: jax.Array,
        cache: Cache | None,
        at: int | jax.Array,
        *,
        bias_E: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The next `x` of the positions from `at` on, which see those before them in the cache.

        Args:
            x_BxTxD: of each token.
            cache: of all positions, of which those from `at` on are overwritten and later ones
                are not seen; None begins one of T positions, with `at` 0.
            at: position of the first token, the same in all rows.
            bias_E: as above.
        """
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        positions = at + jnp.arange(x_BxTxD.shape[1])
        q, *new = self.attention.project(self.attention_norm(x_BxTxD), positions)
        if cache is None:
            cache = Cache(*new)
            mixed, _ = causal_attention(q, *cache, threshold=math.inf)
        else:
            put = jax.lax.dynamic_update_slice_in_dim
            cache = Cache(*(put(old, x, at, axis=1) for old, x in zip(cache, new, strict=True)))
            mixed = _attend(q, cache, positions)
        x_BxTxD, _ = self._fed_forward(x_BxTxD + self.attention.out(join_heads(mixed)), bias_E)
        return x_BxTxD, cache


def _attend(q_BxTxNxH: jax.Array, cache: Cache, positions_T: jax.Array) -> jax.Array:
    """The mixed values `(B, T, N, V)` of what each position sees of a cache."""
    columns = cache.keys.shape[-1], cache.values.shape[-1]
    wide = max(columns)  # JAX wants heads of one size; zeros change no product
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, wide - x.shape[-1]),)) for x in (q_BxTxNxH, *cache))
    seen = jnp.arange(k.shape[1])[None] <= positions_T[:, None]
    mixed = jax.nn.dot_product_attention(q, k, v, mask=seen, scale=columns[0] ** -0.5)
    return mixed[..., : columns[1]]


def graph(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """Returns the graph definition of a module, to merge with its params."""
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)[0]
