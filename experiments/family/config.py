"""What a family run trains: its model and schedule, its grid of cells, its optimizers."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.optimizers import ARMS, AdamW, DecayName, Muon, OptimizerName, Settings
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
    """The AdamW arm, and in the others the embedding, the head and the gains."""
    muon: Muon = dataclasses.field(default_factory=lambda: Muon(learning_rate=0.04))
    """The hidden matrices of the Muon arm."""
    width: Count = 128
    """Embedding size."""
    layers: Count = 2
    """Transformer blocks."""
    head_size: Count = 32
    """Width of an attention head; there are width / this. The default divides --width."""
    context: Count = 64
    """Bytes that a prediction sees at most."""
    batch: Count = 16
    """Windows of context bytes a step."""
    steps: Count = 300
    """Optimizer steps of a cell."""
    warmup: Whole = 20
    """Steps of linear warm-up; the default is a tenth of --steps at most."""
    decay: DecayName = "linear"
    """How the rate falls to zero after warm-up."""
    evaluations: Count = 6
    """Times a cell is validated, the last time at its end; divides --steps, as the default does."""
    validation: Count = 256
    """Windows that it is validated on, always the same."""
    text: Path | None = dataclasses.field(default=None, compare=False)
    """A file to learn instead of the Python standard library."""
    corpus_bytes: Count | None = None
    """Take no more of the text than this, validation included; by default all of it."""

    def __post_init__(self) -> None:
        check(self)
        if self.head_size % 2 or self.width % self.head_size:
            raise ValueError(
                f"--width {self.width} does not split into heads of --head-size {self.head_size}, "
                "which must be even for RoPE."
            )
        if self.steps % self.evaluations:
            raise ValueError(
                f"--steps {self.steps} is no multiple of --evaluations {self.evaluations}; try "
                f"--steps {max(self.steps // self.evaluations, 1) * self.evaluations}."
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
GRID = ("optimizers", "seeds", "sweep", "rates")


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """The family side by side: every optimizer on one small language model, its rate swept.

    Trains a transformer on the bytes of Python's own standard library. Every combination of
    optimizer, learning rate and seed is a cell. Rates are swept around each optimizer's default,
    and further where the best one lies at the edge; the AdamW that others use for embedding, head
    and gains keeps its own. Then all optimizers take turns at timing their updates. Finished cells
    are kept: after Ctrl-C the same command goes on from there, and one that names more optimizers,
    seeds or rates adds them. A cell takes about ten seconds on two quiet cores, the defaults some
    45 minutes; `--optimizers adamw muon` takes four.
    """

    optimizers: tuple[OptimizerName, ...] = tuple(name for name, arm in ARMS.items() if arm.member)
    """Arms of the comparison, by default the whole family; differences are to AdamW."""
    seeds: Count = 3
    """Seeds a rate: of the initial weights and the batches, the same for all optimizers."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Which learning rates an optimizer is tried at."""
    out: Path = dataclasses.field(default=Path("runs/family"), compare=False)
    """Where run folders are."""
    name: str | None = dataclasses.field(default=None, compare=False)
    """The run's folder; by default made of the settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_different(self, "optimizers")

    def folder(self) -> Path:
        """The run's folder: `name`, or one made of the settings, so that equal ones meet again."""
        return self.out / (self.name or f"{self.layers}x{self.width}-{digest(self, GRID)}")


def as_json(config: Training) -> dict:
    """The settings, without where the run is kept and what it reads."""
    settings = dataclasses.asdict(config) | {"rates": config.known_rates()}
    for field in ("out", "name", "text"):
        del settings[field]
    return json.loads(json.dumps(settings))


def digest(config: Training, grid: tuple[str, ...]) -> str:
    """Six characters that tell one run's cells from another's."""
    settings = {key: value for key, value in as_json(config).items() if key not in grid}
    settings["text"] = None if config.text is None else config.text.name
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]


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
