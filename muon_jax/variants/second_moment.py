"""Muon²: Adam's second moment before orthogonalisation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._matrices.hooks import Arrays, Hook, Step, entrywise
from muon_jax._muon import muon
from muon_jax._options import takes_options_of


def second_moment(beta2: float | jax.Array = 0.95, eps: float | jax.Array = 1e-10) -> Hook:
    r"""Divides the momentum by the root of the gradient's second moment, as a hook for `before=`.

    $V \leftarrow \beta_2 V + (1-\beta_2) G^2$, $M \leftarrow M / (\sqrt V + \epsilon)$ elementwise.
    This makes the spectrum flatter, so that fewer steps of Newton-Schulz suffice. The state is the
    square root of V, which does not overflow for any gradient.

    Args:
        beta2: The decay of the second moment, from 0 to 1.
        eps: A number added to the square root of the second moment.

    References:
        Muon², 2026, arXiv 2604.09967; beta2 and eps as in KellerJordan/modded-nanogpt, track 3.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.muon(0.02, before=muon_jax.second_moment(), ns_steps=3)
    """
    check_number("beta2", beta2, at_least=0, at_most=1)
    check_number("eps", eps, at_least=0)

    def whitened(momentum: Arrays, roots: Arrays, step: Step) -> tuple[Arrays, Arrays]:
        roots = root_mean_squares(roots, step.gradients(), beta2)
        return [
            m / jnp.where(r + eps == 0, 1, r + eps) for m, r in zip(momentum, roots, strict=True)
        ], roots

    return entrywise(whitened)


@takes_options_of(muon, without=("before",))
def muon_squared(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-10,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns Muon²: `muon(learning_rate, before=second_moment(beta2, eps))`.

    In addition to Muon's, its state has a float32 number per entry. The paper saves time with
    `ns_steps=3`.
    """
    return muon(learning_rate, before=second_moment(beta2, eps), **options)


def root_mean_squares(roots: Arrays, xs: Arrays, beta2: float | jax.Array) -> Arrays:
    """Returns the square root of `beta2 * root**2 + (1 - beta2) * x**2` without overflow."""
    kept, added = jnp.sqrt(beta2), jnp.sqrt(1 - beta2)

    def root(r: jax.Array, x: jax.Array) -> jax.Array:
        largest = float(jnp.finfo(r.dtype).max)
        return jnp.minimum(jnp.hypot(kept * r, added * jnp.abs(x)), largest).astype(r.dtype)

    return [root(r, x) for r, x in zip(roots, xs, strict=True)]
