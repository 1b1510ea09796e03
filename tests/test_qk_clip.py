"""QK-clip: logits recomputed after it, every layout of heads, every refusal."""

import contextlib
import dataclasses
import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muon_jax
from experiments.compiled import measure
from experiments.layers import rotate
from muon_jax.variants.attention_specs import GroupedQuery, MultiHeadLatent
from muon_jax.variants.muonclip import muonclip
from muon_jax.variants.qk_clip import clip_qk, qk_clip

WIDTH, HEADS, HEAD_DIM = 12, 4, 6
# Powers and products of a few float32 numbers.
CLOSE = 1e-5


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X = normal((3, 5, WIDTH), 100)


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def attend(q, k):
    """Logits `(batch, heads, positions, positions)` of rotated queries and grouped keys."""
    q, k = (rotate(y, jnp.arange(y.shape[1]), 1e4) for y in (q, k))
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5


def largest(logits):
    return logits.max(axis=(0, 2, 3))


def some_are_over(max_logits):
    """A threshold that half of the heads exceed."""
    return float(jnp.median(max_logits))


# --- Multi-head and grouped queries ----------------------------------------------------------


def merged(kernel, bias):
    return {"kernel": kernel.reshape(WIDTH, -1), "bias": bias.reshape(-1)}


def torch(kernel, bias):
    return {"weight": kernel.reshape(WIDTH, -1).T, "bias": bias.reshape(-1)}


def split(kernel, bias):
    return {"kernel": kernel, "bias": bias}


def heads_first(kernel, bias):
    return {"w": jnp.moveaxis(kernel, 0, 1), "b": bias}


LAYOUTS = {merged: -1, torch: 0, split: -2, heads_first: 0}


def project(x, leaves, layout, heads):
    bias, kernel = (leaves[name] for name in sorted(leaves))
    if layout is torch:
        kernel = kernel.T
    if layout is heads_first:
        kernel = jnp.moveaxis(kernel, 0, 1)
    return jnp.einsum("btd,dnh->btnh", x, kernel.reshape(WIDTH, heads, -1)) + bias.reshape(
        1, 1, heads, -1
    )


def grouped(layout=merged, kv_heads=HEADS):
    """Params of one module, and their spec."""
    drawn = {
        name: layout(normal((WIDTH, n, HEAD_DIM), seed), normal((n, HEAD_DIM), seed + 1))
        for name, n, seed in (("query", HEADS, 1), ("key", kv_heads, 3), ("value", kv_heads, 5))
    }
    spec = GroupedQuery(heads=HEADS, kv_heads=kv_heads, head_axis=LAYOUTS[layout])
    return {"attention": drawn}, spec


