"""A model that compiles fast, rows for it, runs of it, a model's folder, and the command."""

import contextlib
import dataclasses
import functools
import io
import json
import sys
import threading

import jax
import numpy as np
import pytest
from etils import epath
from pretraining import one_device

from experiments import commands
from experiments.finetune import __main__ as command
from experiments.finetune import loop, model, weights
from experiments.finetune.architecture import Architecture
from experiments.finetune.chat import write_tokenizer
from experiments.finetune.config import Optimizer, Running, Training
from experiments.finetune.data import Prepared, Report
from experiments.finetune.packing import Rows, assemble
from experiments.finetune.step import Trainer

NORMED = Architecture(
    layers=2,
    hidden=32,
    ffn=64,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocabulary=64,
    initializer_range=0.2,
)

WORDY = dataclasses.replace(NORMED, vocabulary=320)  # for the tokenizer of `written`


def training(quirks=(), **changes):
    optimizer = Optimizer(**({"learning_rate": 1e-2, "quirks": quirks} | changes.pop("with_", {})))
    settings = {"context": 16, "batch": 8, "steps": 12, "warmup": 2, "remat": False}
    return Training(optimizer=optimizer, **settings | changes)


@functools.cache
def trainer_of(config, arm="adamw", architecture=NORMED, mesh=None):
    return Trainer(config, arm, architecture, mesh or one_device())


@functools.cache
def initial(architecture=NORMED, seed=0):
    """Params on the host, gains and biases that differ."""
    rng = np.random.default_rng(seed)

    def vary(path, x):
        x = np.asarray(x)
        if path[-1].key == "bias":
            return rng.normal(0, 0.5, x.shape).astype(x.dtype)
        return x * rng.uniform(0.8, 1.2, x.shape).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(vary, model.init(architecture, jax.random.key(seed)))


def start(trainer):
    return trainer.start(
        jax.device_put(initial(trainer.architecture), trainer.places, may_alias=False)
    )


def stepped(trainer, steps=1):
    """The state after steps on the same windows, and the last metrics."""
    state = start(trainer)
    for seed in range(steps):
        state, metrics = trainer.advance(state, trainer.place(batch(seed=seed)))
        jax.block_until_ready(state)
    return state, metrics


OFTEN = Running(save_every=4, evaluate_every=6, evaluation_tokens=100, max_checkpoints=9)


def run(trainer, folder, stop_after=None, rows=None, text=None, **calls):
    """Trains in this process; whether it finished."""
    stop = threading.Event()

    def on_step(progress):
        if stop_after is not None and progress.step >= stop_after:
            stop.set()

    def load(mesh):
        places = model.shardings(NORMED, mesh)
        return jax.device_put(initial(), places, may_alias=False)

    folder.mkdir(exist_ok=True)
    begin = loop.Start("counting", NORMED, load, text)
    given = trainer, OFTEN, rows or prepared(), begin, epath.Path(folder), stop
    return loop.FineTuning(*given, on_step=on_step, **calls).to_the_end()


def rows(count, seed=0, vocabulary=60, longest=16):
    """Rows of which the later part is learnt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, count)
    return Rows.of(
        [
            (
                np.cumsum(rng.integers(0, 3, n)).astype(np.int32) % vocabulary,
                np.arange(n) >= rng.integers(1, n),
            )
            for n in lengths
        ]
    )


def prepared(seed=0):
    none = dict.fromkeys(Report._fields, 0)
    report = Report(**none | {"name": "counting", "sha256": f"{seed:064}"})
    return Prepared(rows(80, seed), rows(12, seed + 1), report)


def batch(size=8, seed=0, context=16):
    """A window a row, of different lengths, so that masks are uneven."""
    return assemble(rows(size, seed), [[i] for i in range(size)], context)


def written(folder, architecture=WORDY):
    """A folder with a model, and a file of rows for it."""
    write_tokenizer(folder / "tokenizer", ["to be or not to be"] * 9, 300)
    weights.write(folder / "model", architecture, initial(architecture), folder / "tokenizer")
    lines = (
        {"prompt": f"{i} or not", "completion": " to be" * (1 + i % 5), "group": str(i)}
        for i in range(120)
    )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "model", path


def finetune(words, *, stop=None):
    """Runs the command in this process. Returns its exit code, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["finetune", *words.split()])
        patch.setattr(commands, "stop_on_signals", lambda: stop or threading.Event())
        patch.setenv("COLUMNS", "200")
        return command.main(), out.getvalue(), err.getvalue()
