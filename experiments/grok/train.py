"""Trains cells: each epoch is one compiled scan, each evaluation one compiled map."""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import muon_jax
from experiments import optimizers, schedules
from experiments.grok import prefixes, probes, tasks
from experiments.grok.config import Cell, Config
from experiments.grok.losses import LOSSES
from experiments.grok.model import configured
from experiments.language.mesh import one_device
from experiments.parallel import once
from experiments.spikes import spikes

MEMORIZED_ACCURACY = 0.99
GROKKED_ACCURACY = 0.95
SUSTAINED_EVALUATIONS = 5
NEAR_BEST = 0.01
TRAIN_SAMPLE = 1024
_EVALUATION_BATCH = 512


class State(NamedTuple):
    """The state that a training step updates."""

    params: Any
    opt_state: Any


class Epoch(NamedTuple):
    """The results of an epoch.

    `seconds` is the training time since the cell's start, without evaluation. `clipped` is the
    share of the steps in which QK-clip acted, for optimizers that have it. `gradient_norms` holds
    one norm for each step if they are wanted, `probe` the diagnostics if they were due.
    """

    epoch: int
    step: int
    seconds: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    clipped: float | None = None
    gradient_norms: list[float] | None = None
    probe: dict[str, Any] | None = None


class Outcome(NamedTuple):
    """The outcome of a cell: the results of every epoch, and its row of the summary."""

    history: list[Epoch]
    row: dict[str, Any]


class Program(NamedTuple):
    """The compiled functions of an arm for several seeds. All arrays have a leading seed axis.

    Attributes:
        start: A function `seeds -> State`.
        epoch: A function `(state, train rows, seeds, epochs) -> (state, measured)`. `measured`
            has means over the steps by name, and `gradient_norms` with one norm for each step.
        evaluate: A function `(state, rows) -> (losses, correct)`, with one entry for each row.
        probe: A function `(state, train rows) -> measures`, as `probes.measure` returns them. None
            if no diagnostics are wanted.
        place: A function that moves arrays to the program's device.
        steps: The number of steps per epoch.
        step_flops: The FLOPs of one step of one seed, from XLA's cost model.
        parameters: The number of parameters of the model.
    """

    start: Callable
    epoch: Callable
    evaluate: Callable
    probe: Callable | None
    place: Callable
    steps: int
    step_flops: float
    parameters: int


def split(config: Config, cell: Cell) -> tasks.Split:
    """Returns the training and validation rows of a cell."""
    rows = len(tasks.table(cell.task).tokens)
    return tasks.split(rows, config.fraction(cell.task), cell.seed)


