"""What a pretraining run trains: its model, text, schedule, optimizers and mesh."""

import dataclasses
import json
from typing import Annotated, Any, Literal

from experiments.language.data import Data
from experiments.language.mesh import Mesh
from experiments.language.training_loop import Keeping
from experiments.optimizers import AdamW, DecayName, Muon, Settings
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
    """A transformer: some dense layers first, then layers with experts."""

    layers: Count = 4
    """All of them."""
    dense_layers: Whole = 1
    """The first ones, which have no experts; as many as --model.layers for a dense model."""
    width: Count = 128
    """Of the residual stream."""
    heads: Count = 4
    """Attention heads."""
    attention: Literal["latent", "multi-head"] = "latent"
    """Keys and values from a shared latent (DeepSeek's MLA), or from the stream itself."""
    latent: Count = 64
    """Of latent attention: size of the latent."""
    nope: Count = 32
    """Of latent attention: columns of a query or key head without position."""
    rope: Count = 16
    """Of latent attention: rotated columns of a query or key head."""
    value: Count = 32
    """Of latent attention: columns of a value head."""
    rope_base: Annotated[float, above(1)] = 50_000.0
    """Of the wavelengths of RoPE."""
    hidden: Count = 384
    """Hidden size of a dense layer's SwiGLU."""
    experts: Count = 8
    """Routed experts of a layer."""
    active: Count = 2
    """Routed experts that a token goes to."""
    shared: Whole = 1
    """Experts that every token goes to, as one SwiGLU of their joint size."""
    expert_hidden: Count = 96
    """Hidden size of an expert."""
    routed_scale: Positive = 2.446
    """Factor of the routed experts' weights, which sum to 1."""
    bias_rate: Decay = 1e-3
    """Step of the selection biases that balance the experts; 0 for the last phase."""
    balance_loss: Decay = 1e-4
    """Factor of the sequence-wise balance loss."""
    tied: bool = False
    """Let the head be the embedding."""
    init_std: Positive = 0.02
    """Of all kernels and the embedding."""
    epsilon: Positive = 1e-5
    """Of RMSNorm."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the arithmetic; params, router and losses are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but products with kernels, or layers;
    but for attention where a TPU's kernel does it or one of ours."""
    exchange: Literal["gather", "ragged"] | None = None
    """How tokens reach experts of other devices; by default the better that the platform has."""

    def __post_init__(self) -> None:
        check(self, "model")
        if self.dense_layers > self.layers:
            raise ValueError(
                f"--model.dense-layers {self.dense_layers} is more than --model.layers "
                f"{self.layers}."
            )
        if self.dense_layers < self.layers and self.active > self.experts:
            raise ValueError(
                f"--model.active {self.active} is more than --model.experts {self.experts}."
            )
        rotated = self.rope if self.attention == "latent" else self.width / self.heads
        if rotated % 2:
            raise ValueError(
                f"RoPE turns pairs of columns: --model.rope, or --model.width / --model.heads of "
                f"multi-head attention, is even; got {rotated:g}."
            )

    @property
    def key_columns(self) -> int:
        """Of a query or key head."""
        latent = self.attention == "latent"
        return self.nope + self.rope if latent else self.width // self.heads


@dataclasses.dataclass(frozen=True)
class Training(Settings):
    """One training of one model, whichever optimizer does it."""

    adamw: AdamW = dataclasses.field(
        default_factory=lambda: AdamW(learning_rate=4e-3, weight_decay=0.1, b2=0.95)
    )
    """The AdamW arm, and in the others the embedding, the head and the gains."""
    muon: Muon = dataclasses.field(
        default_factory=lambda: Muon(learning_rate=8e-3, scale="match_rms_adamw")
    )
    """The hidden matrices of the Muon arm."""
    model: Model = dataclasses.field(default_factory=Model)
    """The transformer."""
    data: Data = dataclasses.field(default_factory=Data)
    """The text."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    """How devices share the work."""
    context: Count = 256
    """Tokens that a prediction sees at most."""
    batch: Count = 8
    """Windows of context tokens a step, over all devices."""
    accumulate: Count = 1
    """Microbatches that a step's batch is worked through in; the default divides --batch."""
    steps: Count = 400
    """Optimizer steps."""
    warmup: Whole = 40
    """Steps of linear warm-up; the default is a tenth of --steps at most."""
    decay: DecayName = "cosine"
    """How the rate falls after warm-up."""
    final: Share = 0.1
    """Share of the rate that it falls to."""
    cooldown: Whole = 0
    """Last steps, in which the rate falls linearly to 0 and the selection biases rest; the default
    is a tenth of --steps at most."""
    clip: Clip = 1.0
    """Largest norm of the gradient of all params; above it is scaled down."""
    spike: Annotated[float, above(1)] | None = None
    """Skip steps whose gradient norm is more than so many times its recent mean, to which a skipped
    one counts as the largest that would be taken; by default none."""
    patience: Count = 10
    """Steps without finite loss and gradient, in a row, after which the run stops."""
    seed: Whole = 0
    """Of the initial params and the order of the text."""

    def __post_init__(self) -> None:
        check(self)
        if self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate {self.accumulate} does not divide --batch {self.batch}."
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
            return GroupedQuery(heads=model.heads)
        heads = {"nope": model.nope, "rope": model.rope, "value": model.value}
        return MultiHeadLatent(heads=model.heads, query="query", key="key_value", **heads)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context

    def training(self) -> "Training":
        """These settings alone, without those of a command that has more."""
        return Training(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Training)})


@dataclasses.dataclass(frozen=True)
class Running(Keeping):
    """How a run is kept and watched, which changes nothing of what it trains."""

    samples: Whole = 3
    """Texts that the finished model writes."""


def as_json(config: Training) -> dict[str, Any]:
    """What is trained as plain JSON values, without where a machine keeps its text."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(Training)}
    settings = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in own.items()
    }
    settings["rates"] = config.known_rates()
    del settings["data"]["cache"]
    return json.loads(json.dumps(settings))


def from_json(kind: Any, value: Any) -> Any:
    """Undoes `as_json`, for a dataclass or the type of one of its fields."""
    if dataclasses.is_dataclass(kind):
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        return kind(**{name: from_json(types[name], x) for name, x in value.items()})
    return tuple(value) if isinstance(value, list) else value
