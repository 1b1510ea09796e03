"""`config.json` of a Hugging Face model of ours, DeepSeek-V3 or Llama, and the model it tells."""

from pathlib import Path
from typing import Any

from experiments.pretrain.config import Model
from experiments.runs import read_json

# Fields of Model, and of config.json.
_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "tied": "tie_word_embeddings",
    "init_std": "initializer_range",
    "epsilon": "rms_norm_eps",
}
_LATENT_FIELDS = {
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

# What is the same in every model of ours: a config.json that leaves out an unsaid one means just
# that, one that leaves out another means something else.
_UNSAID = {"hidden_act": "silu", "attention_bias": False}
_UNSAID_LATENT = {
    "rope_interleave": True,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
_SAID_LATENT = {"q_lora_rank": None, "n_group": 1, "topk_group": 1}


def to_json(config: Model, vocabulary: int) -> dict[str, Any]:
    """What config.json says of the model itself."""
    latent = config.attention == "latent"
    names = _FIELDS | (_LATENT_FIELDS if latent else {})
    kind = ("DeepseekV3ForCausalLM", "deepseek_v3") if latent else ("LlamaForCausalLM", "llama")
    common = {
        "architectures": [kind[0]],
        "model_type": kind[1],
        "vocab_size": vocabulary,
        **{theirs: getattr(config, ours) for ours, theirs in names.items()},
        "num_key_value_heads": config.heads,
        "rope_theta": config.rope_base,  # for transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},  # and 5
        **_UNSAID,
    }
    if latent:
        return common | _UNSAID_LATENT | _SAID_LATENT | {"num_nextn_predict_layers": 0}
    return common | {"mlp_bias": False, "head_dim": config.width // config.heads}


def read(path: Path) -> tuple[Model, int]:
    given = read_json(path)
    kinds = {"deepseek_v3": "latent", "llama": "multi-head"}
    attention = kinds.get(given.get("model_type"))
    if attention is None:
        raise ValueError(
            f"{path}: the model_type is {given.get('model_type')!r}, but only "
            f"{' and '.join(kinds)} are supported."
        )
    rope = given.get("rope_parameters") or {}
    names = _FIELDS | (_LATENT_FIELDS if attention == "latent" else {})
    values = {"tie_word_embeddings": False, **given, **rope}
    numbers = {}
    for name in [*names.values(), "rope_theta", "vocab_size"]:
        numbers[name] = values.get(name)
        if not isinstance(numbers[name], int | float):
            raise ValueError(f"{path}: {name} is {numbers[name]!r} but must be a number.")
    fields = {ours: numbers[theirs] for ours, theirs in names.items()}
    if attention == "multi-head":
        fields["dense_layers"] = fields["layers"]
    float32 = given.get("dtype", given.get("torch_dtype")) == "float32"
    config = Model(
        attention=attention,
        rope_base=numbers["rope_theta"],
        dtype="float32" if float32 else "bfloat16",
        **fields,
    )
    _check_config(path, given, config)
    return config, numbers["vocab_size"]


def _check_config(path: Path, given: dict[str, Any], config: Model) -> None:
    """Compares with what the model that was read would be written as."""
    wanted = to_json(config, given["vocab_size"])
    wanted |= {"quantization_config": None, "rope_scaling": None}
    for name in wanted.keys() - {"architectures", "rope_parameters", "num_nextn_predict_layers"}:
        found = given.get(name, "missing" if name in _SAID_LATENT else wanted[name])
        if found != wanted[name]:
            raise ValueError(
                f"{path}: {name} is {found!r}, but only models with {wanted[name]!r} are supported."
            )
    kind = (given.get("rope_parameters") or {}).get("rope_type", "default")
    if kind != "default":
        raise ValueError(
            f"{path}: RoPE of type {kind!r}; only models without scaling are supported."
        )
