"""Measures the smoothness constants that Gluon's step sizes are made of.

    python -m experiments.grok.smoothness

Gluon (Riabinin et al., 2505.13416) assumes that the gradient g of each layer changes by at most
(L0 + L1 |g|) |v| where its weights change by v, in the dual norm of |v|. As its authors do, both
changes are measured from step to step of a training, on one batch. L0 and L1 of a kind of layer are
then the line that 95 % of the measured ratios lie below.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from scipy import optimize

from experiments import optimizers, schedules
from experiments.command_line import parse
from experiments.commands import guard
from experiments.grok import tasks
from experiments.grok.config import Cell, Config
from experiments.grok.losses import LOSSES
from experiments.grok.model import configured
from experiments.grok.train import split
from experiments.report.page import Table
from experiments.settings import Count, check

QUANTILE = 0.95
# The kinds of layers, in the order of `--variants.gluon-smoothness`, by the paths of their leaves.
KINDS = {"hidden matrices": "kernel", "embedding and head": "embedding|head", "gains": "norm"}


@dataclasses.dataclass(frozen=True)
class Command:
    """Measures the smoothness of the grokking model's layers along trainings with Gluon."""

    seeds: Count = 3
    """Number of random seeds, whose measurements are taken together."""
    epochs: Count = 100
    """Passes over the training data."""
    every: Count = 5
    """Steps between measurements."""

    def __post_init__(self) -> None:
        check(self)


def kind_of(path: str) -> str:
    """Returns the kind of layer of a leaf.

    >>> kind_of("blocks/0/attention_norm/scale"), kind_of("head/kernel")
    ('gains', 'embedding and head')
    """
    return next(kind for kind in reversed(KINDS) if re.search(KINDS[kind], path))


def primal_norm(kind: str, w: jax.Array) -> jax.Array:
    """Returns the norm in which Scion's steps of this kind of layer have length 1.

    Args:
        kind: Of the layer.
        w: Weights or a change of them, `(fan_in, fan_out)`.
    """
    if kind == "gains":
        return jnp.sqrt(jnp.mean(w * w))
    if kind == "embedding and head":
        return w.shape[0] * jnp.max(jnp.abs(w))
    return (w.shape[0] / w.shape[1]) ** 0.5 * jnp.linalg.norm(w, 2)


def dual_norm(kind: str, g: jax.Array) -> jax.Array:
    """Returns the largest inner product of a gradient with weights whose `primal_norm` is 1."""
    if kind == "gains":
        return jnp.sqrt(g.size * jnp.sum(g * g))
    if kind == "embedding and head":
        return jnp.sum(jnp.abs(g)) / g.shape[0]
    return (g.shape[1] / g.shape[0]) ** 0.5 * jnp.linalg.norm(g, "nuc")


def fit(norms: np.ndarray, ratios: np.ndarray) -> tuple[float, float]:
    """Fits the line `L0 + L1 * norm` that 95 % of the ratios lie below, by quantile regression.

    Args:
        norms: The dual norms of gradients, `(measurements,)`.
        ratios: The change of the gradient over the change of the weights, `(measurements,)`.

    Returns:
        L0 and L1, neither negative.

    Example:
        >>> norms = np.linspace(0, 1, 101)
        >>> [round(x, 3) for x in fit(norms, 2 + 3 * norms)]
        [2.0, 3.0]
    """
    n, scale = len(norms), np.array([1.0, max(norms.mean(), 1e-30)])
    # A residual is a difference of two positive parts; those above the line cost 19 times as much.
    lines = np.stack([np.ones(n), norms / scale[1]], axis=1)
    costs = np.concatenate([[0, 0], np.full(n, QUANTILE), np.full(n, 1 - QUANTILE)])
    equal = np.concatenate([lines, np.eye(n), -np.eye(n)], axis=1)
    found = optimize.linprog(costs, A_eq=equal, b_eq=ratios, bounds=(0, None))
    l0, l1 = found.x[:2] / scale
    return float(l0), float(l1)


def measure(seed: int, epochs: int, every: int) -> dict[str, list[tuple[float, float]]]:
    """Returns dual norms of gradients and ratios of changes, for each kind of layer.

    Args:
        seed: The seed of the split, the initial parameters and the batches.
        epochs: The number of passes over the training data.
        every: The number of steps between measurements.
    """
    config = Config()
    [task], [softmax] = config.tasks, config.softmax
    cell = Cell(task, softmax, "gluon", seed)
    table, train_rows = tasks.table(task), split(config, cell).train
    make = configured(config, table.vocabulary)
    graph, params = nnx.split(make(rngs=nnx.Rngs(params=jax.random.key(seed))), nnx.Param)
    tokens, answers = jnp.asarray(table.tokens), jnp.asarray(table.answers)
    tx = optimizers.build("gluon", config, schedules.warmup(config.warmup))

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        return LOSSES[softmax](nnx.merge(graph, params)(tokens[rows]), answers[rows]).mean()

    @jax.jit
    def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any, Any]:
        gradients = jax.grad(loss)(params, rows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, gradients

    @jax.jit
    def compare(old: Any, new: Any, gradients: Any, rows: jax.Array) -> dict[str, Any]:
        found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        after = jax.grad(loss)(new, rows)
        leaves = map(jax.tree.leaves, (old, new, gradients))
        paths = jax.tree_util.tree_leaves_with_path(after)
        for (path, g), w, v, h in zip(paths, *leaves, strict=True):
            kind = kind_of(jax.tree_util.keystr(path, simple=True, separator="/"))
            ratio = dual_norm(kind, g - h) / primal_norm(kind, v - w)
            found[kind].append((dual_norm(kind, g), ratio))
        return found

    state, rng = tx.init(params), np.random.default_rng(seed)
    steps = len(train_rows) // config.batch
    measured: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in track(range(epochs * steps), f"seed {seed}", transient=True):
        if number % steps == 0:
            order = rng.permutation(train_rows)
        rows = jnp.asarray(order[number % steps * config.batch :][: config.batch])
        old = params
        params, state, gradients = step(params, state, rows)
        if number >= config.warmup and number % every == 0:
            for kind, pairs in jax.device_get(compare(old, params, gradients, rows)).items():
                measured[kind] += [(float(norm), float(ratio)) for norm, ratio in pairs]
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def work() -> int:
        command = parse(Command, "python -m experiments.grok.smoothness", arguments)
        seeds = [measure(seed, command.epochs, command.every) for seed in range(command.seeds)]
        rows = []
        for kind in KINDS:
            norms, ratios = np.array([pair for of in seeds for pair in of[kind]]).T
            numbers = [f"{x:.3g}" for x in (*fit(norms, ratios), np.median(norms))]
            rows.append([kind, *numbers[:2], str(len(norms)), numbers[2]])
        headings = ("layers", "L0", "L1", "measurements", "dual norm, median")
        found = " ".join(x for _, l0, l1, *_ in rows for x in (l0, l1))
        Console().print(Table.of_texts(headings, rows))
        Console().print(f"--variants.gluon-smoothness {found}")
        return 0

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
