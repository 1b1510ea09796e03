"""What a grokking run trains: its grid of cells, its model, its optimizers."""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.grok import grid
from experiments.grok.losses import SoftmaxName
from experiments.grok.tasks import TRAIN_FRACTION, TaskName, split, table
from experiments.optimizers import OptimizerName, Settings
from experiments.settings import Count, Dropout, Whole, check, check_different
from muon_jax import GroupedQuery

SuiteName = Literal["paper", "critics", "width", "batch", "rank", "rates"]


class Panel(NamedTuple):
    """What optimizers are compared on."""

    task: TaskName
    softmax: SoftmaxName
    point: str = ""

    def __str__(self) -> str:
        return " · ".join(filter(None, self))


class Cell(NamedTuple):
    """One training run of the grid; `point` sets what differs from the config."""

    task: TaskName
    softmax: SoftmaxName
    optimizer: OptimizerName
    seed: int
    point: str = ""

    @property
    def panel(self) -> Panel:
        """Where it is compared."""
        return Panel(self.task, self.softmax, self.point)

    def __str__(self) -> str:
        words = [self.task, self.softmax, self.optimizer, self.point, f"seed {self.seed}"]
        return " · ".join(filter(None, words))

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Cell":
        """The cell that a record is of."""
        return cls(*(row[field] for field in cls._fields))


# What only chooses cells; the rest decides what a cell is.
GRID = ("tasks", "softmax", "optimizers", "seeds", "grid")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Grokking: does Muon generalise earlier than AdamW on modular arithmetic?

    Trains a small transformer on part of an operation's table modulo 97 and watches the rest: it
    first memorises, then, suddenly, generalises. Every combination of task, softmax, optimizer and
    seed is a cell. Finished cells are kept: after Ctrl-C the same command goes on from there. The
    defaults take less than a minute on two cores; `--layers 2 --heads 1` is the published study's
    best-known size, and `--suite` names whole studies.
    """

    suite: SuiteName | None = None
    """Settings of a study to begin with; any other option goes before. paper: seven tasks, three
    output functions, both readings of equal decay. critics: the parts of Muon, tuned baselines and
    the family, trained to the end. width, batch, rank, rates: sweeps on division."""
    tasks: tuple[TaskName, ...] = ("mul",)
    """Operations modulo 97, or the parity of ten bits."""
    softmax: tuple[SoftmaxName, ...] = ("softmax",)
    """Output functions, each with its own loss."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "muon")
    """Arms of the comparison."""
    seeds: Count = 3
    """Seeds per arm: of the split, the initial weights, the batches and the dropout."""
    grid: tuple[str, ...] = ()
    """Axes of a sweep, as `width=32,64 muon.learning-rate=0.01,0.02`: settings by their options'
    names. One of a single optimizer's varies that optimizer alone."""
    epochs: Count = 200
    """Budget of a cell; one that has not grokked by then is censored."""
    width: Count = 128
    """Embedding size."""
    layers: Count = 1
    """Transformer blocks."""
    heads: Count = 2
    """Attention heads; width / heads must be even, and is by default."""
    batch: Count = 512
    """Rows a step; an epoch drops the rows that do not fill one."""
    dropout: Dropout = 0.0
    """Share of a block's outputs dropped in training."""
    train_fraction: float | None = None
    """Share of the table trained on; by default the published one of each task."""
    warmup: Whole = 10
    """Steps of linear warm-up."""
    full_length: bool = False
    """Train every cell for all epochs; by default one ends once it has grokked for good."""
    probe_every: Whole = 10
    """Epochs between looks inside the model, besides the first and the last: spectra, norms,
    Fourier power; 0 for none."""
    together: Count | None = dataclasses.field(default=None, compare=False)
    """Seeds that train side by side in one program; by default 1 on a CPU, elsewhere all."""
    out: Path = dataclasses.field(default=Path("runs/grok"), compare=False)
    """Where run folders are."""
    name: str | None = dataclasses.field(default=None, compare=False)
    """The run's folder; by default made of the settings."""

    def __post_init__(self) -> None:
        check(self)
        check_different(self, "tasks", "softmax", "optimizers")
        pair = 2 * self.heads
        if self.width % pair:
            raise ValueError(
                f"--width {self.width} does not split into --heads {self.heads} heads of even "
                f"size, which RoPE needs; try --width {max(self.width // pair, 1) * pair}."
            )
        for task in self.tasks:
            split(len(table(task).tokens), self.fraction(task), seed=0)
        axes = [grid.axis(text) for text in self.grid]
        if repeated := [name for name, n in Counter(a.setting for a in axes).items() if n > 1]:
            raise ValueError(
                f"--grid must name a setting once, with all of its values, as "
                f"{repeated[0]}=1,2; got several axes of {', '.join(repeated)}."
            )
        for text, axis in zip(self.grid, axes, strict=True):
            if not any(map(axis.concerns, self.optimizers)):
                raise ValueError(
                    f"--grid {text!r} concerns none of --optimizers {' '.join(self.optimizers)}."
                )
        for cell in self.cells() if self.grid else ():
            self.at(cell)

    @property
    def attention_spec(self) -> GroupedQuery:
        """Of each layer."""
        return GroupedQuery(heads=self.heads)

    def cells(self) -> list[Cell]:
        """The grid: one task and output function after the other, and of each seed by seed."""
        axes = [grid.axis(text) for text in self.grid]
        arms = itertools.product(self.tasks, self.softmax, range(self.seeds))
        return [
            Cell(task, softmax, optimizer, seed, point)
            for task, softmax, seed in arms
            for optimizer in self.optimizers
            for point in grid.points(axes, optimizer)
        ]

    def at(self, cell: Cell) -> "Config":
        """The settings that a cell has.

        Raises:
            ValueError: they do not go together.
        """
        return grid.at(dataclasses.replace(self, grid=()), cell.point)

    def fraction(self, task: TaskName) -> float:
        """The share of a task's table that is trained on."""
        return TRAIN_FRACTION[task] if self.train_fraction is None else self.train_fraction

    def as_json(self) -> dict:
        """The settings, without where they are kept."""
        settings = dataclasses.asdict(self) | {"rates": self.known_rates()}
        del settings["out"], settings["name"], settings["together"]
        return json.loads(json.dumps(settings))

    def folder(self) -> Path:
        """The run's folder: `name`, or one made of the settings, so that equal ones meet again."""
        if self.name is not None:
            return self.out / self.name
        usual = Config().as_json()
        settings = {
            key: value
            for key, value in self.as_json().items()
            if key not in GRID and value != usual[key]
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
        words = [*self.tasks] if len(self.tasks) <= 3 else [f"{len(self.tasks)}tasks"]
        words += [s for s in self.softmax if self.softmax != ("softmax",)]
        words = words if self.suite is None else [self.suite]
        return self.out / "-".join([*words, f"{self.layers}x{self.width}", digest])
