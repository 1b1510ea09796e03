"""Mixtures of sources, tokenizers of Hugging Face folders, and documents that are kept apart."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from pretraining import DENSE, SMALL, VOCABULARY, mesh_of, one_device, training

from experiments import log
from experiments.language import data, tokenizer
from experiments.language.data import Data
from experiments.language.windows import batches
from experiments.pretrain import loop
from experiments.pretrain.__main__ import parse
from experiments.pretrain.config import Running, Training, as_json, from_json
from experiments.pretrain.step import Trainer
from experiments.schedules import Schedules


def tokens_of(first, count=400):
    train = np.arange(first, first + count, dtype=np.uint32)
    held = train[:50] + 100_000
    return data.Tokens("", (train,), (held,), 2**20, None, None, None, str(first))


def mixed(*weights):
    parts = tuple((f"s{i}", w, tokens_of(1000 * i)) for i, w in enumerate(weights))
    train = sum((tokens.train for _, _, tokens in parts), ())
    return parts[0][2]._replace(train=train, parts=parts)


def test_sources_take_turns_by_their_weights_each_in_epochs_of_its_own():
    steps = batches(mixed(3.0, 1.0), batch=8, context=4, seed=0)
    firsts = np.concatenate([steps[i][:, 0] for i in range(100)])
    source = firsts // 1000
    for until in (8, 100, 800):  # everywhere, and not only on the whole
        assert abs(np.sum(source[:until] == 1) - until / 4) <= 1
    epochs = firsts[source == 0][: 3 * 99].reshape(3, 99)
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 396, 4))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = batches(mixed(3.0, 1.0), batch=8, context=4, seed=0, rows=[1, 5])
    assert (again[77] == steps[77][[1, 5]]).all()
    other = batches(mixed(3.0, 1.0), batch=8, context=4, seed=1)
    assert (other[0] != steps[0]).any()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A mixture of two texts."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for name, words in (("code", "def return if else"), ("prose", "to be or not")):
        lines = [" ".join(rng.choice(words.split(), 8)) for _ in range(800)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    mixture = tuple((n, w, str(folder / f"{n}.txt")) for n, w in (("code", 3.0), ("prose", 1.0)))
    return Data(mixture=mixture, vocabulary=300, cache=folder / "cache")


def test_one_tokenizer_serves_sources_that_stay_apart(sources):
    tokens = data.prepare(sources)
    code, prose = (part for _, _, part in tokens.parts)
    assert code.tokenizer.to_str() == prose.tokenizer.to_str() == tokens.tokenizer.to_str()
    assert {"Ġreturn", "Ġnot"} <= tokens.tokenizer.get_vocab().keys()  # it has seen both
    texts = [part.tokenizer.decode(part.validation[0].tolist()) for part in (code, prose)]
    assert "return" in texts[0] and "return" not in texts[1] and "not" in texts[1]
    assert tokens.as_json()["sources"]["code"]["weight"] == 3.0
    heavier = dataclasses.replace(
        sources, mixture=tuple((n, w + 1, glob) for n, w, glob in sources.mixture)
    )
    assert data.prepare(heavier).sha256 != tokens.sha256
    assert data.prepare(sources).sha256 == tokens.sha256


def test_a_mixture_is_evaluated_by_source_and_goes_on_bit_for_bit(sources, tmp_path, monkeypatch):
    """With all that changes on the way, the average that is evaluated, and documents apart."""
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: one_device())
    course = Schedules(beta=(0.5, 0.9), beta_steps=6, weight_decay=(1.0, 0.0), average=0.7)
    own = {"decay": "wsd", "isolate_documents": True, "schedules": course}
    config = training(DENSE, data=sources, steps=8, **own)
    again = from_json(Training, as_json(config))
    assert (again.data.mixture, again.schedules) == (sources.mixture, course)
    running = Running(save_every=3, evaluate_every=4, evaluation_tokens=128, log_every=1, samples=0)
    tokens, digests = data.prepare(sources), []
    for stops in ((), (5,)):
        folder = epath.Path(tmp_path / str(len(stops)))
        folder.mkdir()
        for stop in (*stops, None):
            stopping = threading.Event()
            run = loop.Pretraining(
                config, "muon", running, tokens, folder, stopping,
                on_step=lambda told, stop=stop, s=stopping: told.step == stop and s.set(),
            )  # fmt: skip
            assert run.to_the_end() == (stop is None)
        found = json.loads((folder / "summary.json").read_text())
        digests.append((found["params_sha256"], found["validation_loss"]))
    assert digests[0] == digests[1]
    last = next(r for r in reversed(log.read(folder)[0]) if "validation_loss" in r)
    each = {name: found["validation_loss"] for name, found in last["sources"].items()}
    assert last["validation_loss"] == pytest.approx(0.75 * each["code"] + 0.25 * each["prose"])
    assert each["code"] != each["prose"] and "bits_per_byte" in last["sources"]["code"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.mixture a 1 x.txt --data.files y.txt", "excludes --data.files"),
        ("--data.mixture a 1 x.txt a 2 y.txt", "another NAME for each source; got a twice"),
        ("--data.mixture a 0 x.txt", "must be greater than 0"),
        ("--isolate-documents --suite optimizers", "excludes --suite optimizers"),
        ("--rollback.above 2 --suite optimizers", "excludes --suite optimizers"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(words.split())
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_text_and_tokens_do_not_mix_without_a_tokenizer(sources, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(400, dtype=np.uint16) % 60)
    mixture = (*sources.mixture, ("x", 1.0, str(tmp_path / "x.npy")))
    config = dataclasses.replace(sources, mixture=mixture)
    with pytest.raises(ValueError, match=r"give the --data\.tokenizer of the tokens"):
        data.prepare(config)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.train(["to be"], 300, "<|endoftext|>"))
    found = data.prepare(dataclasses.replace(config, tokenizer=str(path)))
    assert [len(part.train) for _, _, part in found.parts] == [1, 1, 1]


@pytest.mark.parametrize("spelt", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_a_hugging_face_folder_brings_its_tokenizer(spelt, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.train(["to be"], 300, "<|im_end|>"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": spelt}))
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 100)
    words = ["--data.tokenizer", str(tmp_path), "--data.files", str(tmp_path / "a.txt")]
    found = parse([*words, "--data.cache", str(tmp_path / "cache")]).data
    bpe = tokenizer.read((tmp_path / "tokenizer.json").read_bytes(), "")
    assert (found.end_of_text, found.vocabulary) == ("<|im_end|>", bpe.get_vocab_size())
    tokens = data.prepare(found)
    assert tokens.train[0][-1] == tokens.end_of_text == bpe.token_to_id("<|im_end|>")
    given = parse([*words, "--data.end-of-text", "x", "--data.vocabulary", "999"]).data
    assert (given.end_of_text, given.vocabulary) == ("x", 999)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 5}')
    with pytest.raises(ValueError, match="the eos_token must be a text; got 5"):
        parse(words)


END = 7
APART = {
    "latent attention, experts": SMALL,
    "grouped attention": DENSE,
    "a mesh": dataclasses.replace(DENSE, kv_heads=2),
}


@pytest.mark.parametrize("name", APART)
def test_documents_that_are_kept_apart_are_each_as_if_alone(name):
    model = dataclasses.replace(APART[name], layers=2)
    mesh = mesh_of(1, 2, 1, 2) if name == "a mesh" else one_device()
    config = training(model, context=16, batch=2, isolate_documents=True)
    trainer = Trainer(config, "adamw", mesh, VOCABULARY, END)
    state = trainer.start(0)
    rng = np.random.default_rng(0)
    windows = rng.integers(8, VOCABULARY, (2, 17), np.int32)
    windows[0, [3, 9]], windows[1, 0] = END, END

    @jax.jit
    def alone(params, bias, documents):
        return trainer.model.losses(params, bias, documents)[0]

    @jax.jit
    def together(params, bias):
        segments = trainer.segments(jnp.asarray(windows))
        return trainer.model.losses(params, bias, windows, segments_BxT=segments)[0]

    def summed(trainer):
        placed = jax.device_put(windows[None], trainer.windows)
        with jax.set_mesh(trainer.mesh):
            return float(np.sum(np.asarray(trainer.evaluate(trainer.start(0), placed))))

    with jax.set_mesh(mesh):
        found = together(state.params, state.bias)
        for row, begin, end in [(0, 0, 3), (0, 3, 9), (0, 9, 16), (1, 0, 16)]:
            document = np.repeat(windows[row : row + 1, begin : end + 1], 2, 0)
            wanted = alone(state.params, state.bias, document)[0]
            np.testing.assert_allclose(found[row, begin:end], wanted, atol=1e-5)
    total = float(np.sum(found))
    assert summed(trainer) == pytest.approx(total, rel=1e-6)
    _, metrics = trainer.advance(state, jax.device_put(windows[None], trainer.windows))
    assert float(metrics["loss"]) == pytest.approx(total / 32, rel=1e-5)
    config = dataclasses.replace(config, isolate_documents=False)
    assert abs(summed(Trainer(config, "adamw", mesh, VOCABULARY)) - total) > 1e-3


def test_documents_without_known_ends_cannot_be_kept_apart(tmp_path):
    config = training(DENSE, isolate_documents=True)
    given = config, "adamw", Running(), tokens_of(0)._replace(vocabulary=8)
    with pytest.raises(ValueError, match=r"requires to know the token that ends .* --data\.tok"):
        loop.Pretraining(*given, epath.Path(tmp_path), threading.Event())
