"""The architecture of a model to fine-tune, and its `config.json`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments.language import config_json
from experiments.language.config_json import FAMILIES, Ids
from experiments.layers import RopeScaling
from experiments.settings import Count, Positive, check, even


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and constants of a model. The defaults are those of the first Qwen3 below 8 B.

    Raises:
        ValueError: If the sizes are inconsistent, or the family does not support `rope_scaling`.
    """

    layers: Count
    hidden: Count  # width of the residual stream
    ffn: Count  # width of SwiGLU
    heads: Count  # query heads
    kv_heads: Count  # key and value heads; each serves `heads / kv_heads` query heads
    head_dim: Annotated[int, even("RoPE rotates pairs")]  # `heads * head_dim` need not be `hidden`
    vocabulary: Count
    rope_theta: Positive = 1e6  # base of RoPE's wavelengths
    epsilon: Positive = 1e-6  # of every RMSNorm
    tied: bool = True  # whether the head is the transposed embedding
    initializer_range: Positive = 0.02  # standard deviation of initial matrices
    context: Count = 40_960  # maximum context length
    # As in `config.json`. It determines whether queries and keys have an RMSNorm, and whether the
    # projections to queries, keys and values have biases.
    family: Literal["llama", "qwen2", "qwen3"] = "qwen3"
    rope_scaling: RopeScaling | None = None  # of RoPE's frequencies, for Llama only
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
        """Whether each query and key head has an RMSNorm."""
        return FAMILIES[self.family].qk_norm

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return FAMILIES[self.family].qkv_bias


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

# Fields of Architecture, and those of config.json.
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
_FIELDS = {"llama": _COMMON | {"rope_scaling": "rope_scaling"}, "qwen2": _COMMON, "qwen3": _COMMON}


def to_json(architecture: Architecture) -> dict[str, Any]:
    """Returns the content of the model's `config.json`, for transformers 4 and 5."""
    a = architecture
    fields = {theirs: getattr(a, ours) for ours, theirs in _FIELDS[a.family].items()}
    content = config_json.to_json(a.family, fields) | {"attention_dropout": 0.0}
    return content | ({} if a.family == "llama" else {"sliding_window": None})


def read(path: Path) -> Architecture:
    """Returns the architecture that a `config.json` describes.

    Raises:
        ValueError: If the file is damaged, lacks a size, or is of a model that is not supported.
        OSError: If it cannot be read.
    """
    given, sizes = config_json.read(path, Architecture, _FIELDS)
    try:
        return Architecture(family=given["model_type"], **sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
