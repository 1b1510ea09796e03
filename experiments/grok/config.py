"""What a grokking run trains: its grid of cells, its model, its optimizers."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

from experiments.grok.losses import SoftmaxName
from experiments.grok.tasks import TRAIN_FRACTION, TaskName, split, table
from experiments.optimizers import OptimizerName, Settings
from muon_jax import GroupedQuery


class Cell(NamedTuple):
    """One training run of the grid."""

    task: TaskName
    softmax: SoftmaxName
    optimizer: OptimizerName
    seed: int

    def __str__(self) -> str:
        return f"{self.task} · {self.softmax} · {self.optimizer} · seed {self.seed}"


# What only chooses cells; the rest decides what a cell is.
GRID = ("tasks", "softmax", "optimizers", "seeds")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Grokking: does Muon generalise earlier than AdamW on modular arithmetic?

    Trains a small transformer on part of an operation's table modulo 97 and watches the rest: it
    first memorises, then, suddenly, generalises. Every combination of task, softmax, optimizer and
    seed is a cell. Finished cells are kept: after Ctrl-C the same command goes on from there. The
    defaults take less than a minute on two cores; `--layers 2 --heads 1` is the published study's
    best-known size.
    """

    tasks: tuple[TaskName, ...] = ("mul",)
    """Operations modulo 97, or the parity of ten bits."""
    softmax: tuple[SoftmaxName, ...] = ("softmax",)
    """Output functions, each with its own loss."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "muon")
    """Arms of the comparison."""
    seeds: int = 3
    """Seeds per arm: of the split, the initial weights, the batches and the dropout."""
    epochs: int = 200
    """Budget of a cell; one that has not grokked by then is censored."""
    width: int = 128
    """Embedding size."""
    layers: int = 1
    """Transformer blocks."""
    heads: int = 2
    """Attention heads; width / heads must be even."""
    batch: int = 512
    """Rows a step; an epoch drops the rows that do not fill one."""
    dropout: float = 0.0
    """Share of a block's outputs dropped in training."""
    train_fraction: float | None = None
    """Share of the table trained on; by default the published one of each task."""
    warmup: int = 10
    """Steps of linear warm-up."""
    full_length: bool = False
    """Train every cell for all epochs; by default one ends once it has grokked for good."""
    out: Path = dataclasses.field(default=Path("runs/grok"), compare=False)
    """Where run folders are."""
    name: str | None = dataclasses.field(default=None, compare=False)
    """The run's folder; by default made of the settings."""

    def __post_init__(self) -> None:
        for field in ("seeds", "epochs", "width", "layers", "heads", "batch"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field} must be at least 1, got {getattr(self, field)}.")
        for field in ("tasks", "softmax", "optimizers"):
            values = getattr(self, field)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"--{field} needs one or more different values, got {values}.")
        pair = 2 * self.heads
        if self.width % pair:
            raise ValueError(
                f"--width {self.width} does not split into --heads {self.heads} heads of even "
                f"size, which RoPE needs; try --width {max(self.width // pair, 1) * pair}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be in [0, 1), got {self.dropout}.")
        for task in self.tasks:
            split(len(table(task).tokens), self.fraction(task), seed=0)
        if self.warmup < 0:
            raise ValueError(f"--warmup must not be negative, got {self.warmup}.")

    @property
    def attention_spec(self) -> GroupedQuery:
        """Of each layer."""
        return GroupedQuery(heads=self.heads)

    def cells(self) -> list[Cell]:
        """The grid, seeds outermost, so that every arm has a first result early."""
        seeds = range(self.seeds)
        grid = itertools.product(seeds, self.tasks, self.softmax, self.optimizers)
        return [Cell(task, softmax, optimizer, seed) for seed, task, softmax, optimizer in grid]

    def fraction(self, task: TaskName) -> float:
        """The share of a task's table that is trained on."""
        return TRAIN_FRACTION[task] if self.train_fraction is None else self.train_fraction

    def as_json(self) -> dict:
        """The settings, without where they are kept."""
        settings = dataclasses.asdict(self)
        del settings["out"], settings["name"]
        return json.loads(json.dumps(settings))

    def folder(self) -> Path:
        """The run's folder: `name`, or one made of the settings, so that equal ones meet again."""
        if self.name is not None:
            return self.out / self.name
        settings = {key: value for key, value in self.as_json().items() if key not in GRID}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
        words = [*self.tasks] if len(self.tasks) <= 3 else [f"{len(self.tasks)}tasks"]
        words += [s for s in self.softmax if self.softmax != ("softmax",)]
        return self.out / "-".join([*words, f"{self.layers}x{self.width}", digest])
