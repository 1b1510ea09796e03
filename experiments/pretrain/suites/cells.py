"""One training of a suite, on one device, and what its steps cost beside AdamW's."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import compiled
from experiments.language import windows
from experiments.language.data import Tokens
from experiments.language.mesh import one_device
from experiments.optimizers import OptimizerName
from experiments.pretrain import loop
from experiments.pretrain.config import Training
from experiments.pretrain.step import State, Trainer
from experiments.pretrain.suites.config import BASELINE, model_flops

# Of the timing: turns of an arm after one that does not count, and steps a turn.
ROUNDS, STEPS = 5, 10


class Evaluation(NamedTuple):
    """Losses in nats per token; `seconds` are of training alone, since the cell's start."""

    step: int
    tokens: int
    seconds: float
    train_loss: float
    validation_loss: float
    bits_per_byte: float | None


class Text(NamedTuple):
    """What all cells read.

    Attributes:
        tokens: to train on.
        held_out: windows that they are evaluated on.
    """

    tokens: Tokens
    held_out: windows.HeldOut


@functools.cache
def trainer(config: Training, optimizer: OptimizerName) -> Trainer:
    """The compiled step, which serves all rates and seeds of an arm."""
    mesh = one_device()
    arm = Trainer(config, optimizer, mesh, config.data.vocabulary)
    # Compiles now, before a clock runs.
    jax.block_until_ready(arm.advance(arm.start(0), _no_windows(arm), look=False))
    return arm


def train_cell(
    config: Training,
    text: Text,
    optimizer: OptimizerName,
    rate: float,
    seed: int,
    evaluate_every: int,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
) -> tuple[list[Evaluation], dict[str, Any]]:
    """Trains to the end: every evaluation, and the outcome.

    It ends early when its loss is no longer finite; the outcome then says so and has no loss. It
    is a pure function of its arguments, but for the clock.
    """
    arm = trainer(config, optimizer)
    state, batches = arm.start(seed), _batches(config, text, seed)
    history: list[Evaluation] = []
    seconds, step = 0.0, 0
    while step < config.steps:
        until = min(step + evaluate_every, config.steps)
        began = time.perf_counter()
        while step < until:
            state, metrics = arm.advance(state, arm.share.place(batches[step]), rate, look=False)
            step += 1
        loss, in_a_row = map(float, (metrics["loss"], metrics["nonfinite_in_a_row"]))
        seconds += time.perf_counter() - began
        found = loop.evaluate(arm, state, text.held_out)
        held_out = found["validation_loss"]
        if in_a_row >= config.max_nonfinite_steps or not (
            math.isfinite(loss) and math.isfinite(held_out)
        ):
            break
        tokens = step * config.tokens_per_step
        history.append(
            Evaluation(step, tokens, seconds, loss, held_out, found.get("bits_per_byte"))
        )
        on_evaluation(history[-1])
    diverged = not history or history[-1].step < config.steps
    last = None if diverged else history[-1]
    return history, {
        "diverged": diverged,
        "train_loss": last and last.train_loss,
        "validation_loss": last and last.validation_loss,
        "bits_per_byte": last and last.bits_per_byte,
        "skipped": int(metrics["skipped"]),
        "steps_run": step,
        "seconds": seconds,
        "milliseconds_per_step": 1e3 * seconds / step,
    }


def _batches(config: Training, text: Text, seed: int) -> Any:
    return windows.batches(text.tokens, batch=config.batch, context=config.context, seed=seed)


def _no_windows(arm: Trainer) -> jax.Array:
    config = arm.config
    shape = config.accumulate, config.batch // config.accumulate, config.context + 1
    return jax.device_put(np.zeros(shape, np.int32), arm.windows)


class Cost(NamedTuple):
    """Of one step of an arm.

    Attributes:
        model_flops: of forward and backward pass.
        optimizer_flops: of the update's matrix products; an eigendecomposition counts nothing.
        milliseconds: median of the turns.
        times_baseline: median of each turn's ratio to AdamW's at the same size; None without it.
    """

    model_flops: float
    optimizer_flops: float
    milliseconds: float
    times_baseline: float | None


def measure(
    arms: Sequence[tuple[OptimizerName, Training]],
    on_turn: Callable[[], None] = lambda: None,
) -> list[Cost]:
    """Costs of all arms of one size, which take turns, so that a noisy machine disturbs all.

    Args:
        arms: optimizers, and what they train.
        on_turn: called after every turn, of which there are `ROUNDS + 1` for each arm.
    """
    held = {name: trainer(config, name).start(0) for name, config in arms}
    seconds: dict[str, list[float]] = {name: [] for name in held}
    for _ in range(ROUNDS + 1):
        for name, config in arms:
            arm = trainer(config, name)
            blank = _no_windows(arm)
            began = time.perf_counter()
            for _ in range(STEPS):
                held[name], _ = arm.advance(held[name], blank, look=False)
            jax.block_until_ready(held[name])
            seconds[name].append((time.perf_counter() - began) / STEPS)
            on_turn()
    base = seconds.get(BASELINE)
    return [
        Cost(
            model_flops=float(model_flops(config)),
            optimizer_flops=_optimizer_flops(trainer(config, name)),
            milliseconds=1e3 * statistics.median(seconds[name][1:]),
            times_baseline=base
            and statistics.median(
                ours / theirs for ours, theirs in zip(seconds[name][1:], base[1:], strict=True)
            ),
        )
        for name, config in arms
    ]


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
