"""Settings of a pretraining run: its model, text, schedule, optimizers and mesh."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import tyro

from experiments.language.data import Data
from experiments.language.mesh import Mesh
from experiments.language.rollback import Rollback
from experiments.language.training_loop import Keeping
from experiments.optimizers import AdamW, Muon, Settings
from experiments.schedules import DecayName, Schedules
from experiments.settings import Clip, Count, Decay, Positive, Share, Whole, above, check
from muon_jax import GroupedQuery, MultiHeadLatent

PresetName = Literal[
    "tiny",
    "small",
    "nanogpt-124m",
    "dense-399m",
    "dense-545m",
    "dense-822m",
    "dense-1.1b",
    "dense-1.5b",
    "moonlight-16b",
]


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a transformer whose first layers are dense and whose other layers have experts."""

    layers: Count = 4
    """Number of layers."""
    dense_layers: Whole = 1
    """Number of layers, from the first, without experts. If equal to --model.layers, the model is
    dense."""
    width: Count = 128
    """Width of the residual stream."""
    heads: Count = 4
    """Number of attention heads."""
    attention: Literal["latent", "multi-head"] = "latent"
    """Type of attention. latent: keys and values come from a shared latent (DeepSeek's MLA)."""
    latent: Count = 64
    """Latent attention: size of the latent."""
    nope: Count = 32
    """Latent attention: number of dimensions of a query or key head without RoPE."""
    rope: Count = 16
    """Latent attention: number of dimensions of a query or key head with RoPE."""
    value: Count = 32
    """Latent attention: number of dimensions of a value head."""
    kv_heads: Whole = 0
    """Multi-head attention: number of key and value heads, a divisor of --model.heads. 0 means
    --model.heads."""
    head_dim: Whole = 0
    """Multi-head attention: dimensions of a head. 0 means --model.width / --model.heads."""
    qk_norm: bool = False
    """Multi-head attention: normalise queries and keys, as Qwen3 does."""
    rope_base: Annotated[float, above(1)] = 50_000.0
    """Base of RoPE's wavelengths."""
    hidden: Count = 384
    """Hidden size of a dense layer's SwiGLU."""
    experts: Count = 8
    """Number of routed experts per layer."""
    active: Count = 2
    """Number of routed experts per token."""
    shared: Whole = 1
    """Number of shared experts, which process every token. They are computed as one SwiGLU."""
    expert_hidden: Count = 96
    """Hidden size of an expert."""
    routed_scale: Positive = 2.446
    """Factor applied to the routed experts' gate weights, which sum to 1 before it."""
    bias_rate: Decay = 1e-3
    """Update rate of the router biases that balance the experts."""
    balance_loss: Decay = 1e-4
    """Weight of the sequence-wise balance loss."""
    tied: bool = False
    """Tie the output head to the embedding."""
    init_std: Positive = 0.02
    """Standard deviation of the initial kernels and embedding."""
    epsilon: Positive = 1e-5
    """Epsilon of RMSNorm."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the forward and backward pass. Parameters, router and losses are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """Parts that the backward pass recomputes to save memory. none: nothing. dots: all except
    products with weight matrices. full: whole layers. Fused attention is never recomputed."""
    exchange: Literal["gather", "ragged"] | None = None
    """How tokens reach experts on other devices. gather: every device receives all tokens. ragged:
    tokens are sent to their experts only. By default, the faster way on this platform."""

    def __post_init__(self) -> None:
        check(self, "model")
        if self.dense_layers > self.layers:
            raise ValueError(
                f"--model.dense-layers must be at most --model.layers {self.layers}; got "
                f"{self.dense_layers}."
            )
        if self.dense_layers < self.layers and self.active > self.experts:
            raise ValueError(
                f"--model.active must be at most --model.experts {self.experts}; got {self.active}."
            )
        latent = self.attention == "latent"
        rotated = self.rope if latent else self.head_dim or self.width / self.heads
        if rotated % 2:
            raise ValueError(
                "--model.rope, or with multi-head attention --model.head-dim or --model.width / "
                f"--model.heads, must be even, since RoPE rotates pairs; got {rotated:g}."
            )
        if self.heads % self.key_heads:
            raise ValueError(
                f"--model.kv-heads must divide --model.heads {self.heads}; got {self.kv_heads}."
            )
        if latent and (self.kv_heads or self.head_dim or self.qk_norm):
            raise ValueError(
                "--model.kv-heads, --model.head-dim and --model.qk-norm require --model.attention "
                "multi-head."
            )

    @property
    def key_columns(self) -> int:
        """Number of dimensions of a query or key head."""
        if self.attention == "latent":
            return self.nope + self.rope
        return self.head_dim or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads


@dataclasses.dataclass(frozen=True)
class Training(Settings):
    """Settings of one training, whichever optimizer it uses."""

    adamw: AdamW = dataclasses.field(
        default_factory=lambda: AdamW(learning_rate=4e-3, weight_decay=0.1, b2=0.95)
    )
    """AdamW, on its own and, within other optimizers, for the embedding, head and gains."""
    muon: Muon = dataclasses.field(
        default_factory=lambda: Muon(learning_rate=8e-3, scale="match_rms_adamw")
    )
    """Muon, for the hidden matrices."""
    model: Model = dataclasses.field(default_factory=Model)
    """The model."""
    data: Data = dataclasses.field(default_factory=Data)
    """The text to train on."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    """The device mesh. One axis may be -1: it takes all devices that the other axes leave."""
    context: Count = 256
    """Sequence length, in tokens."""
    isolate_documents: bool = False
    """Attend within documents only, each with positions from 0 on. Its end-of-text token begins the
    next document, so that no token of one is told of another."""
    batch: Count = 8
    """Global batch size, in sequences."""
    accumulate: Count = 1
    """Number of gradient-accumulation steps. Must divide --batch."""
    steps: Count = 400
    """Number of optimizer steps."""
    warmup: Whole = 40
    """Number of linear warm-up steps. By default at most a tenth of --steps."""
    decay: Annotated[DecayName, tyro.conf.arg(aliases=["--schedule"])] = "cosine"
    """Schedule of the learning rate after warm-up. wsd is constant and falls at the end."""
    final_lr_fraction: Share = 0.1
    """Fraction of the learning rate that the decay ends at. Of no meaning to constant."""
    schedules: Schedules = dataclasses.field(default_factory=Schedules)
    """Schedules of momentum and weight decay, and an average of the parameters to evaluate."""
    cooldown: Whole = 0
    """Number of final steps in which the learning rate falls linearly to 0 and router biases are
    fixed. By default at most a tenth of --steps."""
    clip: Clip = 1.0
    """Maximum global gradient norm. Larger gradients are scaled down to it."""
    spike: Annotated[float, above(1)] | None = None
    """Skip a step if its gradient norm exceeds this multiple of the recent mean. A skipped step
    enters the mean with that bound. By default, no step is skipped for this reason."""
    max_nonfinite_steps: Count = 10
    """Stop after this many consecutive steps with NaN or Inf in the loss or gradient."""
    rollback: Rollback = dataclasses.field(default_factory=Rollback)
    """When a run goes back to its last checkpoint, and leaves out the batches since then."""
    seed: Whole = 0
    """Random seed. It sets the initial parameters and the data order."""
    origin: tyro.conf.Suppress[str | None] = None
    """Name and digest of the model that --from starts with."""

    def __post_init__(self) -> None:
        check(self)
        if self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate must divide --batch {self.batch}; got {self.accumulate}."
            )
        if self.warmup + self.cooldown >= self.steps:
            raise ValueError(
                f"--warmup and --cooldown together must be less than --steps {self.steps}; got "
                f"{self.warmup} and {self.cooldown}."
            )

    @property
    def attention_spec(self) -> GroupedQuery | MultiHeadLatent:
        model = self.model
        if model.attention == "multi-head":
            norm = ("query_norm", "key_norm") if model.qk_norm else "refuse"
            return GroupedQuery(heads=model.heads, kv_heads=model.kv_heads or None, qk_norm=norm)
        heads = {"nope": model.nope, "rope": model.rope, "value": model.value}
        return MultiHeadLatent(heads=model.heads, query="query", key="key_value", **heads)

    @property
    def microbatch(self) -> int:
        """Number of sequences in a microbatch."""
        return self.batch // self.accumulate

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context

    def training(self) -> "Training":
        """Returns the training's own settings, without the further ones of a command."""
        return Training(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Training)})


@dataclasses.dataclass(frozen=True)
class Running(Keeping):
    """Settings of checkpoints, logs and samples, which do not affect the training."""

    samples: Whole = 3
    """Number of texts to generate with the trained model."""


def as_json(config: Training) -> dict[str, Any]:
    """Returns the settings as JSON values, without the machine's path of the token cache."""
    settings = dataclasses.asdict(config.training()) | {"rates": config.known_rates()}
    del settings["data"]["cache"]
    return json.loads(json.dumps(settings))


def from_json(kind: Any, value: Any) -> Any:
    """Inverts `as_json`, for a dataclass or the type of one of its fields."""
    if dataclasses.is_dataclass(kind):
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        return kind(**{name: from_json(types[name], x) for name, x in value.items()})
    return tuple(from_json(None, x) for x in value) if isinstance(value, list) else value
