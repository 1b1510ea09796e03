"""The transformer of the grokking study: pre-norm, RoPE, SwiGLU, no biases, one answer token."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

from experiments.layers import Block, Linear, rms_norm

ROPE_BASE = 1e6
FEED_FORWARD_RATIO = 4

MaxLogits = dict[str, jax.Array]  # path of the attention module -> (heads,)
NormName = Literal["rms", "none"]


def attention_path(depth: int) -> str:
    """Returns the path of the parameters of a block's attention."""
    return f"blocks/{depth}/attention"


def _no_norm(width: int, *, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    return _identity


def _identity(x: jax.Array) -> jax.Array:
    return x


_NORMS = {"rms": rms_norm, "none": _no_norm}


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
        sizes = width, heads, FEED_FORWARD_RATIO * width, ROPE_BASE
        kinds = {"norm": _NORMS[norm], "dropout": dropout}
        self.blocks = nnx.List([Block(*sizes, **kinds, rngs=rngs) for _ in range(layers)])
        self.norm = _NORMS[norm](width, rngs=rngs)
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


def configured(config: Any, vocabulary: int) -> Callable[..., Transformer]:
    """Returns the model of a `Config`, as a function of `rngs`."""
    fields = ("width", "layers", "heads", "dropout", "norm")
    own = {name: getattr(config, name) for name in fields}
    return functools.partial(Transformer, vocabulary, **own)
