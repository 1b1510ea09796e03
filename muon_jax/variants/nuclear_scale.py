"""PolarGrad: steepest descent in the spectral norm."""

from typing import Any

import jax.numpy as jnp
import optax

from muon_jax._matrices.hooks import Arrays, Hook, Step, stateless
from muon_jax._muon import muon
from muon_jax._options import takes_options_of


def nuclear_scale() -> Hook:
    r"""Multiplies each orthogonal factor by the momentum's nuclear norm, as a hook for `after=`.

    $O \leftarrow \langle O, M \rangle\,O$, since the inner product with the polar factor is the sum
    of the singular values. Steps then shrink with the gradient, as in gradient descent. Entries of
    the momentum are clipped at 2^100.

    References:
        Lau et al., 2025, PolarGrad, arXiv 2505.21799.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.scale_by_muon(after=muon_jax.nuclear_scale())
    """

    def scaled(factors: Arrays, step: Step) -> Arrays:
        matrices = step.matrices
        pairs = zip(factors, matrices.relative(step.momentum), strict=True)
        inner = matrices.sum([jnp.real(o * jnp.conj(m)) for o, m in pairs], over="matrix")
        sizes = zip(inner, matrices.largest(step.momentum), strict=True)
        norms = [x * jnp.minimum(largest, 2.0**100) for x, largest in sizes]
        return [o * norm for o, norm in zip(factors, norms, strict=True)]

    return stateless(scaled)


@takes_options_of(muon, without=("after",))
def polargrad(
    learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns PolarGrad: `muon(learning_rate, after=nuclear_scale())`.

    Use a learning rate like SGD's rather than Muon's, because the update grows with the gradient.
    """
    return muon(learning_rate, after=nuclear_scale(), **options)
