"""The largest attention logits by blocks, by bounds, on a mesh, and in the studies' model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.compiled import measure
from experiments.grok import prefixes, tasks
from experiments.grok.model import Transformer
from muon_jax.variants.attention_specs import GroupedQuery
from muon_jax.variants.max_logits import max_attention_logits
from muon_jax.variants.qk_clip import qk_clip

# Sums of eight float32 products in another order.
CLOSE = 1e-5


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dense(query, key, scale=None, is_causal=False, mask=None):
    """The same in float64, with all logits at once."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = np.einsum("btnh,bsnh->bnts", query, key)
    logits *= query.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        logits[..., ~np.tri(*logits.shape[2:], dtype=bool)] = -np.inf
    if mask is not None:
        logits[~np.broadcast_to(mask, logits.shape)] = -np.inf
    return logits.max(axis=(0, 2, 3))


def dense_logits(query, key):
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5


def queries_and_keys(kv_heads=2, keys=37, dtype=jnp.float32):
    """Later keys are longer, so that a position seen too early is the largest."""
    growing = jnp.linspace(1, 5, keys)[None, :, None, None]
    return normal((3, 37, 4, 8), 1, dtype), (growing * normal((3, keys, kv_heads, 8), 2)).astype(
        dtype
    )


MASK = np.random.default_rng(5).random((3, 4, 37, 37)) < 0.3


@pytest.mark.parametrize("block_size", [1, 8, 37, 128])
@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"scale": -2.0}, {"mask": MASK}]
    + [{"mask": MASK[:1, :1, :1], "is_causal": True}, {"mask": MASK[:, :1], "scale": 0.1}],
)
def test_the_largest_logits_by_blocks_are_those_of_all(settings, block_size):
    query, key = queries_and_keys()
    ours = max_attention_logits(query, key, block_size=block_size, **settings)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, dense(query, key, **settings), rtol=CLOSE)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_products_are_summed_in_float32(kv_heads, dtype):
    query, key = queries_and_keys(kv_heads=kv_heads, keys=20, dtype=dtype)
    ours = max_attention_logits(query, key, is_causal=True, block_size=16)
    np.testing.assert_allclose(ours, dense(query, key, is_causal=True), rtol=CLOSE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("with_logsumexp", [True, False])
@pytest.mark.parametrize("level", [0.2, 0.8, 0.999, 1.001, 1.5, 10.0])
def test_above_the_threshold_exact_and_below_a_bound(level, with_logsumexp, dtype):
    query, key = queries_and_keys(dtype=dtype)
    query *= jnp.arange(1, 5, dtype=dtype)[None, None, :, None]
    exact = dense(query, key, is_causal=True)
    threshold = level * float(np.median(exact))
    logsumexp = None
    if with_logsumexp:
        value = jnp.zeros_like(key)
        _, logsumexp = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, return_residual=True
        )
    ours = max_attention_logits(
        query, key, is_causal=True, logsumexp=logsumexp, threshold=threshold, block_size=16
    )
    assert (ours >= exact * (1 - CLOSE)).all()
    over = np.asarray(ours) > threshold
    np.testing.assert_array_equal(over, exact > threshold)
    np.testing.assert_allclose(ours[over], exact[over], rtol=CLOSE)


def test_a_log_sum_exp_that_was_rounded_down_is_still_a_bound():
    query, key = jnp.full((1, 1, 1, 1), 100.2), jnp.ones((1, 1, 1, 1))
    logsumexp = query[..., 0].astype(jnp.bfloat16)
    assert logsumexp == 100.0
    ours = max_attention_logits(query, key, logsumexp=logsumexp, threshold=100.1)
    np.testing.assert_allclose(ours, 100.2, rtol=CLOSE)


