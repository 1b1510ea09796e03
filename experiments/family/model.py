"""A small causal transformer on bytes: pre-norm, RoPE, SwiGLU, RMSNorm, no biases, untied head.

It is parametrised by muP (Yang et al., 2203.03466, table 8), so that learning rates transfer across
widths. The initial variance is 1 for the embedding, 1 / (3 fan_in) for hidden kernels, and
independent of the width for the head, whose logits have a factor of 1 / width. Wider models have
more attention heads of the same size. AdamW's best rates for embedding, gains and head then do not
depend on the width. `experiments.family.widths` measures Muon's best rates for hidden kernels. At
`BASE_WIDTH` this is the standard parametrisation.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.corpus import VOCABULARY
from experiments.layers import Block, rms_norm

BASE_WIDTH = 128
ROPE_BASE = 1e4
FEED_FORWARD_RATIO = 3


def head_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Initializes a kernel of any width with the bounds of `fan_in_uniform` at `BASE_WIDTH`."""
    bound = BASE_WIDTH**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class LanguageModel(nnx.Module):
    """Maps bytes `(batch, context)` to logits of each next byte, `(batch, context, 256)`.

    Also returns the largest attention logits `(heads,)` by the path of each attention, which XLA
    removes if no optimizer uses them.
    """

    def __init__(self, *, width: int, layers: int, head_size: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            VOCABULARY, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        sizes = width, width // head_size, FEED_FORWARD_RATIO * width, ROPE_BASE
        self.blocks = nnx.List([Block(*sizes, rngs=rngs) for _ in range(layers)])
        self.norm = rms_norm(width, rngs=rngs)
        self.head = nnx.Linear(
            width, VOCABULARY, use_bias=False, kernel_init=head_uniform, rngs=rngs
        )
        self.output_factor = BASE_WIDTH / width

    def __call__(self, tokens_BxT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_BxTxD, max_logits = self.embedding(tokens_BxT), {}
        for depth, block in enumerate(self.blocks):
            path = f"blocks/{depth}/attention"
            x_BxTxD, max_logits[path] = block(x_BxTxD, return_max_logits=True)
        return self.output_factor * self.head(self.norm(x_BxTxD)), max_logits
