"""The sizes of a Qwen3 model, and the `config.json` that tells them."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.runs import read_json

Ids = int | tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3:
    """Sizes and constants; the defaults are those of the first releases below 8 B.

    Attributes:
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
        qk_norm: RMSNorm of each query and key head. Without it the model is a Llama, and that is
            what its `config.json` says, so that transformers computes the same.
        begin_token, end_token, pad_token: as the tokenizer numbers them.

    Raises:
        ValueError: sizes that make no model.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_theta: float = 1e6
    epsilon: float = 1e-6
    tied: bool = True
    initializer_range: float = 0.02
    context: int = 40_960
    qk_norm: bool = True
    begin_token: Ids = None
    end_token: Ids = None
    pad_token: Ids = None

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocabulary", "context"):
            if sizes[name] < 1:
                raise ValueError(f"{name} must be at least 1; got {sizes[name]}.")
        if self.heads % self.kv_heads:
            raise ValueError(
                "kv_heads must divide heads, since all key heads serve equally many query "
                f"heads; got heads {self.heads}, kv_heads {self.kv_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, since RoPE rotates pairs; got {self.head_dim}."
            )
        for name in ("rope_theta", "epsilon", "initializer_range"):
            if not sizes[name] > 0:
                raise ValueError(f"{name} must be greater than 0; got {sizes[name]}.")

    @property
    def parameters(self) -> int:
        """Entries of all params; a tied embedding counts once."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        gains = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        layer = attention + 3 * self.hidden * self.ffn + gains
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + tables + self.hidden


def _released(layers: int, hidden: int, ffn: int, heads: int) -> Qwen3:
    return Qwen3(
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

# Fields of Qwen3, and of config.json.
_SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
}
_CONSTANTS = {"epsilon": "rms_norm_eps", "initializer_range": "initializer_range"}
_TOKENS = {
    "begin_token": "bos_token_id",
    "end_token": "eos_token_id",
    "pad_token": "pad_token_id",
}

# By model_type: whether queries and keys are normalised, the class, and what else tells the kind.
_KINDS: dict[str, tuple[bool, str, dict[str, Any]]] = {
    "qwen3": (True, "Qwen3ForCausalLM", {"use_sliding_window": False, "sliding_window": None}),
    "llama": (False, "LlamaForCausalLM", {"mlp_bias": False}),
}
# What other models of these kinds may have; a config.json that leaves one out means the same.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "pretraining_tp": 1,
    "quantization_config": None,
}
_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


def to_json(architecture: Qwen3) -> dict[str, Any]:
    """What `config.json` says of the model, for transformers 4 and 5."""
    a = architecture
    kind = next(kind for kind, (qk_norm, *_) in _KINDS.items() if qk_norm == a.qk_norm)
    _, name, told = _KINDS[kind]
    fields = _SIZES | _CONSTANTS | _TOKENS
    return {
        "architectures": [name],
        "model_type": kind,
        **{theirs: getattr(a, ours) for ours, theirs in fields.items()},
        "tie_word_embeddings": a.tied,
        "rope_theta": a.rope_theta,  # for transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_theta},  # and 5
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **told,
    }


def read(path: Path) -> Qwen3:
    """The model that a `config.json` tells.

    Raises:
        ValueError: it is damaged, lacks a size, or tells of a model that is none of these.
        OSError: it cannot be read.
    """
    try:
        given = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist. A model must be a local folder with {path.name}, tokenizer "
            "and safetensors; `hf download NAME --local-dir FOLDER` downloads one."
        ) from None
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _unknown(path, "model_type", kind, " or ".join(map(repr, _KINDS)))
    for name, only in _ONLY.items():
        if given.get(name, only) != only:
            raise _unknown(path, name, given[name], repr(only))
    types = given.get("layer_types") or []
    if not isinstance(types, list):
        raise ValueError(f"{path}: layer_types is {types!r} but must be a list.")
    others = sorted(set(map(str, types)) - {"full_attention"})
    if others:
        raise _unknown(path, "layer_types", others[0], "'full_attention'")
    values: dict[str, Any] = {"rope_theta": _rope_theta(path, given)}
    for ours, theirs in _SIZES.items():
        values[ours] = _checked(path, theirs, given.get(theirs), int)
    for ours, theirs in _CONSTANTS.items():
        values[ours] = _checked(path, theirs, given.get(theirs), float)
    for ours, theirs in _TOKENS.items():
        values[ours] = _ids(path, theirs, given.get(theirs))
    tied = _checked(path, "tie_word_embeddings", given.get("tie_word_embeddings", False), bool)
    try:
        return Qwen3(**values, tied=tied, qk_norm=_KINDS[kind][0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rope_theta(path: Path, given: dict[str, Any]) -> float:
    """Transformers 4 has it beside `rope_scaling`, 5 in `rope_parameters`."""
    bases = set()
    if given.get("rope_theta") is not None:
        bases.add(_checked(path, "rope_theta", given["rope_theta"], float))
    for field in ("rope_parameters", "rope_scaling"):
        rope = given.get(field) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: {field} is {rope!r} but must be an object.")
        for name, value in rope.items():
            if name == "rope_theta":
                bases.add(_checked(path, f"{field}.{name}", value, float))
            elif _ROPE.get(name) != value:
                only = repr(_ROPE[name]) if name in _ROPE else "no such setting"
                raise _unknown(path, f"{field}.{name}", value, only)
    if len(bases) != 1:
        found = " and ".join(map(str, sorted(bases, key=str))) or "missing"
        raise ValueError(f"{path}: rope_theta is {found} but must be one number.")
    return bases.pop()


def _ids(path: Path, name: str, value: Any) -> Ids:
    if isinstance(value, list):
        return tuple(_checked(path, name, index, int) for index in value)
    return value if value is None else _checked(path, name, value, int)


def _checked(path: Path, name: str, value: Any, kind: type) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{path}: {name} is {value!r} but must be of type {kind.__name__}.")
    return value


def _unknown(path: Path, name: str, value: Any, only: str) -> ValueError:
    return ValueError(f"{path}: {name} is {value!r}; only models with {only} are supported.")
