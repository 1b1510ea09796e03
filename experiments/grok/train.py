"""Training of one cell: an epoch is one compiled scan, evaluation one compiled map."""

import functools
import hashlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import optimizers
from experiments.grok import prefixes, tasks
from experiments.grok.config import Cell, Config
from experiments.grok.losses import LOSSES
from experiments.grok.model import Transformer

MEMORIZED_ACCURACY = 0.99
GROKKED_ACCURACY = 0.95
SUSTAINED_EVALUATIONS = 5
TRAIN_SAMPLE = 1024
_EVALUATION_BATCH = 512


class State(NamedTuple):
    """What a training step carries on."""

    params: Any
    opt_state: Any


class Epoch(NamedTuple):
    """An epoch's results; `seconds` are of training alone, since the cell's start."""

    epoch: int
    step: int
    seconds: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float


class Program(NamedTuple):
    """The compiled parts of an arm, shared by its seeds.

    Attributes:
        start: `seed -> State`.
        epoch: `(state, train rows, seed, epoch) -> (state, mean loss)`.
        evaluate: `(state, rows) -> (losses, correct)`, one entry a row.
        steps: steps an epoch.
        step_flops: of one step, from XLA's cost model.
        parameters: of the model.
    """

    start: Callable
    epoch: Callable
    evaluate: Callable
    steps: int
    step_flops: float
    parameters: int


def split(config: Config, cell: Cell) -> tasks.Split:
    """The cell's training and validation rows."""
    rows = len(tasks.table(cell.task).tokens)
    return tasks.split(rows, config.fraction(cell.task), cell.seed)


