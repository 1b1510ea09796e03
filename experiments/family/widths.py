"""`python -m experiments.family.widths`: does Muon's best learning rate stay as the model widens?

The model follows muP (see `experiments.family.model`), so AdamW's rates for the embedding, the
gains and the head are the same at every width. What is left is the size of an orthogonal update:
`spectral` and `mup` keep its spectral norm at Θ(sqrt(fan_out / fan_in)), which is muP's condition
(Yang et al., 2310.17813), and the best rate should stay; `match_rms_adamw` keeps its RMS, so its
spectral norm grows as the root of the width, and the best rate should fall by half a power of two
for each doubling.
"""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import dataclasses
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console

from experiments.command_line import parse
from experiments.commands import run_command
from experiments.family import data
from experiments.family.config import Training, as_json, digest
from experiments.family.train import train_cell
from experiments.optimizers import Muon, ScaleName
from experiments.runs import Run
from experiments.settings import Count, check, check_different
from experiments.study import sweep_rates
from experiments.sweep import Sweep

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

    Trains the language model of `python -m experiments.family` with Muon, for every combination of
    shape scale, width, learning rate and seed. Widths share the learning rates of a scale; more are
    tried where the best one is the highest or the lowest. Finished trainings are kept: after Ctrl-C
    the same command continues.
    """

    muon: Muon = dataclasses.field(default_factory=lambda: Muon(weight_decay=0.0))
    """Muon, for the hidden matrices. Its learning rate and scale are swept."""
    width: tyro.conf.Suppress[int] = 128
    scales: tuple[ScaleName, ...] = ("spectral", "mup", "match_rms_adamw")
    """Shape scales to compare."""
    widths: tuple[Count, ...] = (64, 128, 256)
    """Model widths to compare. Must be multiples of --head-size."""
    seeds: Count = 1
    """Number of random seeds."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Learning rates to try."""
    out: str | None = dataclasses.field(default=None, compare=False)
    """Folder of the run. By default one in runs/widths, named after the settings."""

    def __post_init__(self) -> None:
        check(self)
        check_different(self, "scales", "widths")
        for width in self.widths:
            self.training(width=width)

    def folder(self) -> Path:
        """`out`, or one named after the settings, so that equal settings continue one run."""
        return Path(self.out or f"runs/widths/{self.layers}-{digest(self, GRID)}")

    def of(self, scale: ScaleName, width: int) -> Training:
        """The settings of one training."""
        return self.training(width=width, muon=dataclasses.replace(self.muon, scale=scale))


def main() -> int:
    """Runs the command; returns its exit code."""
    return run_command(compare)


def compare(stop: threading.Event, console: Console) -> int:
    """Trains the sweep of the command line, or what is missing of it."""
    config = parse(Config, "python -m experiments.family.widths")
    text = data.load(config)
    settings = as_json(config) | {"corpus": text.origin}
    with contextlib.closing(Run(config.folder(), settings, GRID, as_json(Config()))) as run:
        return sweep_rates(
            run,
            stop,
            console,
            config,
            cell=Cell,
            arms={
                (scale, width): RATES[scale] for scale in config.scales for width in config.widths
            },
            training=lambda cell: config.of(cell.scale, cell.width),
            train=lambda cell, training, show, device: train_cell(
                training, text, "muon", cell.rate, cell.seed, show
            ),
            corpus=text.origin,
        )


if __name__ == "__main__":
    sys.exit(main())
