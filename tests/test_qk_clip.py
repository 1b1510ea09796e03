"""QK-clip: logits recomputed after it, every layout of heads, every refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_heads import (
    CLOSE,
    HEAD_DIM,
    HEADS,
    LAYOUTS,
    ONES,
    assert_close,
    assert_same_bits,
    grouped,
    grouped_logits,
    largest,
    latent,
    latent_parts,
    normed,
    normed_logits,
    some_are_over,
    stacked,
)

from muon_jax import GroupedQuery, MultiHeadLatent, clip_qk, muonclip, qk_clip


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
    assert_close(after, before * factor[None, :, None, None], 1e-4, CLOSE)
    assert (largest(after) <= threshold * (1 + CLOSE)).all() and (gamma < 1).sum() == 2
    if kv_heads == HEADS:
        np.testing.assert_allclose(largest(after), np.minimum(largest(before), threshold), CLOSE)
    assert_same_bits(clipped["attention"]["value"], params["attention"]["value"])


@pytest.mark.parametrize("alpha", [0.3, 0.5])
@pytest.mark.parametrize("layout", ["merged", "torch", "split"])
def test_both_parts_of_latent_logits_scale_by_gamma(layout, alpha):
    params, spec = latent(layout)
    *before, values = latent_parts(params, layout)
    max_logits = largest(sum(before))
    threshold = some_are_over(max_logits)
    clipped = clip_qk(params, max_logits, spec, threshold=threshold, alpha=alpha)
    *after, values_after = latent_parts(clipped, layout)
    gamma = np.minimum(1, threshold / np.asarray(max_logits))[None, :, None, None]
    assert_close(after, [gamma * x for x in before], 1e-4, CLOSE)
    assert (largest(sum(after)) <= threshold * (1 + CLOSE)).all()
    np.testing.assert_array_equal(values_after, values)
    assert_same_bits(clipped["kv_a"], params["kv_a"])


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
    assert_close(after, before, 1e-4, CLOSE)  # hence the refusal


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_gains_take_the_smallest_factor_of_the_heads(alpha):
    params = normed()
    spec = GroupedQuery(heads=HEADS, kv_heads=2, qk_norm=("q_norm", "k_norm"))
    before = normed_logits(params)
    threshold = 0.7 * float(largest(before).max())
    clipped = clip_qk(params, largest(before), spec, threshold=threshold, alpha=alpha)
    assert_close(normed_logits(clipped), 0.7 * before, 1e-4, CLOSE)
    assert_close(clipped["q_norm"]["scale"], 0.7**alpha * params["q_norm"]["scale"])
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
    assert {x.dtype for x in jax.tree.leaves((ours, theirs))} == {jnp.dtype(dtype)}
    ours, theirs = jax.tree.map(np.float64, (ours, theirs))
    assert_close(ours, theirs, rtol=0, atol=16 * float(jnp.finfo(dtype).eps))


# --- Errors ----------------------------------------------------------------------------------


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
