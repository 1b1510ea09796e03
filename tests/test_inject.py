"""`muon_jax.inject_hyperparams` works for every factory without being told what is static."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import DECAY, FACTORIES, RATE, draw, make

import muon_jax


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def steps(tx, dtype=jnp.float32, count=3, change=None):
    """The updates of each step; `change` of the state comes before the last."""
    params, step = draw(dtype), jax.jit(tx.update)
    state, found = tx.init(params), []
    for seed in range(1, count + 1):
        state = change(state) if change is not None and seed == count else state
        updates, state = step(draw(dtype, seed), state, params)
        found.append(updates)
    assert step._cache_size() == 1
    return found, state


# What each factory has besides the options of all of them.
OWN = {
    "normuon": {"beta2": 0.9, "eps": 1e-3},
    "adamuon": {"beta2": 0.9, "eps": 1e-3},
    "low_rank": {"beta": 0.9},
    "muonbp": {"block_ratio": 0.5},
    "dion": {"beta": 0.9, "eps": 1e-3},
    "splus": {"b1": 0.8, "b2": 0.9, "average": 0.9},
    "scion": {"alpha": 0.5},
    "gluon": {"alpha": 0.5},
}


LOW = [("muon", jnp.bfloat16), ("splus", jnp.bfloat16), ("scion", jnp.float16)]


@pytest.mark.parametrize("name,dtype", [(name, jnp.float32) for name in FACTORIES] + LOW)
def test_numbers_and_schedules(name, dtype):
    own = OWN.get(name, {"beta": 0.9})
    if name in ("muon", "nadam"):
        own = own | {"adam_b1": 0.8, "adam_b2": 0.999, "adam_eps": 1e-3, "adam_eps_root": 1e-4}
    given = {"learning_rate": RATE, "weight_decay": DECAY} | own
    ours, state = steps(make(name, muon_jax.inject_hyperparams, **given), dtype)
    assert set(given) <= set(state.hyperparams)
    assert {x.dtype for x in state.hyperparams.values()} == {jnp.dtype(jnp.float32)}
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(float(RATE(2)))
    for key, value in own.items():
        assert state.hyperparams[key] == np.float32(value)
    expected, _ = steps(make(name, **given), dtype)
    close(ours, expected, 1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("name", ["muon", "int8", "gluon"])
def test_a_rate_changes_between_steps(name):
    def halve(state):
        rate = state.hyperparams["learning_rate"] / 2
        return state._replace(hyperparams=state.hyperparams | {"learning_rate": rate})

    tx = make(name, muon_jax.inject_hyperparams)
    (*_, full), _ = steps(tx)
    (*_, half), _ = steps(tx, change=halve)
    close(jax.tree.map(lambda u: 2 * u, half), full)


def test_what_is_static_stays_out_of_the_state():
    tx = muon_jax.inject_hyperparams(muon_jax.muon)(
        0.02,
        ns_steps=3,
        mu_dtype="bfloat16",
        ns_dtype=jnp.float32,
        scale=lambda fan_in, fan_out: 0.5,
        routing=lambda path, leaf: None,
        weight_decay_mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        cautious_weight_decay=True,
        nesterov=False,
        other_optimizer="sgd",
        chunk_size=1,
    )
    _, state = steps(tx)
    assert set(state.hyperparams) == {"learning_rate", "weight_decay", "beta"}
    kept_out = muon_jax.inject_hyperparams(muon_jax.muon, static_args="beta")(0.02)
    assert "beta" not in kept_out.init(draw()).hyperparams


def test_bfloat16_params_leave_decays_above_their_resolution():
    """0.999 in bfloat16 is 1, and the update NaN."""
    tx = muon_jax.inject_hyperparams(muon_jax.muon)(0.02, adam_b2=0.999, ns_steps=1)
    (*_, updates), _ = steps(tx, jnp.bfloat16)
    assert all(np.all(np.isfinite(np.float32(u))) for u in jax.tree.leaves(updates))


def test_under_x64_hyperparameters_stay_float32():
    with jax.enable_x64(True):
        tx = muon_jax.inject_hyperparams(muon_jax.muon)(RATE, weight_decay=0.1, ns_steps=1)
        _, state = steps(tx)
        dtypes = {x.dtype for x in state.hyperparams.values()}
        assert dtypes == {jnp.dtype(jnp.float32)}


# A deprecated one, one that needs a key, one the loss, and one whose branches differ in dtype.
EXCLUDED = {"optimistic_adam", "noisy_sgd", "sophia", "novograd"}


def of_optax():
    """Optax's own factories of whole optimizers that need a rate and no more."""
    for module in (optax, optax.contrib):
        for name, factory in inspect.getmembers(module, inspect.isfunction):
            required = [
                p.name
                for p in inspect.signature(factory).parameters.values()
                if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            ]
            whole = required == ["learning_rate"] and not name.startswith(("_", "scale_by"))
            if whole and name not in EXCLUDED:
                yield pytest.param(factory, id=name)


@pytest.mark.parametrize("factory", list(of_optax()))
def test_optax_factories(factory):
    given = {"mask" if "mask" in inspect.signature(factory).parameters else None: lambda t: True}
    given.pop(None, None)
    params = {"w": jnp.ones((4, 6), jnp.bfloat16)}
    tx = muon_jax.inject_hyperparams(factory)(RATE, **given)
    state = tx.init(params)
    step = jax.jit(lambda g, s: tx.update(g, s, params, value=1.0))
    for _ in range(2):
        updates, state = step(params, state)
    assert step._cache_size() == 1
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(float(RATE(1)))
    floats = [x.dtype for x in state.hyperparams.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    assert np.all(np.isfinite(np.float32(updates["w"])))


def test_an_unknown_argument_gets_the_factorys_own_message():
    with pytest.raises(TypeError, match=r"muon.*'weight_decai'"):
        muon_jax.inject_hyperparams(muon_jax.muon)(0.1, weight_decai=0.1)
