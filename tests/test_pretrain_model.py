"""The language model against loops over single tokens, and against itself on meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pretraining import DENSE, SMALL, VOCABULARY, mesh_of, one_device, training

import muon_jax
from experiments.language import sharding
from experiments.language.attention import causal_attention
from experiments.language.mesh import make_mesh
from experiments.pretrain.costs import active_entries
from experiments.pretrain.experts import combine, dispatch, gate, sort_by_expert, updated_bias
from experiments.pretrain.model import LanguageModel
from experiments.pretrain.presets import PRESETS
from experiments.pretrain.step import Trainer


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


# --- The gate --------------------------------------------------------------------------------


def test_the_gate_follows_deepseek_v3_token_by_token():
    logits, bias = normal(0, 2, 5, 8), 0.3 * normal(1, 8)
    found = gate(jnp.asarray(logits), jnp.asarray(bias), active=3, scale=2.446)
    load, losses = np.zeros(8, int), []
    for b in range(2):
        count, share = np.zeros(8), np.zeros(8)
        for t in range(5):
            scores = sigmoid(logits[b, t].astype(np.float64))
            ids = np.argsort(-(scores + bias))[:3]
            weights = 2.446 * scores[ids] / scores[ids].sum()
            np.testing.assert_array_equal(found.ids[b, t], ids)
            np.testing.assert_allclose(found.weights[b, t], weights, rtol=1e-5)
            load[ids] += 1
            count[np.argsort(-scores)[:3]] += 1  # equation 18: without the bias
            share += scores / scores.sum() / 5
        losses.append(np.sum(8 / (3 * 5) * count * share))
    np.testing.assert_array_equal(found.load, load)
    np.testing.assert_allclose(found.balance, np.mean(losses), rtol=1e-5)
    assert found.ids.tolist() != gate(logits, jnp.zeros(8), 3, 2.446).ids.tolist()  # it matters


def test_a_gate_whose_scores_all_underflow_is_finite():
    logits = -200 + jnp.asarray(normal(0, 1, 4, 8))

    def all_of(logits):
        found = gate(logits, jnp.zeros(8), 2, 2.0)
        return jnp.sum(found.weights[..., 1]) + found.balance, found

    gradient, found = jax.grad(all_of, has_aux=True)(logits)
    assert np.isfinite(gradient).all() and np.any(gradient)
    np.testing.assert_allclose(np.sum(found.weights, axis=-1), 2.0, rtol=1e-6)
    shares = jax.nn.softmax(logits, axis=-1)  # which scores are in proportion to, far down
    entropy = -np.mean(np.sum(shares * np.log(shares), axis=-1))
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4)
    np.testing.assert_array_equal(jnp.sum(found.load), 8)


def test_the_bias_chooses_and_gets_no_gradient():
    logits = jnp.asarray(normal(0, 1, 4, 8))

    def total(logits, bias):
        return jnp.sum(gate(logits, bias, 2, 1.0).weights ** 2)

    assert not np.any(jax.grad(total, argnums=1)(logits, jnp.zeros(8)))
    chosen = gate(logits, jnp.zeros(8).at[5].set(10.0), 2, 1.0).ids
    assert np.all(np.any(chosen == 5, axis=-1))


def test_bias_rises_for_experts_with_little_load_and_keeps_its_mean():
    bias = updated_bias(jnp.zeros((2, 4)), jnp.array([[9, 1, 1, 1], [3, 3, 3, 3]]), 0.001)
    np.testing.assert_allclose(bias[0], [-0.0015, 0.0005, 0.0005, 0.0005], atol=1e-9)
    assert not np.any(bias[1])


# --- Dispatch and the experts ----------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4])
def test_every_pair_is_sorted_to_its_expert_and_comes_back(block):
    ids = jnp.array([[2, 0], [2, 5], [2, 9], [0, 2]])  # 9 is elsewhere, 1, 3 and 4 have none
    order = sort_by_expert(ids, 6, block)
    np.testing.assert_array_equal(order.sizes, [2, 0, 4, 0, 0, 1])
    tokens = jnp.arange(1.0, 5.0)[:, None]
    places = dispatch(tokens, order)[:, 0]
    starts = np.cumsum(order.padded) - order.padded
    for expert, members in {0: [1, 4], 2: [1, 2, 3, 4], 5: [2]}.items():
        np.testing.assert_array_equal(places[starts[expert] :][: len(members)], members)
    weights = jnp.array([[1.0, 10.0]] * 4)
    back = combine(places[:, None], order, weights)[:, 0]
    np.testing.assert_array_equal(back, [11, 22, 3, 44])


def test_dispatch_and_combine_have_the_gradients_of_plain_indexing():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 5, (6, 2)))
    tokens, weights = jnp.asarray(normal(1, 6, 3)), jnp.asarray(normal(2, 6, 2))

    def ours(tokens, weights):
        order = sort_by_expert(ids, 4, 4)
        return jnp.sum(jnp.sin(combine(dispatch(tokens, order) ** 2, order, weights)))

    def plain(tokens, weights):
        kept = jnp.where(ids < 4, weights, 0)[..., None]
        return jnp.sum(jnp.sin(jnp.sum(kept * tokens[:, None] ** 2, axis=1)))

    for a, b in zip(*(jax.grad(f, (0, 1))(tokens, weights) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def naive_experts(x, ids, weights, kernels):
    """Token by token, in float64."""
    gate, up, down = (np.asarray(k, np.float64) for k in kernels)
    y = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        for e, w in zip(ids[b, t], weights[b, t], strict=True):
            h = silu(x[b, t] @ gate[e]) * (x[b, t] @ up[e])
            y[b, t] += w * (h @ down[e])
    return y


def ragged_on_a_cpu(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *,
                    axis_name):  # fmt: skip
    """What `jax.lax.ragged_all_to_all` does, by gathering everything everywhere."""
    me = jax.lax.axis_index(axis_name)
    everything = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    rows = jnp.arange(output.shape[0])
    for operand, begin, size, at in zip(*everything, strict=True):
        here = (rows >= at[me]) & (rows < at[me] + size[me])
        source = jnp.clip(rows - at[me] + begin[me], 0, len(operand) - 1)
        output = jnp.where(here[:, None], operand[source], output)
    return output


# Sizes of data, fsdp, expert and tensor.
MESHES = [(1, 1, 1, 1), (1, 1, 4, 1), (2, 2, 2, 2), (1, 2, 1, 4)]


@pytest.mark.parametrize("exchange", ["gather", "ragged"])
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("routing", ["spread", "hot"])
def test_experts_equal_a_loop_over_tokens(sizes, exchange, routing, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_on_a_cpu)
    from flax import nnx

    from experiments.pretrain.experts import Experts

    init = nnx.initializers.normal(0.5)
    experts = Experts(8, 32, 16, init=init, rngs=nnx.Rngs(0))
    kernels = [np.asarray(k[...]) for k in (experts.gate, experts.up, experts.down)]
    x, weights = normal(0, 8, 12, 32), np.abs(normal(1, 8, 12, 2))
    if routing == "hot":  # all tokens to expert 6 first, the others' second choice is 0: six empty
        ids = np.broadcast_to([6, 0], (8, 12, 2))
    else:
        order = np.random.default_rng(0).random((8, 12, 8))
        ids = np.argsort(order, axis=-1)[..., :2]
    ids = np.ascontiguousarray(ids.astype(np.int32))
    expected = naive_experts(x, ids, weights, kernels)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *a: experts(*a, exchange))(x, ids, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# --- Attention -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [40, 600])
def test_attention_in_blocks_equals_one_softmax(length):
    q, k = (jnp.asarray(normal(seed, 2, length, 2, 12)) for seed in (0, 1))
    v = jnp.asarray(normal(2, 2, length, 2, 8))
    with jax.set_mesh(one_device()):
        found, largest = jax.jit(causal_attention)(q, k, v)
    logits = np.einsum("btnh,bsnh->bnts", q, k) / 12**0.5
    logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
    np.testing.assert_allclose(largest, logits.max((0, 2, 3)), rtol=1e-5)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bnts,bsnv->btnv", weights, v), atol=1e-5)


@pytest.mark.parametrize("model", [SMALL, DENSE], ids=["moe", "dense"])
def test_no_position_sees_a_later_one(model):
    lm = LanguageModel(model, VOCABULARY)
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (2, 17))
    changed = windows.copy()
    changed[:, 9] += 1
    with jax.set_mesh(one_device()):
        params = lm.init(jax.random.key(0))
        run = jax.jit(lambda w: lm.losses(params, lm.initial_bias(), w % VOCABULARY)[0])
        a, b = run(windows), run(changed)
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert np.all(a[:, 8:12] != b[:, 8:12])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 1, 2)], ids=["one device", "fsdp, tensor"])
def test_the_loss_and_its_gradient_are_those_of_all_logits(sizes):
    lm = LanguageModel(DENSE, VOCABULARY)
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (4, 17)).astype(np.int32)

    def plain(params):
        hidden, _ = lm.hidden(params, lm.initial_bias(), windows[:, :-1])
        logits = lm.logits(params, hidden)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]))

    def loss(params):
        return lm.loss(params, lm.initial_bias(), windows)[0]

    with jax.set_mesh(mesh_of(*sizes)):
        params = lm.init(jax.random.key(0))
        found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, plain))
        losses, _ = jax.jit(lm.losses)(params, lm.initial_bias(), windows)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    assert float(jnp.mean(losses)) == pytest.approx(float(expected[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_muonclip_bounds_the_logits_of_latent_attention():
    model = dataclasses.replace(SMALL, layers=2, dense_layers=2, init_std=0.5)
    config, rows = training(model, warmup=0), np.random.default_rng(0).integers(0, 64, (1, 8, 17))

    def largest(threshold):
        variants = dataclasses.replace(config.variants, clip_threshold=threshold)
        clipping = dataclasses.replace(config, variants=variants)
        trainer = Trainer(clipping, "muonclip", one_device(), VOCABULARY)
        state, found = trainer.start(0), []
        windows = jax.device_put(rows.astype(np.int32), trainer.windows)
        for _ in range(4):
            state, metrics = trainer.advance(state, windows, rate=1e-4)
            found.append(float(metrics["max_logit"]))
        return found

    free, clipped = largest(1e9), largest(2.0)
    assert min(free) > 4
    # What later layers see has changed too, so that theirs come near the threshold, not to it.
    assert clipped[0] == free[0] and max(clipped[1:]) < 3.5 and max(clipped[2:]) < 2.3


# --- The whole model on meshes ---------------------------------------------------------------


@functools.cache
def loss_and_gradient(model, sizes):
    lm = LanguageModel(model, VOCABULARY)
    mesh = mesh_of(*sizes)
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (16, 17)).astype(np.int32)

    def objective(params, windows):
        loss, observed = lm.loss(params, lm.initial_bias(), windows)
        return loss + 0.1 * jnp.sum(observed.balance), observed

    with jax.set_mesh(mesh):
        where = sharding.shardings(sharding.param_specs(lm.shapes, mesh), mesh)
        params = jax.device_put(jax.device_get(lm.init(jax.random.key(0))), where)
        placed = jax.device_put(windows, NamedSharding(mesh, sharding.spec("batch", None)))
        step = jax.jit(jax.value_and_grad(objective, has_aux=True))
        return jax.device_get(step(params, placed))


@pytest.mark.parametrize(
    ("model", "sizes", "remat"),
    [
        *((m, sizes, "none") for m in (SMALL, DENSE) for sizes in ((1, 1, 4, 1), (2, 2, 2, 2))),
        *((DENSE, (1, 1, 1, 1), remat) for remat in ("dots", "full")),
    ],
)
def test_neither_a_mesh_nor_remat_changes_loss_or_gradient(model, sizes, remat):
    changed = dataclasses.replace(model, remat=remat)
    (loss, observed), gradient = loss_and_gradient(changed, sizes)
    (expected, seen), plain = loss_and_gradient(model, (1, 1, 1, 1))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(observed.load, seen.load)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain), strict=True):
        assert np.max(np.abs(a - b)) < 1e-4 * np.max(np.abs(b))


# --- Names and places ------------------------------------------------------------------------


def test_every_param_has_the_optimizer_that_moonlight_gives_it():
    labels = muon_jax.label_params(LanguageModel(SMALL, VOCABULARY).shapes)
    by_label = {"muon": set(), "other": set()}
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
        by_label[label].add(jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2])
    gains = {"attention_norm", "feed_forward_norm", "latent_norm", "norm"}
    assert by_label["other"] == {"embedding", "head"} | gains
    assert {"router", "experts", "query", "latent", "key_value", "out"} <= by_label["muon"]


def test_a_size_that_the_mesh_does_not_divide_is_named():
    mesh = mesh_of(1, 16, 1, 1)
    params = LanguageModel(SMALL, VOCABULARY).shapes
    with pytest.raises(ValueError, match=r"experts/down: axis 0 \(experts\) must be.*= 16; got 8"):
        sharding.param_specs({"moe_layers": params["moe_layers"]}, mesh)


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), (-1, -1, 1, 1), (1, 0, 1, 1)])
def test_a_mesh_that_does_not_make_up_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(sizes, jax.devices()[:8])


def test_the_state_lies_like_the_params():
    params = {"up": {"kernel": jnp.zeros((4, 8))}}
    specs = {"up": {"kernel": P("fsdp", "tensor")}}
    for tx in (muon_jax.muon(0.1, mu_dtype=jnp.int8), muon_jax.normuon(0.1)):
        state = jax.eval_shape(tx.init, params)
        found = sharding.state_specs(state, params, specs)
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
        for leaf, spec in leaves:
            split = tuple(spec) + (None,) * (leaf.ndim - len(spec))
            wanted = {(4, 8): ("fsdp", "tensor"), (1, 8): (None, "tensor"), (4, 1): ("fsdp", None)}
            assert split == wanted.get(leaf.shape, (None,) * leaf.ndim), leaf.shape


def test_a_config_says_which_option_is_wrong():
    with pytest.raises(ValueError, match=r"--model.active must be at most .*experts 8; got 9"):
        dataclasses.replace(SMALL, active=9)
    with pytest.raises(ValueError, match=r"--accumulate must divide --batch 8; got 3"):
        training(accumulate=3)


def test_the_presets_have_the_sizes_that_they_are_named_for():
    """Moonlight-16B-A3B to the last param (2502.16982), without embedding and head."""

    def sizes(name):
        config = PRESETS[name]
        params = LanguageModel(config.model, config.data.vocabulary).shapes
        of = {path: math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(params)}
        ends = sum(n for path, n in of.items() if path[0].key in ("embedding", "head"))
        gains = sum(n for path, n in of.items() if path[-1].key == "scale")
        head = 0 if config.model.tied else ends // 2
        active = active_entries(config.model, params) - head + gains
        return sum(of.values()), sum(of.values()) - ends, active

    assert sizes("moonlight-16b")[1:] == (15_289_019_904, 2_243_685_888)
    assert sizes("nanogpt-124m")[0] == 123_587_328
    millions = {"399m": 399, "545m": 545, "822m": 822, "1.1b": 1100, "1.5b": 1500}
    for name, params in millions.items():
        assert sizes(f"dense-{name}")[1] == pytest.approx(params * 1e6, rel=0.015)
