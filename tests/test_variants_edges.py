"""Zeros, NaN, huge and tiny gradients, half precision, empty leaves, null directions."""

import fractions
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_variants
from trajectories import normal, relative_error, updates_of
from variants import SCALE_BY

from muon_jax import (
    Ball,
    TruncatedPolar,
    adamuon,
    dion,
    evaluation_average,
    gluon,
    low_rank,
    muonbp,
    normuon,
    polar_factor,
    scale_by_adamuon,
    scale_by_dion,
    scale_by_lmo,
    scale_by_muonbp,
    scale_by_normuon,
    scale_by_splus,
    scion,
    splus,
)
from muon_jax.variants.low_rank import rank_of

every_variant = pytest.mark.parametrize("name", SCALE_BY)

TREE = {"stack": (4, 12, 20), "tall": (24, 8)}


def identity(x):
    return x


def draw(seed, factor=1.0, dtype=jnp.float32):
    tree = normal(TREE, seed)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) * jnp.asarray(factor, dtype), tree)


def draws(*args):
    return [draw(seed, *args) for seed in (1, 2, 3)]


@functools.cache
def made(name):
    """One transformation for many tests, so that a step is traced once."""
    return SCALE_BY[name]()


@functools.cache
def found_in(name):
    """The updates of ordinary gradients."""
    return updates_of(made(name), draws())[0]


def assert_finite(tree):
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


@every_variant
def test_zero_gradients_give_zero_updates_and_the_next_ones_do_not(name):
    (*zeros, last), state = updates_of(made(name), [*draws(0.0), draw(1)])
    assert not any(np.any(u) for u in jax.tree.leaves(zeros))
    assert all(np.all(np.any(u, axis=(-2, -1))) for u in last.values())
    assert_finite((last, state))


@every_variant
def test_a_matrix_touches_no_other(name):
    hurt = draws()
    for g in hurt:
        g["stack"] = g["stack"].at[0].set(0).at[2, 1, 3].set(jnp.nan).at[3, 4, 5].set(jnp.inf)
    found, _ = updates_of(made(name), hurt)
    for ours, theirs in zip(found, found_in(name), strict=True):
        assert not np.any(ours["stack"][0]) and np.any(np.isnan(ours["stack"][2]))
        np.testing.assert_allclose(ours["stack"][1], theirs["stack"][1], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(ours["tall"], theirs["tall"])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in SCALE_BY]
    + [(name, jnp.float16) for name in ("normuon", "adamuon", "dion", "splus", "scion", "gluon")],
)
def test_after_any_gradient_the_next_ones_move_the_params(name, dtype):
    tx, info = made(name), jnp.finfo(dtype)
    step, ordinary = jax.jit(tx.update), draw(1, 1.0, dtype)
    largest = jax.tree.map(lambda x: jnp.sign(x) * info.max, ordinary)
    smallest = jax.tree.map(lambda x: jnp.sign(x) * info.tiny, ordinary)
    for extreme in (largest, smallest):
        state, found = tx.init(ordinary), []
        for g in [extreme] * 3 + [ordinary] * 2:
            updates, state = step(g, state)
            found.append(updates)
        assert_finite((found, state))
        assert all(np.all(np.any(u, axis=(-2, -1))) for u in jax.tree.leaves(found[-1]))
        if extreme is largest:
            assert all(np.all(np.any(u, axis=(-2, -1))) for u in jax.tree.leaves(found[0]))


# Gluon's steps and PolarGrad's do depend on it, and squares are what SPlus has to keep.
SIZES = {"splus": 1e15, "eigenbasis": 1e15}


@pytest.mark.parametrize("name", [n for n in SCALE_BY if n not in ("gluon", "nuclear_scale")])
@pytest.mark.parametrize("power", [1, -1], ids=["huge", "tiny"])
def test_the_size_of_the_gradient_does_not_matter(name, power):
    found, state = updates_of(made(name), draws(SIZES.get(name, 1e30) ** power))
    assert relative_error(found, found_in(name)) < 1e-5
    assert_finite(state)


