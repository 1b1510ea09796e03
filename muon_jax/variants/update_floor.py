"""A floor of the update: every matrix or neuron moves at least by a fraction of its norm."""

import jax
import jax.numpy as jnp

from muon_jax._checks import check_number
from muon_jax._constraint import Constraint
from muon_jax._matrices.hooks import Arrays, Step, stateless


def update_floor(share: float | jax.Array = 0.35, *, over: str = "matrix") -> Constraint:
    r"""Raises the norm of an update to at least `share` times that of the weights (u/w floor).

    $U \leftarrow U \max(1, c\,\|W\| / \|U\|)$, before decay and rate. A step then moves a matrix at
    least by the learning rate times `share` times its norm. Zero updates stay zero.

    Args:
        share: The constant c, at least 0.
        over: The axes of the norms: `"matrix"`, or `"fan_in"` for a norm of each output neuron.

    References:
        KellerJordan/modded-nanogpt, track 3: 0.35 (record 11), 0.3825 by neuron (record 46).

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muon(0.1, constraint=muon_jax.update_floor(0.5))
        >>> params = {"kernel": 100 * jnp.eye(4, 8)}
        >>> updates, _ = tx.update({"kernel": jnp.eye(4, 8)}, tx.init(params), params)
        >>> print(f"{jnp.linalg.norm(updates['kernel']):.2f}")  # 0.1 * 0.5 * 200
        10.00
    """
    check_number("share", share, at_least=0)
    if over not in ("matrix", "fan_in"):
        raise ValueError(f'over must be "matrix" or "fan_in"; got {over!r}.')

    def raised(updates: Arrays, step: Step) -> Arrays:
        weights = step.matrices.norms(step.weights("update_floor"), over)
        own = step.matrices.norms(updates, over)
        wanted = [jnp.maximum(u, share * w) for u, w in zip(own, weights, strict=True)]
        return step.matrices.with_norms(updates, wanted, over)

    return Constraint(on_update=stateless(raised))