# On a CPU each arm's programs need about 1600 memory maps, and Linux allows a process 65 530.
@once(keep=24)
def compile_arm(config: Config, cell: Cell, seeds: int, device: jax.Device) -> Program:
    """Compiles the program of cells that differ only in their seeds.

    Args:
        config: The settings of the cells, as returned by `Config.at`.
        cell: One of the cells. Its seed and point must be 0 and "", so that all share one program.
        seeds: The number of seeds that train together.
        device: The device to run on.
    """
    table = tasks.table(cell.task)
    rows = split(config, cell)
    batch = min(config.batch, len(rows.train))
    steps = len(rows.train) // batch
    tokens, answers = jnp.asarray(table.tokens), jnp.asarray(table.answers)
    tree = prefixes.PrefixTree.of(table, batch)
    loss_of = LOSSES[cell.softmax]
    make = configured(config, table.vocabulary)
    graph, shapes, _ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param, ...)

    def forward(params, batch_rows, dropout_key=None):
        """Returns the logits and the largest attention logits, which XLA drops if unused."""
        return prefixes.logits(
            nnx.merge(graph, params),
            tree,
            tokens,
            batch_rows,
            dropout_rngs=None if dropout_key is None else nnx.Rngs(dropout=dropout_key),
            return_max_logits=True,
        )

    def plain(params, tokens):
        """Applies the model without `prefixes`, so that routing can trace how kernels are used."""
        return nnx.merge(graph, params)(tokens)

    windows = jax.ShapeDtypeStruct((batch, tokens.shape[1]), tokens.dtype)
    routing = muon_jax.trace_routing(plain, shapes, windows)
    warmup = schedules.warmup(config.warmup)
    tx = optimizers.build(cell.optimizer, config, warmup, routing=routing)
    threshold = optimizers.clip_threshold(cell.optimizer, config)

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
        measured = {"loss": loss}
        if threshold is not None:
            largest = jnp.stack([logits.max() for logits in max_logits.values()]).max()
            measured["clipped"] = (largest > threshold).astype(jnp.float32)
        if config.gradient_norms:
            measured["gradient_norms"] = optax.tree.norm(grads)
        return State(optax.apply_updates(state.params, updates), opt_state), measured

    def epoch(state, train_rows, seed, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        order_key, dropout_key = jax.random.split(key)
        order = jax.random.permutation(order_key, train_rows)[: steps * batch]
        scanned = order.reshape(steps, batch), jax.random.split(dropout_key, steps)
        state, measured = jax.lax.scan(step, state, scanned)
        norms = {key: measured.pop(key) for key in ("gradient_norms",) if key in measured}
        return state, jax.tree.map(jnp.mean, measured) | norms

    def evaluate(state, eval_rows):
        params = optimizers.ARMS[cell.optimizer].eval_params(state.opt_state, state.params)

        def chunk(chunk_rows):
            logits, _ = forward(params, chunk_rows)
            correct = logits.argmax(-1) == answers[chunk_rows]
            return loss_of(logits, answers[chunk_rows]), correct

        return _in_chunks(chunk, eval_rows)

    def probe(state, train_rows):
        after, _ = step(state, (train_rows[::steps][:batch], jax.random.key(0)))
        updates = jax.tree.map(jnp.subtract, after.params, state.params)
        everything = jnp.arange(len(table.tokens), dtype=jnp.int32)
        logits = _in_chunks(lambda chunk_rows: forward(state.params, chunk_rows)[0], everything)
        return probes.measure(cell.task, cell.softmax, state.params, updates, logits, train_rows)

    # The mesh tells the optimizer the device of the program, which may differ from JAX's default
    # platform or be absent.
    mesh = one_device(device)
    place = jax.NamedSharding(mesh, jax.P())

    def compiled(f: Callable, *arguments: Any, **options: Any) -> Callable:
        """Compiles `f`, a function of one seed's arrays like `arguments`, for all seeds."""
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype, sharding=place), arguments
        )
        with jax.set_mesh(mesh):
            return jax.jit(_together(f, seeds), **options).lower(*shapes).compile()

    state = jax.eval_shape(start, 0)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    train_rows = jax.ShapeDtypeStruct(rows.train.shape, jnp.int32)
    eval_rows = jax.ShapeDtypeStruct(evaluation_rows(rows).shape, jnp.int32)
    one = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    return Program(
        start=compiled(start, number),
        epoch=compiled(epoch, state, train_rows, number, number, donate_argnums=0),
        evaluate=compiled(evaluate, state, eval_rows),
        probe=compiled(probe, state, train_rows) if config.probe_every else None,
        place=functools.partial(jax.device_put, device=place),
        steps=steps,
        step_flops=float(jax.jit(step).lower(state, one).cost_analysis()["flops"]),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
    )


def _in_chunks(f: Callable, rows: jax.Array) -> Any:
    """Returns `f(rows)`, computed in chunks of rows."""
    chunks = math.ceil(len(rows) / _EVALUATION_BATCH)
    padded = jnp.resize(rows, (chunks, math.ceil(len(rows) / chunks)))
    found = jax.lax.map(f, padded)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(rows)], found)


def _together(f: Callable, seeds: int) -> Callable:
    """Returns a function that applies `f` to each seed along the leading axis of all arrays."""

    def alone(*arguments: Any) -> Any:
        found = f(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], found)

    # One seed does not use vmap, under which both branches of a condition would run in every step.
    return jax.vmap(f) if seeds > 1 else alone


