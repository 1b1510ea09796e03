"""The optimizers of the rest: Optax's numbers in float32, and every gradient survived."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import gaussian

import muon_jax
from muon_jax._elementwise import scale_by_adam, scale_by_lion, sign_of_momentum, trace


def directions(tx, grads):
    state, found = tx.init({"w": jnp.zeros_like(grads[0])}), []
    for g in grads:
        updates, state = tx.update({"w": jnp.asarray(g)}, state)
        found.append(np.asarray(updates["w"]))
    return np.stack(found), state


PAIRS = {
    "adam": (lambda: scale_by_adam(0.9, 0.95), lambda: optax.scale_by_adam(0.9, 0.95)),
    "nadam": (
        lambda: scale_by_adam(0.8, 0.999, 1e-3, nesterov=True),
        lambda: optax.scale_by_adam(0.8, 0.999, 1e-3, nesterov=True),
    ),
    "eps_root": (
        lambda: scale_by_adam(0.9, 0.999, eps_root=0.1),
        lambda: optax.scale_by_adam(0.9, 0.999, eps_root=0.1),
    ),
    # With a Python float Optax multiplies a bfloat16 momentum in bfloat16.
    "mu_dtype": (
        lambda: scale_by_adam(0.9, 0.95, mu_dtype=jnp.bfloat16),
        lambda: optax.scale_by_adam(jnp.float32(0.9), 0.95, mu_dtype=jnp.bfloat16),
    ),
    "sgd": (lambda: trace(0.9), lambda: optax.trace(0.9)),
    "lion": (lambda: scale_by_lion(0.9), lambda: optax.scale_by_lion(0.9, 0.99)),
    "sign": (
        lambda: sign_of_momentum(0.9),
        lambda: optax.chain(
            optax.ema(0.9, debias=False), optax.scale_by_sign(), optax.scale(0.001)
        ),
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("case", PAIRS)
def test_ten_steps_of_optax(case, dtype):
    if dtype == np.complex64 and case == "mu_dtype":
        return  # Optax drops the imaginary part
    grads = [gaussian(3, 5, seed=seed, dtype=dtype) for seed in range(10)]
    (ours, _), (theirs, _) = (directions(make(), grads) for make in PAIRS[case])
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-7)


def test_the_second_moment_of_complex_leaves_is_real():
    _, state = directions(
        scale_by_adam(0.9, 0.95, mu_dtype=jnp.bfloat16), [gaussian(3, 5, dtype="complex64")]
    )
    assert (state.mu["w"].dtype, state.nu["w"].dtype) == (jnp.complex64, jnp.float32)


# --- Every gradient --------------------------------------------------------------------------

RESTS = ["adamw", "sgd", "lion", "sign"]
STORED = {"float32": {}, "bfloat16": {}, "float16": {}, "mu float16": {"mu_dtype": jnp.float16}}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("rest", RESTS)
def test_a_leaf_moves_again_after_the_largest_gradient(rest, stored):
    """In two dozen steps with decays of 0.5, whose powers shrink it to nothing."""
    dtype = jnp.dtype(stored if stored in ("bfloat16", "float16") else "float32")
    b1 = "adam_b1" if rest == "adamw" else "other_b1"
    settings = {"other_optimizer": rest, b1: 0.5} | STORED[stored]
    settings |= {"adam_b2": 0.5} if rest == "adamw" else {}
    tx = muon_jax.muon(1.0, **settings)
    params = {"bias": jnp.zeros(2, dtype)}
    largest, usual = (jnp.asarray(g, dtype) for g in ([jnp.finfo(dtype).max, -1], [1, -1]))

    def step(state, g):
        updates, state = tx.update({"bias": g}, state, params)
        return state, updates["bias"]

    grads = jnp.stack([largest] * 3 + [usual] * 300)
    state, updates = jax.lax.scan(step, tx.init(params), grads)
    assert all(np.all(np.isfinite(np.float32(x))) for x in jax.tree.leaves((state, updates)))
    # As an entry that never had one, to the last step's precision.
    np.testing.assert_allclose(
        np.float32(updates[-1, 0]), -np.float32(updates[-1, 1]), rtol=float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rest", RESTS)
def test_what_is_no_number_stays_in_its_entry(rest, bad):
    tx, params = muon_jax.muon(0.1, other_optimizer=rest), {"bias": jnp.zeros(3)}
    state = tx.init(params)
    for g in ([1.0, bad, 1.0], [1.0, 1.0, 1.0]):
        updates, state = tx.update({"bias": jnp.asarray(g)}, state, params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert moments and all((np.isfinite(x) == [True, False, True]).all() for x in moments)
    assert np.all(np.abs(updates["bias"][jnp.array([0, 2])]) > 0)


def test_a_float16_second_moment_does_not_vanish_under_its_momentum():
    """2e-4 squared is below float16's smallest number; the momentum outlives it."""
    tx = muon_jax.muon(1.0, adam_b2=0.5)
    params = {"bias": jnp.zeros(1, jnp.float16)}
    state, sizes = tx.init(params), []
    for g in [2e-4] * 5 + [0.0] * 20:
        updates, state = tx.update({"bias": jnp.full(1, g, jnp.float16)}, state, params)
        sizes.append(abs(float(updates["bias"][0])))
    assert 0 < max(sizes) < 1.5


def test_nu_dtype_float32_moves_where_bfloat16_sticks():
    """b2 = 0.999: a thousandth is less than half a unit in bfloat16's last place."""
    params = {"bias": jnp.zeros(1, jnp.bfloat16)}
    expected = 9 + (1 - 9) * 0.999**3000  # of |g|² from 1 to 9

    def second(nu_dtype):
        tx = muon_jax.muon(0.1, adam_b2=0.999, nu_dtype=nu_dtype)
        state = tx.init(params)
        nu = state.inner_states["other"].inner_state[0].nu["bias"]
        start = jax.tree.map(lambda x: jnp.ones_like(x) if x is nu else x, state)

        def step(state, g):
            return tx.update({"bias": g}, state, params)[1], None

        state, _ = jax.lax.scan(step, start, jnp.full((3000, 1), 3.0, jnp.bfloat16))
        return state.inner_states["other"].inner_state[0].nu["bias"]

    # A dtype object, which Python takes for false, as well as its name.
    assert second(None).dtype == jnp.bfloat16 and second(jnp.dtype("float32")).dtype == jnp.float32
    assert float(second("float32")[0]) == pytest.approx(expected, rel=1e-4)
    assert abs(float(second(None)[0]) - expected) > 1
