"""What a fine-tuning trains: its rows, schedule, optimizers and mesh, whatever the model."""

import dataclasses
import json
import math
from typing import Annotated, Any, Literal

from experiments.language.mesh import Mesh
from experiments.language.training_loop import Keeping
from experiments.optimizers import DecayName, ScheduleName
from experiments.settings import (
    Average,
    Clip,
    Count,
    Decay,
    Positive,
    Rate,
    Rule,
    Share,
    Whole,
    at_least,
    check,
    tenth_at_most,
)

ArmName = Literal["adamw", "muon_frozen1d", "muon_adamw", "muonclip"]
QuirkName = Literal[
    "warmup_of_muonclip_alone",
    "decay_apart",
    "spectral_scale",
    "scale_in_root",
    "sgd_of_gains",
    "no_clip",
    "frozen_in_norm",
    "muon_of_tables",
]

# Steps of warm-up where nobody chooses, of the small model and of a --model; less of a short run.
WARMUP, REAL_WARMUP = 10, 20
_SMALLEST_VOCABULARY = 259


def _even(why: str) -> Rule:
    return Rule(f"even and at least 2, since {why}", lambda value: value >= 2 and value % 2 == 0)


_ALL_BYTES = Rule(
    f"at least {_SMALLEST_VOCABULARY}, all bytes, an end of text and ChatML's two markers",
    lambda value: value >= _SMALLEST_VOCABULARY,
)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What all arms share, so that one learning rate means the same to each.

    Muon's update is scaled to the root mean square of AdamW's, as Liu et al. (2502.16982) do.
    """

    learning_rate: Rate = 4e-3
    """After warm-up, of every param that learns."""
    weight_decay: Decay = 0.1
    """Decoupled: a step shrinks params by learning rate × this."""
    b1: Average = 0.9
    """AdamW's decay of the first moment."""
    b2: Average = 0.95
    """AdamW's decay of the second moment."""
    eps: Positive = 1e-8
    """AdamW's, added to the root of the second moment."""
    beta: Average = 0.95
    """Muon's decay of the momentum, with Nesterov's step ahead."""
    ns_coeffs: ScheduleName = "jordan"
    """Muon's Newton-Schulz schedule."""
    ns_dtype: Literal["bfloat16", "float32"] = "float32"
    """Of Newton-Schulz's matrix products."""
    clip_threshold: Positive = 100.0
    """Of muonclip: largest attention logit."""
    clip_projections: bool = False
    """Of muonclip: clip W_q and W_k although QK-norm cancels it, and not the gains of the norms."""
    quirks: tuple[QuirkName, ...] = ()
    """What to do as the code released with the study did; `arms.QUIRKS` says what each is."""

    def __post_init__(self) -> None:
        if len(set(self.quirks)) != len(self.quirks):
            found = " ".join(self.quirks)
            raise ValueError(f"--optimizer.quirks must name each once; got {found}.")