@functools.cache
def compile_arm(config: Config, cell: Cell) -> Program:
    """Compiles a cell's program; its seed does not matter, so give 0."""
    table = tasks.table(cell.task)
    rows = split(config, cell)
    batch = min(config.batch, len(rows.train))
    steps = len(rows.train) // batch
    tokens, answers = jnp.asarray(table.tokens), jnp.asarray(table.answers)
    tree = prefixes.PrefixTree.of(table, batch)
    loss_of = LOSSES[cell.softmax]
    make = functools.partial(
        Transformer,
        table.vocabulary,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        dropout=config.dropout,
    )
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    tx = optimizers.build(cell.optimizer, config, optimizers.warmup(config.warmup))

    def forward(params, batch_rows, dropout_key=None):
        """The logits, and the largest attention logits, which cost nothing where nobody asks."""
        model = nnx.merge(graph, params)
        if dropout_key is None:
            return prefixes.logits(model, tree, tokens, batch_rows, return_max_logits=True)
        rngs = nnx.Rngs(dropout=dropout_key)
        return model(tokens[batch_rows], dropout_rngs=rngs, return_max_logits=True)

    def start(seed):
        params = nnx.state(make(rngs=nnx.Rngs(params=jax.random.key(seed))), nnx.Param)
        return State(params, tx.init(params))

    def step(state, scanned):
        batch_rows, key = scanned

        def mean_loss(params):
            dropout_key = key if config.dropout else None
            logits, max_logits = forward(params, batch_rows, dropout_key)
            return loss_of(logits, answers[batch_rows]).mean(), max_logits

        (loss, max_logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, max_logits=max_logits)
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    def epoch(state, train_rows, seed, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        order_key, dropout_key = jax.random.split(key)
        order = jax.random.permutation(order_key, train_rows)[: steps * batch]
        scanned = order.reshape(steps, batch), jax.random.split(dropout_key, steps)
        state, losses = jax.lax.scan(step, state, scanned)
        return state, losses.mean()

    def evaluate(state, eval_rows):
        params = optimizers.ARMS[cell.optimizer].eval_params(state.opt_state, state.params)

        def chunk(chunk_rows):
            logits, _ = forward(params, chunk_rows)
            correct = logits.argmax(-1) == answers[chunk_rows]
            return loss_of(logits, answers[chunk_rows]), correct

        chunks = math.ceil(len(eval_rows) / _EVALUATION_BATCH)
        padded = jnp.resize(eval_rows, (chunks, math.ceil(len(eval_rows) / chunks)))
        losses, correct = jax.lax.map(chunk, padded)
        return losses.reshape(-1)[: len(eval_rows)], correct.reshape(-1)[: len(eval_rows)]

    state = jax.eval_shape(start, 0)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    train_rows = jax.ShapeDtypeStruct(rows.train.shape, jnp.int32)
    eval_rows = jax.ShapeDtypeStruct(evaluation_rows(rows).shape, jnp.int32)
    one = (
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    return Program(
        start=jax.jit(start),
        epoch=jax.jit(epoch, donate_argnums=0).lower(state, train_rows, number, number).compile(),
        evaluate=jax.jit(evaluate).lower(state, eval_rows).compile(),
        steps=steps,
        step_flops=float(jax.jit(step).lower(state, one).cost_analysis()["flops"]),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
    )


def evaluation_rows(rows: tasks.Split) -> np.ndarray:
    """A fixed sample of the training rows, then all validation rows."""
    return np.concatenate(
        [rows.train[:: math.ceil(len(rows.train) / TRAIN_SAMPLE)], rows.validation]
    )


def train_cell(
    config: Config, cell: Cell, on_epoch: Callable[[Epoch], None] = lambda epoch: None
) -> tuple[list[Epoch], dict[str, Any]]:
    """Trains a cell to its end: every epoch's results, and the cell's row of the summary.

    A cell ends when it has grokked for good, when its budget is spent, or when its loss is no
    longer finite; the row says which. It is a pure function of the config and the cell.
    """
    program = compile_arm(config, cell._replace(seed=0))
    rows = split(config, cell)
    train_rows, eval_rows = jnp.asarray(rows.train), jnp.asarray(evaluation_rows(rows))
    sample = len(eval_rows) - len(rows.validation)
    seed = jnp.int32(cell.seed)
    state = jax.block_until_ready(program.start(seed))

    history: list[Epoch] = []
    seconds = 0.0
    diverged = False
    for number in range(1, config.epochs + 1):
        began = time.perf_counter()
        state, loss = jax.block_until_ready(
            program.epoch(state, train_rows, seed, jnp.int32(number))
        )
        seconds += time.perf_counter() - began
        losses, correct = map(np.asarray, program.evaluate(state, eval_rows))
        epoch = Epoch(
            epoch=number,
            step=number * program.steps,
            seconds=seconds,
            train_loss=float(loss),
            train_accuracy=float(correct[:sample].mean()),
            validation_loss=float(losses[sample:].mean(dtype=np.float64)),
            validation_accuracy=float(correct[sample:].mean()),
        )
        if not (math.isfinite(epoch.train_loss) and math.isfinite(epoch.validation_loss)):
            diverged = True
            break
        history.append(epoch)
        on_epoch(epoch)
        if not config.full_length and milestones(history)["grok_epoch_sustained"] is not None:
            break
    return history, _row(cell, program, history, seconds, diverged, state.params)


def milestones(history: list[Epoch]) -> dict[str, int | None]:
    """When a cell memorised, first crossed 95 % on validation, and grokked.

    `first_crossing_epoch` counts as it comes; the two grokking epochs only from the memorised
    epoch on, and the sustained one is the first of five evaluations in a row.
    """
    memorized = _first(history, lambda i: history[i].train_accuracy >= MEMORIZED_ACCURACY)

    def crossed(i: int) -> bool:
        return history[i].validation_accuracy >= GROKKED_ACCURACY

    def after(i: int) -> bool:
        return memorized is not None and history[i].epoch >= memorized

    def sustained(i: int) -> bool:
        window = range(i, i + SUSTAINED_EVALUATIONS)
        return window.stop <= len(history) and all(crossed(j) for j in window)

    grokked = _first(history, lambda i: after(i) and crossed(i))
    return {
        "memorized_epoch": memorized,
        "first_crossing_epoch": _first(history, crossed),
        "grok_epoch": grokked,
        "grok_epoch_sustained": _first(history, lambda i: after(i) and sustained(i)),
    }


def _first(history: list[Epoch], holds: Callable[[int], bool]) -> int | None:
    return next((history[i].epoch for i in range(len(history)) if holds(i)), None)


def _row(
    cell: Cell,
    program: Program,
    history: list[Epoch],
    seconds: float,
    diverged: bool,
    params: Any,
) -> dict[str, Any]:
    found = milestones(history)
    grokked = found["grok_epoch"]
    steps = (len(history) + diverged) * program.steps
    delay = None if grokked is None else grokked - found["memorized_epoch"]
    return {
        **cell._asdict(),
        **found,
        "delay": delay,
        "censored": found["grok_epoch_sustained"] is None,
        "diverged": diverged,
        "epochs_run": len(history) + diverged,
        "seconds": seconds,
        "steps_per_second": steps / seconds,
        "seconds_to_grok": None if grokked is None else history[grokked - 1].seconds,
        "flops_to_grok": None if grokked is None else grokked * program.steps * program.step_flops,
        "step_flops": program.step_flops,
        "parameters": program.parameters,
        "params_sha256": _digest(params),
    }


def _digest(params: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
