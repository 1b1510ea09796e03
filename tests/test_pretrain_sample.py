"""Samples: the same tokens as a naive loop, whatever the batch and the mesh; and the command."""

import contextlib
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretraining import DENSE, SMALL, VOCABULARY, mesh_of, one_device, text_file, training

from experiments.language import data
from experiments.language.checkpoints import Checkpoints
from experiments.pretrain import bits, export, sample
from experiments.pretrain.config import as_json
from experiments.pretrain.sample import generate, write_texts
from experiments.pretrain.step import Trainer

MODEL = dataclasses.replace(SMALL, layers=2)
PROMPTS = [[5, 7, 11], [3], [60, 2]]


@pytest.fixture(scope="module")
def trainer():
    return Trainer(training(MODEL, context=5), "adamw", one_device(), VOCABULARY)


@pytest.fixture(scope="module")
def params(trainer):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), trainer.abstract.params
    )


BIAS = np.linspace(-0.2, 0.2, 8, dtype=np.float32)[None]


@pytest.fixture(scope="module")
def last_logits(trainer, params):
    """Of tokens `(1, T)`, the logits `(vocabulary,)` after them."""

    @jax.jit
    def last_logits(tokens):
        hidden, _ = trainer.model.hidden(params, BIAS, tokens)
        return trainer.model.logits(params, hidden[0, -1])

    return last_logits


def naive(trainer, last_logits, prompt, row, length, temperature, top_k, seed):
    """One prompt, one token at a time, from nothing but the tokens that it sees."""
    tokens = list(prompt)
    key = jax.random.fold_in(jax.random.key(seed), row)
    with jax.set_mesh(trainer.mesh):
        for _ in range(length):
            seen = tokens[-trainer.config.context :]
            found = np.array(last_logits(jnp.array([seen])))
            found[np.argsort(found)[: VOCABULARY - top_k]] = -np.inf
            if temperature:
                gumbel = jax.random.gumbel(jax.random.fold_in(key, len(tokens)), (VOCABULARY,))
                found = found / temperature + np.asarray(gumbel)
            tokens.append(int(found.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, VOCABULARY), (1.5, 8)])
def test_generation_is_the_naive_loop(trainer, params, last_logits, temperature, top_k):
    settings = {"temperature": temperature, "top_k": top_k, "seed": 3}
    found = generate(trainer, params, BIAS, PROMPTS, 9, **settings)
    assert found.shape == (3, 9)
    wanted = [
        naive(trainer, last_logits, prompt, row, 9, **settings)
        for row, prompt in enumerate(PROMPTS)
    ]
    np.testing.assert_array_equal(found, wanted)


