"""`python -m experiments.grok.speed` times our training loop, PyTorch's and one with optax's Muon.

All train the same transformer on `mul`, without dropout, to 95 % validation accuracy. They take
turns, one epoch each, so that a noisy machine affects all alike. Only ratios of times are
comparable between machines.
"""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.command_line import parse
from experiments.commands import guard
from experiments.grok import tasks
from experiments.grok.config import Cell, Config
from experiments.grok.model import FEED_FORWARD_RATIO, ROPE_BASE
from experiments.grok.train import GROKKED_ACCURACY, compile_arm, evaluation_rows, split
from experiments.layers import RMS_EPSILON
from experiments.optimizers import AdamW, OptimizerName
from experiments.report.page import Table
from experiments.settings import Count, at_least, check, fitting_divisor
from experiments.timing import seconds_of

TASK: tasks.TaskName = "mul"


def torch_model(vocabulary: int, config: Config) -> Any:
    """Returns the grokking transformer in idiomatic PyTorch.

    Raises:
        ImportError: PyTorch is not installed.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    width, heads = config.width, config.heads

    def linear(fan_in: int, fan_out: int) -> nn.Linear:
        layer = nn.Linear(fan_in, fan_out, bias=False)
        nn.init.uniform_(layer.weight, -(fan_in**-0.5), fan_in**-0.5)
        return layer

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = FEED_FORWARD_RATIO * width
            self.attention_norm = nn.RMSNorm(width, eps=RMS_EPSILON)
            self.feed_forward_norm = nn.RMSNorm(width, eps=RMS_EPSILON)
            self.query, self.key = linear(width, width), linear(width, width)
            self.value, self.out = linear(width, width), linear(width, width)
            self.gate, self.up = linear(width, hidden), linear(width, hidden)
            self.down = linear(hidden, width)

        def forward(self, x, sin, cos):
            def split_heads(y):
                return y.unflatten(-1, (heads, -1)).transpose(1, 2)

            def rotate(y):
                first, second = y.chunk(2, dim=-1)
                return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

            y = self.attention_norm(x)
            q, k = rotate(split_heads(self.query(y))), rotate(split_heads(self.key(y)))
            v = split_heads(self.value(y))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            y = self.feed_forward_norm(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList(Block() for _ in range(config.layers))
            self.norm = nn.RMSNorm(width, eps=RMS_EPSILON)
            self.head = linear(width, vocabulary)

        def forward(self, tokens):
            half = width // heads // 2
            frequency = ROPE_BASE ** (-torch.arange(half) / half)
            angle = torch.arange(tokens.shape[1])[:, None] * frequency
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, angle.sin(), angle.cos())
            return self.head(self.norm(x[:, -1]))

    return Model()


def torch_optimizer(model: Any, adamw: AdamW) -> Any:
    """Returns PyTorch's AdamW with the study's settings."""
    import torch

    rates = {"lr": adamw.learning_rate, "weight_decay": adamw.weight_decay}
    own = rates | {"betas": (adamw.b1, adamw.b2), "eps": adamw.eps}
    return torch.optim.AdamW(model.parameters(), **own)


class Loop(NamedTuple):
    """A training loop that is timed.

    Attributes:
        epoch: A function that trains one epoch and waits for it.
        accuracy: A function that returns the validation accuracy.
        steps: The number of steps per epoch.
    """

    epoch: Callable[[], Any]
    accuracy: Callable[[], float]
    steps: int


def torch_loop(config: Config) -> Loop:
    """Returns PyTorch's loop with AdamW."""
    import torch
    from torch.nn import functional as F

    table, rows = tasks.table(TASK), split(config, Cell(TASK, "softmax", "adamw", 0))
    train, validation = (torch.from_numpy(part).long() for part in rows)
    tokens = torch.from_numpy(table.tokens).long()
    answers = torch.from_numpy(table.answers).long()
    torch.manual_seed(0)
    model = torch_model(table.vocabulary, config)
    optimizer = torch_optimizer(model, config.adamw)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(config.warmup, 1))
    )
    steps = len(train) // config.batch

    def epoch() -> None:
        order = train[torch.randperm(len(train))][: steps * config.batch]
        for batch in order.split(config.batch):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(tokens[batch]), answers[batch]).backward()
            optimizer.step()
            warmup.step()

    def accuracy() -> float:
        with torch.no_grad():
            found = [model(tokens[b]).argmax(-1) == answers[b] for b in validation.split(1024)]
        return torch.cat(found).float().mean().item()

    return Loop(epoch, accuracy, steps)


