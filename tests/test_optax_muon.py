"""`muon_jax.optax_muon` has the arguments of `optax.contrib.muon` and its numbers, for each."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import muon_jax

RATE = optax.linear_schedule(0.01, 0.05, 10)
SHAPES = {"up": (4, 12), "down": (12, 4), "bias": (6,), "qkv": (4, 3, 2)}
AOL = ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254))
FAN = MuonDimensionNumbers
DIMS = {"up": FAN(), "down": FAN(1, 0), "bias": None, "qkv": FAN(0, (1, 2))}
STACKED = {"up": None, "down": FAN(-2, -1), "bias": None, "qkv": FAN(-1, (1,))}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


PARAMS, GRADS = draw(0), [draw(seed) for seed in range(1, 11)]

CASES = {
    "defaults": {},
    "dion": {"ns_coeffs": "dion"},
    "a triple": {"ns_coeffs": (2.0, -1.5, 0.5), "ns_steps": 3},
    "rows": {"ns_coeffs": AOL, "ns_steps": 3},
    "ns_steps": {"ns_steps": 2},
    "beta": {"beta": 0.8},
    "eps": {"eps": 0.5},
    "weight_decay": {"weight_decay": 0.3},
    "weight_decay_mask": {
        "weight_decay": 0.3,
        "weight_decay_mask": lambda tree: jax.tree.map(lambda x: x.shape[0] < 12, tree),
    },
    "mu_dtype": {"mu_dtype": jnp.float32},
    "nesterov": {"nesterov": False},
    "adaptive": {"adaptive": True},
    "adaptive stacks": {"adaptive": True, "muon_weight_dimension_numbers": STACKED},
    "spectral": {"preconditioning": "spectral", "eps": 0.5, "ns_steps": 3},
    "aol": {"preconditioning": "aol"},
    "aol rows": {"preconditioning": "aol", "ns_coeffs": AOL},
    "schatten": {"preconditioning": "schatten"},
    "adam": {"adam_b1": 0.8, "adam_b2": 0.9, "adam_eps_root": 0.1, "adam_weight_decay": 0.2},
    "adam_learning_rate": {"adam_learning_rate": RATE},
    "axes": {"muon_weight_dimension_numbers": DIMS},
    "axes of a callable": {"muon_weight_dimension_numbers": lambda params: STACKED},
    "axes and spectral stacks": {
        "muon_weight_dimension_numbers": STACKED,
        "preconditioning": "spectral",
    },
    "consistent_rms": {"consistent_rms": 0.3},
    "a schedule": {"learning_rate": RATE},
}


def run(tx, params=PARAMS, grads=GRADS):
    """The params after each of the steps."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), stacked)[1])()


def farthest(ours, theirs):
    """As a share of the largest entry of each leaf's way."""
    return {
        name: float(
            np.max(np.abs(np.float64(ours[name]) - np.float64(theirs[name])))
            / np.max(np.abs(np.float64(theirs[name]) - np.float64(PARAMS[name])))
        )
        for name in theirs
    }


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_of_optax(case):
    settings = {"learning_rate": 0.02} | CASES[case]
    ours, theirs = run(muon_jax.optax_muon(**settings)), run(optax.contrib.muon(**settings))
    apart = {name: float(np.max(np.abs(ours[name] - theirs[name]))) for name in theirs}
    assert max(apart.values()) <= 1e-6, apart
    assert max(farthest(ours, theirs).values()) < 1e-4


# --- Beside the numbers ----------------------------------------------------------------------


def test_the_signature_is_optax():
    ours, theirs = map(inspect.signature, (muon_jax.optax_muon, optax.contrib.muon))
    parts = [
        [(p.name, p.kind, p.default) for p in signature.parameters.values()]
        for signature in (ours, theirs)
    ]
    assert parts[0] == parts[1]


