"""Llama 3, Qwen2.5 and Qwen3, made with transformers, fine-tuned here, and loaded there again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from finetuning import finetune
from pretraining import one_device
from tokenizers import Tokenizer, processors

from experiments.finetune import architecture as config_json
from experiments.finetune import chat, model, template, weights
from experiments.finetune.architecture import PRESETS
from experiments.finetune.model import LanguageModel
from experiments.layers import RopeScaling, rotate

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
NUMBERS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, **NUMBERS}
CASES = {
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2.5, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5, untied": ("qwen2", {"tie_word_embeddings": False}),
    "llama 3": ("llama", {"rms_norm_eps": 1e-5}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama 3.2": (
        "llama",
        {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True},
    ),
}
HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="the parity tests need torch")
    return pytest.importorskip("transformers", reason="the parity tests need transformers")


def made(transformers, folder, case):
    """A model of transformers', whose gains and biases differ, and its folder."""
    import torch

    kind, options = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | options)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for x in theirs.parameters():
            if x.ndim == 1:
                x.add_(0.3 * torch.randn_like(x))
    theirs.save_pretrained(folder)
    return theirs


def tokenizer_of(folder, kind):
    """ChatML's, as Qwen's is, or one with Llama 3's tokens and template."""
    chat.write_tokenizer(folder, ["to be or not to be"] * 9, 300)
    if kind != "llama":
        return
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(tokens)
    begin = tokenizer.token_to_id(tokens[0])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{tokens[0]} $A", special_tokens=[(tokens[0], begin)]
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(HEADERS)
    path = folder / "tokenizer_config.json"
    names = {"bos_token": tokens[0], "eos_token": tokens[3]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))


def turn(asked, said):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


TURN = turn("to be", "or not")


