"""SOAP, which is Adam in Shampoo's eigenbases, and SOAP-Muon, which orthogonalises its result."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._matrices.hooks import Arrays, Hook, Step
from muon_jax._muon import muon
from muon_jax._options import takes_options_of
from muon_jax.variants.eigenbases import Eigenbases, Sides, bounded, into, out_of
from muon_jax.variants.second_moment import root_mean_squares


class EigenbasisState(NamedTuple):
    """State of `eigenbasis` for a matrix, in float32.

    Attributes:
        second: The averages of G Gᵀ and Gᵀ G.
        bases: Their eigenvectors when they were last computed.
        root: The root mean square of the gradient in these bases, `(*batch, fan_in, fan_out)`.
    """

    second: Sides
    bases: Sides
    root: jax.Array


def eigenbasis(
    b2: float | jax.Array = 0.95,
    *,
    every: int = 10,
    max_dim: int = 10_000,
    eps: float | jax.Array = 1e-8,
) -> Hook:
    r"""Applies Adam's denominator in the eigenbases of the gradient's second moments.

    $V \leftarrow b_2 V + (1-b_2)(Q_L^\top G\,Q_R)^2$, $M \leftarrow Q_L \left(
    \frac{Q_L^\top M\,Q_R}{\sqrt{\hat V} + \epsilon}\right) Q_R^\top$ with the bias-corrected
    $\hat V$ and the bases of earlier steps, initially identities. Then $L, R \leftarrow
    \mathrm{EMA}(GG^\top, G^\top G; b_2)$, whose eigenvectors are the new bases in the first and
    every `every`-th step. V is not transformed to the new bases: each entry stays with the
    eigenvalues of the same rank.

    This is a hook for `before=`. The remark on repeated eigenvalues in `scale_by_splus` applies
    here as well.

    Args:
        b2: The decay of V, L and R.
        every: The number of steps between eigendecompositions.
        max_dim: A side of at least this size keeps the identity as its basis.
        eps: A number added to the square root of V.

    References:
        Vyas et al., 2024, SOAP, arXiv 2409.11321. Its code skips the first step and renews the
        bases by a power iteration and QR; this function computes eigenvectors.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.muon(0.02, before=muon_jax.eigenbasis(every=5))
    """
    eigenbases = Eigenbases(b2, every, max_dim)
    check_number("eps", eps, at_least=0)

    def init(matrices: Any, params: Arrays) -> list[EigenbasisState]:
        roots = [
            matrices.own_batch(part, jnp.zeros((*batch, m, n), jnp.float32))
            for part in matrices.parts
            for batch, m, n in [part.axes.matrix_shape(part.shape)]
        ]
        return list(map(EigenbasisState, *eigenbases.init(matrices), roots))

    def update(
        momentum: Arrays, states: list[EigenbasisState], step: Step
    ) -> tuple[Arrays, list[EigenbasisState]]:
        if not states:
            return momentum, states
        matrices = step.matrices
        gradients = [bounded(g) for g in matrices.whole(step.gradients())]
        momentum = [bounded(m) for m in matrices.whole(momentum)]
        second, bases, roots = (list(kept) for kept in zip(*states, strict=True))
        turned = [into(g, q) for g, q in zip(gradients, bases, strict=True)]
        roots = root_mean_squares(roots, turned, b2)
        correction = jnp.sqrt(1 - b2**step.count)
        whitened = []
        for m, q, root in zip(momentum, bases, roots, strict=True):
            divisor = root / correction + eps
            whitened.append(out_of(into(m, q) / jnp.where(divisor == 0, 1, divisor), q))
        second = eigenbases.average(second, gradients)
        bases = eigenbases.renew(matrices, second, bases, step.count)
        return matrices.local(whitened), list(map(EigenbasisState, second, bases, roots))

    return Hook(update, init, products=True)


@takes_options_of(
    muon,
    without=("orthogonalizer", "ns_coeffs", "ns_steps", "ns_dtype", "before", "momentum", "scale"),
)
def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float | jax.Array = 0.95,
    b2: float | jax.Array = 0.95,
    every: int = 10,
    max_dim: int = 10_000,
    eps: float | jax.Array = 1e-8,
    nesterov: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Updates the hidden matrices with SOAP and all other leaves with AdamW.

    SOAP is Adam in Shampoo's eigenbases: `muon` without orthogonalisation or shape scale, with
    Adam's bias correction of the momentum and `before=eigenbasis(b2, ...)`. Use a learning rate
    similar to AdamW's, about 3e-3. All other options are those of `muon`.
    """
    hook = eigenbasis(b2, every=every, max_dim=max_dim, eps=eps)
    return muon(
        learning_rate,
        beta=beta,
        nesterov=nesterov,
        momentum="optax",
        orthogonalizer=_as_it_is,
        scale="none",
        before=hook,
        **options,
    )


@takes_options_of(muon, without=("before",))
def soap_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b2: float | jax.Array = 0.95,
    every: int = 10,
    max_dim: int = 10_000,
    eps: float | jax.Array = 1e-8,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns SOAP-Muon: `muon(learning_rate, before=eigenbasis(b2, ...))`.

    References:
        KellerJordan/modded-nanogpt, track 3, 2026-06-09.
    """
    hook = eigenbasis(b2, every=every, max_dim=max_dim, eps=eps)
    return muon(learning_rate, before=hook, **options)


def _as_it_is(x: jax.Array) -> jax.Array:
    return x
