"""The radial brake: limits how much a step changes the norm of a matrix."""

import jax
import jax.numpy as jnp

from muon_jax._checks import check_number
from muon_jax._constraint import Constraint
from muon_jax._matrices.hooks import Arrays, Step, stateless


def radial_brake(outward: float | jax.Array = 0.5, inward: float | jax.Array = 1.0) -> Constraint:
    r"""Keeps only a fraction of the change of each matrix's Frobenius norm.

    $\|W'\| = \|W\| + s\,(\|W + U\| - \|W\|)$, in the direction of $W + U$, where s is `outward` if
    the norm grows and `inward` if it shrinks. The update U includes the decay.

    Args:
        outward, inward: Fractions from 0, which keeps the norm, to 1, which keeps the step.

    References:
        NVIDIA Emerging-Optimizers, `RadialBrakeHook`; KellerJordan/modded-nanogpt, track 3.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muon(0.1, constraint=muon_jax.radial_brake(0.0))
        >>> params = {"kernel": jnp.eye(4, 8)}
        >>> updates, _ = tx.update({"kernel": -jnp.eye(4, 8)}, tx.init(params), params)
        >>> print(f"{jnp.linalg.norm(params['kernel'] + updates['kernel']):.2f}")
        2.00
    """
    check_number("outward", outward, at_least=0, at_most=1)
    check_number("inward", inward, at_least=0, at_most=1)

    def braked(weights: Arrays, step: Step) -> Arrays:
        norms = zip(
            step.matrices.norms(step.weights("radial_brake")),
            step.matrices.norms(weights),
            strict=True,
        )
        wanted = [old + jnp.where(new > old, outward, inward) * (new - old) for old, new in norms]
        return step.matrices.with_norms(weights, wanted)

    return Constraint(on_weights=stateless(braked))
