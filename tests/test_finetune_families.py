"""Llama 3, Qwen2.5 and Qwen3, made with transformers, fine-tuned here, and loaded there again."""

import json

import jax
import numpy as np
import pytest
from finetuning import finetune
from pretraining import one_device
from tokenizers import Tokenizer, processors

from experiments.finetune import chat, template, weights
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
    "nine layers, a loop": ("llama", {"num_hidden_layers": 9}),
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
    """Logits, the losses to evaluate by, and the gradient of the mean loss of a step."""
    lm = LanguageModel(a, "float32")

    def run(params):
        total = np.float32((targets >= 0).sum())
        gradient, _ = jax.grad(lm.loss, has_aux=True)(params, tokens, targets, segments, total)
        logits = lm.logits(params, lm.hidden(params, tokens, segments)[0])
        return logits, lm.losses(params, tokens, targets, segments), gradient

    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(run)(params))


def theirs_of(theirs, tokens, segments, targets):
    """Logits and losses of each text by itself; the mean's gradients are left in the model."""
    import torch

    logits, losses = np.zeros((*tokens.shape, 320), np.float32), np.zeros(tokens.shape, np.float32)
    loss = 0.0
    for n in (1, 2):
        for row in np.flatnonzero((segments == n).any(1)):
            here = segments[row] == n
            out = theirs(torch.tensor(tokens[row, here])[None]).logits[0]
            wanted = torch.tensor(targets[row, here]).long()
            each = torch.nn.functional.cross_entropy(out, wanted, reduction="none")
            loss = loss + each.sum()
            logits[row, here], losses[row, here] = out.detach().numpy(), each.detach().numpy()
    (loss / (targets >= 0).sum()).backward()
    return logits, losses


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
    logits, found, gradient = ours_of(a, params, tokens, segments, targets)
    expected, losses = theirs_of(theirs, tokens, segments, targets)
    there = segments > 0
    np.testing.assert_allclose(found.loss, losses, atol=1e-4)
    np.testing.assert_array_equal(found.correct[there], (expected.argmax(-1) == targets)[there])
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
    (expected, _), there = theirs_of(theirs, tokens, segments, targets), segments > 0
    assert error(ours_of(a, params, tokens, segments, targets)[0][there], expected[there]) < 1e-4
    moved, _ = theirs_of(before, tokens, segments, targets)
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


def test_frequencies_are_kept_divided_or_between():
    """In a context of 64 positions, 2 π of frequency 1 are 10.2 turns."""
    scaling = RopeScaling(**NUMBERS)
    turns = np.array([8.0, 4.0, 2.5, 1.0, 0.5], np.float32)
    kept = np.array([1.0, 1.0, 0.5 + 0.5 / 8, 1 / 8, 1 / 8], np.float32)
    frequency = turns * 2 * np.pi / 64
    np.testing.assert_allclose(scaling(frequency), frequency * kept, rtol=1e-5)
    x = np.ones((3, 1, 8), np.float32)
    assert not np.allclose(rotate(x, np.arange(3), 1e4, scaling), rotate(x, np.arange(3), 1e4))
