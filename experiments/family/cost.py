"""What a step of each optimizer costs beside AdamW's: time, state and working memory.

Time is of `tx.update` and `optax.apply_updates` alone, on the study's model and one of its
gradients. The optimizers take turns, so that a noisy machine disturbs all; what counts is the
ratio. A turn has many steps, since some optimizers do their hard work only every so often.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.family.config import BASELINE, Training
from experiments.family.data import Data
from experiments.family.train import language_model, start, transformation
from experiments.optimizers import OptimizerName

ROUNDS = 5
STEPS = 100


class Cost(NamedTuple):
    """Of one update.

    Attributes:
        milliseconds: median of the rounds.
        times_baseline: median of each round's ratio to AdamW's.
        state_bytes_per_parameter: of the optimizer's state, exact.
        temp_bytes: what the compiled update allocates beside its arguments and results.
    """

    milliseconds: float
    times_baseline: float
    state_bytes_per_parameter: float
    temp_bytes: int


def measure(
    config: Training,
    names: Sequence[OptimizerName],
    text: Data,
    *,
    rounds: int,
    steps: int,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[OptimizerName, Cost]:
    """Costs of AdamW and all the named optimizers.

    Args:
        config: the model and the optimizers' settings.
        names: which optimizers.
        text: for the gradient.
        rounds: turns of each optimizer, after one that does not count.
        steps: updates a turn.
        on_turn: called after every turn.
    """
    model = language_model(config)
    params = model.start(0)
    windows = text.validation[: config.batch]
    gradient, observed = jax.jit(jax.grad(model.loss, has_aux=True))(params, windows)
    names = list(dict.fromkeys([BASELINE, *names]))
    turns, costs = {}, {}
    for name in names:
        tx = transformation(config, name)
        state = start(config, name, 0).opt_state
        update = _update(tx, params, state, gradient, observed)
        turns[name] = _Turns(update, jax.tree.map(jnp.copy, params), state, gradient, observed)
        costs[name] = {
            "state_bytes_per_parameter": sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            / model.parameters,
            "temp_bytes": update.memory_analysis().temp_size_in_bytes,
        }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in names:
            seconds[name].append(turns[name].take(steps) / steps)
            on_turn()
    return {
        name: Cost(
            milliseconds=1e3 * statistics.median(seconds[name][1:]),
            times_baseline=statistics.median(
                own / base
                for own, base in zip(seconds[name][1:], seconds[BASELINE][1:], strict=True)
            ),
            **costs[name],
        )
        for name in names
    }


def _update(tx: optax.GradientTransformationExtraArgs, params, state, gradient, observed) -> Any:
    def update(params, state, gradient, observed):
        updates, state = tx.update(gradient, state, params, **observed)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))
    return jitted.lower(params, state, gradient, observed).compile()


class _Turns:
    """An optimizer's params and state, from one turn to the next."""

    def __init__(self, update: Any, params: Any, state: Any, gradient: Any, observed: Any):
        self.update, self.held, self.given = update, (params, state), (gradient, observed)

    def take(self, steps: int) -> float:
        """Seconds of so many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.held = self.update(*self.held, *self.given)
        jax.block_until_ready(self.held)
        return time.perf_counter() - began