@pytest.mark.parametrize(
    ("size", "l0", "steps"),
    # The norm is some 40 of the size.
    [(5e37, 0.5, (0.5, 0.5)), (1e30, 0.5, (0.5, 0.5)), (1e-30, 0.5, (1e-30, 1e-27))]
    + [(5e37, 0.0, (0.5, 0.5)), (1e-35, 0.0, (0.5, 0.5)), (1e-35, 1e-34, (0.1, 0.4))],
)
def test_the_size_of_the_gradient_leaves_gluon_whole(size, l0, steps):
    """L1 says how far at most, and the norm over L0 how far from small gradients."""
    exact = {"orthogonalizer": polar_factor}
    found, _ = updates_of(scale_by_lmo(smoothness=(l0, 2.0), **exact), draws(size))
    scion, _ = updates_of(scale_by_lmo(Ball("spectral", 1.0), **exact), draws())
    for ours, theirs in zip(found, scion, strict=True):
        step = np.divide(*(np.linalg.norm(np.float64(u["tall"])) for u in (ours, theirs)))
        assert steps[0] * (1 - 1e-5) <= step <= steps[1] * (1 + 1e-5)


# In units of the dtype's rounding. Measured: up to 14, and 30 where signs of small numbers turn.
HALF = {"adamuon": 64}


