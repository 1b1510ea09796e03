"""Settings of the family study: model, schedule, optimizers, and the cells to train."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import json_files
from experiments.optimizers import ARMS, AdamW, Muon, OptimizerName, Rates, Settings
from experiments.schedules import DecayName
from experiments.settings import (
    Count,
    Whole,
    check,
    check_different,
    fitting_divisor,
    given,
    replaced,
    tenth_at_most,
)
from experiments.sweep import Sweep
from muon_jax import GroupedQuery

BASELINE: OptimizerName = "adamw"


@dataclasses.dataclass(frozen=True)
class Training(Settings):
    """Settings of one training of the small language model, apart from its optimizer and rate."""

    adamw: AdamW = dataclasses.field(
        default_factory=lambda: AdamW(learning_rate=6e-3, weight_decay=0.1, b2=0.95)
    )
    """AdamW as a baseline, and beside the other optimizers for embedding, head and gains."""
    muon: Muon = dataclasses.field(default_factory=lambda: Muon(learning_rate=0.04))
    """Muon, which optimizes the hidden matrices."""
    rates: Rates = dataclasses.field(  # type: ignore[valid-type]
        default_factory=lambda: Rates(
            adamw_rest=0.024,
            muon_rest=0.024,
            gluon=0.004,
            muonh=0.08,
            muon_sphere=0.04,
            namo=0.32,
            normuonh=0.08,
            soap=0.012,
            splus=0.4,
        )
    )
    """Learning rates of all other optimizers, after warm-up: those in the middle of the sweeps."""
    width: Count = 128
    """Width of the model."""
    layers: Count = 2
    """Number of layers."""
    head_size: Count = 32
    """Width of an attention head, even and a divisor of --width. The default is lowered to fit."""
    context: Count = 64
    """Sequence length, in tokens. A token is one byte."""
    batch: Count = 16
    """Global batch size, in sequences."""
    steps: Count = 300
    """Number of optimizer steps."""
    warmup: Whole = 20
    """Number of linear warm-up steps. By default at most a tenth of --steps."""
    decay: DecayName = "linear"
    """Schedule of the learning rate after warm-up. wsd is constant and falls at the end."""
    evaluations: Count = 6
    """Number of evaluations of the validation loss, the last one after the last step. Must divide
    --steps; the default is lowered until it does."""
    validation: Count = 256
    """Number of validation sequences. Every evaluation uses the same ones."""
    text: Path | None = dataclasses.field(default=None, compare=False)
    """Text file to train on. By default the source of Python's standard library."""
    corpus_bytes: Count | None = None
    """Number of bytes of the text to use, validation included. By default all of them."""

    def __post_init__(self) -> None:
        check(self)
        if self.head_size % 2 or self.width % self.head_size:
            raise ValueError(
                f"--width {self.width} does not split into heads of --head-size {self.head_size}, "
                "which must be even for RoPE."
            )
        if self.steps % self.evaluations:
            raise ValueError(
                f"--steps {self.steps} is not a multiple of --evaluations {self.evaluations}; "
                f"try --steps {max(self.steps // self.evaluations, 1) * self.evaluations}."
            )
        if self.warmup >= self.steps:
            raise ValueError(f"--warmup must be less than --steps {self.steps}; got {self.warmup}.")

    @property
    def attention_spec(self) -> GroupedQuery:
        """The attention specification of every layer."""
        return GroupedQuery(heads=self.width // self.head_size)

    def training(self, **changes: Any) -> "Training":
        """Returns the settings of one training, without those of the whole study."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Training)}
        return Training(**own | changes)


class Cell(NamedTuple):
    """One training: an optimizer, its learning rate, and a seed."""

    optimizer: OptimizerName
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer} · rate {self.rate:g} · seed {self.seed}"


# Settings that only select cells. All others decide the result of a cell.
GRID = ("optimizers", "seeds", "sweep_seeds", "sweep", "rates")


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Compares every variant of Muon on one small language model, each at its best learning rate.

    Trains a transformer on the bytes of Python's standard library, for every combination of
    optimizer, learning rate and seed. Each optimizer's rate is swept around its default; the sweep
    is extended while the best rate is the highest or the lowest tried. Embedding, head and gains
    keep AdamW's default rate unless an optimizer sweeps it or has no AdamW beside it. At the end
    the time of each optimizer's update is measured, in turns.

    Finished trainings are kept: after Ctrl-C the same command continues, and more optimizers, seeds
    or rates can be added to the run. Trainings run on all cores at once. On two, all defaults take
    about 35 minutes, and `--optimizers adamw muon` two.
    """

    optimizers: tuple[OptimizerName, ...] = tuple(name for name, arm in ARMS.items() if arm.member)
    """Optimizers to compare. By default all variants of Muon; each is compared with AdamW and with
    Muon."""
    seeds: Count = 5
    """Number of random seeds. A seed sets the initial parameters and the batches. All optimizers
    use the same seeds."""
    sweep_seeds: Count = 2
    """Number of seeds that choose the best learning rate. They are trained at every rate, the other
    seeds only at the best one. If --seeds is smaller, all seeds choose."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Learning rates to sweep."""
    out: str | None = dataclasses.field(default=None, compare=False)
    """Folder of the run. By default a folder in runs/family, named after the settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_different(self, "optimizers")

    def folder(self) -> Path:
        """Returns `out`, or a folder named after the settings: equal settings share one run."""
        name = f"{self.layers}x{self.width}-{digest(self, GRID)}"
        return Path(self.out or f"runs/family/{name}")


def as_json(config: Training) -> dict:
    """Returns the settings as JSON values, without the paths of the run and of its text."""
    settings = dataclasses.asdict(config) | {"rates": config.known_rates()}
    for field in ("out", "text"):
        del settings[field]
    return json.loads(json.dumps(settings))


def digest(config: Training, grid: tuple[str, ...]) -> str:
    """Returns six characters that differ if the cells of two runs have different settings."""
    settings = {key: value for key, value in as_json(config).items() if key not in grid}
    settings["text"] = None if config.text is None else config.text.name
    return json_files.digest(settings)[:6]


def fitted(default: "Config", arguments: Sequence[str]) -> "Config":
    """Returns the defaults of a command line, adjusted to the --width and --steps it gives."""
    width, steps = (given(arguments, f"--{x}", getattr(default, x)) for x in ("width", "steps"))
    return replaced(
        default,
        width=width,
        head_size=2 * fitting_divisor(default.head_size // 2, width // 2),
        steps=steps,
        warmup=tenth_at_most(steps, default.warmup),
        evaluations=fitting_divisor(default.evaluations, steps),
    )