def our_loop(config: Config, optimizer: OptimizerName) -> Loop:
    """Returns our loop with any optimizer."""
    cell = Cell(TASK, "softmax", optimizer, 0)
    program = compile_arm(config, cell, 1, jax.local_devices()[0])
    rows = split(config, cell)
    train = program.place(rows.train[None])
    evaluated = program.place(evaluation_rows(rows)[None])
    seed = program.place(np.zeros(1, np.int32))
    state, epochs = program.start(seed), 0

    def epoch() -> None:
        nonlocal state, epochs
        epochs += 1
        number = program.place(np.array([epochs], np.int32))
        state, _ = jax.block_until_ready(program.epoch(state, train, seed, number))

    def accuracy() -> float:
        _, correct = program.evaluate(state, evaluated)
        return float(correct[0, -len(rows.validation) :].mean())

    return Loop(epoch, accuracy, program.steps)


@dataclasses.dataclass(frozen=True)
class Command:
    """Times training with PyTorch, muon_jax and optax.contrib.muon, which alternate by epochs."""

    layers: Count = 2
    """Number of layers."""
    width: Count = 128
    """Width of the model."""
    batch: Count = 512
    """Global batch size, in sequences."""
    rounds: Annotated[int, at_least(2)] = 9
    """Timed rounds, whose median is reported. A round is one epoch of each loop; the first is a
    warm-up and not counted."""
    epochs: Count = 300
    """Largest number of passes over the training data; at least --rounds. A loop stops earlier at
    95 % validation accuracy."""

    def __post_init__(self) -> None:
        check(self)
        if self.epochs < self.rounds:
            raise ValueError(
                f"--epochs must be at least --rounds {self.rounds}; got {self.epochs}. Use fewer "
                "rounds or more epochs."
            )
        self.config()

    def config(self) -> Config:
        """Returns the settings that all loops share."""
        return Config(
            layers=self.layers,
            width=self.width,
            heads=fitting_divisor(Config.heads, self.width // 2),
            batch=self.batch,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return guard(lambda: _compare(parse(Command, "python -m experiments.grok.speed", arguments)))


def _compare(command: Command) -> int:
    rounds, epochs, config = command.rounds, command.epochs, command.config()
    loops = {
        "PyTorch, AdamW": torch_loop(config),
        "ours, AdamW": our_loop(config, "adamw"),
        "ours, Muon": our_loop(config, "muon"),
        "ours, optax.contrib.muon": our_loop(config, "optax_muon"),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    reached: dict[str, int] = {}
    for loop in loops.values():
        loop.accuracy()
    for number in track(range(1, epochs + 1), "training in turns", transient=True):
        for name, loop in loops.items():
            if name in reached and number > rounds:
                continue
            times[name].append(seconds_of(loop.epoch))
            # PyTorch's threads spin for a while after their work, which would slow the next loop.
            time.sleep(0.2 if number <= rounds else 0)
            if name not in reached and loop.accuracy() >= GROKKED_ACCURACY:
                reached[name] = number
        if len(reached) == len(loops) and number >= rounds:
            break
    # Only rounds in which all loops took part count, without the first, which is a warm-up.
    median = {
        name: statistics.median(times[name][1:rounds]) / loop.steps for name, loop in loops.items()
    }
    rows = [
        [
            name,
            f"{seconds * 1e3:.1f}",
            f"{1 / seconds:.1f}",
            f"{median['PyTorch, AdamW'] / seconds:.2f}",
            f"{seconds / median['ours, AdamW']:.2f}",
            str(reached.get(name, f"> {epochs}")),
            f"{reached[name] * loops[name].steps * seconds:.1f}" if name in reached else "–",
        ]
        for name, seconds in median.items()
    ]
    headings = (
        "loop", "ms per step", "steps/s", "× PyTorch", "÷ our AdamW", "epochs to 95 %", "seconds",
    )  # fmt: skip
    sizes = f"{command.layers} layers, width {command.width}, batch {command.batch}"
    title = f"{TASK}, {sizes}, seed 0"
    note = (
        f"Speeds are medians of {rounds - 1} alternating epochs. “seconds” is the training time to "
        "95 % validation accuracy at that speed."
    )
    Console().print(Table.of_texts(headings, rows, title=title), note, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
