"""Converts between the config of a pretraining model and a Hugging Face `config.json`."""

from pathlib import Path
from typing import Any

from experiments.language import config_json
from experiments.pretrain.config import Model

# Our names (fields of Model, and the vocabulary) and those of config.json.
_COMMON = {
    "vocabulary": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "tied": "tie_word_embeddings",
    "init_std": "initializer_range",
    "epsilon": "rms_norm_eps",
}
_LATENT = {
    "dense_layers": "first_k_dense_replace",
    "latent": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
    "experts": "n_routed_experts",
    "active": "num_experts_per_tok",
    "shared": "n_shared_experts",
    "expert_hidden": "moe_intermediate_size",
    "routed_scale": "routed_scaling_factor",
}
_ROPE = {"rope_base": "rope_theta"}
_FIELDS = {
    "deepseek_v3": _COMMON | _LATENT | _ROPE,
    "llama": _COMMON | _ROPE,
    "qwen3": _COMMON | _ROPE,
}


def to_json(config: Model, vocabulary: int) -> dict[str, Any]:
    """Returns the fields of config.json that describe the model itself."""
    latent = config.attention == "latent"
    kind = "deepseek_v3" if latent else "qwen3" if config.qk_norm else "llama"
    own, family = vars(config) | {"vocabulary": vocabulary}, config_json.FAMILIES[kind]
    fields = {theirs: own[ours] for ours, theirs in _FIELDS[kind].items()}
    rope = {"num_key_value_heads": config.key_heads, "rope_theta": fields.pop("rope_theta")}
    said = config_json.to_json(kind, fields | rope) | family.stated
    return said | ({"num_nextn_predict_layers": 0} if latent else {"head_dim": config.key_columns})


def read(path: Path) -> tuple[Model, int]:
    """Returns the model that a config.json describes, with its dtype, and the vocabulary size.

    Raises:
        ValueError, OSError: As for `config_json.read`.
    """
    given, values = config_json.read(path, Model, _FIELDS)
    kind, vocabulary = given["model_type"], values.pop("vocabulary")
    if kind != "deepseek_v3":
        values |= {"attention": "multi-head", "dense_layers": values["layers"]}
        values["qk_norm"] = kind == "qwen3"
        usual = {"kv_heads": values["heads"], "head_dim": values["width"] // values["heads"]}
        for ours, theirs in (("kv_heads", "num_key_value_heads"), ("head_dim", "head_dim")):
            size = config_json.checked(path, theirs, given.get(theirs) or usual[ours], int)
            values[ours] = 0 if size == usual[ours] else size
    dtype = given.get("dtype", given.get("torch_dtype"))
    try:
        config = Model(dtype="float32" if dtype == "float32" else "bfloat16", **values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config_json.require(path, given, {"num_key_value_heads": config.key_heads})
    return config, vocabulary
