"""Trains a cell of a suite on one device, and measures the cost of steps against AdamW's."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments import compiled, timing
from experiments.language import windows
from experiments.language.cell import Metrics, train_in_memory
from experiments.language.data import Tokens
from experiments.language.mesh import one_device
from experiments.optimizers import OptimizerName
from experiments.pretrain import loop
from experiments.pretrain.config import Training
from experiments.pretrain.step import State, Trainer
from experiments.pretrain.suites.config import BASELINE, Cell, model_flops

STEPS = 10  # number of timed steps in a turn


@functools.cache
def trainer(config: Training, optimizer: OptimizerName) -> Trainer:
    """Returns a trainer with a compiled step, for all learning rates and seeds of an arm."""
    mesh = one_device()
    arm = Trainer(config, optimizer, mesh, config.data.vocabulary)
    # Compiles the step now, so that no clock includes it.
    jax.block_until_ready(arm.advance(arm.start(0), _no_windows(arm), look=False))
    return arm


def train_cell(
    config: Training,
    tokens: Tokens,
    held_out: windows.HeldOut,
    evaluate_every: int,
    cell: Cell,
    on_evaluation: Callable[[Metrics], None] = lambda evaluation: None,
) -> tuple[list[Metrics], Metrics]:
    """Trains a cell to its last step; returns the evaluations and the outcome of `train_in_memory`.

    Losses are in nats per token. A cell also counts as diverged after `max_nonfinite_steps`
    consecutive steps with NaN or Inf.
    """
    arm = trainer(config, cell.optimizer)
    batches = windows.batches(tokens, batch=config.batch, context=config.context, seed=cell.seed)

    def advance(state: State, first: int, until: int) -> tuple[State, Metrics]:
        for step in range(first, until):
            state, metrics = arm.advance(
                state, arm.share.place(batches[step]), cell.rate, look=False
            )
        lost = int(metrics["nonfinite_in_a_row"]) >= config.max_nonfinite_steps
        loss = math.nan if lost else float(metrics["loss"])
        return state, {"tokens": until * config.tokens_per_step, "train_loss": loss}

    state, history, outcome = train_in_memory(
        arm.start(cell.seed),
        config.steps,
        evaluate_every,
        advance,
        lambda state: {"bits_per_byte": None} | loop.evaluate(arm, state, held_out),
        on_evaluation,
    )
    return history, outcome | {"skipped": int(state.guard.skipped)}


def _no_windows(arm: Trainer) -> jax.Array:
    return jax.device_put(np.zeros(arm.abstract_windows.shape, np.int32), arm.windows)


def measure(
    arms: Sequence[tuple[OptimizerName, Training]],
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[OptimizerName, dict[str, float | None]]:
    """Measures the costs of a step for all arms of one size.

    Args:
        arms: The optimizers and their settings.
        on_turn: As for `timing.step_costs`.

    Returns:
        For each optimizer, the result of `timing.step_costs`; `model_flops`, of the forward and
        backward pass; and `optimizer_flops`, of the update's matrix products, without
        eigendecompositions.
    """

    def turn(arm: Trainer) -> Callable[[], None]:
        blank = _no_windows(arm)
        step = functools.partial(arm.advance, windows=blank, look=False)
        return timing.repeated(lambda state: step(state)[0], arm.start(0), STEPS)

    turns = {name: turn(trainer(config, name)) for name, config in arms}
    costs = timing.step_costs(turns, STEPS, BASELINE, on_turn)
    return {
        name: {
            "model_flops": float(model_flops(config)),
            "optimizer_flops": _optimizer_flops(trainer(config, name)),
            **costs[name],
        }
        for name, config in arms
    }


def _optimizer_flops(arm: Trainer) -> float:
    def update(state: State, gradient: Any, max_logits: Any) -> Any:
        return arm.tx.update(gradient, state.opt_state, state.params, max_logits=max_logits)

    shapes, blank = arm.abstract, _no_windows(arm)[0]
    with jax.set_mesh(arm.mesh):
        losses = functools.partial(arm.model.losses, max_logits=True)
        _, observed = jax.eval_shape(losses, shapes.params, shapes.bias, blank)
        jitted = jax.jit(update)
        program = jitted.lower(shapes, shapes.params, observed.max_logits).compile()
    return float(compiled.measure(program).flops)
