"""`python -m experiments.family.widths`: does Muon's best learning rate stay as the model grows?

The model follows muP (see `experiments.family.model`), so AdamW's rates for the embedding, the
gains and the head are the same at every width. The shape scale decides the rest. `spectral` and
`mup` keep the update's spectral norm at Θ(sqrt(fan_out / fan_in)), which is muP's condition (Yang
et al., 2310.17813), so the best rate should stay. `match_rms_adamw` keeps its RMS, so its spectral
norm grows as the root of the width, and the best rate should fall by half a power of two for each
doubling. On the `hyperball` a matrix moves by a fraction of its norm, and the best rate is said to
stay over width and depth (Wen et al., 2606.16899).
"""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import dataclasses
import sys
import threading
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from rich.console import Console

from experiments.command_line import parse
from experiments.commands import run_command
from experiments.family import data
from experiments.family.config import Training, as_json, digest
from experiments.family.train import train_cell
from experiments.optimizers import Muon, OptimizerName, ScaleName
from experiments.runs import Run
from experiments.settings import Count, check, check_different
from experiments.study import sweep_rates
from experiments.sweep import Sweep

# Settings that only select cells. All others decide the result of a cell.
GRID = ("scales", "widths", "depths", "seeds", "sweep")

# A shape scale, or MuonH, whose updates have a length that no shape scale changes.
RuleName = Literal[ScaleName, "hyperball"]

# The rates in the middle of the sweeps: about the best ones at width 128.
RATES: dict[RuleName, float] = {
    "spectral": 0.04,
    "mup": 0.04,
    "match_rms_adamw": 0.016,
    "none": 0.04,
    "hyperball": 0.08,
}
_ARMS: dict[str, OptimizerName] = {"hyperball": "muonh"}  # for all shape scales Muon


class Cell(NamedTuple):
    """One training run of the grid."""

    scale: RuleName
    width: int
    rate: float
    seed: int

    def __str__(self) -> str:
        scale, size, rate, seed = self
        return f"{scale} · {self._fields[1]} {size} · rate {rate:g} · seed {seed}"


class DepthCell(NamedTuple):
    """One training run of a grid of depths."""

    scale: RuleName
    layers: int
    rate: float
    seed: int

    __str__ = Cell.__str__


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Finds Muon's best learning rate at several model sizes, under several shape scales.

    Trains the language model of `python -m experiments.family` with Muon, for every combination of
    shape scale, width (or depth), learning rate and seed. Widths share the learning rates of a
    scale; more are tried where the best one is the highest or the lowest. Finished trainings are
    kept: after Ctrl-C the same command continues.
    """

    muon: Muon = dataclasses.field(default_factory=lambda: Muon(weight_decay=0.0))
    """Muon, which optimizes the hidden matrices. Its learning rate and scale are swept."""
    width: tyro.conf.Suppress[int] = 128
    scales: tuple[RuleName, ...] = ("spectral", "mup", "match_rms_adamw")
    """Shape scales to compare; `hyperball` is MuonH, which none of them changes."""
    widths: tuple[Count, ...] = (64, 128, 256)
    """Model widths to compare. Must be multiples of --head-size."""
    depths: tuple[Count, ...] = ()
    """Numbers of layers to compare in place of widths, at width 128."""
    seeds: Count = 1
    """Number of random seeds. A seed sets the initial parameters and the batches."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Learning rates to sweep."""
    out: str | None = dataclasses.field(default=None, compare=False)
    """Folder of the run. By default a folder in runs/widths, named after the settings."""

    def __post_init__(self) -> None:
        check(self)
        check_different(self, "scales", "widths", *["depths"] * bool(self.depths))
        for width in self.widths:
            self.training(width=width)

    def folder(self) -> Path:
        """Returns `out`, or a folder named after the settings: equal settings share one run."""
        return Path(self.out or f"runs/widths/{self.layers}-{digest(self, GRID)}")

    @property
    def sizes(self) -> tuple[type, tuple[int, ...]]:
        """The class of the cells, and the widths or depths of their models."""
        return (DepthCell, self.depths) if self.depths else (Cell, self.widths)

    def of(self, cell: Cell | DepthCell) -> Training:
        """Returns the settings of one training."""
        sized = self.training(**{cell._fields[1]: cell[1]})
        if cell.scale == "hyperball":
            return sized
        return dataclasses.replace(sized, muon=dataclasses.replace(self.muon, scale=cell.scale))


def main() -> int:
    """Runs the command; returns its exit code."""
    return run_command(compare)


def compare(stop: threading.Event, console: Console) -> int:
    """Trains those cells of the command line's sweep that are not finished yet."""
    config = parse(Config, "python -m experiments.family.widths")
    text = data.load(config)
    settings = as_json(config) | {"corpus": text.origin}
    cell, sizes = config.sizes
    with contextlib.closing(Run(config.folder(), settings, GRID, as_json(Config()))) as run:
        return sweep_rates(
            run,
            stop,
            console,
            config,
            cell=cell,
            arms={(scale, size): RATES[scale] for scale in config.scales for size in sizes},
            training=config.of,
            train=lambda cell, training, show, device: train_cell(
                training, text, _ARMS.get(cell.scale, "muon"), cell.rate, cell.seed, show, device
            ),
            program=lambda cells: cells[0][:2],
            corpus=text.origin,
        )


if __name__ == "__main__":
    sys.exit(main())