def evaluation_rows(rows: tasks.Split) -> np.ndarray:
    """Returns a fixed sample of the training rows, followed by all validation rows."""
    return np.concatenate(
        [rows.train[:: math.ceil(len(rows.train) / TRAIN_SAMPLE)], rows.validation]
    )


def train_cells(
    config: Config,
    cells: Sequence[Cell],
    on_epoch: Callable[[Cell, Epoch], None] = lambda cell, epoch: None,
    device: jax.Device | None = None,
) -> list[Outcome]:
    """Trains cells that differ only in their seeds, all together.

    A cell ends when it has grokked stably, when its budget of epochs is used up, or when its loss
    is NaN or infinite. Its row says which. The result depends only on the config and the cell.

    Args:
        config: The settings of the run.
        cells: The cells, at least one.
        on_epoch: A function that is called after every epoch of each cell that has not ended.
        device: The device to train on, by default the first.
    """
    settings = config.at(cells[0])
    arm = cells[0]._replace(seed=0, point="")
    program = compile_arm(settings, arm, len(cells), device or jax.local_devices()[0])
    splits = [split(settings, cell) for cell in cells]
    train_rows = program.place(np.stack([rows.train for rows in splits]))
    eval_rows = program.place(np.stack([evaluation_rows(rows) for rows in splits]))
    sample = eval_rows.shape[1] - len(splits[0].validation)
    seeds = program.place(np.array([cell.seed for cell in cells], np.int32))
    state = jax.block_until_ready(program.start(seeds))

    histories: list[list[Epoch]] = [[] for _ in cells]
    rows: dict[int, dict[str, Any]] = {}
    seconds = 0.0
    for number in range(1, settings.epochs + 1):
        numbers = program.place(np.full(len(cells), number, np.int32))
        began = time.perf_counter()
        state, found = jax.block_until_ready(program.epoch(state, train_rows, seeds, numbers))
        seconds += time.perf_counter() - began
        losses, correct = map(np.asarray, program.evaluate(state, eval_rows))
        due = program.probe and (number == 1 or number % settings.probe_every == 0)
        diagnostics = _diagnostics(program, state, train_rows) if due else None
        for i in sorted({*range(len(cells))} - rows.keys()):
            epoch = Epoch(
                epoch=number,
                step=number * program.steps,
                seconds=seconds,
                train_loss=float(found["loss"][i]),
                train_accuracy=float(correct[i, :sample].mean()),
                validation_loss=float(losses[i, sample:].mean(dtype=np.float64)),
                validation_accuracy=float(correct[i, sample:].mean()),
                clipped=float(found["clipped"][i]) if "clipped" in found else None,
                gradient_norms=found["gradient_norms"][i].tolist()
                if "gradient_norms" in found
                else None,
            )
            finite = math.isfinite(epoch.train_loss) and math.isfinite(epoch.validation_loss)
            seen = [*histories[i], epoch] if finite else histories[i]
            grokked = milestones(seen)["grok_epoch_sustained"] is not None
            spent = number == settings.epochs
            ends = spent or not finite or (grokked and not settings.full_length)
            if finite:
                if ends and program.probe and diagnostics is None:
                    diagnostics = _diagnostics(program, state, train_rows)
                epoch = epoch._replace(probe=diagnostics and diagnostics[i])
                histories[i].append(epoch)
                on_epoch(cells[i], epoch)
            if ends:
                weights = [np.asarray(leaf[i]).tobytes() for leaf in jax.tree.leaves(state.params)]
                rows[i] = {
                    **_row(settings, cells[i], program, histories[i], seconds, not finite),
                    "together": len(cells),
                    "params_sha256": hashlib.sha256(b"".join(weights)).hexdigest(),
                }
        if len(rows) == len(cells):
            break
    return [Outcome(histories[i], rows[i]) for i in range(len(cells))]


def _diagnostics(program: Program, state: State, train_rows: jax.Array) -> list[dict[str, Any]]:
    """Returns the diagnostics of each seed, as `probes.record` formats them."""
    assert program.probe is not None
    measured = jax.device_get(program.probe(state, train_rows))
    each = range(len(train_rows))
    return [probes.record({key: x[i] for key, x in measured.items()}) for i in each]


