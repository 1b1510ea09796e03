"""What a fine-tuning trains: its rows, schedule, optimizers and mesh, whatever the model."""

import dataclasses
import json
import math
from typing import Any, Literal

from experiments.commands import option
from experiments.language.mesh import Mesh
from experiments.language.training_loop import Keeping
from experiments.optimizers import DecayName, ScheduleName

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
_SMALLEST_VOCABULARY = 259  # all bytes, an end of text, and ChatML's two markers


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What all arms share, so that one learning rate means the same to each.

    Muon's update is scaled to the root mean square of AdamW's, as Liu et al. (2502.16982) do.
    """

    learning_rate: float = 4e-3
    """After warm-up, of every param that learns."""
    weight_decay: float = 0.1
    """Decoupled: a step shrinks params by learning rate × this."""
    b1: float = 0.9
    """AdamW's decay of the first moment."""
    b2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's, added to the root of the second moment."""
    beta: float = 0.95
    """Muon's decay of the momentum, with Nesterov's step ahead."""
    ns_coeffs: ScheduleName = "jordan"
    """Muon's Newton-Schulz schedule."""
    ns_dtype: Literal["bfloat16", "float32"] = "float32"
    """Of Newton-Schulz's matrix products."""
    clip_threshold: float = 100.0
    """Of muonclip: largest attention logit."""
    clip_projections: bool = False
    """Of muonclip: clip W_q and W_k although QK-norm cancels it, and not the gains of the norms."""
    quirks: tuple[QuirkName, ...] = ()
    """What to do as the code released with the study did; `arms.QUIRKS` says what each is."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_threshold"):
            value = getattr(self, name)
            if not value > 0 or (value == math.inf and name != "clip_threshold"):
                raise ValueError(f"{option('optimizer', name)} is above 0, got {value:g}.")
        for name in ("b1", "b2", "beta"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"{option('optimizer', name)} is the share of an average that a step keeps: 0 "
                    f"or more and below 1, got {value:g}."
                )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"--optimizer.weight-decay is 0 or more, got {self.weight_decay:g}; 0 is none."
            )
        if len(set(self.quirks)) != len(self.quirks):
            raise ValueError(f"--optimizer.quirks names each once, got {self.quirks}.")


@dataclasses.dataclass(frozen=True)
class Training:
    """One fine-tuning of one model, whichever arm does it."""

    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    """What all arms share."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    """How devices share the work of an arm; on a CPU each arm by default has one of its own."""
    context: int = 512
    """Tokens of a window, which holds one row or several; longer rows lose their end."""
    batch: int = 8
    """Windows a step, over all devices."""
    accumulate: int = 1
    """Microbatches that a step's batch is worked through in; the loss is one mean over tokens."""
    epochs: float = 1.0
    """Passes over all rows, where --steps does not say how long."""
    steps: int = 0
    """Optimizer steps; 0 is as many as --epochs are."""
    warmup: int | None = None
    """Steps of linear warm-up; by default 10, of a --model 20, and a tenth of all at most."""
    decay: DecayName = "linear"
    """How the rate falls after warm-up."""
    final: float = 0.0
    """Share of the rate that it falls to."""
    clip: float = 1.0
    """Largest norm of the gradient of all params that learn; above it is scaled down."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; params, optimizer state, gradients and losses are float32."""
    remat: bool = True
    """Compute layers again in the backward pass, and keep of each no more than its input."""
    patience: int = 10
    """Steps without finite loss and gradient, in a row, after which the run stops."""
    seed: int = 0
    """Of the order of the rows."""

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{option(name)} is at least 1, got {getattr(self, name)}.")
        if self.context < 2:
            raise ValueError(f"--context is 2 tokens or more, got {self.context}.")
        if self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate {self.accumulate} does not divide --batch {self.batch}."
            )
        if not 0 < self.epochs < math.inf or self.steps < 0:
            raise ValueError(
                f"--epochs is above 0, and --steps 0 or more; got {self.epochs:g} and {self.steps}."
            )
        if not self.clip > 0:
            raise ValueError(f"--clip is above 0, got {self.clip}; inf clips nothing.")
        if self.warmup is not None and (
            self.warmup < 0 or (self.steps and self.warmup >= self.steps)
        ):
            raise ValueError(
                f"--warmup is 0 or more and less than the steps, {self.steps or 'of --epochs'}; "
                f"got {self.warmup}. Take fewer, or leave --warmup out for a tenth of the steps."
            )
        if not 0 <= self.final <= 1:
            raise ValueError(
                f"--final is a share of the learning rate, from 0 to 1; got {self.final:g}."
            )
        if self.seed < 0:
            raise ValueError(f"--seed is 0 or more, got {self.seed}.")

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
        warmup = min(warmup, steps // 10) if self.warmup is None else self.warmup
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

    save_every: int = 50
    """Steps from one checkpoint to the next."""
    keep: int = 1
    """Checkpoints that are kept."""
    evaluate_every: int = 25
    """Steps from one evaluation to the next."""
    evaluation_tokens: int = 32_768
    """Tokens of held-out rows that it is evaluated on, always the same."""
    log_every: int = 1
    """Steps from one record of metrics.jsonl to the next."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The small Qwen3 that is fine-tuned where no --model is named: pretrained here, and kept."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Which pretrains it."""
    qk_norm: bool = True
    """Normalise queries and keys, as Qwen3 does; without it the model is a Llama."""
    layers: int = 4
    """Decoder layers."""
    hidden: int = 128
    """Width of the residual stream."""
    ffn: int = 384
    """Width of SwiGLU."""
    heads: int = 4
    """Of queries; half as many of keys and values."""
    head_dim: int = 32
    """Of every head."""
    vocabulary: int = 2048
    """Tokens of its byte-level BPE."""
    context: int = 256
    """Tokens of a window that it is pretrained on."""
    batch: int = 8
    """Windows a step."""
    steps: int = 500
    """Steps of pretraining."""
    learning_rate: float = 4e-3
    """Of pretraining, after warm-up."""
    seed: int = 0
    """Of its initial params, and the order of its text."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{option('base', name)} is at least 1, got {getattr(self, name)}."
                )
        for name, why in (("heads", "two share keys and values"), ("head_dim", "RoPE turns pairs")):
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise ValueError(
                    f"{option('base', name)} is even and at least 2, since {why}; got {value}."
                )
        for name in ("steps", "context"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"{option('base', name)} is at least 2, got {getattr(self, name)}."
                )
        if self.vocabulary < _SMALLEST_VOCABULARY:
            raise ValueError(
                f"--base.vocabulary is at least {_SMALLEST_VOCABULARY}, all bytes and three "
                f"special tokens; got {self.vocabulary}."
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--base.learning-rate is above 0, got {self.learning_rate:g}.")
        if self.seed < 0:
            raise ValueError(f"--base.seed is 0 or more, got {self.seed}.")
