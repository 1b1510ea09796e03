"""An average of the params to evaluate at, as the last link of a chain."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._trees import only_state, only_updated


class EvaluationAverageState(NamedTuple):
    """State of `evaluation_average`.

    Attributes:
        weight: what the averaged params weigh in all, 1 - decay^steps; float32 scalar.
        mean: moving average of the params from zero, shaped like them, in float32 or wider.
    """

    weight: chex.Array
    mean: optax.Params


def evaluation_average(decay: float | jax.Array = 0.999) -> optax.GradientTransformation:
    """Averages what the params become; the last link of a chain, whose updates it leaves alone.

    The average is of the params that `optax.apply_updates` gives, rounded to their dtype, and is
    itself held in float32.

    Args:
        decay: of the exponential moving average; at least 0 and less than 1.

    Returns:
        A transformation that needs `params` in `update`, and whose average `evaluation_params`
        finds in the state of any chain around it.

    Raises:
        ValueError: `update` without params, or a decay out of range.

    Example:
        >>> import jax.numpy as jnp, muon_jax, optax
        >>> tx = optax.chain(muon_jax.muon(0.02), muon_jax.evaluation_average(0.99))
        >>> params = {"mlp": {"kernel": jnp.ones((8, 32))}}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> averaged = muon_jax.evaluation_params(state, params)
    """

    check_number("decay", decay, at_least=0, below=1)

    def init(params):
        mean = jax.tree.map(lambda w: jnp.zeros_like(w, dtype=_wide(w)), params)
        return EvaluationAverageState(jnp.zeros([], jnp.float32), mean)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("evaluation_average averages params: give them to update().")
        # XLA drops a rounding with float32 arithmetic on both sides, unless there is a barrier.
        params = only_updated(params, updates)
        after = jax.lax.optimization_barrier(optax.apply_updates(params, updates))

        def average(old, new):
            return (decay * old + (1 - decay) * new).astype(old.dtype)

        mean = jax.tree.map(lambda a, w: average(a, w.astype(a.dtype)), state.mean, after)
        return updates, EvaluationAverageState(average(state.weight, 1), mean)

    return optax.GradientTransformation(init, update)


def evaluation_params(
    state: Any, params: optax.Params, share: float | jax.Array = 1.0
) -> optax.Params:
    """The average in an optimizer's state, corrected for its start, in the params' dtypes.

    Args:
        state: of a chain with `evaluation_average` in it, `splus` for one.
        params: the present ones, returned where no step has been taken yet.
        share: of the average; the rest is of the present params. 0.6 is the tail readout of
            KellerJordan/modded-nanogpt, track 3 (2026-06-11), with a decay of 1 - 1/150.

    Raises:
        ValueError: the state has no average, or several, or a share outside of 0 to 1.
    """
    check_number("share", share, at_least=0, at_most=1)
    weight, mean = only_state(
        state,
        EvaluationAverageState,
        "averages of the params, where one is needed: end the chain with evaluation_average().",
    )

    def corrected(average, param):
        if average is None:  # what is not trained, such as an activation of an Equinox module
            return param
        average = average / jnp.where(weight == 0, 1, weight)
        mixed = share * average + (1 - share) * param.astype(average.dtype)
        return jnp.where(weight == 0, param, mixed).astype(param.dtype)

    return jax.tree.map(corrected, mean, params, is_leaf=lambda x: x is None)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)
