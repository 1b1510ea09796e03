"""`python -m experiments.family.widths`: does Muon's best learning rate stay as the model widens?

The model follows muP (see `experiments.family.model`), so AdamW's rates for the embedding, the
gains and the head are the same at every width. What is left is the size of an orthogonal update:
`spectral` and `mup` keep its spectral norm at Θ(sqrt(fan_out / fan_in)), which is muP's condition
(Yang et al., 2310.17813), and the best rate should stay; `match_rms_adamw` keeps its RMS, so its
spectral norm grows as the root of the width, and the best rate should fall by half a power of two
for each doubling.
"""

import dataclasses
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console

from experiments.commands import INTERRUPTED, conduct
from experiments.family import data
from experiments.family.config import Training, as_json, digest
from experiments.family.train import train_cell
from experiments.optimizers import Muon, ScaleName
from experiments.report.studies import show
from experiments.runs import Run
from experiments.settings import Count, check, check_different
from experiments.sweep import Sweep, carry_out

# What only chooses cells; the rest decides what a cell is.
GRID = ("scales", "widths", "seeds", "sweep")

# Where a sweep begins: about the best rate at width 128.
RATES: dict[ScaleName, float] = {
    "spectral": 0.04,
    "mup": 0.04,
    "match_rms_adamw": 0.016,
    "none": 0.04,
}


class Cell(NamedTuple):
    """One training run of the grid."""

    scale: ScaleName
    width: int
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.scale} · width {self.width} · rate {self.rate:g} · seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Learning-rate transfer: Muon's best rate at several widths, under several shape scales.

    Trains the language model of `python -m experiments.family` with Muon. Every combination of
    shape scale, width, learning rate and seed is a cell; the rate grid of a scale is the same for
    all widths, and goes on where the best one lies at the edge. Finished cells are kept: after
    Ctrl-C the same command goes on from there.
    """

    muon: Muon = dataclasses.field(default_factory=lambda: Muon(weight_decay=0.0))
    """The hidden matrices; their rate and scale are what is swept."""
    width: tyro.conf.Suppress[int] = 128
    scales: tuple[ScaleName, ...] = ("spectral", "mup", "match_rms_adamw")
    """Shape scales, a panel each."""
    widths: tuple[Count, ...] = (64, 128, 256)
    """Embedding sizes, multiples of --head-size."""
    seeds: Count = 1
    """Seeds a rate."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Which learning rates are tried."""
    out: Path = dataclasses.field(default=Path("runs/widths"), compare=False)
    """Where run folders are."""
    name: str | None = dataclasses.field(default=None, compare=False)
    """The run's folder; by default made of the settings."""

    def __post_init__(self) -> None:
        check(self)
        check_different(self, "scales", "widths")
        for width in self.widths:
            self.training(width=width)

    def folder(self) -> Path:
        """The run's folder: `name`, or one made of the settings, so that equal ones meet again."""
        return self.out / (self.name or f"{self.layers}-{digest(self, GRID)}")

    def of(self, scale: ScaleName, width: int) -> Training:
        """The settings of one training."""
        return self.training(width=width, muon=dataclasses.replace(self.muon, scale=scale))


def main() -> int:
    """Runs the command; returns its exit code."""
    return conduct(begin, study)


def begin() -> tuple[tuple[Config, data.Data], Run]:
    """The command line's config and its corpus, and the run."""
    config = tyro.cli(Config, prog="python -m experiments.family.widths")
    text = data.load(config)
    return (config, text), Run(config.folder(), as_json(config) | {"corpus": text.origin}, GRID)


def study(task: tuple[Config, data.Data], run: Run, stop: threading.Event, console: Console) -> int:
    """Trains what is missing of the sweep, and reports on what there is."""
    config, text = task

    left = carry_out(
        Cell,
        {(scale, width): RATES[scale] for scale in config.scales for width in config.widths},
        config,
        lambda cell, show: train_cell(
            config.of(cell.scale, cell.width), text, "muon", cell.rate, cell.seed, show
        ),
        run,
        stop,
        console,
        corpus=text.origin,
        steps=lambda cell: config.steps,
    )
    if run.finished:
        show(run.folder, console)
    return INTERRUPTED if left else 0


if __name__ == "__main__":
    sys.exit(main())
