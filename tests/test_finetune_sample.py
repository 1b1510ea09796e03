"""Answers of fine-tuned models are transformers', and a user's whole way with one."""

import json
import sys

import pytest
from finetuning import finetune
from test_finetune_families import (
    CASES,
    made,
    rows_of,
    tokenizer_of,
    transformers,  # noqa: F401 - a fixture
)

from experiments.finetune import sample
from experiments.finetune.chat import Chat

MESSAGES = [{"role": "user", "content": "to be <|im_end|> or not"}]


@pytest.fixture(scope="module", params=["llama 3.2", "qwen3"])
def theirs(request, transformers, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp(request.param)
    model = made(transformers, folder, request.param)
    tokenizer_of(folder, CASES[request.param][0])
    return model, transformers.AutoTokenizer.from_pretrained(folder), folder


def greedy(model, tokenizer, tokens, length):
    """Transformers' most likely tokens."""
    import torch

    given = torch.tensor([tokens])
    how = {"do_sample": False, "max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(given, **how)[0, len(tokens) :].tolist()


def test_a_question_has_transformers_tokens(theirs):
    _, tokenizer, folder = theirs
    plain = [{"role": "system", "content": "be"}, {"role": "user", "content": "to be or not"}]
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    chat = Chat(folder)
    assert chat.question(plain) == expected
    assert chat.prompt("to be") == tokenizer("to be").input_ids
    # What is spelt in content ends no turn.
    end = chat._tokenizer.token_to_id("<|im_end|>")
    without = [{"role": "user", "content": "to be or not"}]
    assert chat.question(MESSAGES).count(end) == chat.question(without).count(end)


def test_the_most_likely_answer_is_transformers(theirs):
    model, tokenizer, folder = theirs
    tokens = Chat(folder).question(MESSAGES)
    ends = [model.config.eos_token_id] if model.config.eos_token_id else []
    expected = greedy(model, tokenizer, tokens, 24)
    assert len({*expected}) > 3 and Chat(folder).answer(expected, ends)
    found = sample.answers(folder, MESSAGES, length=24, temperature=0, count=2)
    assert found == [Chat(folder).answer(expected, ends)] * 2
    raw = greedy(model, tokenizer, Chat(folder).prompt("to be"), 8)
    assert sample.answers(folder, "to be", length=8, temperature=0) == [
        Chat(folder).answer(raw, ends)
    ]


def test_an_answer_ends_where_the_model_ends_it(theirs):
    _, _, folder = theirs
    chat = Chat(folder)
    words = chat.prompt("to be")[-2:]
    assert chat.answer([*words, 7, 8], [7]) == chat.answer(words, [])
    end = chat._tokenizer.token_to_id(chat._names["eos_token"])
    assert chat.answer([*words, end, *words], []) == chat.answer(words, [])


def test_what_cannot_be_sampled_is_refused(theirs, tmp_path):
    folder = theirs[2]
    with pytest.raises(ValueError, match="--length is 4,000, but the model's max_position"):
        sample.answers(folder, MESSAGES, length=4000)
    with pytest.raises(ValueError, match="if --model or --export True was given"):
        sample.folder_of(str(tmp_path))
    with pytest.raises(ValueError, match="remove one of them"):
        sample.Command("x", "y", system="z", raw=True)
    (tmp_path / "model").symlink_to(folder)
    assert sample.folder_of(str(tmp_path)) == tmp_path / "model"


@pytest.mark.slow
def test_a_users_way(transformers, tmp_path, monkeypatch, capsys):  # noqa: F811
    """From a Llama of transformers' and a file of rows, by LoRA with Muon, to an answer."""
    source = tmp_path / "llama"
    made(transformers, source, "llama 3.2")
    tokenizer_of(source, "llama")
    data = rows_of(tmp_path, 200, lambda i: (f"say {i} or not", "to be or not to be"))
    words = f"--model {source} --data {data} --context 64 --batch 8 --steps 60 "
    words += "--dtype float32 --optimizers muon_adamw --optimizer.learning-rate 0.02 "
    words += f"--lora.rank 4 --evaluate-every 60 --out {tmp_path / 'runs'}"
    assert finetune(words)[0] == 0
    folder = tmp_path / "runs" / "muon_adamw"
    monkeypatch.setattr(
        sys, "argv", ["sample", str(folder), "--prompt", "say 3 or not", "--temperature", "0"]
    )
    capsys.readouterr()
    assert sample.main() == 0
    assert capsys.readouterr().out.strip() == "to be or not to be"
    # Transformers loads what was exported, says the same, and nothing is missing.
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    question = Chat(folder / "model").question([{"role": "user", "content": "say 3 or not"}])
    said = greedy(theirs.eval(), tokenizer, question, 30)
    assert tokenizer.decode(said).startswith("to be or not to be<|eot_id|>")
    card = (folder / "model" / "README.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    for fact in ("llama", "rows.jsonl", summary["data"]["sha256"], "0.02", "rank 4", "Muon"):
        assert fact in card, fact
    assert f"{summary['validation_loss']:.4f} after" in card and str(tmp_path) not in card
