"""Muon's relatives on meshes: the updates of one device, and what crosses the network for them."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import TOLERANCE, every_kind, lies_like, mesh_of
from trajectories import normal, relative_error, updates_of
from variants import ONE_STEP, SCALE_BY

from experiments.compiled import measure
from muon_jax import Interleaved, MatrixAxes, normuon, scale_by_muon, scale_by_muonbp, scion

GRID = {"fsdp": 4, "tp": 4}

# Shape, where it lies, and which of its axes are the matrix.
LEAVES = {
    "stacked": ((3, 16, 32), P(None, "fsdp", "tp"), MatrixAxes()),
    "rows": ((16, 24), P("fsdp"), MatrixAxes()),
    "whole": ((24, 8), P(), MatrixAxes()),
    "experts": ((8, 16, 20), P("tp", "fsdp"), MatrixAxes()),
    "heads": ((16, 4, 8), P("fsdp", "tp"), MatrixAxes(0, (1, 2))),
    "rounds": ((16, 48), P("fsdp", "tp"), MatrixAxes(split_fan_out=Interleaved((8, 4)))),
    "heads apart": ((16, 4, 20), P("fsdp", "tp"), MatrixAxes(0, (1, 2), split_fan_out=4)),
}
# Parts that end where no device does.
CROOKED = {
    "fused": ((16, 64), P("fsdp", "tp"), MatrixAxes(split_fan_out=(20, 24, 20))),
    "thirds": ((72, 16), P("fsdp", "tp"), MatrixAxes(split_fan_in=3)),
    "rounds apart": ((16, 48), P("fsdp", "tp"), MatrixAxes(split_fan_out=Interleaved((5, 3)))),
}
SOME = {
    "all": LEAVES | CROOKED,
    "straight": LEAVES,
    "few": {"fused": CROOKED["fused"], "rows": LEAVES["rows"], "heads": LEAVES["heads apart"]},
}


class Layout:
    """Leaves on the grid, and two gradients of theirs."""

    def __init__(self, leaves, kind="Auto"):
        shapes, self.specs, self.axes = (
            {name: row[i] for name, row in leaves.items()} for i in range(3)
        )
        self.mesh = mesh_of(kind, **GRID)
        self.shardings = {name: NamedSharding(self.mesh, s) for name, s in self.specs.items()}
        self.grads = [normal(shapes, seed) for seed in (1, 2)]
        self.placed = [jax.device_put(g, self.shardings) for g in self.grads]


def largest_errors(ours, theirs):
    """By leaf, of any step."""
    pairs = list(zip(ours, theirs, strict=True))
    return {name: max(relative_error(a[name], b[name]) for a, b in pairs) for name in ours[0]}


def assert_close(ours, theirs, name="", loose=None):
    # Rounding turns singular vectors by more where singular values are close: 1.3e-5 measured.
    turned = {"low_rank": 3e-5, "eigenbasis": 3e-5}
    tolerance = turned.get(name, TOLERANCE) if loose is None else loose
    errors = largest_errors(ours, theirs)
    assert all(error < tolerance for error in errors.values()), errors


@functools.cache
def alone(name, leaves="all"):
    layout = Layout(SOME[leaves])
    return updates_of(SCALE_BY[name](matrix_axes=layout.axes), layout.grads)[0]


# --- Every variant ---------------------------------------------------------------------------

# How the optimizer learns of the mesh, and whether of the layout.
TOLD = {"Auto": "mesh", "Auto, told": "shardings", "Explicit": None}


def settings_of(layout, told):
    known = {"mesh": layout.mesh, "shardings": layout.specs}
    return {key: known[key] for key in (TOLD[told],) if key}


# Gluon's oracle is Scion's; of a side that is split Dion2 chooses other rows.
PLACED = [name for name in SCALE_BY if name not in ("scion", "dion2", "dion3")]


# Untold, all have the same assumptions about where things lie, and programs that compile slowly.
UNTOLD = ("int8", "normuon", "muonbp", "dion", "splus")


@pytest.mark.parametrize(
    ("name", "told"), [(n, told) for n in PLACED for told in TOLD if n in UNTOLD or told != "Auto"]
)
def test_two_steps_equal_those_of_one_device(name, told):
    leaves = "few" if told == "Auto" else "all"
    layout = Layout(SOME[leaves], told.split(",")[0])
    tx = SCALE_BY[name](matrix_axes=layout.axes, **settings_of(layout, told))
    with jax.set_mesh(layout.mesh):
        found, state = updates_of(tx, layout.placed)
    assert_close(found, alone(name, leaves), name)
    if told == "Explicit":
        moments = [state.mu.values if name == "int8" else state.mu, *found]
        moments += [state.nu] if name == "adamuon" else []
        for tree in moments:
            assert all(lies_like(x, layout.shardings[leaf]) for leaf, x in tree.items())


@every_kind
def test_int4_is_rounded_alike_wherever_it_lies(kind):
    layout = Layout(SOME["few"], kind)
    tx = SCALE_BY["int8"](mu_dtype=jnp.int4, matrix_axes=layout.axes)
    with jax.set_mesh(layout.mesh):
        found, state = updates_of(tx, layout.placed)
    assert {x.dtype for x in jax.tree.leaves(state.mu.values)} == {jnp.dtype("int4")}
    assert_close(found, updates_of(tx, layout.grads)[0])


def in_shard_map(layout, function, *trees):
    specs = (layout.specs,) * len(trees)
    mapped = jax.shard_map(
        function, mesh=layout.mesh, in_specs=specs, out_specs=specs, check_vma=False
    )
    return jax.jit(mapped)(*trees)


def two_steps(tx):
    def both(first, second):
        updates, state = tx.update(first, tx.init(first))
        return updates, tx.update(second, state)[0]

    return both


@every_kind
@pytest.mark.parametrize("name", [name for name in PLACED if name != "muonbp"])
def test_two_steps_inside_shard_map(name, kind):
    layout = Layout(LEAVES, kind)
    tx = SCALE_BY[name](matrix_axes=layout.axes, shardings=layout.specs)
    found = in_shard_map(layout, two_steps(tx), *layout.placed)
    # A row of int8 is what the device holds of it.
    assert_close(found, alone(name, "straight"), name, 1e-2 if name == "int8" else None)


def by_its_shape(x):
    """Tells a matrix from one with rows of zeros."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=(-2, -1), keepdims=True))