@dataclasses.dataclass(frozen=True)
class Training:
    """One fine-tuning of one model, whichever arm does it."""

    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    """What all arms share."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    """How devices share the work of an arm; on a CPU each arm by default has one of its own."""
    context: Annotated[int, at_least(2)] = 512
    """Tokens of a window, which holds one row or several; longer rows lose their end."""
    batch: Count = 8
    """Windows a step, over all devices."""
    accumulate: Count = 1
    """Microbatches that a step's batch is worked through in; the loss is one mean over tokens."""
    epochs: Positive = 1.0
    """Passes over all rows, where --steps does not say how long."""
    steps: Whole = 0
    """Optimizer steps; 0 is as many as --epochs are."""
    warmup: Whole | None = None
    """Steps of linear warm-up; by default 10, of a --model 20, and a tenth of all at most."""
    decay: DecayName = "linear"
    """How the rate falls after warm-up."""
    final: Share = 0.0
    """Share of the rate that it falls to."""
    clip: Clip = 1.0
    """Largest norm of the gradient of all params that learn; above it is scaled down."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; params, optimizer state, gradients and losses are float32."""
    remat: bool = True
    """Compute layers again in the backward pass: keep of each its input, and on accelerators what
    attention returned."""
    patience: Count = 10
    """Steps without finite loss and gradient, in a row, after which the run stops."""
    seed: Whole = 0
    """Of the order of the rows."""

    def __post_init__(self) -> None:
        check(self)
        if self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate {self.accumulate} does not divide --batch {self.batch}."
            )
        if self.warmup is not None and self.steps and self.warmup >= self.steps:
            raise ValueError(
                f"--warmup must be less than --steps {self.steps}; got {self.warmup}. Take fewer, "
                "or leave --warmup out for a tenth of the steps."
            )

    @property
    def microbatch(self) -> int:
        """Windows of one."""
        return self.batch // self.accumulate

    @property
    def tokens_per_step(self) -> int:
        """Positions, those of padding too."""
        return self.batch * self.context

    def with_steps(self, windows: int, warmup: int = WARMUP) -> "Training":
        """The same with `steps` and `warmup` of its own.

        Args:
            windows: of an epoch.
            warmup: steps of it where the settings leave that open and there are ten times as many.

        Raises:
            ValueError: the steps are not more than the warm-up that the settings ask for.
        """
        steps = self.steps or max(math.ceil(self.epochs * windows / self.batch), 1)
        if self.warmup is not None and self.warmup >= steps:
            raise ValueError(
                f"--warmup must be less than the steps of --epochs {self.epochs:g}, {steps}; got "
                f"{self.warmup}. Take fewer, or leave --warmup out for a tenth of the steps."
            )
        warmup = tenth_at_most(steps, warmup) if self.warmup is None else self.warmup
        return dataclasses.replace(self, steps=steps, warmup=warmup)

    def training(self) -> "Training":
        """These settings alone, without those of a command that has more."""
        return Training(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Training)})

    def as_json(self) -> dict[str, Any]:
        """What is trained as plain JSON values."""
        settings = dataclasses.asdict(self.training())
        return json.loads(json.dumps(settings))


@dataclasses.dataclass(frozen=True)
class Running(Keeping):
    """How a run is kept and watched, which changes nothing of what it trains."""

    save_every: Count = 50
    """Steps from one checkpoint to the next."""
    keep: Count = 1
    """Checkpoints that are kept."""
    evaluate_every: Count = 25
    """Steps from one evaluation to the next."""
    evaluation_tokens: Count = 32_768
    """Tokens of held-out rows that it is evaluated on, always the same."""
    log_every: Count = 1
    """Steps from one record of metrics.jsonl to the next."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The small Qwen3 that is fine-tuned where no --model is named: pretrained here, and kept."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Which pretrains it."""
    qk_norm: bool = True
    """Normalise queries and keys, as Qwen3 does; without it the model is a Llama."""
    layers: Count = 4
    """Decoder layers."""
    hidden: Count = 128
    """Width of the residual stream."""
    ffn: Count = 384
    """Width of SwiGLU."""
    heads: Annotated[int, _even("two share keys and values")] = 4
    """Of queries; half as many of keys and values."""
    head_dim: Annotated[int, _even("RoPE turns pairs")] = 32
    """Of every head."""
    vocabulary: Annotated[int, _ALL_BYTES] = 2048
    """Tokens of its byte-level BPE."""
    context: Annotated[int, at_least(2)] = 256
    """Tokens of a window that it is pretrained on."""
    batch: Count = 8
    """Windows a step."""
    steps: Annotated[int, at_least(2)] = 500
    """Steps of pretraining."""
    learning_rate: Rate = 4e-3
    """Of pretraining, after warm-up."""
    seed: Whole = 0
    """Of its initial params, and the order of its text."""

    def __post_init__(self) -> None:
        check(self, "base")
