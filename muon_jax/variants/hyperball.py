"""Hyperball: every matrix keeps its initial Frobenius norm, and updates are relative to it."""

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
    r"""Keeps weights on a sphere: $W \leftarrow R\,n(W - \eta R\,n(U))$ with $n(X) = X / \|X\|_F$.

    R is the norm of each matrix at `init`. The learning rate is then the distance that a matrix
    moves relative to its norm, and the shape scale has no effect. The method has no weight decay.

    Each matrix of a stack, such as a layer or an expert, has its own norm, computed over all
    devices that have a shard of it. A matrix that is zero at `init` has no direction to keep, so it
    is updated without the constraint, and a warning says so.

    References:
        Wen et al., 2026, arXiv 2606.16899. Its JAX code in marin sums over experts.

    Example:
        >>> import jax.numpy as jnp, muon_jax, optax
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
    """Returns MuonH: `muon(learning_rate, constraint=hyperball())`, with a rate of about 0.02.

    There is no weight decay, which the constraint would undo.
    """
    return muon(learning_rate, constraint=hyperball(), **options)


def _warn_of_zeros(norms: Arrays) -> None:
    """Warns about zero matrices, unless arrays are traced or on devices of other processes."""
    seen = [x for x in norms if not isinstance(x, jax.core.Tracer) and x.is_fully_addressable]
    if any(bool((x == 0).any()) for x in seen):
        warnings.warn(
            "hyperball: a matrix is zero at init, so it has no norm to keep and is updated without "
            "the constraint. Initialise it differently, or route it to the other optimizer.",
            stacklevel=2,
        )