def grouped_logits(params, layout=merged, kv_heads=HEADS):
    q = project(X, params["attention"]["query"], layout, HEADS)
    return attend(q, project(X, params["attention"]["key"], layout, kv_heads))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_after_the_clip_are_at_most_the_threshold(layout, kv_heads, alpha):
    params, spec = grouped(layout, kv_heads)
    before = grouped_logits(params, layout, kv_heads)
    threshold = some_are_over(largest(before))
    clipped = clip_qk(
        params, {"attention": largest(before)}, spec, threshold=threshold, alpha=alpha
    )
    after = grouped_logits(clipped, layout, kv_heads)

    gamma = np.minimum(1, threshold / np.asarray(largest(before)))
    of_keys = np.repeat(gamma.reshape(kv_heads, -1).min(1), HEADS // kv_heads)
    factor = gamma**alpha * of_keys ** (1 - alpha)
    np.testing.assert_allclose(after, before * factor[None, :, None, None], rtol=1e-4, atol=CLOSE)
    assert (largest(after) <= threshold * (1 + CLOSE)).all() and (gamma < 1).sum() == 2
    if kv_heads == HEADS:
        np.testing.assert_allclose(largest(after), np.minimum(largest(before), threshold), CLOSE)
    assert_same_bits(clipped["attention"]["value"], params["attention"]["value"])


# --- Multi-head latent attention -------------------------------------------------------------

NOPE, ROPE, VALUE, LATENT = 6, 4, 5, 7


def latent(layout=merged):
    def leaf(columns, fan_in, seed):
        kernel = normal((fan_in, HEADS, columns), seed)
        if layout is torch:
            return {"weight": kernel.reshape(fan_in, -1).T}
        return {"kernel": kernel if layout is split else kernel.reshape(fan_in, -1)}

    params = {
        "q_b": leaf(NOPE + ROPE, WIDTH, 1),
        "kv_a": {"kernel": normal((WIDTH, LATENT + ROPE), 2)},
        "kv_b": leaf(NOPE + VALUE, LATENT, 3),
        "q_a_layernorm": {"scale": jnp.ones(WIDTH)},
        "kv_a_layernorm": {"scale": jnp.ones(LATENT)},
    }
    spec = MultiHeadLatent(
        heads=HEADS,
        query="q_b",
        key="kv_b",
        nope=NOPE,
        rope=ROPE,
        value=VALUE,
        head_axis=LAYOUTS[layout],
    )
    return params, spec


def latent_parts(params, layout=merged):
    """The parts of the logits without and with position, and the values."""

    def heads(x, leaf):
        (kernel,) = leaf.values()
        kernel = kernel.T if layout is torch else kernel
        return jnp.einsum("btd,dnh->btnh", x, kernel.reshape(x.shape[-1], HEADS, -1))

    q = heads(X, params["q_b"])
    shared = X @ params["kv_a"]["kernel"]
    kv = heads(shared[..., :LATENT], params["kv_b"])
    k_rope = jnp.repeat(shared[..., None, LATENT:], HEADS, axis=2)
    nope = jnp.einsum("btnh,bsnh->bnts", q[..., :NOPE], kv[..., :NOPE]) * NOPE**-0.5
    return nope, attend(q[..., NOPE:], k_rope), kv[..., NOPE:]


@pytest.mark.parametrize("alpha", [0.3, 0.5])
@pytest.mark.parametrize("layout", [merged, torch, split])
def test_both_parts_of_latent_logits_scale_by_gamma(layout, alpha):
    params, spec = latent(layout)
    *before, values = latent_parts(params, layout)
    max_logits = largest(sum(before))
    threshold = some_are_over(max_logits)
    clipped = clip_qk(params, max_logits, spec, threshold=threshold, alpha=alpha)
    *after, values_after = latent_parts(clipped, layout)
    gamma = np.minimum(1, threshold / np.asarray(max_logits))[None, :, None, None]
    for one, other in zip(after, before, strict=True):
        np.testing.assert_allclose(one, gamma * other, rtol=1e-4, atol=CLOSE)
    assert (largest(sum(after)) <= threshold * (1 + CLOSE)).all()
    np.testing.assert_array_equal(values_after, values)
    assert_same_bits(clipped["kv_a"], params["kv_a"])


# --- Norms of queries and keys ---------------------------------------------------------------


def normed_logits(params):
    """Like Qwen3: RMS norm of each head, then rotation."""

    def norm(y, gains):
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True))
        return y * gains["scale"].reshape(1, 1, 1, -1)

    q = norm(project(X, params["query"], merged, HEADS), params["q_norm"])
    return attend(q, norm(project(X, params["key"], merged, 2), params["k_norm"]))


def normed():
    params, _ = grouped(kv_heads=2)
    gains = {f"{name}_norm": {"scale": 3 * normal((HEAD_DIM,), ord(name))} for name in "qk"}
    return params["attention"] | gains


def test_a_norm_after_the_projections_is_refused_with_the_reason():
    params, spec = normed(), GroupedQuery(heads=HEADS, kv_heads=2)
    reason = r"\(q_norm, k_norm\), which cancels any .* qk_norm=\('q_norm', 'k_norm'\)"
    with pytest.raises(ValueError, match=reason):
        qk_clip(spec).init(params)
    with pytest.raises(ValueError, match=reason):
        clip_qk(params, jnp.ones(HEADS), spec)

    before = normed_logits(params)
    ignoring = dataclasses.replace(spec, qk_norm="ignore")
    after = normed_logits(clip_qk(params, largest(before), ignoring, threshold=1.0))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=CLOSE)  # hence the refusal


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_gains_take_the_smallest_factor_of_the_heads(alpha):
    params = normed()
    spec = GroupedQuery(heads=HEADS, kv_heads=2, qk_norm=("q_norm", "k_norm"))
    before = normed_logits(params)
    threshold = 0.7 * float(largest(before).max())
    clipped = clip_qk(params, largest(before), spec, threshold=threshold, alpha=alpha)
    np.testing.assert_allclose(normed_logits(clipped), 0.7 * before, rtol=1e-4, atol=CLOSE)
    np.testing.assert_allclose(
        clipped["q_norm"]["scale"], 0.7**alpha * params["q_norm"]["scale"], CLOSE
    )
    assert_same_bits(clipped["query"], params["query"])


