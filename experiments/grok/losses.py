"""The losses of the three output functions, for logits `(batch, classes)`."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

SoftmaxName = Literal["softmax", "stablemax", "sparsemax"]


def stablemax_loss(logits: jax.Array, answers: jax.Array) -> jax.Array:
    """Returns the cross-entropy of stablemax, `(batch,)` (2501.04697, eq. 4).

    Stablemax replaces exp(z) by s(z), which is z + 1 for z >= 0 and 1 / (1 - z) otherwise. Since
    s(z) grows linearly, sums do not absorb small terms in float32, as they do with exp(z).
    """
    positive = logits >= 0
    # Each branch gets only logits of its own side, so that no gradient is 0 * inf.
    above, below = jnp.where(positive, logits, 0.0), jnp.where(positive, 0.0, logits)
    log_s = jnp.where(positive, jnp.log1p(above), -jnp.log1p(-below))
    total = jnp.sum(jnp.where(positive, above + 1, 1 / (1 - below)), axis=-1)
    return jnp.log(total) - jnp.take_along_axis(log_s, answers[:, None], axis=-1)[:, 0]


LOSSES: dict[SoftmaxName, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "softmax": optax.softmax_cross_entropy_with_integer_labels,
    "stablemax": stablemax_loss,
    "sparsemax": optax.losses.multiclass_sparsemax_loss,  # Martins & Astudillo, 1602.02068
}
