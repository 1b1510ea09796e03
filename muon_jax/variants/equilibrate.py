"""MuonEq: row equilibration before orthogonalisation."""

from typing import Any

import optax

from muon_jax._matrices.hooks import Arrays, Hook, Step, stateless
from muon_jax._muon import muon
from muon_jax._options import takes_options_of


def equilibrate() -> Hook:
    r"""Scales the rows of the momentum to equal norms, before orthogonalisation.

    $M_i \leftarrow M_i \sqrt{\mathrm{mean}_j \|M_j\|^2} / \|M_i\|$ for each output neuron i; rows
    of zeros stay zero. Newton-Schulz then starts with more uniform singular values.

    Returns:
        A hook, for `before=` of `muon`, `scale_by_muon` and their variants.

    References:
        MuonEq, 2026, arXiv 2603.28254.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muon(0.02, before=muon_jax.equilibrate())
        >>> params = {"kernel": jnp.ones((4, 8))}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """

    def even(momentum: Arrays, step: Step) -> Arrays:
        matrices = step.matrices
        momentum = matrices.relative(momentum)
        whole = zip(matrices.parts, matrices.norms(momentum), strict=True)
        means = [norm / part.fans[1] ** 0.5 for part, norm in whole]
        return matrices.with_norms(momentum, means, over="fan_in")

    return stateless(even)


@takes_options_of(muon, without=("before",))
def muon_eq(
    learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns MuonEq, which is Muon with equal row norms of the momentum and no additional state.

    It is `muon(learning_rate, before=equilibrate())`.

    Args:
        learning_rate: The learning rate of the hidden matrices, a number or a schedule.
        options: The options of `muon`.

    Returns:
        A transformation that requires `params` in `update`.

    References:
        MuonEq, 2026, arXiv 2603.28254.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muon_eq(0.02, adam_learning_rate=3e-4)
        >>> params = {"embed": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 32))}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    return muon(learning_rate, before=equilibrate(), **options)
