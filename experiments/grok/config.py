"""What a grokking run trains: its grid of cells, its model, its optimizers."""

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

    Trains a small transformer on some equations of an operation modulo 97 and validates it on the
    others: it first memorises, then suddenly generalises. Every combination of task, output
    function, optimizer and seed is trained. Finished trainings are kept: after Ctrl-C the same
    command continues. The defaults take less than a minute on two CPU cores; `--layers 2 --heads 1`
    is the best-known size of the published study, and `--suite` names whole studies.
    """

    suite: SuiteName | None = None
    """Named study to run; explicit options override its settings.
    paper: seven tasks and three output functions; Muon also with AdamW's weight decay, and with
    AdamW's learning rate × weight decay. critics: parts of Muon, tuned baselines and variants, all
    trained to the last epoch. width, batch, rank, rates: sweeps on the task "div"."""
    tasks: tuple[TaskName, ...] = ("mul",)
    """Tasks: operations modulo 97, or the parity of ten bits."""
    softmax: tuple[SoftmaxName, ...] = ("softmax",)
    """Output functions, each with the cross-entropy that belongs to it."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "muon")
    """Optimizers to compare."""
    seeds: Count = 3
    """Number of random seeds. A seed sets the split, the initial parameters, the batches and
    the dropout."""
    grid: tuple[str, ...] = ()
    """Settings to sweep, as `width=32,64 muon.learning-rate=0.01,0.02`; every combination is
    trained. A setting of one optimizer is swept for that optimizer alone."""
    epochs: Count = 200
    """Passes over the training data. A training that has not grokked by then counts as censored.
    Rows that do not fill a batch are dropped from an epoch."""
    width: Count = 128
    """Width of the model."""
    layers: Count = 1
    """Number of layers."""
    heads: Count = 2
    """Attention heads. --width / --heads must be even; the default follows --width."""
    batch: Count = 512
    """Global batch size, in sequences."""
    norm: NormName = "rms"
    """Norm layers, before attention, feed-forward part and output: RMSNorm, or none."""
    dropout: Dropout = 0.0
    """Dropout probability of a block's outputs."""
    train_fraction: float | None = None
    """Fraction of all examples to train on. By default the published one of each task."""
    warmup: Whole = 10
    """Steps of linear warm-up."""
    full_length: bool = False
    """Train for all epochs. By default a training ends once it has grokked and stays so."""
    probe_every: Whole = 10
    """Epochs between diagnostics of the model: spectra, norms and Fourier power. The first and the
    last epoch always have them; 0 turns them off."""
    together: Count | None = dataclasses.field(default=None, compare=False)
    """Seeds that one program trains together. By default 1 on a CPU, and all elsewhere."""
    out: str | None = dataclasses.field(default=None, compare=False)
    """Folder of the run. By default one in runs/grok, named after the settings."""

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
        del settings["out"], settings["together"]
        return json.loads(json.dumps(settings))

    def folder(self) -> Path:
        """`out`, or one named after the settings, so that equal settings continue one run."""
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