def test_blocks_below_the_threshold_are_not_computed():
    """Nothing but a bound comes back from them, so one NaN among their keys is not seen."""
    query, key = queries_and_keys()
    logsumexp = jnp.full(query.shape[:3], 5.0).at[:, 20].set(50.0)
    find = functools.partial(max_attention_logits, logsumexp=logsumexp, block_size=8)
    np.testing.assert_allclose(find(query, key * jnp.nan, threshold=60.0), 50.0, rtol=CLOSE)
    ours = find(query, key, threshold=40.0)
    np.testing.assert_allclose(ours, np.maximum(5.0, dense(query[:, 16:24], key)), rtol=CLOSE)
    jaxpr = str(jax.make_jaxpr(lambda q, k: find(q, k, threshold=40.0))(query, key))
    assert "dot_general" in jaxpr.split("cond[")[1] and "dot_general" not in jaxpr.split("cond[")[0]


def test_no_array_holds_all_logits_and_no_gradient_flows():
    query, key = normal((1, 1024, 2, 8)), normal((1, 1024, 2, 8), 1)
    find = jax.jit(functools.partial(max_attention_logits, is_causal=True, block_size=64))
    program = measure(find.lower(query, key).compile())
    assert program.temp_bytes < 3 * (2 * 64 * 1024 * 4)  # of 8 MiB
    assert program.flops == 2 * 2 * 1024 * 1024 * 8  # one product
    gradient = jax.grad(lambda q: max_attention_logits(q, key, threshold=1.0).sum())(query)
    assert not gradient.any()


def test_a_head_that_sees_nothing_never_clips():
    query, key = queries_and_keys()
    mask = jnp.ones((1, 4, 1, 1), bool).at[:, 1].set(False)
    ours = max_attention_logits(query, key, mask=mask)
    assert ours[1] == -jnp.inf and np.isfinite(np.delete(ours, 1)).all()
    assert max_attention_logits(query, key, mask=mask, threshold=0.1)[1] == -jnp.inf


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("threshold", [0.1, 1e3])
def test_a_log_sum_exp_of_nothing_is_minus_infinity(threshold, dtype):
    """Of a whole head, and of padded positions."""
    query, key = queries_and_keys()
    mask = jnp.ones((1, 4, 37, 1), bool).at[:, 1].set(False).at[:, :, 30:].set(False)
    logits = jnp.where(mask, dense_logits(query, key), -jnp.inf)
    logsumexp = jnp.moveaxis(jax.nn.logsumexp(logits, axis=-1), 1, 2).astype(dtype)
    assert not jnp.isfinite(logsumexp[:, 30:]).any()
    ours = max_attention_logits(
        query, key, mask=mask, logsumexp=logsumexp, threshold=threshold, block_size=8
    )
    exact = dense(query, key, mask=mask)
    assert ours[1] == -jnp.inf and not jnp.isnan(ours).any()
    assert (ours >= exact).all() and (threshold < 1) == bool((ours[2:] > threshold).all())


def test_a_nan_stays_in_its_own_head():
    query, key = queries_and_keys()
    hurt = query.at[0, 0, 2].set(jnp.nan)
    for settings in ({}, {"threshold": 1.0}, {"threshold": 1e3}):
        find = functools.partial(max_attention_logits, block_size=16, **settings)
        ours, expected = (np.delete(find(q, key), 2) for q in (hurt, query))
        np.testing.assert_allclose(ours, expected, rtol=CLOSE)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("settings", [{}, {"threshold": 1.0}], ids=["exact", "threshold"])
def test_largest_logits_on_a_mesh(kind, settings):
    query, key = normal((8, 37, 4, 8), 1), normal((8, 37, 2, 8), 2)
    mesh = jax.make_mesh((4, 2), ("data", "tp"), axis_types=(kind,) * 2)
    spec = P("data", None, "tp")
    placed = jax.device_put((query, key), NamedSharding(mesh, spec))
    find = functools.partial(max_attention_logits, is_causal=True, block_size=16, **settings)
    expected = dense(query, key, is_causal=True)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(find)(*placed), expected, rtol=CLOSE)
    mapped = jax.shard_map(
        lambda q, k: jax.lax.pmax(find(q, k), "data"),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=P("tp"),
    )
    np.testing.assert_allclose(jax.jit(mapped)(*placed), expected, rtol=CLOSE)