@pytest.mark.parametrize("told", TOLD)
def test_a_user_s_function_sees_no_padding(told):
    # No side of these is a multiple of the devices.
    leaves = {"square": ((8, 8), P(), None), "stack": ((3, 24, 20), P(None, "fsdp", "tp"), None)}
    layout = Layout(leaves, told.split(",")[0])
    tx = scale_by_muon(orthogonalizer=by_its_shape, **settings_of(layout, told))
    with jax.set_mesh(layout.mesh):
        found, _ = updates_of(tx, layout.placed)
    expected, _ = updates_of(scale_by_muon(orthogonalizer=by_its_shape), layout.grads)
    assert_close(found, expected)


def test_parts_that_end_within_a_device_are_refused_inside_shard_map():
    layout = Layout(CROOKED)
    for leaf in CROOKED:
        axes = {leaf: layout.axes[leaf]}
        tx = scale_by_muon(matrix_axes=axes, shardings={leaf: layout.specs[leaf]})
        one = Layout({leaf: CROOKED[leaf]})
        with pytest.raises(ValueError, match=f"Inside shard_map.*hold whole parts of {leaf!r}"):
            in_shard_map(one, two_steps(tx), *one.placed)


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("make", [normuon, scion])
def test_a_whole_model(make, told):
    leaves = {"embed": ((24, 16), P(None, "tp"), None), "bias": ((32,), P("tp"), None)}
    leaves |= {"up": LEAVES["stacked"], "down": ((32, 16), P("tp", "fsdp"), None)}
    layout = Layout(leaves, told.split(",")[0])
    settings = {"weight_decay": 0.1, "cautious_weight_decay": True, "mu_dtype": jnp.int8}

    def steps(grads, **where):
        tx = make(0.02, ns_steps=1, **settings, **where)
        params, step = grads[0], jax.jit(tx.update)
        state = tx.init(params)
        for g in grads:
            updates, state = step(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    expected = steps([jax.tree.map(jnp.asarray, g) for g in layout.grads])
    with jax.set_mesh(layout.mesh):
        found = steps(layout.placed, **settings_of(layout, told))
    assert_close([found], [expected])


# --- What crosses the network ----------------------------------------------------------------

EVEN = {"kernel": ((16, 64, 128), P(None, "fsdp", "tp"), MatrixAxes())}


def program(tx, layout):
    """The state, and what the compiled update costs."""
    with jax.set_mesh(layout.mesh):
        state = jax.jit(tx.init)(layout.placed[0])
        return state, measure(jax.jit(tx.update).lower(layout.placed[0], state).compile())


@pytest.mark.parametrize("told", ["Auto, told", "Explicit"])
@pytest.mark.parametrize(("name", "summed"), [("normuon", 128 // 4 + 4), ("adamuon", 2)])
def test_a_second_moment_moves_sums_and_no_matrices(name, summed, told):
    layout = Layout(EVEN, told.split(",")[0])
    settings = {"matrix_axes": layout.axes} | settings_of(layout, told)
    _, plain = program(SCALE_BY["muon"](**settings), layout)
    state, found = program(SCALE_BY[name](**settings), layout)
    sums = found.collectives.pop("all-reduce")
    assert found.collectives == plain.collectives
    # Of each matrix its own columns, where there are some, and norms over one mesh axis at a time.
    assert sums.output_bytes <= 4 * 16 * summed
    if told == "Explicit":
        spec = P(None, None, "tp") if name == "normuon" else EVEN["kernel"][1]
        assert lies_like(state.nu["kernel"], NamedSharding(layout.mesh, spec))


# --- The blocks of MuonBP --------------------------------------------------------------------

WAYS = {
    "stacked": (4, 4),
    "rows": (4, 1),
    "whole": (1, 1),
    "experts": (4, 1),
    "heads": (4, 4),
    "heads apart": None,
}
BLOCKED = {leaf: LEAVES[leaf] for leaf in WAYS}


def blocks_alone():
    """The blocks of each leaf by number."""
    layout, found = Layout(BLOCKED), [{}, {}]
    for leaf, ways in WAYS.items():
        axes = layout.axes[leaf]
        tx = scale_by_muonbp(period=2, blocks=ways, matrix_axes=axes, scale="mup", **ONE_STEP)
        updates, _ = updates_of(tx, [g[leaf] for g in layout.grads])
        for way, update in zip(found, updates, strict=True):
            way[leaf] = update
    return found


@pytest.mark.parametrize("told", ["Auto, told", "Explicit", "shard_map"])
def test_the_blocks_are_what_the_devices_hold(told):
    layout = Layout(BLOCKED, "Explicit" if told == "Explicit" else "Auto")
    settings = {"shardings": layout.specs} if told != "Explicit" else {}
    settings |= {"matrix_axes": layout.axes, "period": 2, "scale": "mup"} | ONE_STEP
    tx = scale_by_muonbp(**settings)
    if told == "shard_map":
        found = in_shard_map(layout, two_steps(tx), *layout.placed)
    else:
        with jax.set_mesh(layout.mesh):
            found, _ = updates_of(tx, layout.placed)
    assert_close(found, blocks_alone())


@pytest.mark.parametrize("told", ["Auto, told", "Explicit"])
def test_a_step_on_blocks_has_no_collective(told, monkeypatch):
    # Where a mesh axis repeats a leaf, the devices along it share the work.
    held_once = ("stacked", "experts", "heads")
    layout = Layout({leaf: LEAVES[leaf] for leaf in held_once}, told.split(",")[0])
    settings = {"matrix_axes": layout.axes} | ONE_STEP | settings_of(layout, told)
    _, either = program(scale_by_muonbp(period=5, **settings), layout)
    monkeypatch.setattr(jax.lax, "cond", lambda whole_next, whole, blocks, *args: blocks(*args))
    _, on_blocks = program(scale_by_muonbp(period=5, **settings), layout)
    assert "all-to-all" in either.collectives
    assert on_blocks.flops and not on_blocks.collectives


def test_blocks_that_nothing_tells_of_are_refused():
    layout = Layout(LEAVES)
    tx = scale_by_muonbp(matrix_axes=layout.axes, mesh=layout.mesh)
    with pytest.raises(
        ValueError, match=r"Cannot determine the sharding of '.*'.* pass shardings="
    ):
        jax.jit(tx.update)(layout.placed[0], tx.init(layout.placed[0]))


def test_a_period_of_one_needs_to_know_of_no_blocks():
    layout = Layout(LEAVES)
    settings = {"matrix_axes": layout.axes, "mesh": layout.mesh, "scale": "mup"} | ONE_STEP
    found, _ = updates_of(scale_by_muonbp(period=1, **settings), layout.placed)
    assert_close(found, alone("muon", "straight"))
