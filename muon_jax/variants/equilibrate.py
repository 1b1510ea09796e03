"""MuonEq: row equilibration before orthogonalisation."""

from typing import Any

import optax

from muon_jax._matrices.hooks import Arrays, Hook, Step, stateless
from muon_jax._muon import muon
from muon_jax._options import takes_options_of


def equilibrate() -> Hook:
    r"""Scales the rows of the momentum to equal norms, as a hook for `before=`.

    $M_i \leftarrow M_i \sqrt{\mathrm{mean}_j \|M_j\|^2} / \|M_i\|$ for each output neuron i; rows
    of zeros stay zero. Newton-Schulz then starts with more uniform singular values.

    References:
        MuonEq, 2026, arXiv 2603.28254.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.muon(0.02, before=muon_jax.equilibrate())
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
    """Returns MuonEq: `muon(learning_rate, before=equilibrate())`, with no additional state."""
    return muon(learning_rate, before=equilibrate(), **options)
