"""SPEL: keeps the rows or columns of weights orthonormal."""

from typing import Any

import jax
import optax

from muon_jax._checks import check_number
from muon_jax._constraint import Constraint
from muon_jax._matrices.hooks import Arrays, Step, stateless
from muon_jax._matrices.stages import Orthogonalizer
from muon_jax._muon import muon
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz, as_newton_schulz


def stiefel(
    radius: float | jax.Array = 1.0, *, orthogonalizer: Orthogonalizer | None = None
) -> Constraint:
    r"""Replaces the weights after every step by $r$ times their orthogonal factor.

    $W \leftarrow r\,\mathrm{msign}(W + U)$, so every singular value is r. The first step projects
    the initial weights onto this manifold, however far away they are, so initialise them as
    orthogonal matrices.

    Args:
        radius: The positive number r.
        orthogonalizer: The orthogonalizer of the weights. `None` means `newton_schulz` with eight
            steps of `"polar_express"`, which is accurate to 1e-3. Muon's own five steps are not
            accurate enough here, since their errors of up to 30 % would be in the weights.

    References:
        Manifold constrained steepest descent, 2026, arXiv 2601.21487 (SPEL).

    Example:
        >>> import jax.numpy as jnp, muon_jax, optax
        >>> tx = muon_jax.muon(0.1, constraint=muon_jax.stiefel())
        >>> params = {"kernel": jnp.eye(4, 8)}
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 8))}, tx.init(params), params)
        >>> new = optax.apply_updates(params, updates)["kernel"]
        >>> bool(jnp.allclose(new @ new.T, jnp.eye(4), atol=1e-2))
        True
    """
    check_number("radius", radius, above=0)
    exact = orthogonalizer or NewtonSchulz("polar_express", 8)
    function = as_newton_schulz(exact)

    def orthogonal(weights: Arrays, step: Step) -> Arrays:
        factors = step.matrices.orthogonalize(weights, step.updates, function)
        return [radius * w for w in factors]

    return Constraint(on_weights=stateless(orthogonal))


@takes_options_of(muon, without=("scale", "constraint"))
def spel(
    learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns SPEL: `muon(learning_rate, scale="none", constraint=stiefel())`.

    There is no weight decay, which the constraint would undo.
    """
    return muon(learning_rate, scale="none", constraint=stiefel(), **options)
