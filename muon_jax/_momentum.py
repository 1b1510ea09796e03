"""Momentum by name: gradients and the running average -> what is orthogonalised."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


class Int8(NamedTuple):
    """Momentum in one byte an entry: `values * scales`.

    An entry is off by at most 1/254 of the largest of its row (the leaf's last axis) for each
    rounding.

    Attributes:
        values: int8, shaped like the params.
        scales: float32, the same with a last axis of 1.
    """

    values: Any
    scales: Any

    @classmethod
    def encode(cls, mu: optax.Updates) -> "Int8":
        def largest(m: jax.Array) -> jax.Array:
            last = -1 if m.ndim else None
            return jnp.max(jnp.abs(m), axis=last, keepdims=True, initial=0).astype(jnp.float32)

        scales = jax.tree.map(lambda m: largest(m) / 127, mu)
        values = jax.tree.map(
            lambda m, s: jnp.round(m / jnp.where(s == 0, 1, s)).astype(jnp.int8), mu, scales
        )
        return cls(values, scales)

    def decode(self) -> optax.Updates:
        return jax.tree.map(lambda v, s: v * s, self.values, self.scales)


def init_momentum(params: optax.Params, dtype: jax.typing.DTypeLike | None) -> Any:
    """Zeros in `dtype`; `None` is each parameter's own, `int8` makes it an `Int8`.

    Raises:
        ValueError: any other dtype that is no real floating point.
    """
    if dtype is None or jnp.issubdtype(dtype, jnp.floating):
        return optax.tree.zeros_like(params, dtype=dtype)
    if jnp.dtype(dtype) != jnp.int8:
        raise ValueError(f"mu_dtype must be real floating point or int8, got {jnp.dtype(dtype)}.")
    return Int8.encode(optax.tree.zeros_like(params))


def as_array_tree(mu: Any) -> optax.Updates:
    """Momentum as numbers, however it is stored."""
    return mu.decode() if isinstance(mu, Int8) else mu


def update_momentum(
    updates: optax.Updates, mu: Any, *, beta, nesterov: bool, kind: str, count: jax.Array
) -> tuple[optax.Updates, Any]:
    """Returns the average to orthogonalise, in the gradients' dtypes, and the new `mu` in its own.

    `count` is the number of this step, from 1.
    """
    momentum = MOMENTA[kind]
    new_mu = jax.tree.map(lambda g, m: momentum.accumulate(g, m, beta), updates, as_array_tree(mu))
    used = jax.tree.map(
        lambda g, m: momentum.look_ahead(g, m, beta, nesterov, count).astype(g.dtype),
        updates,
        new_mu,
    )
    return used, stored_like(new_mu, mu)


def stored_like(mu: optax.Updates, old: Any) -> Any:
    """Momentum stored as `old` is."""
    if isinstance(old, Int8):
        return Int8.encode(mu)
    return jax.tree.map(lambda new, like: new.astype(like.dtype), mu, old)
