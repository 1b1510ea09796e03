"""Settings of fine-tuning: its examples, schedule, optimizers and mesh, whatever the model."""

import dataclasses
import json
import math
from typing import Annotated, Any, Literal, get_args

import tyro

from experiments.language.mesh import Mesh
from experiments.language.rollback import Rollback
from experiments.language.training_loop import Keeping
from experiments.optimizers import ScheduleName
from experiments.schedules import DecayName, Schedules
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
    even,
    tenth_at_most,
)

ArmName = Literal["adamw", "muon_frozen1d", "muon_adamw", "muonclip"]
TargetName = Literal["query", "key", "value", "out", "gate", "up", "down"]
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

# Default warm-up steps, for the small model and for --model; short runs have fewer.
WARMUP, REAL_WARMUP = 10, 20
_SMALLEST_VOCABULARY = 259


_DIFFERENT = Rule("different values", lambda values: len(set(values)) == len(values))
_ALL_BYTES = Rule(
    f"at least {_SMALLEST_VOCABULARY}, for all bytes, an end-of-text token and ChatML's two "
    "markers",
    lambda value: value >= _SMALLEST_VOCABULARY,
)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings that all optimizers share, so that a learning rate means the same to each of them.

    Muon's update is scaled to the root mean square of AdamW's, as in Liu et al. (2502.16982).
    """

    learning_rate: Rate = 4e-3
    """Learning rate after warm-up, for all trained parameters."""
    weight_decay: Decay = 0.1
    """Decoupled weight decay. A step shrinks parameters by learning rate × this."""
    b1: Average = 0.9
    """AdamW: decay rate of the first moment."""
    b2: Average = 0.95
    """AdamW: decay rate of the second moment."""
    eps: Positive = 1e-8
    """AdamW: added to the square root of the second moment."""
    beta: Average = 0.95
    """Muon: decay rate of the Nesterov momentum."""
    ns_coeffs: ScheduleName = "jordan"
    """Muon: coefficients of the Newton-Schulz iteration."""
    ns_dtype: Literal["bfloat16", "float32"] = "float32"
    """Muon: precision of Newton-Schulz's matrix products."""
    clip_threshold: Positive = 100.0
    """muonclip: largest attention logit allowed."""
    clip_projections: bool = False
    """muonclip: in a model with QK-norm, scale W_q and W_k (which the norm undoes) instead of the
    norm's gains."""
    quirks: Annotated[tuple[QuirkName, ...], _DIFFERENT] = ()
    """Peculiarities of the published study's code to reproduce; see QUIRKS in finetune/arms.py."""

    def __post_init__(self) -> None:
        check(self, "optimizer")


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA (2106.09685): of each target two factors are trained, and everything else is frozen."""

    rank: Whole = 0
    """Rank of the update of each target, which is alpha / rank × A B. 0 trains all parameters."""
    alpha: Positive = 16.0
    """Scale of the update, times the rank. Muon and AdamW take steps of one size whatever it is, so
    that twice the alpha moves the model twice as far."""
    targets: Annotated[tuple[TargetName, ...], _DIFFERENT] = get_args(TargetName)
    """Matrices of each layer to train: of attention and of SwiGLU. Muon and muon_frozen1d take all
    factors, so that they are the same arm; muonclip clips the gains of QK-norm beside them."""

    def __post_init__(self) -> None:
        check(self, "lora")

    @property
    def scale(self) -> float:
        """Of the product of two factors."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of one fine-tuning, whichever optimizer it uses."""

    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    """Settings that all optimizers share."""
    lora: Lora = dataclasses.field(default_factory=Lora)
    """Low-rank adapters to train in place of the parameters."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    """The device mesh. One axis may be -1: it takes all devices that the other axes leave. On a
    CPU, by default, each optimizer trains on its own device instead."""
    context: Annotated[int, at_least(2)] = 512
    """Sequence length, in tokens. Short examples are packed together; longer ones are truncated."""
    batch: Count = 8
    """Global batch size, in sequences."""
    accumulate: Count = 1
    """Number of gradient-accumulation steps. Must divide --batch. The loss is the mean over all
    trained tokens of the batch."""
    epochs: Positive = 1.0
    """Number of passes over the training data. Ignored if --steps is given."""
    steps: Whole = 0
    """Number of optimizer steps. 0 means as many as --epochs takes."""
    warmup: Whole | None = None
    """Number of linear warm-up steps. By default 10 (20 with --model), or a tenth of all steps if
    that is less."""
    decay: Annotated[DecayName, tyro.conf.arg(aliases=["--schedule"])] = "linear"
    """Schedule of the learning rate after warm-up. wsd is constant and falls at the end."""
    final_lr_fraction: Share = 0.0
    """Fraction of the learning rate that the decay ends at. Of no meaning to constant."""
    schedules: Schedules = dataclasses.field(default_factory=Schedules)
    """Schedules of momentum and weight decay, and an average of the parameters to evaluate."""
    clip: Clip = 1.0
    """Maximum global gradient norm. Larger gradients are scaled down to it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass. Parameters, optimizer state, gradients and loss
    are float32."""
    remat: bool = True
    """Recompute each layer in the backward pass to save memory. On accelerators, the outputs of
    attention are kept."""
    max_nonfinite_steps: Count = 10
    """Stop after this many consecutive steps with NaN or Inf in the loss or gradient."""
    rollback: Rollback = dataclasses.field(default_factory=Rollback)
    """When a run goes back to its last checkpoint, and leaves out the batches since then."""
    seed: Whole = 0
    """Random seed. It sets the order of the examples."""

    def __post_init__(self) -> None:
        check(self)
        if self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate must divide --batch {self.batch}; got {self.accumulate}."
            )
        if self.steps:
            self._check_warmup(self.steps, "--steps")

    def _check_warmup(self, steps: int, name: str) -> None:
        if (self.warmup or 0) >= steps:
            raise ValueError(
                f"--warmup must be less than {name} {steps}; got {self.warmup}. Use fewer, or omit "
                "--warmup for a tenth of the steps."
            )

    @property
    def microbatch(self) -> int:
        """Number of windows in a microbatch."""
        return self.batch // self.accumulate

    @property
    def tokens_per_step(self) -> int:
        """Number of positions in a step, including padding."""
        return self.batch * self.context

    def with_steps(self, windows: int, warmup: int = WARMUP) -> "Training":
        """Returns the settings with the numbers of `steps` and `warmup` steps filled in.

        Args:
            windows: Number of windows in an epoch.
            warmup: Default number of warm-up steps; a tenth of all steps if that is less.

        Raises:
            ValueError: If the settings' own warm-up is not shorter than the training.
        """
        steps = self.steps or max(math.ceil(self.epochs * windows / self.batch), 1)
        self._check_warmup(steps, f"the steps of --epochs {self.epochs:g},")
        warmup = tenth_at_most(steps, warmup) if self.warmup is None else self.warmup
        return dataclasses.replace(self, steps=steps, warmup=warmup)

    def training(self) -> "Training":
        """Returns the training's own settings, without the further ones of a command."""
        return Training(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Training)})

    def as_json(self) -> dict[str, Any]:
        """Returns the settings as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self.training())))


@dataclasses.dataclass(frozen=True)
class Running(Keeping):
    """Settings of checkpoints, evaluations and logs, which do not affect the training."""

    save_every: Count = 50
    """Number of steps between checkpoints."""
    max_checkpoints: Count = 1
    """Number of checkpoints to keep; older ones are deleted."""
    evaluate_every: Count = 25
    """Number of steps between evaluations."""
    evaluation_tokens: Count = 32_768
    """Number of held-out tokens to evaluate on, the same ones every time. Half as many are of the
    pretraining text, where it is known."""
    log_every: Count = 1
    """Number of steps between records in metrics.jsonl."""
    data_sha256: str | None = None
    """Digest that the examples must have, or how it begins; others are refused. It is that of
    the tokens, or that of the default rows' text, which does not depend on the tokenizer."""
    pretraining_text: str | None = None
    """Text like that which the model was pretrained on, whose loss is told beside that of the
    examples, to see what is forgotten: .txt, .jsonl or .parquet, as python -m experiments.pretrain
    reads it. By default, without --model, held-out text of the small model."""