@pytest.mark.parametrize(
    "norm",
    ["q_norm/scale", "query_ln/scale", "k_layernorm/weight", "QNorm_0/scale", "query/norm/scale"]
    + ["norm_k/weight", "key_rms/g", "qk_norm/scale", "layers/qnorm"],
)
def test_norms_are_known_by_many_names(norm):
    params = {"query/kernel": jnp.ones((4, 8)), "key/kernel": jnp.ones((4, 8))}
    spec = GroupedQuery(heads=2, query="query/kernel", key="key/kernel")
    with pytest.raises(ValueError, match="cancels any scale"):
        qk_clip(spec).init(params | {norm: jnp.ones(4)})


@pytest.mark.parametrize("other", ["norm/scale", "kv_norm/scale", "query/bias", "input_norm/scale"])
def test_other_leaves_are_no_norm_of_queries(other):
    params = {"query/kernel": jnp.ones((4, 8)), "key/kernel": jnp.ones((4, 8))}
    qk_clip(GroupedQuery(heads=2)).init(params | {other: jnp.ones(8)})


# --- What is left alone ----------------------------------------------------------------------


def test_max_logits_of_none_leave_the_updates_as_they_are():
    params, spec = grouped()
    tx, updates = qk_clip(spec), jax.tree.map(lambda x: -x, params)
    given, state = tx.update(updates, tx.init(params), params, max_logits=None)
    assert given is updates and state == optax.EmptyState()


def test_no_threshold_of_infinity_clips():
    params, spec = grouped()
    max_logits = {"attention": jnp.array([1e30, jnp.inf, jnp.nan, 5.0])}
    clip = jax.jit(lambda threshold: clip_qk(params, max_logits, spec, threshold=threshold))
    for clipped in (clip_qk(params, max_logits, spec, threshold=jnp.inf), clip(jnp.inf)):
        assert_same_bits(clipped, params)


