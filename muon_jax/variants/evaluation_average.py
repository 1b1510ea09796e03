"""An average of the params for evaluation, as the last link of a chain."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._precision import widen
from muon_jax._trees import only_state, only_updated


class EvaluationAverageState(NamedTuple):
    """State of `evaluation_average`.

    Attributes:
        weight: The total weight of the averaged params, 1 - decay^steps, a float32 scalar.
        mean: The moving average of the params, starting from zero, in float32 or wider.
    """

    weight: chex.Array
    mean: optax.Params


def evaluation_average(decay: float | jax.Array = 0.999) -> optax.GradientTransformation:
    """Averages the new params, as the last link of a chain. Updates are not changed.

    The params are averaged as `optax.apply_updates` returns them, rounded to their dtype. The
    average itself is stored in float32.

    Args:
        decay: The decay of the exponential moving average, at least 0 and less than 1.

    Returns:
        A transformation that requires `params` in `update`. `evaluation_params` finds its average
        in the state of any chain around it.

    Example:
        >>> import jax.numpy as jnp, muon_jax, optax
        >>> tx = optax.chain(muon_jax.muon(0.02), muon_jax.evaluation_average(0.99))
        >>> params = {"mlp": {"kernel": jnp.ones((8, 32))}}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> averaged = muon_jax.evaluation_params(state, params)
    """

    check_number("decay", decay, at_least=0, below=1)

    def init(params):
        mean = jax.tree.map(lambda w: jnp.zeros_like(widen(w)), params)
        return EvaluationAverageState(jnp.zeros([], jnp.float32), mean)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "evaluation_average needs the params: call update(updates, state, params)."
            )
        # Without a barrier, XLA would omit a rounding between two float32 operations.
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
    """Returns the average in an optimizer's state, bias-corrected, in the params' dtypes.

    Args:
        state: The state of a chain that contains `evaluation_average`, such as `splus`.
        params: The current params, which are returned before the first step.
        share: The weight of the average; the current params have the remaining weight. 0.6 is the
            tail readout of KellerJordan/modded-nanogpt, track 3 (2026-06-11), with a decay of
            1 - 1/150.
    """
    check_number("share", share, at_least=0, at_most=1)
    weight, mean = only_state(
        state,
        EvaluationAverageState,
        "averages of the params but needs exactly one: end the chain with evaluation_average().",
    )

    def corrected(average, param):
        if average is None:  # leaves that are not trained, such as activations in Equinox
            return param
        average = average / jnp.where(weight == 0, 1, weight)
        mixed = share * average + (1 - share) * param.astype(average.dtype)
        return jnp.where(weight == 0, param, mixed).astype(param.dtype)

    return jax.tree.map(corrected, mean, params, is_leaf=lambda x: x is None)