@dataclasses.dataclass(frozen=True)
class Base:
    """Settings of the small Qwen3 that is pretrained, cached and fine-tuned without --model."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer that pretrains the small model."""
    qk_norm: bool = True
    """Normalise queries and keys, as Qwen3 does. Without it, the model is a Llama."""
    layers: Count = 4
    """Number of layers."""
    width: Count = 128
    """Width of the residual stream."""
    ffn: Count = 384
    """Hidden size of SwiGLU."""
    heads: Annotated[int, even("two share keys and values")] = 4
    """Number of query heads. There are half as many key and value heads."""
    head_dim: Annotated[int, even("RoPE turns pairs")] = 32
    """Number of dimensions of an attention head."""
    vocabulary: Annotated[int, _ALL_BYTES] = 2048
    """Vocabulary size of the byte-level BPE trained for it."""
    context: Annotated[int, at_least(2)] = 256
    """Sequence length of its pretraining, in tokens."""
    batch: Count = 8
    """Global batch size of its pretraining, in sequences."""
    steps: Annotated[int, at_least(2)] = 500
    """Number of optimizer steps of its pretraining."""
    learning_rate: Rate = 4e-3
    """Learning rate of its pretraining, after warm-up."""
    seed: Whole = 0
    """Random seed of its initial parameters and data order."""

    def __post_init__(self) -> None:
        check(self, "base")
