"""QK-clip of stacks, on meshes, inside other transformations, and in every framework's trees."""

import contextlib
import functools

import equinox
import jax
import jax.numpy as jnp
import optax
import pytest
from attention_heads import (
    CLOSE,
    HEADS,
    LAYOUTS,
    ONES,
    WIDTH,
    X,
    assert_close,
    assert_same_bits,
    grouped,
    latent,
    normal,
    normed,
    stacked,
)
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muon_jax
from experiments.compiled import measure
from muon_jax import GroupedQuery, clip_qk, muonclip, qk_clip

# --- Stacks, meshes, transformations ---------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stacked_layers_are_clipped_one_by_one(layout):
    params, spec = grouped(layout, 2)
    layers = [jax.tree.map(lambda x, i=i: x * (i + 1), params) for i in range(3)]
    max_logits = 100 * jnp.exp(normal((3, HEADS)))
    ours = clip_qk(stacked(layers), {"attention": max_logits}, spec)

    def clip(layer, s):
        return clip_qk(layer, {"attention": s}, spec)

    assert_close(ours, stacked(list(map(clip, layers, max_logits))))
    assert_close(jax.vmap(clip)(stacked(layers), max_logits), ours)
    assert_close(jax.lax.map(lambda x: clip(*x), (stacked(layers), max_logits)), ours)


def test_stacked_latent_attention_and_gains():
    params, spec = latent("split")
    max_logits = 100 * jnp.exp(normal((2, HEADS)))
    ours = clip_qk(stacked([params] * 2), max_logits, spec)
    one_by_one = stacked([clip_qk(params, s, spec) for s in max_logits])
    assert_close(ours, one_by_one)

    spec = GroupedQuery(heads=HEADS, qk_norm=("q_norm", "k_norm"))
    ours = clip_qk(stacked([normed()] * 2), max_logits, spec)
    one_by_one = stacked([clip_qk(normed(), s, spec) for s in max_logits])
    assert_close(ours, one_by_one)
    with pytest.raises(ValueError, match=r"'q_norm/scale' has the shape \(2, 6\) in each layer"):
        clip_qk(stacked([normed()] * 2), max_logits[0], spec)


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("of_heads", [P(), P("tp")])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", ["merged", "split"])
def test_on_a_mesh_leaves_stay_where_they_are(layout, kind, of_heads, context):
    params, spec = grouped(layout, 2)
    max_logits = {"attention": 100 * jnp.exp(normal((HEADS,)))}
    expected = clip_qk(params, max_logits, spec)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)

    def place(x):
        along = ("fsdp", "tp", None) if x.shape[0] == WIDTH else ("tp", None)
        return jax.device_put(x, NamedSharding(mesh, P(*along[: x.ndim])))

    params = jax.tree.map(place, params)
    max_logits = jax.device_put(max_logits, NamedSharding(mesh, of_heads))
    clip = jax.jit(lambda p, s: clip_qk(p, s, spec))
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        clipped = clip(params, max_logits)
        program = measure(clip.lower(params, max_logits).compile())
        eager = clip_qk(params, max_logits, spec)
    assert_close(clipped, expected)
    assert_close(eager, expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (clipped, params)), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    assert program.exchanged_bytes < 256  # gammas alone; a device's part of the leaves is 900


MASK = {"attention": {"query": True, "key": True, "value": False}}
WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.identity()),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, "all"),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(tx, MASK),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_max_logits_pass_through_other_transformations(wrapper):
    params, spec = grouped()
    max_logits = {"attention": jnp.array([50.0, 400.0, 1.0, 101.0])}
    wrapped, tx = WRAPPERS[wrapper](qk_clip(spec)), qk_clip(spec)

    @jax.jit
    def step(params, state):
        updates = jax.tree.map(lambda x: 0.1 * x, params)
        updates, state = wrapped.update(updates, state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), state

    state = wrapped.init(params)
    ours, after = step(params, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    updates = jax.tree.map(lambda x: 0.1 * x, params)
    updates, _ = tx.update(updates, tx.init(params), params, max_logits=max_logits)
    expected = optax.apply_updates(params, updates)
    assert_close(ours, expected)
    step(*step(ours, after))
    assert step._cache_size() == 1


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_forgotten_and_misspelt_max_logits_are_errors(wrapper):
    params, spec = grouped()
    tx = WRAPPERS[wrapper](qk_clip(spec))
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"must be given max_logits=.* Pass max_logits=None"):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match=r"by module; got 'max_logit'\. Pass"):
        tx.update(params, state, params, max_logit={"attention": ONES})
    given, _ = tx.update(params, state, params, max_logits=None)
    assert_same_bits(given, params)


