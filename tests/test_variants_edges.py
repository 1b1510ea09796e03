"""Zeros, NaN, huge and tiny gradients, half precision, empty leaves, null directions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_variants
from trajectories import normal, relative_error, updates_of
from variants import SCALE_BY

from muon_jax import Ball, TruncatedPolar, polar_factor, scale_by_lmo

every_variant = pytest.mark.parametrize("name", SCALE_BY)

TREE = {"stack": (3, 12, 20), "tall": (24, 8)}


def draw(seed, factor=1.0, dtype=jnp.float32):
    tree = normal(TREE, seed)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) * jnp.asarray(factor, dtype), tree)


def draws(*args):
    return [draw(seed, *args) for seed in (1, 2, 3)]


@functools.cache
def found_in(name):
    """The updates of ordinary gradients."""
    return updates_of(SCALE_BY[name](), draws())[0]


def assert_finite(tree):
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


@every_variant
def test_zero_gradients_give_zero_updates_and_the_next_ones_do_not(name):
    (*zeros, last), state = updates_of(SCALE_BY[name](), [*draws(0.0), draw(1)])
    assert not any(np.any(u) for u in jax.tree.leaves(zeros))
    assert all(np.all(np.any(u, axis=(-2, -1))) for u in last.values())
    assert_finite((last, state))


@every_variant
def test_a_matrix_touches_no_other(name):
    hurt = draws()
    for g in hurt:
        g["stack"] = g["stack"].at[0].set(0).at[2, 1, 3].set(jnp.nan)
    found, _ = updates_of(SCALE_BY[name](), hurt)
    for ours, theirs in zip(found, found_in(name), strict=True):
        assert not np.any(ours["stack"][0]) and np.any(np.isnan(ours["stack"][2]))
        np.testing.assert_allclose(ours["stack"][1], theirs["stack"][1], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(ours["tall"], theirs["tall"])


# Gluon's steps do depend on it, and squares of gradients are what SPlus has to keep.
SIZES = {"splus": 1e15}


@pytest.mark.parametrize("name", [name for name in SCALE_BY if name != "gluon"])
@pytest.mark.parametrize("power", [1, -1], ids=["huge", "tiny"])
def test_the_size_of_the_gradient_does_not_matter(name, power):
    found, state = updates_of(SCALE_BY[name](), draws(SIZES.get(name, 1e30) ** power))
    assert relative_error(found, found_in(name)) < 1e-5
    assert_finite(state)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_the_size_of_the_gradient_leaves_gluon_whole(size):
    """L1 says how far at most, and the norm over L0 how far from small gradients."""
    exact = {"orthogonalizer": polar_factor}
    found, _ = updates_of(scale_by_lmo(smoothness=(0.5, 2.0), **exact), draws(size))
    scion, _ = updates_of(scale_by_lmo(Ball("spectral", 1.0), **exact), draws())
    for ours, theirs in zip(found, scion, strict=True):
        step = np.divide(*(np.linalg.norm(np.float64(u["tall"])) for u in (ours, theirs)))
        assert step == pytest.approx(0.5, rel=1e-5) if size > 1 else 0 < step < 1e-27


# In units of the dtype's rounding. Measured: up to 14, and 30 where signs of small numbers turn.
HALF = {"adamuon": 64}


@every_variant
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype_and_nearly_its_update(name, dtype):
    grads = draws(1.0, dtype)
    found, state = updates_of(SCALE_BY[name](), grads)
    assert {u.dtype for u in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    others = jax.tree.leaves(state._replace(count=(), mu=()))
    assert {x.dtype for x in others} <= {jnp.dtype(jnp.float32)}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    error = relative_error(found, updates_of(SCALE_BY[name](), exact)[0])
    assert error < HALF.get(name, 32) * float(jnp.finfo(dtype).eps)


@every_variant
def test_empty_leaves_stay_empty(name):
    empty = {"no rows": jnp.zeros((0, 4)), "no columns": jnp.zeros((3, 4, 0))}
    found, _ = updates_of(SCALE_BY[name](), [g | empty for g in draws()])
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
