"""A model to fine-tune: its family, its sizes, and the `config.json` that tells them."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments.language import config_json
from experiments.language.config_json import FAMILIES, Ids
from experiments.layers import RopeScaling
from experiments.settings import Count, Positive, check, even


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and constants; the defaults are those of the first releases of Qwen3 below 8 B.

    Attributes:
        family: as `config.json` has it, which says whether queries and keys are normed, and whether
            their projections and the values' have biases.
        layers: decoder layers.
        hidden: width of the residual stream.
        ffn: width of SwiGLU.
        heads: of queries.
        kv_heads: of keys and values; each serves `heads / kv_heads` of queries.
        head_dim: of every head; `heads * head_dim` need not be `hidden`.
        vocabulary: entries of the embedding.
        rope_theta: base of RoPE's wavelengths.
        epsilon: of every RMSNorm.
        tied: the head is the embedding transposed.
        initializer_range: standard deviation of initial matrices.
        context: positions that the model was made for.
        rope_scaling: of RoPE's frequencies, which a Llama may have.
        begin_token, end_token, pad_token: as the tokenizer numbers them.

    Raises:
        ValueError: sizes that make no model, or a family that does not scale RoPE so.
    """

    layers: Count
    hidden: Count
    ffn: Count
    heads: Count
    kv_heads: Count
    head_dim: Annotated[int, even("RoPE rotates pairs")]
    vocabulary: Count
    rope_theta: Positive = 1e6
    epsilon: Positive = 1e-6
    tied: bool = True
    initializer_range: Positive = 0.02
    context: Count = 40_960
    family: Literal["llama", "qwen2", "qwen3"] = "qwen3"
    rope_scaling: RopeScaling | None = None
    begin_token: Ids = None
    end_token: Ids = None
    pad_token: Ids = None

    def __post_init__(self) -> None:
        check(self, named=lambda *names: ".".join(names))
        if self.heads % self.kv_heads:
            raise ValueError(
                "kv_heads must divide heads, since all key heads serve equally many query "
                f"heads; got heads {self.heads}, kv_heads {self.kv_heads}."
            )
        if self.rope_scaling and "rope_scaling" not in _FIELDS[self.family]:
            raise ValueError(f"A {self.family} has no rope_scaling; got {self.rope_scaling}.")

    @property
    def qk_norm(self) -> bool:
        """RMSNorm of each query and key head."""
        return FAMILIES[self.family].qk_norm

    @property
    def qkv_bias(self) -> bool:
        """Biases of queries, keys and values."""
        return FAMILIES[self.family].qkv_bias

    @property
    def parameters(self) -> int:
        """Entries of all params; a tied embedding counts once."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        vectors = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        if self.qkv_bias:
            vectors += (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.ffn + vectors
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + tables + self.hidden


def _released(layers: int, hidden: int, ffn: int, heads: int) -> Architecture:
    return Architecture(
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        vocabulary=151_936,
        begin_token=151_643,
        end_token=151_645,
    )


# Qwen3 technical report, 2505.09388.
PRESETS = {
    "0.6b": _released(28, 1024, 3072, 16),
    "1.7b": _released(28, 2048, 6144, 16),
    "4b": _released(36, 2560, 9728, 32),
}

# Fields of Architecture, and of config.json.
_COMMON = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
    "epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "begin_token": "bos_token_id",
    "end_token": "eos_token_id",
    "pad_token": "pad_token_id",
    "tied": "tie_word_embeddings",
    "rope_theta": "rope_theta",
}
_FIELDS = {
    "llama": _COMMON | {"rope_scaling": "rope_scaling"},
    "qwen2": _COMMON,
    "qwen3": _COMMON,
}


def to_json(architecture: Architecture) -> dict[str, Any]:
    """What `config.json` says of the model, for transformers 4 and 5."""
    a = architecture
    fields = {theirs: getattr(a, ours) for ours, theirs in _FIELDS[a.family].items()}
    said = config_json.to_json(a.family, fields) | {"attention_dropout": 0.0}
    return said | ({} if a.family == "llama" else {"sliding_window": None})


def read(path: Path) -> Architecture:
    """The model that a `config.json` tells.

    Raises:
        ValueError: it is damaged, lacks a size, or tells of a model that is none of these.
        OSError: it cannot be read.
    """
    given, sizes = config_json.read(path, Architecture, _FIELDS)
    try:
        return Architecture(family=given["model_type"], **sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
