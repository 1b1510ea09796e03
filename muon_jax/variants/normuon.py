"""NorMuon: Muon followed by a second moment for each output neuron."""

import functools
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._matrices.hooks import Hook, Step, as_hooks
from muon_jax._matrices.stages import Stages
from muon_jax._muon import MuonOptions, hooked, hybrid_muon, muon, scale_by_muon
from muon_jax._options import takes_options_of


class NorMuonState(NamedTuple):
    """State of `scale_by_normuon`.

    Attributes:
        count, mu: As in `MuonState`.
        nu: The mean square of the orthogonal factor for each output neuron, float32, shaped like
            the params with fan_in axes of size 1.
    """

    count: chex.Array
    mu: optax.Updates
    nu: optax.Updates


@takes_options_of(scale_by_muon)
def scale_by_normuon(
    *,
    beta2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-10,
    **options: Any,
) -> optax.GradientTransformation:
    r"""Gives all output neurons steps of about equal size, for trees of matrix stacks.

    $O = NS(u)$, $v \leftarrow \beta_2 v + (1-\beta_2)\,\mathrm{mean}_{fan\_in}(O^2)$ and
    $\hat O = O / (\sqrt v + \epsilon)$, which is scaled to the norm $\|O\|_F$ and multiplied by the
    shape scale.

    Args:
        beta2: The decay of the second moment, from 0 to 1.
        eps: A number added to the square root of the second moment.
        options: The options of `scale_by_muon`.

    References:
        Li et al., 2025, NorMuon, arXiv 2510.05491, algorithm 1, with the norm of its code. The
        paper's 0.2 · sqrt(fan_in · fan_out) is `scale="match_rms_adamw"` if O has full rank.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.scale_by_normuon(beta2=0.9)
        >>> tx.init({"kernel": jnp.ones((4, 8))}).nu["kernel"].shape
        (1, 8)
    """
    before, after = options.pop("before", None), options.pop("after", None)
    hooks = (neuron_norm(beta2, eps), *as_hooks("after", after))
    return hooked(Stages(before=before, after=hooks, **options), NorMuonState)


def neuron_norm(beta2: float | jax.Array = 0.95, eps: float | jax.Array = 1e-10) -> Hook:
    """NorMuon's second moment as a hook for `after=`; arguments as in `scale_by_normuon`.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.scale_by_muon(after=muon_jax.neuron_norm())
    """
    check_number("beta2", beta2, at_least=0, at_most=1)
    check_number("eps", eps, at_least=0)

    def init(matrices: Any, params: Any) -> Any:
        return matrices.sum((jnp.zeros_like(x, jnp.float32) for x in params), over="fan_in")

    def update(factors: Any, nu: Any, step: Step) -> Any:
        matrices = step.matrices
        squares = matrices.sum([o * o for o in factors], over="fan_in")
        nu = [
            beta2 * v + (1 - beta2) * s / part.fans[0]
            for part, v, s in zip(matrices.parts, nu, squares, strict=True)
        ]
        even = [o / (jnp.sqrt(v) + eps) for o, v in zip(factors, nu, strict=True)]
        norms = zip(matrices.norms(factors), matrices.norms(even), strict=True)
        return [y * old / (new + eps) for y, (old, new) in zip(even, norms, strict=True)], nu

    return Hook(update, init)


@takes_options_of(muon)
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-10,
    **options: Unpack[MuonOptions],
) -> optax.GradientTransformationExtraArgs:
    """Updates the hidden matrices with NorMuon and all other leaves with AdamW.

    NorMuon gives all output neurons steps of about equal size; see `scale_by_normuon`. In addition
    to Muon's, its state has one number for each output neuron. All other options are those of
    `muon`.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.normuon(0.02, weight_decay=0.1, adam_learning_rate=3e-4)
    """
    scale_by = functools.partial(scale_by_normuon, beta2=beta2, eps=eps)
    return hybrid_muon(scale_by, learning_rate, **options)