FAMILIES = {
    "latent attention, experts": SMALL,
    "more layers than are unrolled": dataclasses.replace(DENSE, layers=14, dense_layers=14),
    "fewer heads of keys": dataclasses.replace(
        DENSE, attention="multi-head", kv_heads=2, head_dim=8, qk_norm=True
    ),
    "experts on a mesh": dataclasses.replace(SMALL, layers=2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_logits_are_those_of_a_whole_pass(name):
    mesh = mesh_of(1, 2, 2, 2) if "mesh" in name else one_device()
    trainer = Trainer(training(FAMILIES[name], context=9), "adamw", mesh, VOCABULARY)
    model, state = trainer.model, trainer.start(0)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (4, 9), np.int32)
    given, seen = tokens.copy(), 4
    given[:, seen:] = 0  # places that are still empty when the caches begin

    @jax.jit
    def cached(params, bias):
        hidden, caches = model.continued(params, bias, given)
        rows = [hidden[:, seen - 1]]
        for at in range(seen, 9):
            hidden, caches = model.continued(params, bias, tokens[:, at : at + 1], caches, at)
            rows.append(hidden[:, 0])
        return model.logits(params, jnp.stack(rows, axis=1))

    @jax.jit
    def whole(params, bias):
        return model.logits(params, model.hidden(params, bias, tokens)[0][:, seen - 1 :])

    with jax.set_mesh(mesh):
        found, wanted = (f(state.params, state.bias) for f in (cached, whole))
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_a_token_within_the_context_takes_a_pass_over_itself(trainer, params, monkeypatch):
    passes = []
    run = trainer.model.continued

    def watched(params, bias, tokens, caches, at):
        passes.append(tokens.shape[1])
        return run(params, bias, tokens, caches, at)

    monkeypatch.setattr(trainer.model, "continued", watched)
    for length, traced in ((4, [5, 1]), (6, [5, 1, 5])):
        passes.clear()
        tokens, lengths = np.ones((1, 1 + length), np.int32), np.ones(1, np.int32)
        with jax.set_mesh(trainer.mesh):
            sample._extend.__wrapped__(
                trainer, params, BIAS, tokens, lengths, np.float32(1), None, np.uint32(0)
            )
        assert [n for n, before in zip(passes, [0, *passes], strict=False) if n != before] == traced


def test_samples_depend_on_seed_and_place_alone(trainer, params):
    draw = lambda *prompts, seed=0: generate(trainer, params, BIAS, prompts, 9, seed=seed)  # noqa: E731
    first = draw([5, 7], [5, 7])
    np.testing.assert_array_equal(first, draw([5, 7], [5, 7]))
    np.testing.assert_array_equal(first[:1], draw([5, 7]))
    assert (first[0] != first[1]).any()
    assert (draw([5, 7], [5, 7], seed=1) != first).any()


def test_a_mesh_gives_the_same_samples(trainer, params):
    meshed = Trainer(training(MODEL, context=5), "adamw", mesh_of(1, 2, 2, 2), VOCABULARY)
    placed = jax.tree.map(jax.device_put, params, meshed.shardings.params)
    settings = {"temperature": 1.5, "top_k": 8, "seed": 3}
    found = generate(meshed, placed, BIAS, PROMPTS, 9, **settings)
    np.testing.assert_array_equal(found, generate(trainer, params, BIAS, PROMPTS, 9, **settings))


def test_temperature_and_top_k_shape_the_distribution(trainer, params, last_logits):
    """Of one next token, over many rows."""
    draw = lambda **how: generate(trainer, params, BIAS, [[5, 7]] * 400, 1, **how)[:, 0]  # noqa: E731
    with jax.set_mesh(trainer.mesh):
        logits = np.asarray(last_logits(jnp.array([[5, 7]])), np.float64)
    best = np.argsort(logits)[::-1]
    assert set(draw(top_k=3)) == set(best[:3])
    assert set(draw(temperature=0)) == {best[0]}
    for temperature in (1.0, 2.0):
        p = np.exp(logits / temperature)
        p /= p.sum()
        share = np.mean(draw(temperature=temperature) == best[0])
        assert abs(share - p[best[0]]) < 4 * np.sqrt(p[best[0]] / 400)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"length": 0}, "--length must be at least 1; got 0"),
        ({"temperature": -0.5}, "--temperature must be at least 0; got -0.5"),
        ({"temperature": float("nan")}, "--temperature must be at least 0; got nan"),
        ({"top_k": 0}, "--top-k must be at least 1; got 0"),
    ],
)
def test_senseless_settings_are_refused(trainer, params, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(trainer, params, BIAS, **{"prompts": [[1]], "length": 1} | settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint, and what it holds."""
    folder = tmp_path_factory.mktemp("run")
    text = data.Data((text_file(folder),), vocabulary=300)
    config = training(MODEL, data=text, context=8)
    trainer = Trainer(config, "adamw", one_device(), 300)
    state = trainer.start(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        tokens = data.prepare(config.data)
        (folder / "config.json").write_text(json.dumps({"optimizer": "adamw"} | as_json(config)))
        with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            checkpoints.save(0, state, {"data_sha256": tokens.sha256})
        (folder / "tokenizer.json").write_text(tokens.tokenizer.to_str())
        yield folder, trainer, state, tokens


def test_texts_begin_with_the_prompt_and_end_with_the_document(run, monkeypatch):
    _, trainer, state, tokens = run
    encode = lambda text: tokens.tokenizer.encode(text).ids  # noqa: E731
    end = tokens.end_of_text
    rows = [[*encode(" be or"), end, *encode("not")], [*encode(" be"), *encode(" naïve")[:-1]]]
    width = max(map(len, rows))
    seen = {}

    def stub(trainer, params, bias, prompts, length, **settings):
        seen.update(prompts=prompts, settings=settings)
        return np.array([row + [end] * (width - len(row)) for row in rows])

    monkeypatch.setattr(sample, "generate", stub)
    settings = {"count": 2, "temperature": 0.5}
    texts = write_texts(trainer, state, tokens.tokenizer, "to <|endoftext|>", **settings)
    assert texts[0] == "to <|endoftext|> be or"
    assert texts[1].startswith("to <|endoftext|> be na")
    assert end not in seen["prompts"][0]
    assert seen["settings"] == {"temperature": 0.5, "top_k": 40, "seed": 0}
    assert write_texts(trainer, state, tokens.tokenizer, "", count=2)[0] == " be or"
    assert seen["prompts"] == [[end]] * 2
    with pytest.raises(ValueError, match=r"--data\.tokenizer"):
        write_texts(trainer, state, None, "to")


def test_the_commands_read_a_run(run, monkeypatch, capsys, tmp_path):
    folder, trainer, state, tokens = run

    def call(module, *words):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        code = module.main()
        return code, capsys.readouterr()

    options = ("--prompt=to", "--length=6", "--count=2", "--top-k=5", "--seed=4")
    code, printed = call(sample, folder, *options)
    texts = write_texts(trainer, state, tokens.tokenizer, "to", length=6, count=2, top_k=5, seed=4)
    assert (code, printed.out) == (0, sample.DIVIDER.join(texts) + "\n")

    code, printed = call(export, folder, tmp_path / "hf")
    assert (code, printed.out) == (0, f"Wrote step 0 of {folder} to {tmp_path / 'hf'}.\n")
    config, vocabulary, *tree = export.read(tmp_path / "hf")
    assert vocabulary == 300
    assert config.layers == 2
    jax.tree.map(np.testing.assert_array_equal, tree, [state.params, state.bias])
    assert (tmp_path / "hf" / "tokenizer.json").exists()

    for words in ((sample, tmp_path), (export, tmp_path, tmp_path / "new")):
        code, printed = call(*words)
        assert code == 2
        assert "holds no run" in printed.err
    code, printed = call(export, folder, tmp_path / "hf")
    assert code == 2
    assert "not empty" in printed.err


def test_bits_of_a_users_files_are_those_of_its_tokens(run, monkeypatch, capsys, tmp_path):
    """Every token once, those of the last window that is not full too, and every byte."""
    folder, trainer, state, tokens = run
    texts = ["to be or not to be, that is", "whether 'tis nobler, naïve"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    end = tokens.end_of_text
    ids = [[*tokens.tokenizer.encode(text).ids, end] for text in texts]
    stream = np.array([end, *ids[0], *ids[1]])
    assert (len(stream) - 1) % 8
    nats = 0.0
    with jax.set_mesh(trainer.mesh):
        for at in range(0, len(stream) - 1, 8):
            row = jnp.array(stream[at : at + 9])[None]
            hidden, _ = trainer.model.hidden(state.params, state.bias, row[:, :-1])
            chances = jax.nn.log_softmax(trainer.model.logits(state.params, hidden)[0])
            nats -= float(jnp.take_along_axis(chances, row[0, 1:, None], axis=1).sum())
    size = len("".join(texts).encode())
    for words, code, said in (
        ([folder, tmp_path / "*.jsonl"], 0, f"{nats / np.log(2) / size:.4f} bits per byte: {size}"),
        ([folder, tmp_path / "none.txt"], 2, "matches no file"),
        ([tmp_path, tmp_path / "*.jsonl"], 2, "holds no run"),
    ):
        monkeypatch.setattr(sys, "argv", ["bits", *map(str, words)])
        assert bits.main() == code
        assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("option", "said"),
    [("--count=0", "1; got 0"), ("--length=-1", "1; got -1"), ("--top-k=0", "1; got 0"),
     ("--temperature=-1", "0; got -1"), ("--temperature=nan", "nan")],
)  # fmt: skip
def test_numbers_are_refused_before_a_run_is_looked_for(option, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "nowhere", option])
    with pytest.raises(SystemExit, match="2"):
        sample.main()
    printed = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert f"{option.split('=')[0]} must be" in printed and said in printed
    assert "holds no run" not in printed
