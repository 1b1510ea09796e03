"""Dion where the gradient has fewer directions than the rank, and at the ends of the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import updates_of

from muon_jax import scale_by_dion

FAN_IN, FAN_OUT, RANK = 24, 20, 6
ROUNDING = 1e-6


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def of_rank(rank):
    return gaussian(1, FAN_IN, rank) @ gaussian(2, rank, FAN_OUT)


def only(index):
    kept = np.zeros((FAN_IN, FAN_OUT))
    kept[index] = of_rank(FAN_OUT)[index]
    return kept


DEFICIENT = {
    "one column": (only((slice(None), 3)), 1),
    "one row": (only((5,)), 1),
    "one entry": (only((5, 3)), 1),
    "three columns": (only((slice(None), slice(7, 10))), 3),
    "rank 1": (of_rank(1), 1),
    "rank 4": (of_rank(4), 4),
    "rank 5": (of_rank(5), 5),
}


@pytest.fixture(scope="module")
def found():
    """The updates of all of these in one stack, and of a full gradient among them."""
    stack = np.stack([g for g, _ in DEFICIENT.values()] + [of_rank(FAN_OUT)])
    grads = [{"w": jnp.asarray(stack, jnp.float32)}] * 4
    updates, state = updates_of(scale_by_dion(rank=RANK, scale=None), grads)
    return [np.float64(u["w"]) for u in updates], state


@pytest.mark.parametrize("case", DEFICIENT)
def test_no_update_has_directions_that_the_gradient_has_not(found, case):
    """Each column of Q has length 1, so the norm is the root of the gradient's rank."""
    updates, state = found
    at, (gradient, rank) = list(DEFICIENT).index(case), DEFICIENT[case]
    for u in (stack[at] for stack in updates):
        left, _, right = np.linalg.svd(gradient)
        outside = u - left[:, :rank] @ (left[:, :rank].T @ u)
        assert np.linalg.norm(outside) < ROUNDING
        outside = u - (u @ right[:rank].T) @ right[:rank]
        assert np.linalg.norm(outside) < 100 * ROUNDING  # P of a span whose condition is 100
        assert np.linalg.norm(u) == pytest.approx(rank**0.5, rel=1e-5)
    lengths = np.linalg.norm(state.q["w"][at], axis=0)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_a_full_gradient_beside_them_is_as_if_alone(found):
    full = [{"w": jnp.asarray(of_rank(FAN_OUT)[None], jnp.float32)}] * 4
    tx = scale_by_dion(rank=RANK, scale=None)
    q = found[1].q["w"][-1:]
    alone = tx.init(full[0])
    first = tx.init({"w": jnp.zeros((len(DEFICIENT) + 1, FAN_IN, FAN_OUT))}).q["w"][-1:]
    step, state = jax.jit(tx.update), alone._replace(q={"w": first})
    for g, theirs in zip(full, found[0], strict=True):
        updates, state = step(g, state)
        np.testing.assert_allclose(updates["w"][0], theirs[-1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(state.q["w"], q, rtol=0, atol=1e-5)


def test_directions_that_come_late_are_found():
    """Those columns of Q that had nothing are Gaussian still."""
    first, then = ({"w": jnp.asarray(of_rank(n), jnp.float32)} for n in (1, FAN_OUT))
    updates, _ = updates_of(scale_by_dion(rank=RANK, scale=None), [first] * 3 + [then])
    assert np.linalg.norm(updates[-1]["w"]) == pytest.approx(RANK**0.5, rel=1e-5)
