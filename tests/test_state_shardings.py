"""Where a state lies, in a step and in a checkpoint, for every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import FACTORIES, draw, make
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from orbax.checkpoint import v1 as ocp

import muon_jax

SPECS = {
    "mlp": {"kernel": P("data", "model"), "bias": P("model")},
    "stack": P("data", None, "model"),
    "embed": P(("data", "model")),
}


def placed(kind="Auto"):
    mesh = mesh_of(kind, data=2, model=2)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return jax.device_put(draw(), shardings), shardings


WRAPPED = {
    "in a chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.ema(0.9)),
    "in MultiSteps": lambda tx: optax.MultiSteps(optax.apply_if_finite(tx, 2), 2),
}
CASES = {name: (lambda name=name: make(name)) for name in FACTORIES} | {
    name: (lambda wrap=wrap: wrap(make("int8"))) for name, wrap in WRAPPED.items()
}
PARTS = {"matrix_axes": {"mlp": None, "stack": muon_jax.MatrixAxes(split_fan_out=(2, 2))}}
PARTS["matrix_axes"] |= {"embed": None}
CASES |= {"parts": lambda: make("normuon", **PARTS), "adafactor": lambda: optax.adafactor(0.1)}


def same_places(tree, shardings):
    return all(
        x.sharding.is_equivalent_to(at, x.ndim)
        for x, at in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["int8", "dion"])
def test_each_kind_of_axes(name, kind):
    check(make(name), kind)


@pytest.mark.parametrize("name", CASES)
def test_init_and_a_step_lie_there(name, tmp_path):
    state, where = check(CASES[name](), "Auto")
    like = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, where
    )
    ocp.save(tmp_path / "state", state)
    restored = ocp.load(tmp_path / "state", like)
    assert same_places(restored, where)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def check(tx, kind):
    params, shardings = placed(kind)
    where = muon_jax.state_shardings(tx, params, shardings)
    state = jax.jit(tx.init, out_shardings=where)(params)
    assert jax.tree.structure(where) == jax.tree.structure(state)
    assert same_places(state, where)  # which jit refuses where a spec does not divide a shape

    step = jax.jit(
        lambda g, state, params: tx.update(g, state, params), out_shardings=(shardings, where)
    )
    for _ in range(2):
        _, state = step(params, state, params)
    assert same_places(state, where) and step._cache_size() == 1
    return state, where


def specs(tree):
    return jax.tree.map(lambda at: at.spec, tree)


def test_moments_lie_like_their_params_and_what_is_reduced_drops_the_axis():
    params, shardings = placed()
    where = muon_jax.state_shardings(make("int8"), params, shardings)
    hidden = where.inner_states["muon"].inner_state[0]
    assert hidden.count.spec == P()
    assert hidden.mu.values["mlp"]["kernel"].spec == P("data", "model")
    assert hidden.mu.scales["mlp"]["kernel"].spec == P("data")
    assert hidden.mu.scales["stack"].spec == P("data")
    rest = where.inner_states["other"].inner_state[0]
    assert (rest.mu["embed"].spec, rest.nu["mlp"]["bias"].spec) == (
        P(("data", "model")),
        P("model"),
    )
    nu = muon_jax.state_shardings(make("normuon"), params, shardings)
    assert nu.inner_states["muon"].inner_state[0].nu["mlp"]["kernel"].spec == P(None, "model")


def test_params_tell_by_themselves_and_names_may_be_those_of_labels():
    params, _ = placed()
    params = {"muon": params["mlp"], "mu": params["stack"], "0": params["embed"]}
    tx = make("muon")
    where = muon_jax.state_shardings(tx, params)
    mu = where.inner_states["muon"].inner_state[0].mu
    assert mu["muon"]["kernel"].spec == P("data", "model") and mu["mu"].spec == SPECS["stack"]
    with pytest.raises(ValueError, match=r"NamedSharding for each leaf.*SingleDevice"):
        muon_jax.state_shardings(tx, draw())
    with pytest.raises(ValueError, match="leaves"):
        muon_jax.state_shardings(tx, {})


def test_shapes_are_enough():
    params, shardings = placed()
    shapes = jax.eval_shape(lambda: draw(jnp.bfloat16))
    tx = make("normuon")
    ours = muon_jax.state_shardings(tx, shapes, shardings)
    assert specs(ours) == specs(muon_jax.state_shardings(tx, params))
