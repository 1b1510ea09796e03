"""What `plan` tells of every optimizer, against the compiled program and the state itself."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import every_kind, mesh_of

import muon_jax
from experiments.compiled import measure

RATE = 0.1
KERNELS = {"a": {"kernel": (64, 192)}, "b": {"kernel": (128, 128)}, "embed": (100, 64)}
PARAMS = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    KERNELS,
    is_leaf=lambda x: type(x) is tuple,
)

OPTIMIZERS = {
    "muon": muon_jax.muon(RATE),
    "cubic": muon_jax.muon(RATE, ns_coeffs="cubic"),
    "NorMuon": muon_jax.normuon(RATE),
    "MuonEq": muon_jax.muon_eq(RATE),
    "Muon squared": muon_jax.muon_squared(RATE),
    "SOAP": muon_jax.soap(RATE),
    "SOAP-Muon": muon_jax.soap_muon(RATE),
    "SPlus": muon_jax.splus(RATE),
    "Dion": muon_jax.dion(RATE, rank=8),
    "Dion2": muon_jax.dion2(RATE, fraction=0.25),
    "Dion3": muon_jax.dion3(RATE, fraction=0.25),
    "PolarGrad": muon_jax.polargrad(RATE),
    "Aurora": muon_jax.aurora(RATE, iterations=3),
    "exact polar": muon_jax.low_rank(RATE, rank=64),
    "rank 4 by subspaces": muon_jax.low_rank(RATE, rank=4, method="subspace"),
    "MuonH": muon_jax.muonh(RATE),
    "spectral cap": muon_jax.muon(RATE, constraint=muon_jax.spectral_cap(3.0)),
    "MuonSphere": muon_jax.muon_sphere(RATE),
    "SPEL": muon_jax.spel(RATE),
    "Muown": muon_jax.muown(RATE),
    "Scion": muon_jax.scion(RATE),
    "int8": muon_jax.muon(RATE, mu_dtype=jnp.int8),
    "AdamW": optax.adamw(RATE),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plan_has_the_products_of_the_compiled_program(name):
    tx = OPTIMIZERS[name]
    (row,) = muon_jax.plan(PARAMS, tx, platform="cpu").rows
    state = jax.eval_shape(tx.init, PARAMS)
    program = measure(jax.jit(tx.update).lower(PARAMS, state, PARAMS).compile())
    assert row.flops == row.device_flops == pytest.approx(program.flops, rel=0.01)
    assert (row.flops > 0) == (name != "AdamW")
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert row.momentum_bytes == held > 0
    assert (row.seconds > 0) == (name != "AdamW")  # where a CPU's traffic counts as nothing


def test_decompositions_are_counted_as_often_as_they_are_due():
    """Those of both sides of both kernels, by 9 n³; SPlus renews its bases at step 1 as well."""
    every = 9 * (64**3 + 192**3 + 2 * 128**3)
    for tx, share in (
        (muon_jax.soap(RATE, every=1), 1),
        (muon_jax.soap(RATE, every=10), 101 / 1000),
        (muon_jax.splus(RATE, every=100), 11 / 1000),
        (muon_jax.muon(RATE), 0),
    ):
        plan = muon_jax.plan(PARAMS, tx, platform="cpu")
        assert plan.total("decomposition_flops") == pytest.approx(share * every, abs=1)
        assert ("Decompositions" in str(plan)) == (share > 0)
    assert "decompositions not counted" in muon_jax.plan(PARAMS, tx, platform="gpu").assumptions


def test_a_step_is_the_mean_of_those_that_differ():
    """MuonBP: whole matrices at one step of five, halves' quarters at the others."""
    whole, blocks, both = (
        muon_jax.plan(PARAMS, muon_jax.muonbp(RATE, blocks=(2, 2), period=period)).total("flops")
        for period in (1, 10**6, 5)
    )
    assert blocks < 0.6 * whole
    assert both == pytest.approx(whole / 5 + blocks * 4 / 5, rel=1e-3)


def test_the_plan_of_muon_is_the_same_either_way():
    """And a constraint's power iteration reads the matrices, which takes a GPU time."""
    by_name, traced = muon_jax.plan(PARAMS), muon_jax.plan(PARAMS, muon_jax.muon(RATE))
    assert by_name.total("flops") == traced.total("flops")
    counters = 2 * 4  # Muon's and Adam's
    assert traced.total("momentum_bytes") - by_name.total("momentum_bytes") == counters
    assert by_name.total("seconds") == pytest.approx(traced.total("seconds"))
    plain, capped = (
        muon_jax.plan(PARAMS, OPTIMIZERS[name], platform="gpu").total("seconds")
        for name in ("muon", "spectral cap")
    )
    read_twice = 2 * 4 * (64 * 192 + 128 * 128) / 3.35e12
    assert capped - plain > read_twice


ON_MESH = {
    "muon": (muon_jax.muon, {}),
    "Dion2": (functools.partial(muon_jax.dion2, fraction=0.25), {}),
    "Aurora": (muon_jax.aurora, {}),
    "MuonH": (muon_jax.muonh, {}),
    "SPEL": (muon_jax.spel, {}),
}


@every_kind
@pytest.mark.parametrize("name", ON_MESH)
def test_a_plan_on_a_mesh_has_the_products_of_a_device(name, kind):
    mesh = mesh_of(kind, fsdp=4)
    sharding = NamedSharding(mesh, P(None, "fsdp", None))
    params = {
        "blocks": {"kernel": jax.ShapeDtypeStruct((4, 64, 192), jnp.float32, sharding=sharding)}
    }
    make, own = ON_MESH[name]
    tx = make(RATE, mesh=mesh, shardings=jax.tree.map(lambda x: x.sharding, params), **own)
    (row,) = muon_jax.plan(params, tx, mesh=mesh).rows
    where = muon_jax.state_shardings(tx, params)
    state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        jax.eval_shape(tx.init, params),
        where,
    )
    program = measure(jax.jit(tx.update).lower(params, state, params).compile())
    assert row.device_flops == pytest.approx(program.flops, rel=0.1)
    assert row.flops == 4 * row.device_flops > 0
    pairs = zip(*map(jax.tree.leaves, (state, where)), strict=True)
    assert row.momentum_bytes == sum(4 * math.prod(at.shard_shape(x.shape)) for x, at in pairs)
    if name in ("muon", "Dion2", "MuonH"):
        assert row.exchanged_bytes == pytest.approx(program.exchanged_bytes, rel=0.1)
    if name == "muon":
        (planned,) = muon_jax.plan(params, mesh=mesh).rows
        assert row.exchanged_bytes == planned.exchanged_bytes > 0


@pytest.mark.parametrize(
    "settings", [{"ns_steps": 3}, {"ns_coeffs": np.ones((2, 3))}, {"shardings": P()}]
)
def test_an_optimizer_has_its_settings_itself(settings):
    with pytest.raises(ValueError, match="an optimizer or the settings of Muon, but got both"):
        muon_jax.plan(PARAMS, OPTIMIZERS["AdamW"], **settings)