@every_variant
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype_and_nearly_its_update(name, dtype):
    grads = draws(1.0, dtype)
    found, state = updates_of(made(name), grads)
    assert {u.dtype for u in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    others = jax.tree.leaves(state._replace(count=(), mu=()))
    assert {x.dtype for x in others} <= {jnp.dtype(jnp.float32)}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    error = relative_error(found, updates_of(made(name), exact)[0])
    assert error < HALF.get(name, 32) * float(jnp.finfo(dtype).eps)


ONE_LEAF = {"w": jnp.asarray(normal({"w": (8, 16)}, 3)["w"], jnp.bfloat16)}


@pytest.mark.parametrize(
    "tx",
    [
        scale_by_lmo(Ball(identity, 0.99), alpha=1.0),
        scale_by_muonbp(
            period=2, blocks=(1, 2), block_ratio=0.99, beta=0.0, scale=None, orthogonalizer=identity
        ),
    ],
)
def test_numbers_act_in_float32(tx):
    """In bfloat16 0.99 is 0.988."""
    found, _ = updates_of(tx, [ONE_LEAF] * 2)
    exact = (0.99 * np.float32(ONE_LEAF["w"])).astype(jnp.bfloat16)
    assert np.mean(exact != 0.99 * ONE_LEAF["w"]) > 0.1
    np.testing.assert_array_equal(found[-1]["w"], exact)


def test_an_average_is_of_the_params_as_they_are_rounded():
    tx = optax.chain(optax.scale(-0.0123), evaluation_average(0.0))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    params, (_, average) = step(ONE_LEAF, tx.init(ONE_LEAF))
    np.testing.assert_array_equal(average.mean["w"], np.float32(params["w"]))


# --- Dtypes, traced numbers, arguments -------------------------------------------------------

NUMBERS = {
    "normuon": lambda n: scale_by_normuon(beta2=n(0.9), eps=n(1e-9)),
    "adamuon": lambda n: scale_by_adamuon(beta2=n(0.9), eps=n(1e-9)),
    "muonbp": lambda n: scale_by_muonbp(period=2, blocks=(1, 2), block_ratio=n(0.5)),
    "dion": lambda n: scale_by_dion(rank=2, beta=n(0.9), eps=n(1e-9)),
    "splus": lambda n: scale_by_splus(b1=n(0.9), b2=n(0.9), every=2),
    "scion": lambda n: scale_by_lmo(alpha=n(0.2)),
    "gluon": lambda n: scale_by_lmo(alpha=n(0.2), smoothness=(1.0, 2.0)),
    "average": lambda n: evaluation_average(n(0.9)),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_no_dtype_changes(name, dtype):
    """Numbers of Python's, arrays of float64, and traced ones."""
    with jax.enable_x64(True):
        params = {"w": jnp.ones((3, 8, 16), dtype)}

        def step(tx, params):
            state = tx.init(params)
            return state, *tx.update(params, state, params)

        for number in (float, jnp.float64):
            tx = NUMBERS[name](number)
            state, updates, after = jax.eval_shape(lambda p, tx=tx: step(tx, p), params)
            assert updates["w"].dtype == dtype
            assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, after)
        jax.eval_shape(lambda one: step(NUMBERS[name](lambda x: x * one), params), jnp.ones(()))


def make(factory, **settings):
    return lambda: factory(**settings)


HOW_FAR = {"learning_rate": 0.1}
BAD = [
    (make(dion, **HOW_FAR, rank=0), "rank must be an integer of at least 1, or .*; got 0"),
    (make(dion, **HOW_FAR, rank=1.5), "rank must be .*; got 1.5"),
    (make(dion, **HOW_FAR, rank=True), "rank must be a number; got True"),
    (make(dion, **HOW_FAR, rank="half"), "rank must be a number; got 'half'"),
    (make(dion, **HOW_FAR, rank=jnp.ones(())), "rank must be a static Python value"),
    (make(dion, **HOW_FAR, beta=1.5), "beta must be at least 0 and at most 1; got 1.5"),
    (make(dion, **HOW_FAR, eps=-1e-8), "eps must be at least 0; got -1e-08"),
    (make(dion, **HOW_FAR, seed=0.5), "seed must be an integer of at least 0; got 0.5"),
    (make(low_rank, **HOW_FAR, rank=2, iterations=0), "iterations must .* at least 1; got 0"),
    (make(low_rank, **HOW_FAR, rank=2, iterations=2.0), "iterations must .*; got 2.0"),
    (make(low_rank, **HOW_FAR, rank=2, method="qr"), "method must be svd or subspace; got 'qr'"),
    (make(normuon, **HOW_FAR, beta2=math.nan), "beta2 must be at least 0 and at most 1; got nan"),
    (make(normuon, **HOW_FAR, eps=None), "eps must be a number; got None"),
    (make(adamuon, **HOW_FAR, beta2=-0.1), "beta2 must be .*; got -0.1"),
    (make(adamuon, **HOW_FAR, eps=math.inf), "eps must be at least 0; got inf"),
    (make(muonbp, **HOW_FAR, period=0), "period must be an integer of at least 1; got 0"),
    (make(muonbp, **HOW_FAR, block_ratio=-1), "block_ratio must be at least 0; got -1"),
    (make(muonbp, **HOW_FAR, blocks=2), "blocks must be .along fan_in, along fan_out.*; got 2"),
    (make(muonbp, **HOW_FAR, blocks=(1, 0)), "blocks along fan_out must .* at least 1; got 0"),
    (make(splus, **HOW_FAR, b1=1.0), "b1 must be at least 0 and less than 1; got 1.0"),
    (make(splus, **HOW_FAR, b2=1.0), "b2 must be at least 0 and less than 1; got 1.0"),
    (make(splus, **HOW_FAR, every=0), "every must be an integer of at least 1; got 0"),
    (make(splus, **HOW_FAR, max_dim=0.5), "max_dim must be an integer of at least 1; got 0.5"),
    (make(splus, **HOW_FAR, average=1.0), "average must be at least 0 and less than 1; got 1.0"),
    (make(evaluation_average, decay="a"), "decay must be a number; got 'a'"),
    (make(scion, **HOW_FAR, alpha=0), "alpha must be greater than 0 and at most 1; got 0"),
    (make(scion, learning_rate=math.nan), "learning_rate must be at least 0; got nan"),
    (make(scion, **HOW_FAR, weight_decay=-1), "weight_decay must be at least 0; got -1"),
    (make(scion, **HOW_FAR, balls={"w": Ball()}), r"balls must be a list .* list\(rules.items"),
    (make(scion, **HOW_FAR, balls=[Ball()]), "balls must be a list .* got Ball.* as a pair"),
    (make(scion, **HOW_FAR, balls=[("w", "sign")]), "A ball must be a muon_jax.Ball.*; got 'sign'"),
    (
        make(scion, **HOW_FAR, balls=[("w", Ball("Sign"))]),
        "oracle must be one of .*; got 'Sign'",
    ),
    (make(scion, **HOW_FAR, balls=[("w", Ball("sign", 0))]), "radius must be greater .*; got 0"),
    (make(scale_by_lmo, ball=Ball("sign", math.inf)), "radius must be greater than 0; got inf"),
    (make(gluon, smoothness=(0.0, 0.0)), "L0 or L1 of smoothness must be greater than 0"),
    (make(gluon, smoothness=(-1.0, 1.0)), "L0 of smoothness must be at least 0; got -1.0"),
    (make(gluon, smoothness=(1.0,)), r"smoothness must be \(L0, L1\); got \(1.0,\)"),
    (make(gluon, smoothness={"": (1.0, 1.0)}), "smoothness must be a list of .regex.*"),
    (
        make(gluon, smoothness=(1.0, 1.0), oracles="sign"),
        "oracles must be a list .*; got 'sign'",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused_by_name(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def test_an_oracle_of_another_shape_is_refused_by_name():
    def gram(x):
        return x @ x.mT

    tx = scale_by_lmo(Ball(gram))
    with pytest.raises(ValueError, match=r"oracle 'gram' .* shape .*\(8, 16\); got \(8, 8\)"):
        tx.update(ONE_LEAF, tx.init(ONE_LEAF))


def test_a_share_of_the_rank_is_rounded_up_as_it_is_written():
    for short in (*range(1, 130), 1000, 4096, 5120):
        for percent in range(1, 101):
            exact = max(1, math.ceil(fractions.Fraction(percent * short, 100)))
            assert rank_of(percent / 100, short, short + 1) == exact
        for rank in range(1, min(short, 130)):
            assert rank_of(rank / short, short, short) == rank


@every_variant
def test_empty_leaves_stay_empty(name):
    empty = {"no rows": jnp.zeros((0, 4)), "no columns": jnp.zeros((3, 4, 0))}
    found, _ = updates_of(made(name), [g | empty for g in draws()])
    for ours, theirs in zip(found, found_in(name), strict=True):
        assert {ours.pop(key).shape for key in empty} == {x.shape for x in empty.values()}
        assert relative_error(ours, theirs) < 1e-6


# --- Singular values -------------------------------------------------------------------------


def spectrum(values, m, n, seed=0):
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(k, len(values))))[0] for k in (m, n))
    return jnp.asarray(u * np.asarray(values) @ v.T, jnp.float32)


FALLING = [spectrum(0.5 ** np.arange(30), 30, 40, seed) for seed in range(2)]


@pytest.mark.parametrize("method", ["svd", "subspace"])
@pytest.mark.parametrize("rank", [1, 4, 0.3])
@pytest.mark.parametrize("turn", [False, True], ids=["wide", "tall"])
def test_the_top_directions_of_a_stack(method, rank, turn):
    x = jnp.stack([m.T if turn else m for m in FALLING])
    found = np.asarray(TruncatedPolar(rank, method)(x))
    k = 9 if rank == 0.3 else rank
    expected = np.stack([reference_variants.truncated_polar(m, k) for m in x])
    # 0.5^8 between the last wanted value and the first that is not carried, four times.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    values = np.linalg.svd(found, compute_uv=False)
    np.testing.assert_allclose(values, np.arange(30) < np.full((2, 1), k), rtol=0, atol=1e-5)


def test_more_iterations_come_closer():
    flat = spectrum(0.9 ** np.arange(30), 30, 40)
    exact = TruncatedPolar(4)(flat)
    errors = [relative_error(TruncatedPolar(4, "subspace", n)(flat), exact) for n in (1, 2, 4, 8)]
    assert errors[0] > 0.1 and errors[-1] < 1e-3
    assert all(b < a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("method", ["svd", "subspace"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_null_directions_have_none(method, dtype):
    """More directions are wanted than there are."""
    x = spectrum([3.0, 1.0], 30, 40).astype(dtype)
    found = TruncatedPolar(5, method)(x.at[1:].set(0))
    assert found.dtype == dtype
    expected = np.zeros(x.shape) + np.asarray(x[0] / jnp.linalg.norm(x[0])) * np.eye(30, 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * float(jnp.finfo(dtype).eps))
    assert not np.any(TruncatedPolar(5, method)(jnp.zeros((30, 40), dtype)))
    assert np.all(np.isnan(TruncatedPolar(5, method)(x.at[2, 3].set(jnp.nan))))


@pytest.mark.parametrize("shape", [(2, 6, 16), (16, 6), (8, 8)])
def test_the_polar_factor(shape):
    x = normal({"x": shape}, 0)["x"]
    expected = np.vectorize(reference.polar_factor, signature="(m,n)->(m,n)")(x)
    np.testing.assert_allclose(polar_factor(jnp.asarray(x)), expected, rtol=0, atol=1e-5)
