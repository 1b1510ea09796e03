"""Muon+: sets the norm of the orthogonal factor to that of an exact one."""

from typing import Any

import optax

from muon_jax._matrices.hooks import Arrays, Hook, Step, stateless
from muon_jax._muon import muon
from muon_jax._options import takes_options_of


def snap_norm() -> Hook:
    r"""Sets the norm of each orthogonal factor to $\sqrt{\min(m, n)}$, as a hook for `after=`.

    That is the norm of a semi-orthogonal matrix of full rank. After five steps of Newton-Schulz the
    norm is 0.7 to 1.2 times that, and less if the momentum has a low rank.

    References:
        Muon+, 2026, arXiv 2602.21545.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.scale_by_muon(scale="none", after=muon_jax.snap_norm())
        >>> params = {"kernel": jnp.ones((4, 8))}
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> print(f"{jnp.linalg.norm(updates['kernel']):.3f}")
        2.000
    """

    def snapped(factors: Arrays, step: Step) -> Arrays:
        norms = [min(part.fans) ** 0.5 for part in step.matrices.parts]
        return step.matrices.with_norms(factors, norms)

    return stateless(snapped)


@takes_options_of(muon, without=("after",))
def muon_plus(
    learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns Muon+: `muon(learning_rate, after=snap_norm())`."""
    return muon(learning_rate, after=snap_norm(), **options)
