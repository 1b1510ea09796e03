"""`--from FOLDER`: training goes on from a Hugging Face model, and comes back as one."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretraining import DENSE, SMALL, one_device, text_file
from tokenizers import Tokenizer

from experiments.language import tokenizer
from experiments.pretrain import __main__ as command
from experiments.pretrain import export, loop, trained
from experiments.pretrain.model import LanguageModel
from experiments.pretrain.suites import study

END = "<|end|>"
QWEN = dataclasses.replace(DENSE, kv_heads=2, head_dim=6, qk_norm=True)
SLOWEST = "--muon.learning-rate 1e-30 --adamw.learning-rate 1e-30 --model.bias-rate 0"


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """Commands take all devices, of which there are many here."""
    patch = pytest.MonkeyPatch()
    for module in (command, loop, trained):
        patch.setattr(module, "make_mesh", lambda sizes: one_device())
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return text_file(folder), folder / "cache"


@pytest.fixture(scope="module", params=[SMALL, QWEN], ids=["experts", "grouped-query"])
def base(request, text, tmp_path_factory):
    """A model's folder with a tokenizer, which has fewer tokens than the model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    own = Tokenizer.from_buffer(tokenizer.train(["to be or not to be"] * 9, 300, END))
    model = LanguageModel(request.param, 320)
    bias = np.random.default_rng(0).normal(0, 0.2, model.initial_bias().shape)
    params = model.init(jax.random.key(1))
    bias = bias.astype(np.float32)
    end = own.token_to_id(END)
    export.write(folder, request.param, params, bias, context=64, tokenizer=own, end_of_text=end)
    return folder


@pytest.fixture
def run(text, tmp_path, monkeypatch):
    def run(base, *words, out="run"):
        """The command's exit code."""
        files, cache = text
        line = f"--from {base} --context 16 --batch 8 --steps 6 --warmup 1 --save-every 3"
        line += " --optimizers muon --evaluate-every 50 --evaluation-tokens 256 --log-every 1"
        line += f" --samples 0 --data.cache {cache} --out {tmp_path / out}"
        arguments = [*line.split(), "--data.files", files, *" ".join(words).split()]
        monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
        try:
            return command.main()
        except SystemExit as ended:  # of the options' own errors
            return ended.code

    return run


def exported(tmp_path, monkeypatch, out="run"):
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / out), str(tmp_path / f"{out}-hf")])
    assert export.main() == 0
    return tmp_path / f"{out}-hf"


def summary(tmp_path, out):
    return json.loads((tmp_path / out / "summary.json").read_text())


def test_the_model_is_the_start_and_the_folder_says_which(base, run, tmp_path, monkeypatch):
    """At a rate of nearly nothing it comes back as it was, bit for bit."""
    assert run(base, SLOWEST) == 0
    folder = exported(tmp_path, monkeypatch)
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (base / name).read_bytes()
    ours, theirs = (json.loads((x / "config.json").read_text()) for x in (folder, base))
    assert ours == theirs | {"max_position_embeddings": 16}
    assert (folder / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["origin"].startswith("model ") and settings["data"]["end_of_text"] == END
    card = (folder / "README.md").read_text()
    done = summary(tmp_path, "run")
    for fact in (settings["origin"], done["data"]["sha256"], done["params_sha256"], "6 of 6, each"):
        assert fact in card, fact
    assert f"{done['validation_loss']:.4g}" in card and str(tmp_path) not in card


def test_it_goes_on_after_a_kill_and_transformers_computes_the_same(
    base, run, tmp_path, monkeypatch
):
    assert run(base, out="whole") == 0
    whole = loop.windows.from_step

    def killed(windows, step):
        for number, rows in enumerate(whole(windows, step), step):
            if number == 4:
                raise KeyboardInterrupt
            yield rows

    with monkeypatch.context() as patch:
        patch.setattr(loop.windows, "from_step", killed)
        assert run(base) == 130
    with monkeypatch.context() as patch:
        patch.setattr(export, "read", None)  # the checkpoint has all
        assert run(base) == 0
    digests = {summary(tmp_path, out)["params_sha256"] for out in ("run", "whole")}
    assert len(digests) == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses[-1] < losses[0] - 0.1

    pytest.importorskip("torch", reason="the parity tests need torch")
    transformers = pytest.importorskip("transformers", reason="the parity tests need transformers")
    import torch

    folder = exported(tmp_path, monkeypatch)
    config, vocabulary, params, bias = export.read(folder)
    tokens = np.random.default_rng(1).integers(0, vocabulary, (2, 16))
    model = LanguageModel(config, vocabulary)
    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda *a: model.logits(a[0], model.hidden(*a)[0]))
        ours = np.asarray(logits(params, bias, jnp.asarray(tokens)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = theirs(torch.tensor(tokens)).logits.float().numpy()
    assert np.abs(ours - theirs).max() < 5e-5 < 0.5 < ours.std()


one_model = pytest.mark.parametrize("base", [DENSE], indirect=True, ids=["dense"])


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "model")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@one_model
def test_what_cannot_go_on_is_refused_before_text_is_read(copy, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.data, "prepare", None)
    for words, message in {
        "--model.width 64": "hidden_size must be 32, as in the model of --from",
        "--data.vocabulary 999": "vocab_size must be 320, as in the model of --from",
        "--suite optimizers": "--from excludes --suite optimizers",
        "--device-memory 1e-5": "The planned step of muon requires",
    }.items():
        assert run(copy, words) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert run(tmp_path / "nowhere") == 2
    assert "config.json does not exist. A model must be a local folder" in capsys.readouterr().err
    (copy / "tokenizer.json").rename(tmp_path / "kept")
    assert run(copy) == 2
    assert "has no tokenizer.json, which is required to tokenise text" in capsys.readouterr().err
    (tmp_path / "kept").rename(copy / "tokenizer.json")
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert run(copy) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    path.write_bytes(content)
    change(copy, num_hidden_layers=9)
    assert run(copy) == 2
    assert "lacks" in capsys.readouterr().err
    change(copy, model_type="gemma3")
    assert run(copy) == 2
    assert (
        "only models with 'deepseek_v3' or 'llama' or 'qwen3' are supported"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


@one_model
def test_another_start_is_another_run(copy, run, capsys):
    assert run(copy, "--steps 2") == 0
    change(copy, rms_norm_eps=1e-4)
    assert run(copy, "--steps 2") == 2
    assert "origin" in capsys.readouterr().err


@one_model
def test_a_context_beyond_the_models_positions_is_told(copy, run, capsys):
    change(copy, max_position_embeddings=8)
    assert run(copy, "--steps 2") == 0
    assert "exceeds the model's max_position_embeddings 8" in capsys.readouterr().out


@one_model
def test_a_plan_is_that_of_the_folders_model(copy, run, capsys, monkeypatch):
    monkeypatch.setattr(study, "suite", None)
    monkeypatch.setattr(command, "mesh_of_config", lambda mesh: one_device())
    assert run(copy, "--dry-run") == 0
    count = sum(x.size for x in jax.tree.leaves(export.read(copy)[2]))
    assert f"{count:,} parameters" in capsys.readouterr().out
