"""Settings of the grokking study: tasks, model, optimizers, and the cells to train."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.grok import grid
from experiments.grok.losses import SoftmaxName
from experiments.grok.model import NormName
from experiments.grok.tasks import TRAIN_FRACTION, TaskName, split, table
from experiments.json_files import digest
from experiments.optimizers import OptimizerName, Settings
from experiments.settings import Count, Dropout, Whole, check, check_different
from muon_jax import GroupedQuery

SuiteName = Literal["paper", "critics", "width", "batch", "rank", "rates"]


class Panel(NamedTuple):
    """A problem on which optimizers are compared: a task, an output function, a grid point."""

    task: TaskName
    softmax: SoftmaxName
    point: str = ""

    def __str__(self) -> str:
        return " · ".join(filter(None, self))


class Cell(NamedTuple):
    """One training of the grid. `point` holds the settings that differ from the config."""

    task: TaskName
    softmax: SoftmaxName
    optimizer: OptimizerName
    seed: int
    point: str = ""

    @property
    def panel(self) -> Panel:
        """The problem on which this cell is compared with others."""
        return Panel(self.task, self.softmax, self.point)

    def __str__(self) -> str:
        words = [self.task, self.softmax, self.optimizer, self.point, f"seed {self.seed}"]
        return " · ".join(filter(None, words))

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Cell":
        """Returns the cell to which a record belongs."""
        return cls(*(row[field] for field in cls._fields))


# Settings that only select cells. All others decide the result of a cell.
GRID = ("tasks", "softmax", "optimizers", "seeds", "grid")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Tests whether Muon groks earlier than AdamW on modular arithmetic.

    Trains a small transformer on part of the equations of an operation modulo 97 and validates it
    on the others. The model first memorises, then suddenly generalises: it groks. Every combination
    of task, output function, optimizer and seed is trained. Finished trainings are kept: after
    Ctrl-C the same command continues. The defaults take less than a minute on two CPU cores. The
    published study is best known for `--layers 2 --heads 1`; `--suite` runs a whole study.
    """

    suite: SuiteName | None = None
    """Named study to run; explicit options override its settings.
    paper: seven tasks and three output functions; Muon also with AdamW's weight decay, and with
    AdamW's learning rate × weight decay. critics: ablations of Muon, tuned baselines and variants
    of Muon, all trained for all epochs. width, batch, rank, rates: sweeps on the task "div"."""
    tasks: tuple[TaskName, ...] = ("mul",)
    """Tasks to train on: operations modulo 97, or the parity of ten bits."""
    softmax: tuple[SoftmaxName, ...] = ("softmax",)
    """Output functions to train with, each with its own cross-entropy."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "muon")
    """Optimizers to compare."""
    seeds: Count = 3
    """Number of random seeds. A seed sets the split of the data, the initial parameters, the
    batches and the dropout."""
    grid: tuple[str, ...] = ()
    """Settings to sweep, as `width=32,64 muon.learning-rate=0.01,0.02`; every combination is
    trained. A setting of one optimizer is swept for that optimizer only."""
    epochs: Count = 200
    """Number of passes over the training data. A training that has not grokked by then counts as
    censored. An incomplete last batch is dropped from each epoch."""
    width: Count = 128
    """Width of the model."""
    layers: Count = 1
    """Number of layers."""
    heads: Count = 2
    """Number of attention heads. --width / --heads must be even; the default is lowered to fit."""
    batch: Count = 512
    """Global batch size, in sequences."""
    norm: NormName = "rms"
    """Norm layers, before attention, feed-forward part and output: RMSNorm, or none."""
    dropout: Dropout = 0.0
    """Dropout probability at the outputs of each block."""
    train_fraction: float | None = None
    """Fraction of all examples to train on. By default each task's published fraction."""
    warmup: Whole = 10
    """Number of linear warm-up steps."""
    full_length: bool = False
    """Train for all epochs. By default a training stops early once it has grokked stably."""
    probe_every: Whole = 10
    """Number of epochs between diagnostics of the model: spectra, norms and Fourier power. They are
    also computed at the first and the last epoch; 0 turns all of them off."""
    gradient_norms: bool = False
    """Record the norm of every step's gradient, and count its spikes: the steps at which it is more
    than three times its running median."""
    together: Count | None = dataclasses.field(default=None, compare=False)
    """Number of seeds that one program trains together. By default 1 on a CPU, all elsewhere."""
    out: str | None = dataclasses.field(default=None, compare=False)
    """Folder of the run. By default a folder in runs/grok, named after the settings."""

    def __post_init__(self) -> None:
        check(self)
        check_different(self, "tasks", "softmax", "optimizers")
        pair = 2 * self.heads
        if self.width % pair:
            raise ValueError(
                f"--width {self.width} must be a multiple of 2 × --heads {self.heads}, since "
                "RoPE requires an even head size; try --width "
                f"{max(self.width // pair, 1) * pair}."
            )
        for task in self.tasks:
            split(len(table(task).tokens), self.fraction(task), seed=0)
        axes = [grid.axis(text) for text in self.grid]
        if repeated := [name for name, n in Counter(a.setting for a in axes).items() if n > 1]:
            raise ValueError(
                f"--grid must name each setting once, with all its values, as {repeated[0]}=1,2; "
                f"got several of {', '.join(repeated)}."
            )
        for text, axis in zip(self.grid, axes, strict=True):
            if not any(map(axis.concerns, self.optimizers)):
                raise ValueError(
                    f"--grid {text!r} affects none of --optimizers {' '.join(self.optimizers)}."
                )
        for cell in self.cells() if self.grid else ():
            self.at(cell)

    @property
    def attention_spec(self) -> GroupedQuery:
        """The attention specification of every layer."""
        return GroupedQuery(heads=self.heads)

    def cells(self) -> list[Cell]:
        """Returns the grid, ordered by task, output function and seed."""
        axes = [grid.axis(text) for text in self.grid]
        arms = itertools.product(self.tasks, self.softmax, range(self.seeds))
        return [
            Cell(task, softmax, optimizer, seed, point)
            for task, softmax, seed in arms
            for optimizer in self.optimizers
            for point in grid.points(axes, optimizer)
        ]

    def at(self, cell: Cell) -> "Config":
        """Returns the settings of a cell.

        Raises:
            ValueError: The settings contradict each other.
        """
        return grid.at(dataclasses.replace(self, grid=()), cell.point)

    def fraction(self, task: TaskName) -> float:
        """Returns the fraction of a task's examples that are trained on."""
        return TRAIN_FRACTION[task] if self.train_fraction is None else self.train_fraction

    def as_json(self) -> dict:
        """Returns the settings as JSON values, without the run's folder."""
        settings = dataclasses.asdict(self) | {"rates": self.known_rates()}
        del settings["out"], settings["together"]
        return json.loads(json.dumps(settings))

    def folder(self) -> Path:
        """Returns `out`, or a folder named after the settings: equal settings share one run."""
        if self.out is not None:
            return Path(self.out)
        usual = Config().as_json()
        settings = {
            key: value
            for key, value in self.as_json().items()
            if key not in GRID and value != usual[key]
        }
        words = [*self.tasks] if len(self.tasks) <= 3 else [f"{len(self.tasks)}tasks"]
        words += [s for s in self.softmax if self.softmax != ("softmax",)]
        words = words if self.suite is None else [self.suite]
        words = [*words, f"{self.layers}x{self.width}", digest(settings)[:6]]
        return Path("runs/grok") / "-".join(words)
