"""What a family run trains: its model and schedule, its grid of cells, its optimizers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import json_files
from experiments.optimizers import ARMS, AdamW, Muon, OptimizerName, Settings
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
    """One training of the small language model, whichever optimizer does it."""

    adamw: AdamW = dataclasses.field(
        default_factory=lambda: AdamW(learning_rate=6e-3, weight_decay=0.1, b2=0.95)
    )
    """AdamW, as an optimizer of its own and in the others for embedding, head and gains."""
    muon: Muon = dataclasses.field(default_factory=lambda: Muon(learning_rate=0.04))
    """Muon, for the hidden matrices."""
    width: Count = 128
    """Width of the model."""
    layers: Count = 2
    """Number of layers."""
    head_size: Count = 32
    """Width of an attention head. Must divide --width; the default does."""
    context: Count = 64
    """Sequence length, in tokens. Tokens are bytes."""
    batch: Count = 16
    """Global batch size, in sequences."""
    steps: Count = 300
    """Optimizer steps."""
    warmup: Whole = 20
    """Steps of linear warm-up. The default is at most a tenth of --steps."""
    decay: DecayName = "linear"
    """Schedule of the learning rate after warm-up. wsd is constant and falls at the end."""
    evaluations: Count = 6
    """Number of validations, the last after the last step. Must divide --steps, and does by
    default."""
    validation: Count = 256
    """Sequences to validate on, the same every time."""
    text: Path | None = dataclasses.field(default=None, compare=False)
    """Text file to train on. By default the source of Python's standard library."""
    corpus_bytes: Count | None = None
    """Use only so many bytes of the text, validation included. By default all."""

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
        """Of each layer."""
        return GroupedQuery(heads=self.width // self.head_size)

    def training(self, **changes: Any) -> "Training":
        """These settings alone, without those of a study that has more."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Training)}
        return Training(**own | changes)


class Cell(NamedTuple):
    """One training run of the grid."""

    optimizer: OptimizerName
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer} · rate {self.rate:g} · seed {self.seed}"


# What only chooses cells; the rest decides what a cell is.
GRID = ("optimizers", "seeds", "sweep_seeds", "sweep", "rates")


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Compares every variant of Muon on one small language model, each at its best learning rate.

    Trains a transformer on the bytes of Python's standard library, for every combination of
    optimizer, learning rate and seed. Learning rates are swept around each optimizer's default, and
    further where the best one is the highest or the lowest tried; embedding, head and gains keep
    AdamW's own. Then all optimizers time their updates in turns. Finished trainings are kept: after
    Ctrl-C the same command continues, and more optimizers, seeds or rates are added to the run. A
    training takes about ten seconds on two idle CPU cores, the defaults some 45 minutes, and
    `--optimizers adamw muon` four.
    """

    optimizers: tuple[OptimizerName, ...] = tuple(name for name, arm in ARMS.items() if arm.member)
    """Optimizers to compare. By default all variants of Muon; differences are to AdamW."""
    seeds: Count = 3
    """Number of random seeds. A seed sets the initial parameters and the batches; all optimizers
    have the same seeds."""
    sweep_seeds: Count = 3
    """Number of seeds that choose the best learning rate. The others train at that rate alone; with
    fewer --seeds, all choose."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Learning rates to try."""
    out: str | None = dataclasses.field(default=None, compare=False)
    """Folder of the run. By default one in runs/family, named after the settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_different(self, "optimizers")

    def folder(self) -> Path:
        """`out`, or one named after the settings, so that equal settings continue one run."""
        name = f"{self.layers}x{self.width}-{digest(self, GRID)}"
        return Path(self.out or f"runs/family/{name}")


def as_json(config: Training) -> dict:
    """The settings, without where the run is kept and what it reads."""
    settings = dataclasses.asdict(config) | {"rates": config.known_rates()}
    for field in ("out", "text"):
        del settings[field]
    return json.loads(json.dumps(settings))


def digest(config: Training, grid: tuple[str, ...]) -> str:
    """Six characters that tell one run's cells from another's."""
    settings = {key: value for key, value in as_json(config).items() if key not in grid}
    settings["text"] = None if config.text is None else config.text.name
    return json_files.digest(settings)[:6]


def fitted(default: "Config", arguments: Sequence[str]) -> "Config":
    """A command line's defaults: what it does not name follows what it does."""
    width, steps = (given(arguments, f"--{x}", getattr(default, x)) for x in ("width", "steps"))
    return replaced(
        default,
        width=width,
        head_size=2 * fitting_divisor(default.head_size // 2, width // 2),
        steps=steps,
        warmup=tenth_at_most(steps, default.warmup),
        evaluations=fitting_divisor(default.evaluations, steps),
    )
