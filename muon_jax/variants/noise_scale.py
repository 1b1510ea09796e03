"""NAMO: one adaptive scalar for each matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._matrices.hooks import Arrays, Hook, Step
from muon_jax._muon import muon
from muon_jax._options import takes_options_of
from muon_jax.variants.second_moment import root_mean_squares


def noise_scale(beta2: float | jax.Array = 0.95, eps: float | jax.Array = 1e-8) -> Hook:
    r"""Scales each orthogonal factor by the norm of the momentum relative to that of the gradients.

    $v \leftarrow \beta_2 v + (1-\beta_2) \|G\|_F^2$, $O \leftarrow O\,\|M\|_F / (\sqrt v +
    \epsilon)$. The factor is about 1 if gradients agree from step to step, and less if they are
    noisy. This is a hook for `after=`, whose state is $\sqrt v$, a float32 number for each matrix.

    Args:
        beta2: The decay of the second moment, from 0 to 1.
        eps: A number added to the square root of the second moment.

    References:
        NAMO, 2026, arXiv 2602.17080, without a bias correction, as in NVIDIA Emerging-Optimizers.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.muon(0.02, after=muon_jax.noise_scale())
    """
    check_number("beta2", beta2, at_least=0, at_most=1)
    check_number("eps", eps, at_least=0)

    def init(matrices: Any, params: Arrays) -> Arrays:
        return [jnp.zeros_like(norm) for norm in matrices.norms(params)]

    def update(factors: Arrays, roots: Arrays, step: Step) -> tuple[Arrays, Arrays]:
        momentum, gradients = (
            [jnp.minimum(norm, 2.0**126) for norm in step.matrices.safe_norms(arrays)]
            for arrays in (step.momentum, step.gradients())
        )
        roots = root_mean_squares(roots, gradients, beta2)
        return [
            o * (m / jnp.where(r + eps == 0, 1, r + eps))
            for o, m, r in zip(factors, momentum, roots, strict=True)
        ], roots

    return Hook(update, init)


@takes_options_of(muon, without=("after",))
def namo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns NAMO: `muon(learning_rate, after=noise_scale(beta2, eps))`.

    Each matrix has an adaptive step size, which is shorter if gradients are noisy.
    """
    return muon(learning_rate, after=noise_scale(beta2, eps), **options)
