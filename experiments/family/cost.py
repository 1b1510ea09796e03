"""What a step of each optimizer costs beside AdamW's: time, FLOPs, state and working memory.

Time is of `tx.update` and `optax.apply_updates` alone, on the study's model and one of its
gradients. A turn has many steps, since some optimizers do their hard work only every so often.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import muon_jax
from experiments import timing
from experiments.family.config import BASELINE, Training
from experiments.family.data import Data
from experiments.family.train import language_model, start, transformation
from experiments.optimizers import OptimizerName

STEPS = 100  # per turn


def measure(
    config: Training,
    names: Sequence[OptimizerName],
    text: Data,
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[OptimizerName, dict[str, Any]]:
    """Measures the costs of an update of the named optimizers.

    Args:
        config: The settings of the model and the optimizers.
        names: The optimizers. Ratios are to AdamW, if it is one of them.
        text: The text from which the gradient is computed.
        on_turn: As in `timing.step_costs`.

    Returns:
        What `timing.step_costs` tells; by `muon_jax.plan` `state_bytes_per_parameter`, exact,
        `flops` of products and `decomposition_flops`, means of a step; and `temp_bytes`, what the
        compiled update allocates beside its arguments and results.
    """
    model = language_model(config)
    params = model.start(0)
    windows = text.validation[: config.batch]
    gradient, observed = jax.jit(jax.grad(model.loss, has_aux=True))(params, windows)
    turns, memory = {}, {}
    for name in names:
        tx = transformation(config, name)
        held = jax.tree.map(jnp.copy, params), start(config, name, 0).opt_state
        update = jax.jit(functools.partial(_update, tx), donate_argnums=0)
        compiled = update.lower(held, gradient=gradient, observed=observed).compile()
        planned = optax.GradientTransformation(tx.init, functools.partial(tx.update, **observed))
        (row,) = muon_jax.plan(params, planned).rows
        memory[name] = {
            "flops": row.flops,
            "decomposition_flops": row.decomposition_flops,
            "state_bytes_per_parameter": row.momentum_bytes / model.parameters,
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        step = functools.partial(compiled, gradient=gradient, observed=observed)
        turns[name] = timing.repeated(step, held, STEPS)
    costs = timing.step_costs(turns, STEPS, BASELINE, on_turn)
    return {name: costs[name] | memory[name] for name in names}


def _update(tx: optax.GradientTransformationExtraArgs, held: Any, gradient: Any, observed: Any):
    params, state = held
    updates, state = tx.update(gradient, state, params, **observed)
    return optax.apply_updates(params, updates), state
