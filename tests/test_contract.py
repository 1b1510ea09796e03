"""Every transformation of the package keeps Optax's contract; one row in the table each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import DECAY, RATE, make
from flax import nnx
from orbax.checkpoint import v1 as ocp

import muon_jax

TREES = {
    "routing": {"block": {"up": {"kernel": "muon", "bias": "other"}, "gate": "frozen"}}
    | {"stack": "muon", "embed": "other"},
    "weight_decay_mask": {"block": True, "stack": False, "embed": False},
    "matrix_axes": {"block": None, "stack": muon_jax.MatrixAxes(-1, -2), "embed": None},
}
PARTS = {"stack": muon_jax.MatrixAxes(split_fan_out=(1, 3))}


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def quick(factory, *args, **settings):
    """With decay, and one Newton-Schulz step, which compiles faster than five."""
    return lambda: factory(*args, **{"weight_decay": 0.1, "ns_steps": 1} | settings)


def row(name, **settings):
    return lambda: make(name, **{"weight_decay": 0.1} | settings)


TRANSFORMATIONS = {
    name: row(name)
    for name in ("muon", "int4", "adamuon", "low_rank", "muonbp", "dion", "splus", "gluon")
} | {
    "muon with schedules and rules": quick(
        muon_jax.muon,
        RATE,
        weight_decay=DECAY,
        mu_dtype=jnp.bfloat16,
        momentum="optax",
        routing=[("gate", "frozen")],
    ),
    "muon with trees": quick(muon_jax.muon, 0.02, weight_decay=DECAY, **TREES),
    "optax_muon": quick(muon_jax.optax_muon, 0.02),
    "muon on a mesh": lambda: quick(muon_jax.muon, 0.02, mesh=mesh())(),
    "scale_by_muon": lambda: optax.chain(
        muon_jax.scale_by_muon(
            momentum="heavy_ball",
            orthogonalizer=functools.partial(muon_jax.newton_schulz, steps=1),
        ),
        optax.scale_by_learning_rate(0.02),
    ),
    "int8": row("int8", cautious_weight_decay=True, other_optimizer="lion"),
    "normuon": row("normuon", matrix_axes=PARTS),
    "dion3": quick(muon_jax.dion3, 0.02, fraction=0.5),
    "muown": quick(muon_jax.muown, 0.02),
    "muloco": lambda: muon_jax.muloco(quick(muon_jax.muon, 0.02)(), every=2),
    "lookahead": lambda: optax.chain(
        muon_jax.muon(0.02, beta=RATE, ns_steps=1), muon_jax.lookahead(RATE)
    ),
    "muonh": quick(muon_jax.muonh, 0.02, weight_decay=0.0, matrix_axes=PARTS),
    "hooks": quick(
        muon_jax.muon,
        0.02,
        before=[muon_jax.equilibrate(), muon_jax.second_moment()],
        after=[muon_jax.snap_norm(), muon_jax.noise_scale()],
        constraint=[muon_jax.update_floor(), muon_jax.spectral_sphere(), muon_jax.radial_brake()],
    ),
    "spel": quick(muon_jax.spel, 0.02),
    "aurora": quick(muon_jax.aurora, 0.02),
    # The longer side, without an eigenbasis of its own after one gradient, is left as it is.
    "soap": lambda: muon_jax.soap(0.02, every=2, max_dim=5, weight_decay=0.1),
    "polargrad": quick(muon_jax.polargrad, 0.02),
    "scion": row("scion", weight_decay=0.0, constrained=True),
}

# What is kept for whole rows, columns or directions of the matrices, and for parts of them.
REDUCED = {
    "int8": {(4, 1), (2, 6, 1)},
    "int4": {(4, 1), (2, 6, 1)},
    "normuon": {(1, 6), (2, 1, 1, 1), (2, 1, 1, 3)},
    "dion": {(4, 2), (2, 6, 2)},
    "soap": {(4, 4), (2, 4, 4)},
    "dion3": {(4,), (2, 4)},
    "muown": {(1, 6), (2, 1, 4)},
    "muonh": {(1, 1), (2, 1, 1, 1)},
    "hooks": {(1, 1), (2, 1, 1), (1, 6), (2, 1, 4)},
    "splus": {(4, 4), (2, 4, 4)},
}

# The weight of an average, and the factor of the next look ahead.
ONE_FLOAT = {"splus", "lookahead"}

# Those that take matrices only, and leave the rest to another transformation.
MATRICES_ONLY = {"scale_by_muon"}

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params_for(name, seed=0):
    params = {
        "block": {"up": {"kernel": normal((4, 6), seed)}, "gate": {"kernel": normal((4, 6), 1)}},
        "stack": [normal((2, 6, 4), seed + 2)],
    }
    if name in MATRICES_ONLY:
        return params
    params["block"]["up"]["bias"] = normal((6,), seed + 3)
    params |= {"embed": normal((8, 4), seed + 4)}
    return jax.tree.map(on_mesh, params) if "mesh" in name else params


def on_its_mesh(x, params):
    """Counters, which start on one device, on the mesh of the params."""
    sharding = jax.tree.leaves(params)[0].sharding
    if x.ndim or not isinstance(sharding, jax.sharding.NamedSharding):
        return x
    return jax.device_put(
        x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    )


def on_mesh(x):
    spec = jax.sharding.PartitionSpec(*(None,) * (x.ndim - 1), "model")
    return jax.device_put(x, jax.sharding.NamedSharding(mesh(), spec))


def gradients(params, seed):
    leaves, tree = jax.tree.flatten(params)
    drawn = [normal(x.shape, seed + n) for n, x in enumerate(leaves)]
    if isinstance(leaves[0].sharding, jax.sharding.NamedSharding):
        drawn = jax.device_put(drawn, [x.sharding for x in leaves])
    return tree.unflatten(drawn)


def signature(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def assert_same_bits(ours, theirs):
    assert signature(ours) == signature(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def make_step(tx):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, steps=4, step=None):
    step, state = step or make_step(tx), tx.init(params)
    state = jax.tree.map(lambda x: on_its_mesh(x, params), state)
    for seed in range(steps):
        params, state = step(params, state, gradients(params, 10 * seed))
    return params, state


@functools.cache
def made(name):
    """The transformation, params, and a step that is compiled once for many tests."""
    tx = TRANSFORMATIONS[name]()
    return tx, params_for(name), make_step(tx)


@functools.cache
def trained(name):
    tx, params, step = made(name)
    return train(tx, params, step=step)


def assert_close(ours, theirs):
    """Two programs for one computation: rounding apart, 3e-6 measured."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5), ours, theirs)