def rows_of(folder, count, words):
    """A file of conversations, of the question and the answer `words(i)`."""
    rows = ({"messages": turn(*words(i)), "group": str(i)} for i in range(count))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows():
    """Packed: texts one after another in a row, and padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 320, (2, 24)).astype(np.int32)
    segments = np.array([[1] * 10 + [2] * 14, [1] * 5 + [2] * 12 + [0] * 7], np.int32)
    targets = np.full_like(tokens, -100)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets[:, :-1][inside] = tokens[:, 1:][inside]
    return tokens, segments, targets


def ours_of(a, params, tokens, segments, targets):
    """Logits, and the gradient of the mean loss of a step."""
    lm = LanguageModel(a, "float32")

    def run(params):
        total = np.float32((targets >= 0).sum())
        gradient, _ = jax.grad(lm.loss, has_aux=True)(params, tokens, targets, segments, total)
        return lm.logits(params, lm.hidden(params, tokens, segments)[0]), gradient

    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(run)(params))


def theirs_of(theirs, tokens, segments, targets):
    """The logits of each text by itself; gradients of the mean loss are left in the model."""
    import torch

    logits, loss = np.zeros((*tokens.shape, 320), np.float32), 0.0
    for n in (1, 2):
        for row in np.flatnonzero((segments == n).any(1)):
            here = segments[row] == n
            out = theirs(torch.tensor(tokens[row, here])[None]).logits[0]
            wanted = torch.tensor(targets[row, here]).long()
            loss = loss + torch.nn.functional.cross_entropy(
                out, wanted, reduction="sum", ignore_index=-100
            )
            logits[row, here] = out.detach().numpy()
    (loss / (targets >= 0).sum()).backward()
    return logits


def error(x, y):
    return np.max(np.abs(x - y)) / np.max(np.abs(y))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case, tmp_path, transformers):
    theirs = made(transformers, tmp_path / "hf", case)
    a, params = weights.read(tmp_path / "hf")
    assert (a.family, a.tied, a.rope_scaling is not None) == (
        CASES[case][0],
        bool(CASES[case][1].get("tie_word_embeddings")),
        "rope_parameters" in CASES[case][1],
    )
    tokens, segments, targets = rows()
    logits, gradient = ours_of(a, params, tokens, segments, targets)
    expected = theirs_of(theirs, tokens, segments, targets)
    there = segments > 0
    assert expected[there].std() > 0.5
    of_logits = error(logits[there], expected[there])
    for parameter in theirs.parameters():  # through the files, which have each one's place and axes
        parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = jax.device_get(weights.read(tmp_path / "gradients")[1])
    errors = jax.tree.map(error, gradient, wanted)
    print(f"{case}: logits {of_logits:.1e}, gradients {max(jax.tree.leaves(errors)):.1e}")
    assert max(of_logits, *jax.tree.leaves(errors)) < 1e-4


@pytest.mark.parametrize("case", ["qwen3", "qwen2.5, untied", "llama 3.2"])
def test_a_model_is_read_trained_exported_and_loaded(case, tmp_path, transformers):
    before = made(transformers, tmp_path / "hf", case)
    tokenizer_of(tmp_path / "hf", CASES[case][0])
    data = rows_of(tmp_path, 40, lambda i: (f"{i}?", "to be" + " or not" * (i % 5)))
    words = f"--model {tmp_path / 'hf'} --data {data} --context 64 --batch 4 --steps 8"
    words += f" --warmup 1 --dtype float32 --optimizer.learning-rate 0.01 --out {tmp_path / 'runs'}"
    words += " --optimizers muonclip"
    assert finetune(words)[0] == 0
    log = (tmp_path / "runs" / "muonclip" / "metrics.jsonl").read_text().splitlines()
    losses = [one["validation_loss"] for one in map(json.loads, log) if "validation_loss" in one]
    assert losses[-1] < losses[0] - 0.5
    folder = tmp_path / "runs" / "muonclip" / "model"
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(theirs) is type(before)
    a, params = weights.read(folder)
    assert a == weights.read(tmp_path / "hf")[0]
    tokens, segments, targets = rows()
    expected, there = theirs_of(theirs, tokens, segments, targets), segments > 0
    assert error(ours_of(a, params, tokens, segments, targets)[0][there], expected[there]) < 1e-4
    moved = theirs_of(before, tokens, segments, targets)
    assert error(moved[there], expected[there]) > 1e-2
    same = transformers.AutoTokenizer.from_pretrained(folder)
    given = chat.Chat(folder)
    (encoded,) = given.encode([given.conversation(TURN)])
    assert encoded.tokens.tolist() == same.apply_chat_template(TURN, return_dict=False)
    end = chat.LLAMA3.end if a.family == "llama" else chat.CHATML.end
    assert same.decode(encoded.tokens[encoded.learnt]) == f"or not{end}"
    (encoded,) = given.encode([given.completion("to be", " or not")])
    prompt = same("to be")["input_ids"]
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.learnt.argmax() == len(prompt)


def test_a_llama_s_tokenizer_with_a_template_of_chatml_has_its_turns(tmp_path):
    tokenizer_of(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").write_text(template.CHATML)
    given = chat.Chat(tmp_path)
    (encoded,) = given.encode([given.conversation(TURN)])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    learnt = encoded.tokens[encoded.learnt].tolist()
    assert tokenizer.decode(learnt, skip_special_tokens=False) == "or not<|im_end|>"


# --- config.json -----------------------------------------------------------------------------

# Of Llama 3.2 1B, as transformers 4 has written it, without what no model is told by.
FOUR = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
# Of Qwen2.5 0.5B.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
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
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(tmp_path, given):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    return config_json.read(path)


def test_released_configs_are_read_and_counted(tmp_path):
    llama, qwen = read(tmp_path, FOUR), read(tmp_path, QWEN)
    presets = PRESETS.values()
    assert llama.rope_scaling == RopeScaling(
        factor=32, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
    )
    assert qwen.head_dim == 64 and qwen.qkv_bias and not qwen.qk_norm
    counts = 1_235_814_400, 494_032_768, 596_049_920, 1_720_574_976, 4_022_468_096
    for a, count in zip((llama, qwen, *presets), counts, strict=True):
        assert read(tmp_path, config_json.to_json(a)) == a
        assert sum(x.size for x in jax.tree.leaves(model.shapes(a))) == count
    without = {key: value for key, value in FOUR.items() if key != "head_dim"}
    assert read(tmp_path, without) == llama
    del without["num_key_value_heads"]
    assert read(tmp_path, without).kv_heads == 32


def scaled(**changes):
    return FOUR | {"rope_scaling": FOUR["rope_scaling"] | changes}


REFUSED = {
    "an unknown family": (
        FOUR | {"model_type": "gemma3"},
        "model_type is 'gemma3'; only .* 'llama' or 'qwen2' or 'qwen3' are supported. Give the",
    ),
    "another scaling": (
        scaled(rope_type="yarn"),
        "rope_type is 'yarn'; only .* 'default' or 'llama3'",
    ),
    "a number missing": (
        scaled(low_freq_factor=None),
        "rope_scaling.low_freq_factor is None but must be of type float",
    ),
    "one too many": (scaled(beta_fast=32), "beta_fast is 32; only models with no such setting"),
    "no range": (scaled(high_freq_factor=1.0), "rope_scaling: high_freq_factor must be greater"),
    "two scalings": (
        FOUR | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "rope_parameters and rope_scaling differ",
    ),
    "Llama's scaling in a Qwen": (
        QWEN | {"rope_scaling": FOUR["rope_scaling"]},
        "rope_type is 'llama3'; only models with 'default'",
    ),
    "biases of a Llama": (FOUR | {"attention_bias": True}, "attention_bias is True; only"),
    "windows of a Qwen": (QWEN | {"use_sliding_window": True}, "use_sliding_window is True; only"),
    "key heads of a Qwen": (
        {key: value for key, value in QWEN.items() if key != "num_key_value_heads"},
        "num_key_value_heads is None but must be of type int",
    ),
    "no heads": (FOUR | {"num_attention_heads": 0}, "heads must be at least 1; got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(name, tmp_path):
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read(tmp_path, given)


def test_other_families_scale_no_rope():
    with pytest.raises(ValueError, match="A qwen2 has no rope_scaling"):
        dataclasses.replace(PRESETS["0.6b"], family="qwen2", rope_scaling=RopeScaling(**NUMBERS))


def test_frequencies_are_kept_divided_or_between():
    """In a context of 64 positions, 2 π of frequency 1 are 10.2 turns."""
    scaling = RopeScaling(**NUMBERS)
    turns = np.array([8.0, 4.0, 2.5, 1.0, 0.5], np.float32)
    kept = np.array([1.0, 1.0, 0.5 + 0.5 / 8, 1 / 8, 1 / 8], np.float32)
    frequency = turns * 2 * np.pi / 64
    np.testing.assert_allclose(scaling(frequency), frequency * kept, rtol=1e-5)
    x = np.ones((3, 1, 8), np.float32)
    assert not np.allclose(rotate(x, np.arange(3), 1e4, scaling), rotate(x, np.arange(3), 1e4))