SAME = {
    "by position": ((AOL, 3, 0.9, 0.5, 0.1), {}),
    "an array of rows": ((np.asarray(AOL), 3, 0.9, 0.5, 0.1), {}),
    "fewer steps than rows": ((), {"ns_coeffs": AOL, "ns_steps": 2}),
    "more steps than rows": ((), {"ns_coeffs": AOL, "ns_steps": 9}),
}


def first_update(tx, params=PARAMS, grads=GRADS[0]):
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("case", SAME)
def test_other_ways_to_say_the_same(case):
    args, settings = SAME[case]
    settings = settings | ({} if args else {"beta": 0.9, "eps": 0.5, "weight_decay": 0.1})
    said = {"ns_coeffs": AOL, "ns_steps": 3, "beta": 0.9, "eps": 0.5, "weight_decay": 0.1}
    ours = first_update(muon_jax.optax_muon(0.02, *args, **settings))
    theirs = first_update(optax.contrib.muon(0.02, **said))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["standard", "muon"])
def test_presets_of_the_documentation(preset):
    ours, theirs = (first_update(muon_jax.optax_muon(0.02, *c)) for c in ((preset,), ()))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_complex_matrices():
    params, grads = (jax.tree.map(lambda a, b: a + 1j * b, draw(n), draw(n + 1)) for n in (0, 5))
    ours = first_update(muon_jax.optax_muon(0.02), params, grads)
    theirs = first_update(optax.contrib.muon(0.02), params, grads)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_on_a_mesh_each_matrix_lies_where_it_did():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    kernels = [{name: tree[name] for name in ("up", "down")} for tree in (PARAMS, GRADS[0])]
    settings = {"adaptive": True, "eps": 0.5}
    alone = first_update(muon_jax.optax_muon(0.02, **settings), *kernels)
    spread = first_update(
        muon_jax.optax_muon(0.02, **settings), *(jax.device_put(t, split) for t in kernels)
    )
    for name in alone:
        assert spread[name].sharding.is_equivalent_to(split, 2)
        np.testing.assert_allclose(spread[name], alone[name], rtol=0, atol=1e-6)


def test_inject_hyperparams():
    tx = muon_jax.inject_hyperparams(muon_jax.optax_muon)(RATE, consistent_rms=0.2)
    state = tx.init(PARAMS)
    assert {"learning_rate", "beta", "eps", "adam_b2", "consistent_rms"} <= set(state.hyperparams)
    updates, _ = jax.jit(tx.update)(GRADS[0], state, PARAMS)
    expected = first_update(muon_jax.optax_muon(RATE, consistent_rms=0.2))
    for name in expected:
        np.testing.assert_allclose(updates[name], expected[name], rtol=0, atol=1e-6)


ERRORS = {
    "preset": ({"ns_coeffs": "jordan"}, ["ns_coeffs", "standard", "dion", "'jordan'"]),
    "pairs": ({"ns_coeffs": (1.0, 2.0)}, ["ns_coeffs", "(a, b, c)", "(1.0, 2.0)"]),
    "NaN": ({"ns_coeffs": (1.0, float("nan"), 1.0)}, ["ns_coeffs", "finite"]),
    "preconditioning": ({"preconditioning": "l2"}, ["preconditioning", "schatten", "'l2'"]),
    "ns_steps": ({"ns_steps": 0}, ["ns_steps", "at least 1", "0"]),
    "eps": ({"eps": -1.0}, ["eps", "at least 0"]),
    "adam_b2": ({"adam_b2": 1.0}, ["adam_b2", "less than 1"]),
    "consistent_rms": ({"consistent_rms": -0.2}, ["consistent_rms", "at least 0"]),
    "a leaf that is not there": (
        {"muon_weight_dimension_numbers": {"gate": FAN()} | DIMS},
        ["muon_weight_dimension_numbers", "gate"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_value_is_named(case):
    settings, words = ERRORS[case]
    with pytest.raises(ValueError) as raised:
        muon_jax.optax_muon(0.1, **settings).init(PARAMS)
    assert [word for word in words if word not in str(raised.value)] == []
