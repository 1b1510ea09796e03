"""The transformer of the grokking study: pre-norm, RoPE, SwiGLU, no biases, one answer token."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx

from experiments.layers import Attention, Linear, SwiGLU

RMS_EPSILON = 1e-5
ROPE_BASE = 1e6
FEED_FORWARD_RATIO = 4

MaxLogits = dict[str, jax.Array]  # path of the attention module -> (heads,)
NormName = Literal["rms", "none"]


def attention_path(depth: int) -> str:
    """Returns the path of the parameters of a block's attention."""
    return f"blocks/{depth}/attention"


def _identity(x: jax.Array) -> jax.Array:
    return x


def _norm(norm: NormName, width: int, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    if norm == "none":
        return _identity
    return nnx.RMSNorm(width, epsilon=RMS_EPSILON, rngs=rngs)


class Block(nnx.Module):
    """One layer: `x += attention(norm(x))`, then `x += feed_forward(norm(x))`."""

    def __init__(self, width: int, heads: int, dropout: float, norm: NormName, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(norm, width, rngs)
        self.attention = Attention(width, heads, ROPE_BASE, rngs=rngs)
        self.feed_forward_norm = _norm(norm, width, rngs)
        self.feed_forward = SwiGLU(width, FEED_FORWARD_RATIO * width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self, x: jax.Array, rngs: nnx.Rngs | None, *, return_max_logits: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        train = rngs is None
        mixed = self.attention(self.attention_norm(x), return_max_logits=return_max_logits)
        if return_max_logits:
            mixed, max_logits = mixed
        x = x + self.dropout(mixed, deterministic=train, rngs=rngs)
        x = x + self.dropout(
            self.feed_forward(self.feed_forward_norm(x)), deterministic=train, rngs=rngs
        )
        return (x, max_logits) if return_max_logits else x


class Transformer(nnx.Module):
    """Maps tokens `(batch, positions)` to logits `(batch, vocabulary)` of the answer.

    With 2 layers, width 128 and a vocabulary of 99 it has 550 272 parameters.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        norm: NormName = "rms",
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Embed(
            vocabulary, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        self.blocks = nnx.List(
            [Block(width, heads, dropout, norm, rngs=rngs) for _ in range(layers)]
        )
        self.norm = _norm(norm, width, rngs)
        self.head = Linear(width, vocabulary, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        dropout_rngs: nnx.Rngs | None = None,
        return_max_logits: bool = False,
    ) -> jax.Array | tuple[jax.Array, MaxLogits]:
        """Returns the logits, and if asked for, the largest attention logits of each module."""
        x, max_logits = self.embedding(tokens), {}
        for depth, block in enumerate(self.blocks):
            x = block(x, dropout_rngs, return_max_logits=return_max_logits)
            if return_max_logits:
                x, max_logits[attention_path(depth)] = x
        logits = self.head(self.norm(x[:, -1]))
        return (logits, max_logits) if return_max_logits else logits