def test_inject_hyperparams_changes_the_threshold():
    params, spec = grouped()
    tx = optax.inject_hyperparams(qk_clip, static_args=("specs",))(spec, threshold=100.0)
    state = tx.init(params)
    state.hyperparams["threshold"] = jnp.asarray(25.0)
    max_logits = {"attention": jnp.full(HEADS, 50.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, state, params, max_logits=max_logits)
    expected = clip_qk(params, max_logits, spec, threshold=25.0)
    ours = optax.apply_updates(params, updates)
    assert_close(ours, expected)


def test_muonclip_is_muon_and_then_the_clip():
    params, spec = grouped()
    max_logits = {"attention": jnp.array([50.0, 400.0, 1.0, 101.0])}
    tx = muonclip(0.02, spec, threshold=90.0, alpha=0.3, ns_steps=1, beta=0.9)
    plain = muon_jax.muon(0.02, scale="match_rms_adamw", weight_decay=0.1, ns_steps=1, beta=0.9)
    grads = jax.tree.map(jnp.sin, params)

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, params, state, max_logits=None):
        updates, state = tx.update(grads, state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), state

    expected, _ = step(plain, params, plain.init(params))
    assert_same_bits(step(tx, params, tx.init(params))[0], expected)
    ours, _ = step(tx, params, tx.init(params), max_logits)
    expected = clip_qk(expected, max_logits, spec, threshold=90.0, alpha=0.3)
    assert_close(ours, expected, 1e-4, CLOSE)


# --- Trees of the frameworks -----------------------------------------------------------------


def nnx_tree(heads):
    model = nnx.Dict(
        attention=nnx.MultiHeadAttention(heads, WIDTH, heads * 2, decode=False, rngs=nnx.Rngs(0))
    )
    return nnx.state(model, nnx.Param), {}


def linen_tree(heads):
    attention = linen.MultiHeadDotProductAttention(
        heads,
        qkv_features=heads * 2,
        kernel_init=linen.with_partitioning(linen.initializers.lecun_normal(), (None, "tp", None)),
        name="attention",
    )

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return attention.clone(parent=self)(x)

    return Net().init(jax.random.key(0), X)["params"], {}


def equinox_tree(heads):
    attention = equinox.nn.MultiheadAttention(
        heads, WIDTH, qk_size=2, use_query_bias=True, key=jax.random.key(0)
    )
    names = {"query": "query_proj", "key": "key_proj", "head_axis": 0}
    return equinox.filter({"attention": attention}, equinox.is_inexact_array), names


def torch_tree(heads):
    weight = {f"attention.{name}_proj.weight": normal((heads * 2, WIDTH)) for name in "qk"}
    return weight, {"query": "q_proj", "key": "k_proj", "head_axis": 0}


@pytest.mark.parametrize("tree", [nnx_tree, linen_tree, equinox_tree, torch_tree])
def test_trees_of_every_framework(tree):
    params, names = tree(HEADS)
    spec = GroupedQuery(heads=HEADS, **({"head_axis": -2} | names))
    tx = optax.chain(optax.sgd(0.0), qk_clip(spec, alpha=1.0))
    state = jax.jit(tx.init)(params)
    max_logits = {"attention": jnp.full(HEADS, 400.0)}
    updates, _ = jax.jit(tx.update)(params, state, params, max_logits=max_logits)
    clipped = optax.apply_updates(params, updates)
    assert jax.tree.structure(clipped) == jax.tree.structure(params)

    def quarter_of_queries(path, x):
        return x * (0.25 if "query" in str(path) or "q_proj" in str(path) else 1.0)

    assert_close(clipped, jax.tree_util.tree_map_with_path(quarter_of_queries, params))


def test_max_logits_may_be_nested_as_the_params_are():
    params, spec = grouped()
    params, max_logits = {"blocks": [params, params]}, jnp.array([50.0, 400.0, 1.0, 101.0])
    flat = {f"blocks/{i}/attention": max_logits for i in range(2)}
    nested = {"blocks": [{"attention": max_logits}] * 2}
    boxed = nnx.State({"blocks": {i: {"attention": nnx.Variable(max_logits)} for i in range(2)}})
    expected = clip_qk(params, flat, spec)
    for tree in (nested, boxed):
        assert_same_bits(clip_qk(params, tree, spec), expected)


def test_frozen_leaves_and_two_kinds_of_attention():
    params, spec = grouped()
    other, other_spec = latent()
    params = {"frozen": {"query": None, "key": optax.MaskedNode()}, "other": other} | params
    max_logits = {"attention": jnp.full(HEADS, 400.0), "other": jnp.full(HEADS, 400.0)}
    clipped = clip_qk(params, max_logits, [spec, other_spec])
    assert clipped["frozen"] == params["frozen"]
    expected = clip_qk(other, jnp.full(HEADS, 400.0), other_spec)
    assert_same_bits(clipped["other"], expected)


def test_an_empty_tree_has_nothing_to_match():
    params, spec = grouped()
    tx = optax.chain(optax.adam(0.1), qk_clip(spec))
    state = tx.init(params)
    marked = optax.tree_map_params(tx, lambda _: 1, state, transform_non_params=lambda _: 0)
    assert sum(jax.tree.leaves(marked)) == 2 * len(jax.tree.leaves(params))