# --- State -----------------------------------------------------------------------------------


@every_transformation
def test_the_state_keeps_structure_and_dtypes_and_is_traced_once(name):
    tx, params, _ = made(name)
    step = make_step(tx)
    before = signature(tx.init(params))
    trained, state = train(tx, params, step=step)
    assert signature(state) == before
    assert signature(trained) == signature(params)
    assert step._cache_size() == 1
    assert not any(
        np.array_equal(a, b) for a, b in zip(*map(moving, (trained, params)), strict=True)
    )


def moving(params):
    return [x for path, x in jax.tree.leaves_with_path(params) if "gate" not in str(path)]


@every_transformation
def test_the_state_is_named_tuples_shaped_like_the_params(name):
    tx, params, _ = made(name)

    def check(node):
        if isinstance(node, tuple):
            assert type(node) is not tuple or all(isinstance(x, tuple) for x in node)
            for child in node:
                check(child)

    state = tx.init(params)
    check(state)
    shapes = [x.shape for x in jax.tree.leaves(state)]
    # Coefficients are static: the state holds moments and counts, and nothing else.
    reduced = REDUCED.get(name, set())
    assert reduced < set(shapes)
    assert set(shapes) <= {x.shape for x in jax.tree.leaves(params)} | {()} | reduced
    counts = [x for x in jax.tree.leaves(state) if x.shape == ()]
    floats = [x for x in counts if x.dtype != jnp.int32]
    assert not any(counts) and len(floats) == (name in ONE_FLOAT)


@every_transformation
def test_tree_map_params_finds_the_moments(name):
    tx, params, _ = made(name)
    state = tx.init(params)
    marked = optax.tree_map_params(
        tx, lambda _: "moment", state, transform_non_params=lambda _: "other"
    )
    for mark, x in zip(jax.tree.leaves(marked), jax.tree.leaves(state), strict=True):
        assert mark == ("moment" if x.ndim else "other")


@every_transformation
def test_init_and_update_work_on_shapes_alone(name):
    tx, params, _ = made(name)
    state = jax.eval_shape(tx.init, params)
    assert signature(state) == signature(tx.init(params))
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert signature(updates) == signature(params) and signature(after) == signature(state)


@every_transformation
def test_orbax_restores_the_state_bit_for_bit(name, tmp_path):
    tx, params, step = made(name)
    saved = train(tx, params, steps=2, step=step)
    ocp.save(tmp_path / "step_2", saved)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
    )
    restored = ocp.load(tmp_path / "step_2", target)
    assert_same_bits(restored, saved)
    g = gradients(params, 99)
    assert_same_bits(step(*restored, g), step(*saved, g))


