"""Each family on meshes, in every precision, and one text's independence of others."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from pretraining import mesh_of, one_device

from experiments.finetune import model
from experiments.finetune.architecture import Architecture
from experiments.finetune.model import LanguageModel
from experiments.language import attention, sharding, vocabulary
from experiments.language.attention import causal_attention
from experiments.layers import RopeScaling

TIED = Architecture(
    layers=2,
    hidden=64,
    ffn=176,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocabulary=256,
    initializer_range=0.2,
)
UNTIED = dataclasses.replace(TIED, tied=False, rope_theta=5e6)
# More layers than are unrolled.
PLAIN = dataclasses.replace(UNTIED, layers=9, family="llama", initializer_range=0.1)
# Of 16 frequencies some are kept, some are divided, and some lie between.
SCALED = dataclasses.replace(
    TIED,
    family="llama",
    rope_theta=100.0,
    epsilon=1e-5,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
)
BIASED = dataclasses.replace(TIED, family="qwen2")
MODELS = {
    "qwen3, tied": TIED,
    "qwen3, untied, theta 5e6": UNTIED,
    "qwen2, tied": BIASED,
    "qwen2, untied": dataclasses.replace(BIASED, tied=False),
    "llama, untied": PLAIN,
    "llama, tied, scaled": SCALED,
}
every_model = pytest.mark.parametrize("a", MODELS.values(), ids=MODELS)


@functools.cache
def start(a):
    """Params with gains and biases that differ."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        gain = path[-1].key == "scale"
        x = rng.uniform(0.5, 1.5, x.shape) if gain else rng.normal(0, a.initializer_range, x.shape)
        return x.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.shapes(a))


