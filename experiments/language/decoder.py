"""A layer of a decoder, whatever its attention and feed-forward part are."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from experiments.language.sharding import constrain
from experiments.layers import RMSNorm


class Layer(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Args:
        width: of the residual stream.
        epsilon: of both norms.
        attention, feed_forward: make these of `rngs`.
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
        """The next `x`, and what was seen on the way: largest logits of heads, and the routing.

        Args:
            x_BxTxD: of each token.
            *attended: what else the attention takes.
            bias_E: of the experts' selection, where the feed-forward part has experts.
        """
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        mixed, max_logits = self.attention(self.attention_norm(x_BxTxD), *attended)
        x_BxTxD = x_BxTxD + mixed
        normed = self.feed_forward_norm(x_BxTxD)
        if bias_E is None:
            y, routed = self.feed_forward(normed), None
        else:
            y, routed = self.feed_forward(normed, bias_E)
        return constrain(x_BxTxD + y, "batch", None, None), (max_logits, routed)


def graph(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """Of a module, to be merged with its params."""
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)[0]
