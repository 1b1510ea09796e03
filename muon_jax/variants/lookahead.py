"""EMA-Nesterov: gradients at a point ahead of the params, along the average of their steps."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._precision import widen
from muon_jax._trees import only_state


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
        count: The number of steps taken, an int32 scalar.
        factor: The factor of the average in the next look-ahead, a float32 scalar. It is 0 before
            the first step, when there is no average yet.
        mean: The moving average of the params' steps, in float32 or wider.
    """

    count: chex.Array
    factor: chex.Array
    mean: optax.Updates


def lookahead(
    factor: optax.ScalarOrSchedule = 0.3, *, decay: float | jax.Array = 0.99
) -> optax.GradientTransformation:
    r"""Averages the steps of the params, as the last link of a chain. Updates are not changed.

    $\Delta_t = w_{t+1} - w_t$, $m \leftarrow d\,m + (1-d)\,\Delta_t$. The training loop computes
    the gradient, and applies the updates, at $w + f m$, which `lookahead_params` returns. This is
    Nesterov momentum around any optimizer.

    Args:
        factor: The factor f of the average, a number or a schedule. 0 means no look-ahead.
        decay: The decay d of the average, at least 0 and less than 1.

    References:
        EMA-Nesterov, 2026, arXiv 2605.25395. The defaults are those of KellerJordan/modded-nanogpt,
        track 3, 2026-05-25, where the factor falls with the rate and is 0 for the first 300 and the
        last 950 of about 3 000 steps.

    Example:
        >>> import jax, jax.numpy as jnp, muon_jax, optax
        >>> tx = optax.chain(muon_jax.muon(0.02), muon_jax.lookahead(0.5))
        >>> params = {"mlp": {"kernel": jnp.ones((8, 32))}}
        >>> state = tx.init(params)
        >>> loss = lambda params: jnp.sum(params["mlp"]["kernel"] ** 2)
        >>> for _ in range(2):
        ...     ahead = muon_jax.lookahead_params(state, params)
        ...     updates, state = tx.update(jax.grad(loss)(ahead), state, ahead)
        ...     params = optax.apply_updates(ahead, updates)
    """
    check_number("factor", factor, at_least=0, schedule=True)
    check_number("decay", decay, at_least=0, below=1)

    def at(count: jax.Array) -> jax.Array:
        return jnp.asarray(factor(count) if callable(factor) else factor, jnp.float32)

    def init(params):
        mean = jax.tree.map(lambda w: jnp.zeros_like(widen(w)), params)
        return LookaheadState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), mean)

    def update(updates, state, params=None):
        del params

        def average(mean, update):
            move = widen(update) + state.factor * mean
            return (decay * mean + (1 - decay) * move).astype(mean.dtype)

        mean = jax.tree.map(average, state.mean, updates)
        count = optax.safe_increment(state.count)
        return updates, LookaheadState(count, at(count), mean)

    return optax.GradientTransformation(init, update)


def lookahead_params(state: Any, params: optax.Params) -> optax.Params:
    """Returns the params at which to compute the next gradient and apply the next updates.

    Args:
        state: The state of a chain that contains `lookahead`.
        params: The current params.

    Returns:
        The params ahead, in their dtypes; see `lookahead`.
    """
    _, factor, mean = only_state(
        state,
        LookaheadState,
        "look-ahead states but needs exactly one: end the chain with lookahead().",
    )

    def ahead(m: Any, w: Any) -> Any:
        return w if m is None else (w.astype(m.dtype) + factor * m).astype(w.dtype)

    return jax.tree.map(ahead, mean, params, is_leaf=lambda x: x is None)
