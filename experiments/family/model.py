"""A small causal transformer on bytes: pre-norm, RoPE, SwiGLU, RMSNorm, no biases, untied head.

It is parametrised by muP (Yang et al., 2203.03466, table 8), so that the same rates serve all
widths. The embedding begins with a variance of 1 and hidden kernels with 1 / (3 fan_in); attention
heads keep their size, and more of them come; the head begins with a variance that does not depend
on the width, and its logits carry a factor of 1 / width. AdamW then wants rates for the embedding,
the gains and the head that do not depend on the width; what hidden kernels want under Muon is
measured by `experiments.family.widths`. At `BASE_WIDTH` all this is the usual model.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.corpus import VOCABULARY
from experiments.layers import Attention, SwiGLU

BASE_WIDTH = 128
RMS_EPSILON = 1e-5
ROPE_BASE = 1e4
FEED_FORWARD_RATIO = 3


def head_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """`fan_in_uniform` as it is at `BASE_WIDTH`, for every width."""
    bound = BASE_WIDTH**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Block(nnx.Module):
    """One layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, epsilon=RMS_EPSILON, rngs=rngs)
        self.attention = Attention(width, heads, ROPE_BASE, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(width, epsilon=RMS_EPSILON, rngs=rngs)
        self.feed_forward = SwiGLU(width, FEED_FORWARD_RATIO * width, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed, max_logits = self.attention(self.attention_norm(x), return_max_logits=True)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), max_logits


class LanguageModel(nnx.Module):
    """Bytes `(batch, context)` -> logits `(batch, context, 256)` of each next byte.

    And the largest attention logits `(heads,)` by the path of each attention, which XLA drops where
    no optimizer asks for them.
    """

    def __init__(self, *, width: int, layers: int, head_size: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            VOCABULARY, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        self.blocks = nnx.List([Block(width, width // head_size, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, epsilon=RMS_EPSILON, rngs=rngs)
        self.head = nnx.Linear(
            width, VOCABULARY, use_bias=False, kernel_init=head_uniform, rngs=rngs
        )
        self.output_factor = BASE_WIDTH / width

    def __call__(self, tokens_BxT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_BxTxD, max_logits = self.embedding(tokens_BxT), {}
        for depth, block in enumerate(self.blocks):
            x_BxTxD, max_logits[f"blocks/{depth}/attention"] = block(x_BxTxD)
        return self.output_factor * self.head(self.norm(x_BxTxD)), max_logits