@pytest.mark.parametrize(
    ("query", "key", "settings", "message"),
    [
        ((5, 4, 8), (5, 4, 8), {}, r"query must be \(B, T, N, H\)"),
        ((2, 5, 4, 8), (3, 5, 4, 8), {}, "must have the same B and H"),
        ((2, 5, 4, 8), (2, 5, 3, 8), {}, "query heads must be a multiple of K"),
        ((2, 5, 4, 8), (2, 6, 4, 8), {"mask": jnp.ones((5, 6), bool)}, r"\(2, 4, 5, 6\); got"),
        ((2, 5, 4, 8), (2, 6, 4, 8), {"logsumexp": jnp.ones((2, 4, 5))}, r"\(2, 5, 4\); got"),
        ((2, 5, 4, 8), (2, 6, 4, 8), {"block_size": 0}, "block_size must .* at least 1; got 0"),
        ((2, 5, 4, 8), (2, 6, 4, 8), {"threshold": np.nan}, "threshold must .*; got nan"),
        ((2, 5, 4, 8), (2, 6, 4, 8), {"scale": np.inf}, "scale must .*; got inf"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(query, key, settings, message):
    with pytest.raises(ValueError, match=message):
        max_attention_logits(jnp.ones(query), jnp.ones(key), **settings)


# --- In the studies' model -------------------------------------------------------------------


def grok(task, layers, dropout=0.0):
    table = tasks.table(task)
    model = Transformer(
        table.vocabulary, width=32, layers=layers, heads=2, dropout=dropout, rngs=nnx.Rngs(3)
    )
    return table, *nnx.split(model, nnx.Param)


@pytest.mark.parametrize(
    ("task", "layers", "batch"), [("mul", 2, 128), ("mul", 1, 64), ("parity", 2, 64)]
)
def test_shared_prefixes_have_the_largest_logits_of_their_rows(task, layers, batch):
    """Also where the tree has prefixes that no row of the batch has."""
    table, graph, params = grok(task, layers)
    tree, tokens = prefixes.PrefixTree.of(table, batch), jnp.asarray(table.tokens)

    @jax.jit
    def both(rows):
        model = nnx.merge(graph, params)
        return (
            model(tokens[rows], return_max_logits=True),
            prefixes.logits(model, tree, tokens, rows, return_max_logits=True),
        )

    found = []
    for rows in np.random.default_rng(0).integers(len(tokens), size=(4, batch)):
        for some in (rows, rows % (len(tokens) // 20)):
            (plain, expected), (logits, ours) = both(some)
            assert (
                ours.keys() == expected.keys() == {f"blocks/{i}/attention" for i in range(layers)}
            )
            ours, expected = (np.concatenate([*x.values()]) for x in (ours, expected))
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=CLOSE)
            np.testing.assert_allclose(logits, plain, rtol=0, atol=1e-4)
            found.append(ours)
    assert len(np.unique(np.round(found, 4), axis=0)) > 4  # the rows matter


def test_the_studies_model_is_clipped_to_the_threshold():
    """With no learning rate, one layer's logits are exactly what the clip makes of them."""
    table, graph, params = grok("mul", 1, dropout=0.1)
    tokens, spec = jnp.asarray(table.tokens[:200]), GroupedQuery(heads=2)

    def mean_and_max_logits(params):
        rngs = nnx.Rngs(dropout=0)
        model = nnx.merge(graph, params)
        logits, found = model(tokens, dropout_rngs=rngs, return_max_logits=True)
        return logits.mean(), found

    graded = jax.jit(jax.value_and_grad(mean_and_max_logits, has_aux=True))
    (_, before), grads = graded(params)
    threshold = float(before["blocks/0/attention"].min()) / 2
    tx = optax.chain(optax.sgd(0.0), qk_clip(spec, threshold=threshold))
    updates, _ = tx.update(grads, tx.init(params), params, max_logits=before)
    (_, after), _ = graded(optax.apply_updates(params, updates))
    np.testing.assert_allclose(after["blocks/0/attention"], threshold, rtol=1e-4)