@pytest.mark.parametrize("value", [0.0, -7.0, np.nan, np.inf, -np.inf, 30.0])
def test_only_finite_logits_above_the_threshold_clip(value):
    params, spec = grouped(kv_heads=2)
    updates = jax.tree.map(lambda x: 0.1 * x, params)
    tx = qk_clip(spec, threshold=30.0)
    max_logits = {"attention": jnp.full(HEADS, value).at[0].set(60.0)}
    given, _ = jax.jit(tx.update)(updates, tx.init(params), params, max_logits=max_logits)
    clipped = clip_qk(params, max_logits, spec, threshold=30.0)
    for ours, theirs in ((given, updates), (clipped, params)):
        ours, theirs = ours["attention"], theirs["attention"]
        assert_same_bits(ours["value"], theirs["value"])
        for name in ("query", "key"):
            other_heads = [
                jax.tree.map(lambda x: x[..., HEAD_DIM:], y[name]) for y in (ours, theirs)
            ]
            assert_same_bits(*other_heads)
            first, before = (y[name]["kernel"][:, :HEAD_DIM] for y in (ours, theirs))
            assert np.isfinite(first).all() and (first != before).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_params_are_scaled_in_float32_and_rounded_once(dtype):
    params, spec = grouped(kv_heads=2)
    max_logits = {"attention": jnp.array([500.0, 80.0, 150.0, 1e6])}
    low = jax.tree.map(lambda x: x.astype(dtype), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    clipped = clip_qk(wide, max_logits, spec, alpha=0.4)
    expected = jax.tree.map(lambda x: x.astype(dtype), clipped)
    jax.tree.map(assert_same_bits, clip_qk(low, max_logits, spec, alpha=0.4), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_transformation_is_the_function(dtype):
    params, spec = grouped(kv_heads=2)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    updates = jax.tree.map(lambda x: (0.1 * x[::-1]).astype(dtype), params)
    max_logits = {"attention": jnp.array([500.0, 80.0, 150.0, 1e6])}
    tx = qk_clip(spec, alpha=0.4)
    given, _ = tx.update(updates, tx.init(params), params, max_logits=max_logits)
    ours = optax.apply_updates(params, given)
    theirs = clip_qk(optax.apply_updates(params, updates), max_logits, spec, alpha=0.4)
    # The update is rounded to its dtype once more, beside params that may be 100 times as large.
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * 4)


# --- Stacks, meshes, transformations ---------------------------------------------------------


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stacked_layers_are_clipped_one_by_one(layout):
    params, spec = grouped(layout, 2)
    layers = [jax.tree.map(lambda x, i=i: x * (i + 1), params) for i in range(3)]
    max_logits = 100 * jnp.exp(normal((3, HEADS)))
    ours = clip_qk(stacked(layers), {"attention": max_logits}, spec)
    one_by_one = [
        clip_qk(layer, {"attention": s}, spec) for layer, s in zip(layers, max_logits, strict=True)
    ]
    np.testing.assert_allclose(*map(ravel, (ours, stacked(one_by_one))), rtol=CLOSE)
    mapped = jax.vmap(lambda p, s: clip_qk(p, {"attention": s}, spec))(stacked(layers), max_logits)
    np.testing.assert_allclose(*map(ravel, (mapped, ours)), rtol=CLOSE)
    _, scanned = jax.lax.scan(
        lambda _, x: (None, clip_qk(x[0], {"attention": x[1]}, spec)),
        None,
        (stacked(layers), max_logits),
    )
    np.testing.assert_allclose(*map(ravel, (scanned, ours)), rtol=CLOSE)


def ravel(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_stacked_latent_attention_and_gains():
    params, spec = latent(split)
    max_logits = 100 * jnp.exp(normal((2, HEADS)))
    ours = clip_qk(stacked([params] * 2), max_logits, spec)
    one_by_one = stacked([clip_qk(params, s, spec) for s in max_logits])
    np.testing.assert_allclose(*map(ravel, (ours, one_by_one)), rtol=CLOSE)

    spec = GroupedQuery(heads=HEADS, qk_norm=("q_norm", "k_norm"))
    ours = clip_qk(stacked([normed()] * 2), max_logits, spec)
    one_by_one = stacked([clip_qk(normed(), s, spec) for s in max_logits])
    np.testing.assert_allclose(*map(ravel, (ours, one_by_one)), rtol=CLOSE)
    with pytest.raises(ValueError, match=r"'q_norm/scale' has the shape \(2, 6\) in each layer"):
        clip_qk(stacked([normed()] * 2), max_logits[0], spec)


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("of_heads", [P(), P("tp")])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", [merged, split])
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
    np.testing.assert_allclose(*map(ravel, (clipped, expected)), rtol=CLOSE)
    np.testing.assert_allclose(*map(ravel, (eager, expected)), rtol=CLOSE)
    for ours, theirs in zip(*map(jax.tree.leaves, (clipped, params)), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    assert program.exchanged_bytes < 256  # gammas alone; a device's part of the leaves is 900


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.identity()),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, "all"),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(
        tx, {"attention": {"query": True, "key": True, "value": False}}
    ),
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
    np.testing.assert_allclose(*map(ravel, (ours, expected)), rtol=CLOSE)
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
    np.testing.assert_array_equal(*map(ravel, (given, params)))


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
    np.testing.assert_allclose(*map(ravel, (ours, expected)), rtol=CLOSE)


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
    np.testing.assert_allclose(*map(ravel, (ours, expected)), rtol=1e-4, atol=CLOSE)


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
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(clipped), jax.tree.leaves(params), strict=True
    ):
        scaled = "query" in str(path) or "q_proj" in str(path)
        np.testing.assert_allclose(ours, theirs * (0.25 if scaled else 1.0), rtol=CLOSE)


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