def milestones(history: list[Epoch]) -> dict[str, int | None]:
    """Returns the epochs at which a cell memorised, generalised, and lost its accuracy again.

    `first_crossing_epoch` is the first epoch with 95 % validation accuracy. The grokking epochs are
    at or after the memorised epoch: `grok_epoch` is the first with 95 %; `sustained` the first of
    five evaluations in a row with 95 %; `near_best` the first that is also within 1 % of the run's
    highest accuracy (Essential AI, 2025). `collapse_epoch` is the first of five evaluations in a
    row below 95 % after sustained grokking.
    """
    accuracy = np.array([epoch.validation_accuracy for epoch in history])
    memorized = _first(np.array([e.train_accuracy for e in history]) >= MEMORIZED_ACCURACY)
    above = accuracy >= GROKKED_ACCURACY
    after = np.arange(1, len(history) + 1) >= (np.inf if memorized is None else memorized)
    near = above & (accuracy >= accuracy.max(initial=0) - NEAR_BEST)
    sustained = _first(after & _sustained(above))
    lost = _sustained(~above) & (np.arange(1, len(history) + 1) > (sustained or np.inf))
    return {
        "memorized_epoch": memorized,
        "first_crossing_epoch": _first(above),
        "grok_epoch": _first(after & above),
        "grok_epoch_sustained": sustained,
        "grok_epoch_near_best": _first(after & near),
        "collapse_epoch": _first(lost),
    }


def _first(holds: np.ndarray) -> int | None:
    """Returns the first epoch, counted from 1, at which a condition holds."""
    return int(holds.argmax()) + 1 if holds.any() else None


def _sustained(holds: np.ndarray) -> np.ndarray:
    """Returns at which evaluations a condition holds, and at the next four too, if all exist."""
    padded = np.append(holds, np.zeros(SUSTAINED_EVALUATIONS, bool))
    windows = np.lib.stride_tricks.sliding_window_view(padded, SUSTAINED_EVALUATIONS)
    return windows[:-1].all(axis=1)


def _row(
    settings: Config,
    cell: Cell,
    program: Program,
    history: list[Epoch],
    seconds: float,
    diverged: bool,
) -> dict[str, Any]:
    found = milestones(history)
    grokked = found["grok_epoch"]
    epochs = len(history) + diverged
    positions = tasks.table(cell.task).tokens.shape[1]
    batch = min(settings.batch, len(split(settings, cell).train))
    clipped = [epoch.clipped for epoch in history if epoch.clipped is not None]
    norms = [norm for epoch in history for norm in epoch.gradient_norms or ()]
    return {
        **cell._asdict(),
        **found,
        "delay": None if grokked is None else grokked - found["memorized_epoch"],
        **after_grokking(history, found["grok_epoch_sustained"]),
        "censored": found["grok_epoch_sustained"] is None,
        "diverged": diverged,
        "epochs_run": epochs,
        "final_validation_accuracy": history[-1].validation_accuracy if history else None,
        "seconds": seconds,
        "steps_per_second": epochs * program.steps / seconds,
        "seconds_to_grok": None if grokked is None else history[grokked - 1].seconds,
        "flops_to_grok": None if grokked is None else grokked * program.steps * program.step_flops,
        "steps_per_epoch": program.steps,
        "tokens_per_epoch": program.steps * batch * positions,
        "step_flops": program.step_flops,
        "parameters": program.parameters,
        **({"clipped_share": float(np.mean(clipped))} if clipped else {}),
        **(spikes(norms) if norms else {}),
    }


def after_grokking(history: list[Epoch], grokked: int | None) -> dict[str, int]:
    """Returns the number of evaluations after grokking, and of those with less than 95 %."""
    later = history[grokked:] if grokked else []
    below = sum(epoch.validation_accuracy < GROKKED_ACCURACY for epoch in later)
    return {"evaluations_after_grok": len(later), "below_after_grok": below}
