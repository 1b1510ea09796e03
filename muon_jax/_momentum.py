"""Momentum by name: gradients and the running average -> what is orthogonalised."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax


class Momentum(NamedTuple):
    """How the average moves, and what of it is used.

    Attributes:
        accumulate: `(g, mu, beta) -> mu`.
        look_ahead: `(g, mu, beta, nesterov, count) -> u`, with the new `mu`; `count` starts at 1.
    """

    accumulate: Callable
    look_ahead: Callable


def _ema(g, mu, beta):
    return beta * mu + (1 - beta) * g


def _ema_look_ahead(g, mu, beta, nesterov, count):
    del count
    return beta * mu + (1 - beta) * g if nesterov else mu


def _heavy_ball(g, mu, beta):
    return g + beta * mu


def _heavy_ball_look_ahead(g, mu, beta, nesterov, count):
    del count
    return g + beta * mu if nesterov else mu


def _debiased_look_ahead(g, mu, beta, nesterov, count):
    if not nesterov:
        return mu / (1 - beta**count)
    return beta * mu / (1 - beta ** (count + 1)) + (1 - beta) * g / (1 - beta**count)


MOMENTA = {
    # KellerJordan/Muon, torch.optim.Muon.
    "ema": Momentum(_ema, _ema_look_ahead),
    # Liu et al. (2502.16982), eq. 1; optax.trace. A positive factor away from "ema".
    "heavy_ball": Momentum(_heavy_ball, _heavy_ball_look_ahead),
    # optax.contrib.muon: Adam's bias correction, one step further for the momentum part (Dozat's
    # NAdam).
    "optax": Momentum(_ema, _debiased_look_ahead),
}


def update_momentum(
    updates: optax.Updates, mu: optax.Updates, *, beta, nesterov: bool, kind: str, count: jax.Array
) -> tuple[optax.Updates, optax.Updates]:
    """Returns the average to orthogonalise, in the gradients' dtypes, and the new `mu` in its own.

    `count` is the number of this step, from 1.
    """
    momentum = MOMENTA[kind]
    new_mu = jax.tree.map(lambda g, m: momentum.accumulate(g, m, beta), updates, mu)
    used = jax.tree.map(
        lambda g, m: momentum.look_ahead(g, m, beta, nesterov, count).astype(g.dtype),
        updates,
        new_mu,
    )
    return used, jax.tree.map(lambda new, old: new.astype(old.dtype), new_mu, mu)