# --- Errors ----------------------------------------------------------------------------------

ONES = jnp.ones(HEADS)


@pytest.mark.parametrize(
    ("changes", "max_logits", "message"),
    [
        ({"query": "q_proj"}, {"attention": ONES}, "none has all of 'key', 'q_proj'. The leaves"),
        ({}, {"attn": ONES}, "has 'attn', where no spec .* those of the modules: 'attention'"),
        ({}, {}, "has no entry for 'attention', only for . Pass an entry"),
        ({"heads": 8}, {"attention": ONES}, r"\(8,\), or \(layers, 8\).* the shape \(4,\)"),
        (
            {"heads": 5, "kv_heads": 5},
            {"attention": jnp.ones(5)},
            r"\(24,\) in each layer, but head_axis=-1",
        ),
        ({"head_axis": 2}, {"attention": ONES}, r"head_axis=2 must have the size 4, .* 3 axes"),
        (
            {},
            {"attention": jnp.ones((2, 4))},
            r"got \(2,\) for 'attention/query/bias' of shape \(24,\)",
        ),
        ({"kv_heads": 2}, {"attention": ONES}, "have heads of one size.*: 6.*: 12"),
        ({"query": "key"}, {"attention": ONES}, "'attention/key/bias' would be scaled twice"),
    ],
)
def test_what_does_not_fit_is_refused(changes, max_logits, message):
    params, spec = grouped()
    with pytest.raises(ValueError, match=message):
        clip_qk(params, max_logits, dataclasses.replace(spec, **changes))


def test_a_stack_without_stacked_max_logits_is_refused():
    for layout in LAYOUTS:
        params, spec = grouped(layout)
        with pytest.raises(ValueError, match=r"pass max_logits of shape \(layers, heads\)"):
            clip_qk(stacked([params] * 3), {"attention": ONES}, spec)


def test_latent_columns_that_do_not_fit_are_refused():
    params, spec = latent()
    with pytest.raises(ValueError, match=r"'q_b/kernel' has the shape \(12, 40\).* 4 × 11"):
        clip_qk(params, ONES, dataclasses.replace(spec, rope=5))
    with pytest.raises(ValueError, match=r"'kv_b/kernel' has the shape \(7, 44\).* 4 × 12"):
        clip_qk(params, ONES, dataclasses.replace(spec, value=6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroupedQuery(heads=4, kv_heads=3), "kv_heads must divide heads.*kv_heads=3"),
        (lambda: GroupedQuery(heads=0), "heads must be an integer of at least 1; got 0"),
        (lambda: GroupedQuery(heads=4, kv_heads=0), "kv_heads must be an integer .*; got 0"),
        (lambda: GroupedQuery(heads="4"), "heads must be an integer of at least 1; got '4'"),
        (lambda: GroupedQuery(heads=4, query=0), "query must be the name of a leaf.*; got 0"),
        (lambda: GroupedQuery(heads=4, head_axis=1.0), "head_axis must be an integer.*; got 1.0"),
        (lambda: GroupedQuery(heads=4, qk_norm="no"), "'no'"),
        (
            lambda: MultiHeadLatent(heads=4, query="q", key="k", nope=-1, rope=4, value=8),
            "nope must be an integer of at least 0; got -1",
        ),
        (lambda: qk_clip(GroupedQuery(heads=4), threshold=0.0), "greater than 0; got 0.0"),
        (lambda: qk_clip(GroupedQuery(heads=4), threshold=np.nan), "greater than 0; got nan"),
        (lambda: qk_clip(GroupedQuery(heads=4), threshold=None), "a number; got None"),
        (lambda: qk_clip(GroupedQuery(heads=4), alpha=1.5), "at least 0 and at most 1; got 1.5"),
        (lambda: qk_clip([]), r"specs must be GroupedQuery\(.*; got \[\]"),
        (lambda: qk_clip("attention"), "specs must be .*; got 'attention'"),
        (lambda: muonclip(0.1, ["query", "key"]), "specs must be .*; got .'query', 'key'"),
        (lambda: qk_clip(GroupedQuery(heads=4)).update({}, None, max_logits={}), "the params"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
