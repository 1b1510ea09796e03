"""Models as Hugging Face folders: the logits of transformers, and the way back, bit by bit.

Damage to folders, which fine-tuning reads in the same way, is in test_finetune_weights.py.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from experiments.language import sharding, tokenizer
from experiments.language.mesh import make_mesh, one_device
from experiments.pretrain.config import Model
from experiments.pretrain.export import read, write
from experiments.pretrain.model import LanguageModel

VOCABULARY = 61
LATENT = Model(
    layers=3,
    width=32,
    heads=2,
    latent=16,
    nope=8,
    rope=6,
    value=10,
    hidden=48,
    experts=6,
    active=2,
    expert_hidden=20,
    init_std=0.2,
    epsilon=1e-5,
    dtype="float32",
)
DENSE = Model(
    layers=2,
    dense_layers=2,
    width=32,
    heads=2,
    attention="multi-head",
    rope_base=10_000.0,
    hidden=48,
    init_std=0.2,
    dtype="float32",
)


def change(config, **fields):
    return Model(**{**vars(config), **fields})


MODELS = {
    "experts": LATENT,
    "experts, two shared": change(LATENT, shared=2, dense_layers=2),
    "experts, none shared, tied": change(LATENT, shared=0, dense_layers=0, tied=True),
    "latent, dense": change(LATENT, dense_layers=3),
    "multi-head": DENSE,
    "multi-head, tied": change(DENSE, tied=True),
    "grouped-query": change(DENSE, heads=4, kv_heads=2, head_dim=12),
    "grouped-query, QK-norm": change(DENSE, heads=4, kv_heads=2, qk_norm=True, epsilon=1e-6),
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def start(config):
    """Params with gains that differ, and selection biases that change the choice."""
    model = LanguageModel(config, VOCABULARY)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        gain = jax.tree_util.DictKey("scale") in path
        x = rng.uniform(0.5, 1.5, leaf.shape) if gain else rng.normal(0, 0.2, leaf.shape)
        return x.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, model.shapes)
    return params, rng.normal(0, 0.2, model.initial_bias().shape).astype(np.float32)


def our_logits(config, params, bias, tokens):
    model = LanguageModel(config, VOCABULARY)
    with (
        jax.set_mesh(one_device()),
        jax.default_matmul_precision("highest"),
    ):
        logits = jax.jit(lambda *a: model.logits(a[0], model.hidden(*a)[0]))
        return np.asarray(logits(params, bias, jnp.asarray(tokens)))


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="the parity tests need torch")
    return pytest.importorskip("transformers", reason="the parity tests need transformers")


def load(transformers, folder: Path, **options):
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    empty = "shared_experts"  # a model without these has them with no columns
    assert not [name for names in info.values() for name in names if empty not in str(name)], info
    return found.eval()


def their_logits(found, tokens):
    import torch

    with torch.no_grad():
        return found(torch.tensor(tokens)).logits.float().numpy()


@every_model
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_transformers_computes_the_same_logits(config, tmp_path, transformers):
    params, bias = start(config)
    write(tmp_path / "hf", config, params, bias, context=64)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    ours = our_logits(config, params, bias, tokens)
    theirs = their_logits(load(transformers, tmp_path / "hf"), tokens)
    assert np.abs(ours - theirs).max() < 2e-5
    assert ours.std() > 0.5


def test_the_parity_would_see_a_wrong_setting(tmp_path, transformers):
    write(tmp_path / "hf", LATENT, *start(LATENT), context=64)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    right = their_logits(load(transformers, tmp_path / "hf"), tokens)
    wrong = load(transformers, tmp_path / "hf")
    for layer in wrong.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
    assert np.abs(their_logits(wrong, tokens) - right).max() > 0.1
    for setting in ({"rope_interleave": False}, {"routed_scaling_factor": 1.0}):
        wrong = load(transformers, tmp_path / "hf", **setting)
        assert np.abs(their_logits(wrong, tokens) - right).max() > 0.1


@every_model
def test_reading_is_the_inverse_of_writing(config, tmp_path):
    params, bias = start(config)
    write(tmp_path / "hf", config, params, bias, context=64)
    found, vocabulary, *tree = read(tmp_path / "hf")
    assert (found, vocabulary) == (config, VOCABULARY)
    assert_equal(tree, [params, bias])
    assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("config", [LATENT, DENSE], ids=["experts", "multi-head"])
def test_what_transformers_saves_can_be_read(config, tmp_path, transformers):
    params, bias = start(config)
    write(tmp_path / "ours", config, params, bias, context=64)
    load(transformers, tmp_path / "ours").save_pretrained(
        tmp_path / "theirs", max_shard_size="20KB"
    )
    found, _, *tree = read(tmp_path / "theirs")
    assert found == config
    assert_equal(tree, [params, bias])


def test_a_model_that_transformers_made_can_be_read(tmp_path, transformers):
    import torch

    torch.manual_seed(0)
    made = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=10,
        initializer_range=0.2,
        rope_theta=5e4,
    )
    theirs = transformers.DeepseekV3ForCausalLM(made).eval()
    theirs.save_pretrained(tmp_path / "hf")
    config, vocabulary, params, bias = read(tmp_path / "hf")
    assert (vocabulary, config.rope_base, config.dtype) == (VOCABULARY, 5e4, "float32")
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    ours = our_logits(config, params, bias, tokens)
    assert np.abs(ours - their_logits(theirs, tokens)).max() < 2e-5


def test_bfloat16_rounds_all_but_the_routing(tmp_path, transformers):
    params, bias = start(LATENT)
    write(tmp_path / "hf", LATENT, params, bias, context=64, dtype="bfloat16")
    config, _, found, found_bias = read(tmp_path / "hf")
    assert config == change(LATENT, dtype="bfloat16")

    def rounded(path, x):
        routing = jax.tree_util.DictKey("router") in path
        return x if routing else x.astype(jnp.bfloat16).astype(np.float32)

    assert_equal(found, jax.tree_util.tree_map_with_path(rounded, params))
    assert_equal(found_bias, bias)
    loaded = load(transformers, tmp_path / "hf")
    assert str(loaded.dtype) == "torch.bfloat16"
    gate = loaded.model.layers[1].mlp.gate
    np.testing.assert_array_equal(gate.e_score_correction_bias.numpy(), bias[0])


def test_large_models_are_split_into_files(tmp_path, transformers):
    params, bias = start(LATENT)
    write(tmp_path / "hf", LATENT, params, bias, context=64, shard=40_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    sizes = {path.name: sum(x.nbytes for x in load_file(path).values()) for path in files}
    assert max(sizes.values()) <= 40_000
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    for path in files:
        with safe_open(path, "np") as file:
            assert {index["weight_map"][name] for name in file.keys()} == {path.name}  # noqa: SIM118
    assert_equal(read(tmp_path / "hf")[2:], (params, bias))
    load(transformers, tmp_path / "hf")


def test_the_tokenizer_goes_along(tmp_path, transformers):
    text = "def f(x):\n    return x  # naïve <|end|> 東京\n" * 20
    source = tokenizer.train([text], 300, "<|end|>")
    own = Tokenizer.from_buffer(source)
    end = own.token_to_id("<|end|>")
    params, bias = start(DENSE)
    write(tmp_path / "hf", DENSE, params, bias, context=64, tokenizer=own, end_of_text=end)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert found.eos_token_id == end
    sample = "  return naïve(x)\n\n東京 a , b"
    assert found.encode(sample) == own.encode(sample).ids
    assert found.decode(own.encode(sample).ids) == sample
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.eos_token_id, config.bos_token_id) == (end, None)


def test_a_model_is_read_onto_a_mesh_and_written_from_it(tmp_path):
    config = change(LATENT, experts=8, heads=4, tied=True)
    model = LanguageModel(config, 64)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    bias = np.random.default_rng(0).normal(0, 0.2, (2, 8)).astype(np.float32)
    write(tmp_path / "host", config, params, bias, context=64)
    mesh = make_mesh((1, 2, 2, 2), jax.devices()[:8])
    _, _, *tree = read(tmp_path / "host", mesh)
    assert_equal(tree, [params, bias])
    places = sharding.shardings(sharding.param_specs(params, mesh), mesh)
    assert jax.tree.map(lambda x: x.sharding, tree[0]) == places
    write(tmp_path / "mesh", config, *tree, context=64)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("mesh", "host"))
    assert ours.read_bytes() == theirs.read_bytes()


BROKEN_CONFIGS = {
    "n_group": 2,
    "topk_group": 2,
    "q_lora_rank": 64,
    "attention_bias": True,
    "hidden_act": "gelu",
    "rope_interleave": False,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_scaling": {"type": "yarn", "factor": 4},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4},
    "quantization_config": {"quant_method": "fp8"},
    "model_type": "deepseek_v2",
    "num_key_value_heads": 1,
    "kv_lora_rank": None,
    "vocab_size": "61",
}


@pytest.mark.parametrize("field", [*BROKEN_CONFIGS, "n_group missing"])
def test_models_that_are_none_of_ours_are_refused(field, tmp_path):
    write(tmp_path, LATENT, *start(LATENT), context=64)
    path, (name, *missing) = tmp_path / "config.json", field.split()
    config = json.loads(path.read_text())
    if missing:  # another writer's default is not ours
        del config[name]
    else:
        config[name] = BROKEN_CONFIGS[name]
    path.write_text(json.dumps(config))
    named = "yarn" if name == "rope_parameters" else name
    with pytest.raises(ValueError, match=rf"config.json.*{named}{' is .missing' * len(missing)}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change(LATENT, value=12), "dense_layers/attention/key_value/kernel"),
        (change(LATENT, tied=True), r"head/kernel is \(32, 61\)"),
        (change(DENSE, dense_layers=1), "no Hugging Face format"),
    ],
    ids=["shape", "head", "format"],
)
def test_params_of_another_model_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "hf", config, *start(LATENT), context=64)
    assert not list(tmp_path.iterdir())
