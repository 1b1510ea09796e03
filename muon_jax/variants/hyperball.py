"""Hyperball: every matrix keeps its first Frobenius norm, and the update is a share of it."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._constraint import Constraint
from muon_jax._matrices.hooks import Arrays, Hook, Step, stateless
from muon_jax._muon import muon
from muon_jax._options import takes_options_of


def hyperball() -> Constraint:
    r"""Weights on a sphere: $W \leftarrow R\,n(W - \eta R\,n(U))$, $n(X) = X / \|X\|_F$.

    R is the norm that each matrix had at `init`. The learning rate is then the share of its norm
    that a matrix moves by, whatever its size, and the shape scale does nothing. No weight decay.

    A matrix is one of a stack: each layer and each expert has a norm of its own, whole wherever the
    mesh has split it. One that is zero at first has no direction to keep: it is updated without the
    constraint, with a warning.

    Returns:
        A constraint, for `constraint=` of `muon` and its relatives.

    References:
        Wen et al., 2026, arXiv 2606.16899. Its JAX code in marin has summed over experts.

    Example:
        >>> import jax.numpy as jnp, optax, muon_jax
        >>> tx = muon_jax.normuon(0.02, constraint=muon_jax.hyperball())
        >>> params = {"kernel": 3 * jnp.eye(4, 8)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> new = optax.apply_updates(params, updates)
        >>> print(f"{jnp.linalg.norm(new['kernel']):.3f}")  # 3 * sqrt(4)
        6.000
    """

    def scaled(arrays: Arrays, norms: Arrays, step: Step) -> Arrays:
        own = step.matrices.norms(arrays)
        wanted = [jnp.where(norm == 0, old, norm) for norm, old in zip(norms, own, strict=True)]
        return step.matrices.with_norms(arrays, wanted)

    def relative_to_weights(updates: Arrays, step: Step) -> Arrays:
        return scaled(updates, step.matrices.norms(step.weights("hyperball")), step)

    def first_norms(matrices: Any, params: Arrays) -> Arrays:
        norms = matrices.norms(params)
        _warn_of_zeros(norms)
        return norms

    def on_sphere(weights: Arrays, radii: Arrays, step: Step) -> tuple[Arrays, Arrays]:
        return scaled(weights, radii, step), radii

    return Constraint(stateless(relative_to_weights), Hook(on_sphere, first_norms))


@takes_options_of(muon, without=("constraint",))
def muonh(
    learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """MuonH: Muon whose weights keep the norm that they began with.

    `muon(learning_rate, constraint=hyperball())`. No weight decay: the constraint would undo it.

    Args:
        learning_rate: the share of its norm that a matrix moves by; 0.02 or so. A number or a
            schedule.
        options: those of `muon`.

    Returns:
        A transformation that takes (and needs) `params` in `update`.

    References:
        Wen et al., 2026, arXiv 2606.16899.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muonh(0.02, adam_learning_rate=3e-4)
        >>> params = {"embed": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 32))}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    return muon(learning_rate, constraint=hyperball(), **options)


def _warn_of_zeros(norms: Arrays) -> None:
    """Where they can be seen: not under a transformation, nor on the devices of others."""
    seen = [x for x in norms if not isinstance(x, jax.core.Tracer) and x.is_fully_addressable]
    if any(bool((x == 0).any()) for x in seen):
        warnings.warn(
            "hyperball: a matrix is zero at first, and has no norm to keep; it is updated without "
            "the constraint. Initialise it otherwise, or route it to the other optimizer.",
            stacklevel=2,
        )