def batch(seed=0, rows=8, length=24):
    """Tokens; segments of padded and packed rows; and targets, none of the last token of a text."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (rows, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[0, 15:] = 0  # padded at the right
    segments[1, :6] = 0  # at the left
    segments[2] = np.repeat([1, 2, 1, 3], length // 4)  # packed, a number that comes again
    segments[3, 10:] = 2
    segments[4:] = 0
    return tokens, segments, next_tokens(tokens, segments)


def next_tokens(tokens, segments):
    """Targets within each text, and -100, as transformers has it, where there is none."""
    targets = np.full_like(tokens, -100)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets[:, :-1][inside] = tokens[:, 1:][inside]
    return targets


@functools.cache
def compiled(a, dtype="float32", remat=True):
    """Params, tokens, targets and segments → losses, the gradient of their mean, and logits."""
    lm = LanguageModel(a, dtype, remat)

    def run(params, *given):
        tokens, targets, segments = given
        total = jnp.sum(targets >= 0).astype(jnp.float32)
        objective = functools.partial(lm.loss, max_logits=True)
        gradient, found = jax.grad(objective, has_aux=True)(params, *given, total)
        return found, gradient, lm.logits(params, lm.hidden(params, tokens, segments)[0])

    return jax.jit(run)


def run(a, params, tokens, targets, segments, mesh=None, **how):
    mesh = mesh or one_device()
    rows = NamedSharding(mesh, sharding.spec("batch", None))
    params = jax.device_put(params, model.shardings(a, mesh))
    given = jax.device_put((tokens, targets, segments), rows)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        return jax.device_get(compiled(a, **how)(params, *given))


def largest_difference(ours, theirs):
    return max(
        np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b)))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


# --- Texts in a row --------------------------------------------------------------------------


@every_model
def test_a_packed_text_is_as_it_is_alone(a):
    tokens, segments, targets = batch()
    packed, gradient, logits = run(a, start(a), tokens, targets, segments)
    alone = np.zeros((8, 24), np.int32), np.zeros((8, 24), np.int32), np.full((8, 24), -1, np.int32)
    places = []
    texts = [(0, 0, 15), (1, 6, 24), *((2, i, i + 6) for i in range(0, 24, 6)), (3, 0, 10)]
    for text, (row, begin, end) in enumerate([*texts, (3, 10, 24)]):
        here = slice(0, end - begin)
        places.append((row, slice(begin, end), text, here))
        alone[0][text, here], alone[1][text, here] = tokens[row, begin:end], 7
        alone[2][text, here] = targets[row, begin:end]
    separate, their_gradient, their_logits = run(a, start(a), alone[0], alone[2], alone[1])
    for row, there, text, here in places:
        np.testing.assert_allclose(packed.loss[row, there], separate.loss[text, here], atol=2e-5)
        np.testing.assert_allclose(logits[row, there], their_logits[text, here], atol=2e-5)
    assert largest_difference(gradient, their_gradient) < 1e-5
    key = "layers/attention"  # padding, of which there is more here, has no logits
    np.testing.assert_allclose(packed.max_logits[key], separate.max_logits[key], rtol=1e-5)


def test_without_segments_a_row_is_one_text():
    tokens = batch()[0]
    lm = LanguageModel(TIED, "float32")
    with jax.set_mesh(one_device()):
        found = jax.jit(lambda p, t: lm.hidden(p, t, max_logits=True))(start(TIED), tokens)
        ones = np.ones_like(tokens)
        wanted = jax.jit(lambda p, t: lm.hidden(p, t, ones, max_logits=True))(start(TIED), tokens)
        with pytest.raises(ValueError, match=r"shape of the tokens, \(8, 24\); got \(8, 1\)"):
            lm.hidden(start(TIED), tokens, ones[:, :1])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_attention_of_grouped_heads_in_segments_is_one_softmax(monkeypatch):
    q, k, v = normal(0, 2, 384, 4, 16), normal(1, 2, 384, 2, 16), normal(2, 2, 384, 2, 16)
    segments = np.repeat([[1, 2, 0], [3, 3, 1]], 128, axis=1).astype(np.int32)
    logits = np.einsum("btkgh,bskh->bkgts", q.reshape(2, 384, 2, 2, 16), k).reshape(2, 4, 384, 384)
    seen = np.tri(384, dtype=bool) & (segments[:, None, :, None] == segments[:, None, None])
    logits = np.where(seen, logits / 4, -np.inf)
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    expected = np.einsum("bkgts,bskh->btkgh", scores.reshape(2, 2, 2, 384, 384), v)
    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        mixed, largest = jax.device_get(jax.jit(causal_attention)(q, k, v, segments))
    np.testing.assert_allclose(mixed, expected.reshape(mixed.shape), atol=1e-5)
    there = np.where(segments[:, None, :, None] > 0, logits, -np.inf).max((0, 2, 3))
    np.testing.assert_allclose(largest, there, rtol=1e-5)

    interpreted = functools.partial(attention.splash, interpret=True)
    monkeypatch.setattr(attention, "splash", interpreted)
    mesh = mesh_of(1, 2, 1, 2)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        for threshold in (None, 0.1, 100.0):
            kernel = functools.partial(attention._by_splash, threshold=threshold)
            by_kernel, told = jax.device_get(jax.jit(kernel)(q, k, v, segments))
            np.testing.assert_allclose(by_kernel, mixed, atol=1e-5)
            if threshold == 100.0:  # a bound, of what is no padding
                assert np.all((told >= largest - 1e-5) & (told <= largest + np.log(128)))
            else:
                np.testing.assert_allclose(told, largest, rtol=1e-5)


# --- One result, however it is computed ------------------------------------------------------


@pytest.mark.parametrize("a", [TIED, PLAIN, BIASED], ids=["qwen3", "llama", "qwen2"])
def test_a_mesh_changes_nothing(a):
    tokens, segments, targets = batch()
    logits = run(a, start(a), tokens, targets, segments)[2]
    targets[:, ::3] = np.where(targets < 0, targets, logits.argmax(-1))[:, ::3]
    found, gradient, logits = run(a, start(a), tokens, targets, segments, mesh_of(2, 2, 1, 2))
    expected = run(a, start(a), tokens, targets, segments)
    np.testing.assert_array_equal(found.correct, expected[0].correct)
    np.testing.assert_array_equal(found.correct, logits.argmax(-1) == targets)
    assert found.correct.any() and not found.correct[targets < 0].any()
    for a, b in ((found.loss, expected[0].loss), (logits, expected[2])):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert largest_difference(found.max_logits, expected[0].max_logits) < 1e-5
    assert largest_difference(gradient, expected[1]) < 1e-5


def test_remat_changes_nothing():
    tokens, segments, targets = batch()
    given = TIED, start(TIED), tokens, targets, segments
    found, expected = run(*given, remat=False), run(*given)
    assert largest_difference(found[1:], expected[1:]) < 1e-6
    assert largest_difference(found[0].max_logits, expected[0].max_logits) < 1e-6


@pytest.mark.parametrize("a", [TIED, BIASED], ids=["qwen3", "qwen2"])
def test_bfloat16_computes_near_float32_and_its_gradient_is_float32(a):
    tokens, segments, targets = batch()
    given = a, start(a), tokens, targets, segments
    (found, gradient, _), (expected, exact, _) = run(*given, dtype="bfloat16"), run(*given)
    there = targets >= 0
    assert np.sqrt(np.mean((found.loss - expected.loss)[there] ** 2)) < 0.05
    assert {x.dtype for x in jax.tree.leaves((gradient, found.loss))} == {np.dtype(np.float32)}
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(exact), strict=True
    ):
        # What all keys have in common moves a softmax only as far as RoPE turns it.
        cancels = [key.key for key in path[-2:]] == ["key", "bias"]
        assert 0 < np.linalg.norm(x - y) < (0.1 if cancels else 0.05) * np.linalg.norm(y)
    lm = LanguageModel(a)
    with jax.set_mesh(one_device()):
        hidden, _ = jax.eval_shape(lm.hidden, start(a), tokens)
    assert hidden.dtype == jnp.bfloat16


# --- The loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 1, 2)], ids=["one device", "fsdp, tensor"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_losses_and_the_gradient_of_the_weighted_one_are_optax_s(
    monkeypatch, sizes, dtype, tolerance
):
    """In chunks that the tokens do not fill, with targets that do not count."""
    monkeypatch.setattr(vocabulary, "LOSS_TOKENS", 64)
    kernel, hidden = normal(0, 16, 1024).astype(dtype), normal(1, 4, 75, 16).astype(dtype)
    rng = np.random.default_rng(2)
    targets, weights = rng.integers(0, 1024, (4, 75)), rng.uniform(0, 1, (4, 75))
    weights[rng.uniform(size=weights.shape) < 0.3] = 0.0
    targets, weights = np.where(weights > 0, targets, -1), jnp.asarray(weights, jnp.float32)

    def ours(kernel, hidden):
        total, found = vocabulary.weighted_loss(kernel, hidden, targets, weights, tied=False)
        return 3.0 * total, found

    def evaluated(kernel, hidden):
        return vocabulary.cross_entropy(kernel, hidden, targets)

    def plain(kernel, hidden):
        logits = hidden @ kernel
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(targets, 0))
        return 3.0 * jnp.sum(weights * losses), (losses, jnp.argmax(logits, axis=-1) == targets)

    with jax.set_mesh(mesh_of(*sizes)), jax.default_matmul_precision("highest"):
        step, only = (
            jax.jit(f).lower(kernel, hidden).compile()
            for f in (jax.value_and_grad(ours, (0, 1), has_aux=True), evaluated)
        )
        (total, (losses, correct)), gradient = jax.device_get(step(kernel, hidden))
        found = jax.device_get(only(kernel, hidden))
        whole = kernel.astype(jnp.float32), hidden.astype(jnp.float32)
        (expected, (each, hits)), exact = jax.value_and_grad(plain, (0, 1), has_aux=True)(*whole)
    there = targets >= 0
    for program in (step, only):
        assert program.memory_analysis().temp_size_in_bytes < 300 * 1024 * 4
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for one, right in ((losses, correct), found):
        np.testing.assert_allclose(one[there], each[there], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(right[there], hits[there])
    for ours, theirs in zip(gradient, exact, strict=True):
        assert ours.dtype == dtype
        error = np.linalg.norm(ours.astype(np.float32) - theirs)
        assert error < tolerance * np.linalg.norm(theirs)


def test_of_equal_logits_the_first_is_the_argmax():
    kernel = np.zeros((8, 8), np.float32)
    kernel[0, [2, 3, 6]] = kernel[1, 6] = 1.0  # 0 to 3 lie on one device, 4 to 7 on the other
    hidden, targets = np.zeros((2, 8, 8), np.float32), np.tile(np.arange(8), (2, 1))
    hidden[[0, 1], :, [0, 1]] = 1.0
    with jax.set_mesh(mesh_of(1, 1, 1, 2)):
        _, correct = jax.jit(vocabulary.cross_entropy)(kernel, hidden, targets)
    np.testing.assert_array_equal(correct, targets == [[2], [6]])


# --- Params ----------------------------------------------------------------------------------


def test_params_begin_as_transformers_initialises_them():
    a = dataclasses.replace(UNTIED, initializer_range=0.05)
    params = jax.jit(lambda key: model.init(a, key))(jax.random.key(3))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "scale":
            assert np.all(x == 1)
        else:
            assert np.std(x) == pytest.approx(0.05, rel=0.05)
            assert abs(np.mean(x)) < 4 * 0.05 / math.sqrt(x.size)
    hidden = jax.tree.leaves(params["layers"]["feed_forward"])
    assert not np.any(np.array_equal(hidden[1], hidden[2]))


def test_sizes_that_make_no_model_or_no_mesh_are_refused():
    for field, value, message in (
        ("kv_heads", 3, r"kv_heads must divide heads.*heads 4, kv_heads 3"),
        ("head_dim", 31, r"head_dim must be even.*got 31"),
        ("layers", 0, "layers must be at least 1; got 0"),
        ("rope_theta", math.nan, r"rope_theta must be a finite number.*; got nan"),
        ("epsilon", 0.0, r"epsilon must be greater than 0.*; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TIED, **{field: value})
    with pytest.raises(ValueError, match=r"must divide the model's 2 key heads; got 4"):
        model.shardings(TIED, mesh_of(1, 1, 1, 4))
    with pytest.raises(
        ValueError, match=r"embedding: axis 1 \(width\) must be.* fsdp 4 = 4; got 66"
    ):
        model.shardings(dataclasses.replace(TIED, hidden=66), mesh_of(1, 4, 1, 1))