@every_transformation
def test_buffers_may_be_donated(name):
    tx, params = made(name)[0], params_for(name)
    donating = jax.jit(make_step(tx), donate_argnums=(0, 1))
    assert_same_bits(train(tx, params, step=donating), trained(name))
    assert all(x.is_deleted() for x in jax.tree.leaves(params))


# --- Inside other transformations ------------------------------------------------------------


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx, optax.scale(1.0)),
    "masked": lambda tx: optax.masked(tx, True),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, "all"),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@every_transformation
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_change_nothing(name, wrapper):
    tx, params, _ = made(name)
    wrapped = WRAPPERS[wrapper](tx)
    step = make_step(wrapped)
    ours, state = train(wrapped, params, step=step)
    assert step._cache_size() == 1
    assert signature(state) == signature(wrapped.init(params))
    assert_close(ours, trained(name)[0])


@every_transformation
def test_multi_steps_averages(name):
    tx, params, plain = made(name)
    several = optax.MultiSteps(tx, 2)
    step, state = make_step(several), several.init(params)
    first, second = gradients(params, 0), gradients(params, 50)
    half, state = step(params, state, first)
    assert_same_bits(half, params)
    ours, _ = step(half, state, second)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    assert_close(ours, plain(params, tx.init(params), mean)[0])


@every_transformation
def test_apply_if_finite_skips_a_bad_step(name):
    tx, params, plain = made(name)
    guarded = optax.apply_if_finite(tx, 3)
    bad = jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), params)
    step, state = make_step(guarded), guarded.init(params)
    ours, state = step(params, state, bad)
    assert_same_bits(ours, params)
    assert_close(step(ours, state, params)[0], plain(params, tx.init(params), params)[0])


def test_inject_hyperparams():
    inject = optax.inject_hyperparams(muon_jax.muon, static_args=("ns_steps",))
    rate = optax.linear_schedule(0.02, 0.0, 10)
    params = params_for("muon")
    tx = inject(learning_rate=rate, weight_decay=0.1, beta=0.9, adam_b1=0.9, ns_steps=5)
    step = make_step(tx)
    ours, state = train(tx, params, step=step)
    assert step._cache_size() == 1
    assert {"learning_rate", "weight_decay", "beta", "adam_b1"} <= set(state.hyperparams)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(rate(3))
    assert_close(ours, train(muon_jax.muon(rate, weight_decay=0.1, beta=0.9), params)[0])
    with pytest.raises(TypeError, match="static_args"):
        train(optax.inject_hyperparams(muon_jax.muon)(learning_rate=0.1, ns_steps=5), params)


# --- Inside JAX's transformations ------------------------------------------------------------


# The others take ten eager steps beside float64 NumPy in `test_variants.py` and `test_muon.py`.
@pytest.mark.parametrize(
    "name",
    ["muon on a mesh", "muonbp", "splus", "muown", "muloco", "lookahead", "hooks", "spel"]
    + ["soap", "polargrad", "aurora"],
)
def test_a_compiled_step_is_the_eager_step(name):
    tx, params, step = made(name)
    g, state = gradients(params, 0), tx.init(params)
    updates, after = tx.update(g, state, params)
    compiled, compiled_state = step(params, state, g)
    assert_close(compiled, optax.apply_updates(params, updates))
    assert_close(compiled_state, after)


@every_transformation
def test_vmap_over_models(name):
    tx, _, step = made(name)
    models = [params_for(name, seed) for seed in (0, 100)]
    grads = [gradients(params, 7 * n) for n, params in enumerate(models)]
    stacked, stacked_grads = (jax.tree.map(lambda *x: jnp.stack(x), *t) for t in (models, grads))
    ours, _ = jax.vmap(step)(stacked, jax.vmap(tx.init)(stacked), stacked_grads)
    one_by_one = [step(p, tx.init(p), g)[0] for p, g in zip(models, grads, strict=True)]
    assert_close(ours, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


@every_transformation
def test_scan_over_steps(name):
    tx, params, step = made(name)
    grads = [gradients(params, 10 * seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    ours, _ = jax.lax.scan(
        lambda carry, g: (step(*carry, g), None), (params, tx.init(params)), stacked
    )
    assert_close(ours[0], trained(name)[0])


def test_a_module_without_matrices_trains_in_nnx():
    """flax issue 4901: optax's Muon fails in `nnx.Optimizer` where no parameter is a matrix."""
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, muon_jax.muon(0.05), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = nnx.grad(lambda model: jnp.sum((model(jnp.eye(4, 3)) - 1) ** 2))(model)
    optimizer.update(model, grads)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, after)))
