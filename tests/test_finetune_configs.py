"""`config.json` as transformers 4 and 5 write it: what is read, counted, written and refused."""

import dataclasses
import json

import jax
import pytest

from experiments.finetune import architecture as config_json
from experiments.finetune import model
from experiments.finetune.architecture import PRESETS
from experiments.layers import RopeScaling

SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
# Of Llama 3.2 1B, as transformers 4 has written it, without what no model is told by.
LLAMA = COMMON | {
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": SCALING,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
# Of Qwen2.5 0.5B.
QWEN2 = COMMON | {
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Of Qwen3-0.6B.
QWEN3 = COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# And as transformers 5 does.
FIVE = {key: value for key, value in QWEN3.items() if not key.startswith("rope_")} | {
    "layer_types": ["full_attention"] * 28,
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}


@pytest.fixture
def read(tmp_path):
    def read(given):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(given))
        return config_json.read(path)

    return read


def test_released_configs_are_read_and_counted(read):
    llama, qwen = read(LLAMA), read(QWEN2)
    assert llama.rope_scaling == RopeScaling(
        factor=32, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
    )
    assert qwen.head_dim == 64 and qwen.qkv_bias and not qwen.qk_norm
    assert read(QWEN3) == read(FIVE) == PRESETS["0.6b"]
    counts = 1_235_814_400, 494_032_768, 596_049_920, 1_720_574_976, 4_022_468_096
    for a, count in zip((llama, qwen, *PRESETS.values()), counts, strict=True):
        assert read(config_json.to_json(a)) == a
        assert sum(x.size for x in jax.tree.leaves(model.shapes(a))) == count
    without = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    assert read(without) == llama
    del without["num_key_value_heads"]
    assert read(without).kv_heads == 32


THETA = QWEN3 | {"rope_parameters": {"rope_theta": 1e6}}
PARTIAL = {"partial_rotary_factor": 0.5, "rope_theta": 1e6}
REFUSED = [
    # Models that are not supported.
    (THETA | {"model_type": "mistral"}, "model_type"),
    (
        LLAMA | {"model_type": "gemma3"},
        "model_type is 'gemma3'; only .* 'llama' or 'qwen2' or 'qwen3' are supported. Give the",
    ),
    (THETA | {"hidden_act": "gelu"}, "hidden_act"),
    (THETA | {"attention_bias": True}, "attention_bias"),
    (LLAMA | {"attention_bias": True}, "attention_bias is True; only"),
    (THETA | {"attention_dropout": 0.1}, "attention_dropout"),
    (THETA | {"use_sliding_window": True}, "use_sliding_window"),
    (QWEN2 | {"use_sliding_window": True}, "use_sliding_window is True; only"),
    (THETA | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    (THETA | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    # RoPE.
    (THETA | {"rope_theta": 5e6}, "1000000.0 and 5000000.0"),
    (QWEN3 | {"rope_theta": None}, "rope_theta is missing"),
    (THETA | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    (
        QWEN3 | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
        "rope_parameters",
    ),
    (QWEN3 | {"rope_parameters": PARTIAL}, "rope_parameters.partial_rotary_factor"),
    (QWEN3 | {"rope_parameters": {"factor": 4.0, "rope_theta": 1e6}}, "rope_parameters.factor"),
    (
        LLAMA | {"rope_scaling": SCALING | {"rope_type": "yarn"}},
        "rope_type is 'yarn'; only .* 'default' or 'llama3'",
    ),
    (
        LLAMA | {"rope_scaling": SCALING | {"low_freq_factor": None}},
        "rope_scaling.low_freq_factor is None but must be of type float",
    ),
    (
        LLAMA | {"rope_scaling": SCALING | {"beta_fast": 32}},
        "beta_fast is 32; only models with no such setting",
    ),
    (
        LLAMA | {"rope_scaling": SCALING | {"high_freq_factor": 1.0}},
        "rope_scaling: high_freq_factor must be greater",
    ),
    (
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "rope_parameters and rope_scaling differ",
    ),
    (QWEN2 | {"rope_scaling": SCALING}, "rope_type is 'llama3'; only models with 'default'"),
    # Sizes.
    (THETA | {"num_hidden_layers": None}, "num_hidden_layers"),
    (THETA | {"hidden_size": "1024"}, "hidden_size"),
    (THETA | {"rms_norm_eps": None}, "rms_norm_eps"),
    (THETA | {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    (THETA | {"vocab_size": True}, "vocab_size"),
    (THETA | {"num_key_value_heads": 3}, "kv_heads"),
    (
        QWEN2 | {"num_key_value_heads": None},
        "num_key_value_heads is None but must be of type int",
    ),
    (LLAMA | {"num_attention_heads": 0}, "heads must be at least 1; got 0"),
    # Values that are none of their types, and of which no set or key can be made.
    (THETA | {"eos_token_id": {"a": 1}}, "eos_token_id"),
    (QWEN3 | {"model_type": ["qwen3"]}, "(?<=json: )model_type.* is .*qwen3"),
    (QWEN3 | {"rope_theta": [1e6]}, "(?<=json: )rope_theta.* is .*1"),
    (QWEN3 | {"rope_parameters": {"rope_theta": [1e6]}}, "(?<=json: )rope_parameters.* is .*1"),
    (QWEN3 | {"layer_types": 5}, "(?<=json: )layer_types.* is .*5"),
    (QWEN3 | {"bos_token_id": [[1]]}, "(?<=json: )bos_token_id.* is .*1"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_supported_is_refused_by_name(read, given, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read(given)


def test_other_families_scale_no_rope():
    scaling = RopeScaling(**{key: SCALING[key] for key in SCALING if key != "rope_type"})
    with pytest.raises(ValueError, match="A qwen2 has no rope_scaling"):
        dataclasses.replace(PRESETS["0.6b"], family="qwen2", rope_scaling=scaling)
