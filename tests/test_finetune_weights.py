"""Folders of each family: transformers and this project read what the other has written."""

import dataclasses
import json
import resource
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretraining import mesh_of
from safetensors.numpy import load_file, save_file

from experiments.finetune import chat, model
from experiments.finetune.architecture import Architecture
from experiments.finetune.weights import check, read, write
from experiments.language import tensors
from experiments.layers import RopeScaling
from experiments.pretrain import export

TIED = Architecture(
    layers=2,
    hidden=16,
    ffn=24,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocabulary=64,
    end_token=(3, 5),
    pad_token=3,
)
UNTIED = dataclasses.replace(TIED, tied=False, rope_theta=5e6, end_token=5)
PLAIN = dataclasses.replace(TIED, family="llama")
BOTH = {"qwen3, tied": TIED, "qwen3, untied": UNTIED, "llama, tied": PLAIN}
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
MODELS = BOTH | {
    "qwen2, tied": dataclasses.replace(TIED, family="qwen2"),
    "llama, untied, scaled": dataclasses.replace(UNTIED, family="llama", rope_scaling=SCALING),
}
every_model = pytest.mark.parametrize("a", MODELS.values(), ids=MODELS)
GATE = "model.layers.1.mlp.gate_proj.weight"


def start(a):
    """Params, every entry another one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), model.shapes(a))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


def rounded(params, dtype):
    return jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="the parity tests need torch")
    return pytest.importorskip("transformers", reason="the parity tests need transformers")


def load(transformers, folder, **options):
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return found


# --- transformers ----------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_transformers_saves_is_read(a, dtype, tmp_path, transformers):
    import torch

    write(tmp_path / "ours", a, start(a), dtype="float32")
    theirs = load(transformers, tmp_path / "ours", dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    found, params = read(tmp_path / "theirs")
    assert found == a
    assert_equal(params, rounded(start(a), dtype))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@every_model
def test_transformers_loads_every_key_of_what_is_written(a, tmp_path, transformers):
    write(tmp_path / "hf", a, start(a), shard=5000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    theirs = load(transformers, tmp_path / "hf")
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[a.family] + "ForCausalLM"
    assert (type(theirs).__name__, str(theirs.dtype)) == (kind, "torch.bfloat16")
    tied = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert tied == a.tied
    assert_equal(read(tmp_path / "hf")[1], rounded(start(a), jnp.bfloat16))


def test_tokenizer_and_generation_go_along(tmp_path, transformers):
    chat.write_tokenizer(tmp_path / "tokenizer", ["def f(x):\n    return x\n"] * 9, 300)
    settings = {"eos_token_id": [3, 5], "temperature": 0.6, "do_sample": True}
    (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer" / "model.safetensors").write_text("not copied")
    write(tmp_path / "hf", TIED, start(TIED), tmp_path / "tokenizer")
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("tokenizer", "hf")
    )
    turn = [{"role": "user", "content": "def g(x)"}]
    assert theirs.apply_chat_template(turn) == ours.apply_chat_template(turn)
    assert load(transformers, tmp_path / "hf").generation_config.temperature == 0.6


# --- There and back --------------------------------------------------------------------------


@every_model
def test_reading_is_the_inverse_of_writing(a, tmp_path):
    write(tmp_path / "hf", a, start(a), dtype="float32")
    found, params = read(tmp_path / "hf")
    assert found == a
    assert_equal(params, start(a))
    assert jax.tree.structure(params) == jax.tree.structure(model.shapes(a))


@pytest.mark.parametrize("a", BOTH.values(), ids=BOTH)
def test_both_studies_read_what_the_other_has_written(a, tmp_path):
    """What pretraining exports is fine-tuned, and what is fine-tuned pretraining goes on from."""
    write(tmp_path / "ours", a, start(a), dtype="float32")
    config, vocabulary, params, bias = export.read(tmp_path / "ours")
    assert_equal(params.pop("dense_layers"), start(a)["layers"])
    assert_equal(params, {name: leaf for name, leaf in start(a).items() if name != "layers"})
    params["dense_layers"] = start(a)["layers"]
    export.write(tmp_path / "theirs", config, params, bias, context=64)
    found, tree = read(tmp_path / "theirs")
    assert_equal(tree, start(a))
    sizes = {"context": 64, "end_token": None, "pad_token": None}  # which pretraining asks for
    assert found == dataclasses.replace(a, **sizes) and vocabulary == a.vocabulary


def test_params_are_read_onto_a_mesh_and_written_from_it(tmp_path):
    write(tmp_path / "hf", UNTIED, start(UNTIED), dtype="float32")
    mesh = mesh_of(2, 2, 1, 2)
    _, params = read(tmp_path / "hf", mesh)
    assert_equal(params, start(UNTIED))
    assert jax.tree.map(lambda x: x.sharding, params) == model.shardings(UNTIED, mesh)
    gate = params["layers"]["feed_forward"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape == (2, 8, 12)
    write(tmp_path / "again", UNTIED, params, dtype="float32")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_few_tensors_at_a_time_are_in_memory(tmp_path):
    a = dataclasses.replace(TIED, layers=6, hidden=512, ffn=1024)
    write(tmp_path / "hf", a, start(a), shard=10**6)
    read(tmp_path / "hf")  # what is compiled stays
    tracemalloc.start()
    read(tmp_path / "hf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tensor, whole = 512 * 1024 * 2, sum(x.size for x in jax.tree.leaves(model.shapes(a))) * 2
    assert tensor <= peak < 3.5 * tensor < whole / 4


def test_a_leaf_without_a_name_is_an_error():
    shapes = model.shapes(TIED)
    shapes["norm"]["bias"] = shapes["norm"]["scale"]
    with pytest.raises(ValueError, match="NAMES has no tensor of the leaf norm/bias"):
        tensors.tensors(shapes)


# --- Damage ----------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    write(tmp_path / "hf", TIED, start(TIED), dtype="float32")
    return tmp_path / "hf"


def rewrite(folder, **tensors):
    path = folder / "model.safetensors"
    kept = load_file(path) | tensors
    save_file({name: x for name, x in kept.items() if x is not None}, path)


def test_damaged_tensors_are_named(written):
    gate = load_file(written / "model.safetensors")[GATE]
    for x, message in (
        (None, rf"lacks 1 tensor\(s\), the first being {GATE}"),
        (gate[1:], rf"hf.model\.safetensors: {GATE} is F32 \(23, 16\).*F16 \(24, 16\)"),
        (gate.T.copy(), rf"{GATE} is F32 \(16, 24\)"),
        (gate.astype(np.int32), rf"{GATE} is I32"),
        (np.where(gate == gate[3, 3], np.inf, gate), rf"{GATE} contains NaN or Inf"),
        (np.where(gate == gate[0, 0], np.nan, gate), rf"{GATE} contains NaN or Inf"),
    ):
        rewrite(written, **{GATE: x})
        with pytest.raises(ValueError, match=message):
            read(written)
        if "NaN or Inf" in message:
            check(written, TIED)
        else:
            with pytest.raises(ValueError, match=message):
                check(written, TIED)
    rewrite(written, **{GATE: gate, "model.layers.1.mlp.gate_proj.bias": gate[:, 0].copy()})
    with pytest.raises(ValueError, match=r"beyond its config.*gate_proj\.bias"):
        read(written)


def test_a_tied_model_may_repeat_its_embedding_but_no_other_head(written):
    embedding = load_file(written / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(written, **{"lm_head.weight": embedding})
    assert_equal(read(written)[1], start(TIED))
    changed = embedding + np.eye(64, 16, -30, np.float32)
    for other, message in (
        (changed, "lm_head.weight must equal model.embed_tokens.weight"),
        (embedding[1:], r"lm_head.weight is F32 \(63, 16\)"),
    ):
        rewrite(written, **{"lm_head.weight": other})
        with pytest.raises(ValueError, match=message):
            read(written)


def test_files_that_are_cut_or_missing_are_refused(written):
    path = written / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read(written)
    path.unlink()
    (written / "pytorch_model.bin").touch()
    error = r"hf has neither model\.safetensors nor .*pytorch_model\.bin is not supported; download"
    with pytest.raises(FileNotFoundError, match=error):
        read(written)
    (written / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist.*`hf download"):
        read(written)


def test_an_index_names_files_that_are_there(tmp_path):
    folder = tmp_path / "hf"
    write(folder, TIED, start(TIED), dtype="float32", shard=5000)
    check(folder, TIED)
    index, last = folder / "model.safetensors.index.json", max(folder.glob("model-*"))
    last.rename(tmp_path / "last")
    for look in (lambda: check(folder, TIED), lambda: read(folder)):
        with pytest.raises(FileNotFoundError, match=f"{index.name} names {last.name}, .*download"):
            look()
    for weight_map, value in (["a"], r"\['a'\]"), ({}, "{}"), (None, None), ({"a": [1]}, r"\[1\]"):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=rf"{index.name}: .* is {value} but must (be|name) "):
            check(folder, TIED)


def test_of_two_sets_of_weights_none_is_read(tmp_path):
    """Transformers takes the single file, and others the shards."""
    folder = tmp_path / "hf"
    write(folder, TIED, start(TIED), dtype="float32", shard=5000)
    write(tmp_path / "one", TIED, start(TIED))
    single = (tmp_path / "one" / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"hf has model\.safetensors and, .*00001-of-.*Remove"):
        read(folder)
    names = load_file(single)
    index = {"weight_map": dict.fromkeys(names, single.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(read(folder)[1], rounded(start(TIED), jnp.bfloat16))  # both say the same


def test_no_tensor_is_read_to_check(written, monkeypatch):
    def fails(*arguments):
        pytest.fail("a tensor was read")

    monkeypatch.setattr(tensors, "_insertion", fails)
    monkeypatch.setattr(tensors, "_check_tied", fails)
    check(written, TIED)
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\), the first being lm_head"):
        check(written, UNTIED)


def test_params_of_another_model_and_broken_ones_are_not_written(tmp_path):
    params = start(TIED)
    with pytest.raises(ValueError, match=r"head/kernel is missing.*\(16, 64\)"):
        write(tmp_path / "hf", UNTIED, params)
    with pytest.raises(ValueError, match=r"key_norm/scale is \(2, 8\).*none"):
        write(tmp_path / "hf", PLAIN, params)
    params["layers"]["feed_forward"]["gate"]["kernel"][1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=f"{GATE} contains NaN or Inf"):
        write(tmp_path / "hf", TIED, params)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_whole_or_not_there(written, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="not empty"):
        write(written, TIED, start(TIED))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError, match="cannot be written"):
            write(tmp_path / "new", TIED, start(TIED), dtype="float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def killed(path, value):
        """What a kill before the last file leaves."""
        assert not (tmp_path / "new").exists()
        with pytest.raises(OSError, match=r"config\.json"):
            read(path.parent)
        raise KeyboardInterrupt

    monkeypatch.setattr(tensors, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new", TIED, start(TIED))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
