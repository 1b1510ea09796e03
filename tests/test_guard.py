"""The guard of a training: which steps it skips."""

import jax
import jax.numpy as jnp
import pytest

from experiments.language import guard


@jax.jit
def _step(state, spike, norm):
    step, before = state
    taken, after = guard.judge(before, step - before.skipped, jnp.float32(1), norm, spike)
    return (step + 1, after), taken


def taken(norms, spike):
    state, found = (jnp.int32(0), guard.begin()), []
    for norm in norms:
        state, is_taken = _step(state, spike, jnp.float32(norm))
        found.append(bool(is_taken))
    return found


@pytest.mark.parametrize(
    "spike, quiet, loud, most", [(10.0, 0.1, 1.5, 3), (10.0, 0.1, 1e4, 45), (2.0, 0.1, 1.5, 60)]
)
def test_a_norm_that_stays_large_is_taken_after_a_while(spike, quiet, loud, most):
    found = taken([quiet] * 50 + [loud] * 100, spike)
    assert all(found[:50]) and not found[50]
    skipped = found[50:].count(False)
    assert skipped <= most and all(found[50 + skipped :])


def test_lone_spikes_are_skipped_and_change_little():
    found = taken(([0.1] * 30 + [5.0]) * 4, 10.0)
    assert found == ([True] * 30 + [False]) * 4


def test_a_spike_that_was_skipped_does_not_let_smaller_ones_pass():
    """It counts as the largest norm that would have been taken, however large it was."""
    assert taken([0.1] * 30 + [1e4, 5.0], 10.0) == [True] * 30 + [False] * 2


def test_a_norm_of_zero_is_no_measure_of_spikes():
    found = taken([0.0] * 30 + [1.0] * 9, 10.0)
    assert found[30] and found.count(False) <= 3 and all(found[-4:])


@pytest.mark.parametrize("spike", [None, 10.0])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_neither_taken_nor_remembered(bad, spike):
    found = taken([0.1] * 30 + [bad] * 40 + [0.1, 5.0], spike)
    assert found == [True] * 30 + [False] * 40 + [True, spike is None]
