"""AdaMuon: orthogonalises the sign of the momentum, then applies an elementwise second moment."""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._matrices.hooks import Hook, Step, as_hooks, entrywise, stateless
from muon_jax._matrices.stages import Stages
from muon_jax._muon import hooked, hybrid_muon, muon, scale_by_muon
from muon_jax._options import takes_options_of
from muon_jax._scale import ShapeScale


class AdaMuonState(NamedTuple):
    """State of `scale_by_adamuon`.

    Attributes:
        count, mu: As in `MuonState`.
        nu: The average square of the orthogonal factor, float32, shaped like the params.
    """

    count: chex.Array
    mu: optax.Updates
    nu: optax.Updates


@takes_options_of(scale_by_muon)
def scale_by_adamuon(
    *,
    beta2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    scale: str | ShapeScale | None = "match_rms_adamw",
    **options: Any,
) -> optax.GradientTransformation:
    r"""Adds Adam's elementwise step size to the orthogonal factor, for trees of matrix stacks.

    $O = NS(\mathrm{sign}(u))$, $V \leftarrow \beta_2 V + (1-\beta_2) O^2$ and
    $\hat O = O / (\sqrt V + \epsilon)$. The result is scaled to the Frobenius norm of a
    semi-orthogonal matrix and multiplied by the shape scale. With the default shape scale the RMS
    of every update is 0.2, like AdamW's, so that its learning rate can be reused.

    Args:
        beta2: The decay of the second moment, from 0 to 1.
        eps: A number added to the square root of the second moment, and to the norm.
        scale: As in `scale_by_muon`.
        options: The options of `scale_by_muon`.

    References:
        Si et al., 2025, AdaMuon, arXiv 2507.11005, algorithm 1.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.scale_by_adamuon()
        >>> params = {"kernel": jnp.eye(4, 8)}
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> print(f"{jnp.sqrt(jnp.mean(updates['kernel'] ** 2)):.2f}")
        0.20
    """
    before, after = options.pop("before", None), options.pop("after", None)
    sign = stateless(lambda momentum, step: [jnp.sign(x) for x in momentum])
    stages = Stages(
        scale=scale,
        before=(*as_hooks("before", before), sign),
        after=(entry_norm(beta2, eps), *as_hooks("after", after)),
        **options,
    )
    return hooked(stages, AdaMuonState)


def entry_norm(beta2: float | jax.Array = 0.95, eps: float | jax.Array = 1e-8) -> Hook:
    """AdaMuon's second moment as a hook for `after=`; arguments as in `scale_by_adamuon`.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.scale_by_muon(after=muon_jax.entry_norm())
    """
    check_number("beta2", beta2, at_least=0, at_most=1)
    check_number("eps", eps, at_least=0)

    def update(factors: Any, nu: Any, step: Step) -> Any:
        nu = [beta2 * v + (1 - beta2) * o * o for v, o in zip(nu, factors, strict=True)]
        adapted = [o / (jnp.sqrt(v) + eps) for o, v in zip(factors, nu, strict=True)]
        sized = zip(step.matrices.parts, adapted, step.matrices.norms(adapted), strict=True)
        return [math.sqrt(min(part.fans)) * y / (norm + eps) for part, y, norm in sized], nu

    return entrywise(update)


@takes_options_of(muon)
def adamuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    scale: str | ShapeScale | None = "match_rms_adamw",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Updates the hidden matrices with AdaMuon and all other leaves with AdamW.

    AdaMuon is Muon followed by Adam's second moment; see `scale_by_adamuon`. Its state is twice as
    large as Muon's. Use AdamW's learning rate rather than Muon's. All other options are those of
    `muon`.
    """
    scale_by = functools.partial(scale_by_adamuon, beta2=beta2, eps=eps)
    return hybrid_muon(scale_by, learning_rate, scale=scale, **options)
