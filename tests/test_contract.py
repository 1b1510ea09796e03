"""Every transformation of the package keeps Optax's contract; one row in the table each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equinox import apply_updates, combine, filter, filter_value_and_grad, is_inexact_array, nn
from flax import linen, nnx
from flax.training import train_state
from orbax.checkpoint import v1 as ocp

import muon_jax

TREES = {
    "routing": {"block": {"up": {"kernel": "muon", "bias": "other"}, "gate": "frozen"}}
    | {"stack": "muon", "embed": "other"},
    "weight_decay_mask": {"block": True, "stack": False, "embed": False},
    "matrix_axes": {"block": None, "stack": muon_jax.MatrixAxes(-1, -2), "embed": None},
}
PARTS = {"stack": muon_jax.MatrixAxes(split_fan_out=(1, 3))}
RATE = optax.cosine_decay_schedule(0.02, 100)
DECAY = optax.linear_schedule(0.1, 0.0, 100)


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


# One Newton-Schulz step, which compiles faster than five.
TRANSFORMATIONS = {
    "muon": lambda: muon_jax.muon(0.02, weight_decay=0.1, ns_steps=1),
    "muon with schedules and rules": lambda: muon_jax.muon(
        RATE,
        weight_decay=DECAY,
        mu_dtype=jnp.bfloat16,
        momentum="optax",
        routing=[("gate", "frozen")],
        ns_steps=1,
    ),
    "muon with trees": lambda: muon_jax.muon(0.02, weight_decay=DECAY, ns_steps=1, **TREES),
    "optax_muon": lambda: muon_jax.optax_muon(0.02, ns_steps=1, weight_decay=0.1),
    "muon on a mesh": lambda: muon_jax.muon(0.02, weight_decay=0.1, ns_steps=1, mesh=mesh()),
    "scale_by_muon": lambda: optax.chain(
        muon_jax.scale_by_muon(
            momentum="heavy_ball",
            orthogonalizer=functools.partial(muon_jax.newton_schulz, steps=1),
        ),
        optax.scale_by_learning_rate(0.02),
    ),
    "int8": lambda: muon_jax.muon(
        0.02,
        weight_decay=0.1,
        mu_dtype=jnp.int8,
        cautious_weight_decay=True,
        other_optimizer="lion",
        ns_steps=1,
    ),
    "int4": lambda: muon_jax.muon(0.02, weight_decay=0.1, mu_dtype=jnp.int4, ns_steps=1),
    "normuon": lambda: muon_jax.normuon(0.02, weight_decay=0.1, ns_steps=1, matrix_axes=PARTS),
    "adamuon": lambda: muon_jax.adamuon(0.02, weight_decay=0.1, ns_steps=1),
    "low_rank": lambda: muon_jax.low_rank(0.02, 2, weight_decay=0.1),
    "muonbp": lambda: muon_jax.muonbp(0.02, period=2, blocks=(2, 2), weight_decay=0.1, ns_steps=1),
    "dion": lambda: muon_jax.dion(0.02, rank=2, weight_decay=0.1),
    "dion3": lambda: muon_jax.dion3(0.02, fraction=0.5, weight_decay=0.1, ns_steps=1),
    "muown": lambda: muon_jax.muown(0.02, weight_decay=0.1, ns_steps=1),
    "muloco": lambda: muon_jax.muloco(muon_jax.muon(0.02, weight_decay=0.1, ns_steps=1), every=2),
    "lookahead": lambda: optax.chain(
        muon_jax.muon(0.02, beta=RATE, ns_steps=1), muon_jax.lookahead(RATE)
    ),
    # The longer side, without an eigenbasis of its own after one gradient, is left as it is.
    "splus": lambda: muon_jax.splus(0.2, every=2, max_dim=5, weight_decay=0.1),
    "muonh": lambda: muon_jax.muonh(0.02, ns_steps=1, matrix_axes=PARTS),
    "hooks": lambda: muon_jax.muon(
        0.02,
        before=[muon_jax.equilibrate(), muon_jax.second_moment()],
        after=[muon_jax.snap_norm(), muon_jax.noise_scale()],
        constraint=[muon_jax.update_floor(), muon_jax.spectral_sphere(), muon_jax.radial_brake()],
        weight_decay=0.1,
        ns_steps=1,
    ),
    "spel": lambda: muon_jax.spel(0.02, weight_decay=0.1, ns_steps=1),
    "aurora": lambda: muon_jax.aurora(0.02, weight_decay=0.1, ns_steps=1),
    "soap": lambda: muon_jax.soap(0.02, every=2, max_dim=5, weight_decay=0.1),
    "polargrad": lambda: muon_jax.polargrad(0.02, weight_decay=0.1, ns_steps=1),
    "scion": lambda: muon_jax.scion(2**-9, constrained=True, ns_steps=1),
    "gluon": lambda: muon_jax.gluon(smoothness=(0.5, 9.0), weight_decay=0.1, ns_steps=1),
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
def trained(name):
    return train(TRANSFORMATIONS[name](), params_for(name))


def assert_close(ours, theirs):
    """Two programs for one computation: rounding apart, 3e-6 measured."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5), ours, theirs)


# --- State -----------------------------------------------------------------------------------


@every_transformation
def test_the_state_keeps_structure_and_dtypes_and_is_traced_once(name):
    tx, params = TRANSFORMATIONS[name](), params_for(name)
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
    tx, params = TRANSFORMATIONS[name](), params_for(name)

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
    tx, params = TRANSFORMATIONS[name](), params_for(name)
    state = tx.init(params)
    marked = optax.tree_map_params(
        tx, lambda _: "moment", state, transform_non_params=lambda _: "other"
    )
    for mark, x in zip(jax.tree.leaves(marked), jax.tree.leaves(state), strict=True):
        assert mark == ("moment" if x.ndim else "other")


@every_transformation
def test_init_and_update_work_on_shapes_alone(name):
    tx, params = TRANSFORMATIONS[name](), params_for(name)
    state = jax.eval_shape(tx.init, params)
    assert signature(state) == signature(tx.init(params))
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert signature(updates) == signature(params) and signature(after) == signature(state)


@every_transformation
def test_orbax_restores_the_state_bit_for_bit(name, tmp_path):
    tx, params = TRANSFORMATIONS[name](), params_for(name)
    step = make_step(tx)
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
    tx, params = TRANSFORMATIONS[name](), params_for(name)
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
    wrapped, params = WRAPPERS[wrapper](TRANSFORMATIONS[name]()), params_for(name)
    step = make_step(wrapped)
    ours, state = train(wrapped, params, step=step)
    assert step._cache_size() == 1
    assert signature(state) == signature(wrapped.init(params))
    assert_close(ours, trained(name)[0])


@every_transformation
def test_multi_steps_averages(name):
    tx, params = TRANSFORMATIONS[name](), params_for(name)
    several = optax.MultiSteps(tx, 2)
    step, state = make_step(several), several.init(params)
    first, second = gradients(params, 0), gradients(params, 50)
    half, state = step(params, state, first)
    assert_same_bits(half, params)
    ours, _ = step(half, state, second)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    assert_close(ours, make_step(tx)(params, tx.init(params), mean)[0])


@every_transformation
def test_apply_if_finite_skips_a_bad_step(name):
    tx, params = TRANSFORMATIONS[name](), params_for(name)
    guarded = optax.apply_if_finite(tx, 3)
    bad = jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), params)
    step, state = make_step(guarded), guarded.init(params)
    ours, state = step(params, state, bad)
    assert_same_bits(ours, params)
    assert_close(step(ours, state, params)[0], make_step(tx)(params, tx.init(params), params)[0])


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


def test_inject_hyperparams_changes_the_rate_between_steps():
    tx, params = optax.inject_hyperparams(muon_jax.muon)(learning_rate=0.02), params_for("muon")
    step, state = make_step(tx), tx.init(params)
    g = gradients(params, 0)
    full = jax.tree.map(jnp.subtract, step(params, state, g)[0], params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.01, jnp.float32)
    half = jax.tree.map(jnp.subtract, step(params, state, g)[0], params)
    assert_close(jax.tree.map(lambda u: 2 * u, half), full)
    assert step._cache_size() == 1


# --- Inside JAX's transformations ------------------------------------------------------------


@every_transformation
def test_a_compiled_step_is_the_eager_step(name):
    tx, params = TRANSFORMATIONS[name](), params_for(name)
    g, state = gradients(params, 0), tx.init(params)
    updates, after = tx.update(g, state, params)
    compiled, compiled_state = make_step(tx)(params, state, g)
    assert_close(compiled, optax.apply_updates(params, updates))
    assert_close(compiled_state, after)


@every_transformation
def test_vmap_over_models(name):
    tx = TRANSFORMATIONS[name]()
    models = [params_for(name, seed) for seed in (0, 100)]
    grads = [gradients(params, 7 * n) for n, params in enumerate(models)]
    stacked, stacked_grads = (jax.tree.map(lambda *x: jnp.stack(x), *t) for t in (models, grads))
    step = make_step(tx)
    ours, _ = jax.vmap(step)(stacked, jax.vmap(tx.init)(stacked), stacked_grads)
    one_by_one = [step(p, tx.init(p), g)[0] for p, g in zip(models, grads, strict=True)]
    assert_close(ours, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


@every_transformation
def test_scan_over_steps(name):
    tx, params = TRANSFORMATIONS[name](), params_for(name)
    grads = [gradients(params, 10 * seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    step = make_step(tx)
    ours, _ = jax.lax.scan(
        lambda carry, g: (step(*carry, g), None), (params, tx.init(params)), stacked
    )
    assert_close(ours[0], trained(name)[0])


# --- With the frameworks' own models ---------------------------------------------------------

X = normal((16, 4), 0)
Y = jnp.sin(X @ normal((4, 3), 1))


def falls(losses):
    return losses[-1] < 0.5 * losses[0] and np.all(np.isfinite(losses))


def hybrid():
    return muon_jax.muon(0.05, weight_decay=0.01, adam_learning_rate=0.02)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.up, self.out = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        self.norm, self.drop = nnx.LayerNorm(16, rngs=rngs), nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(jnp.tanh(self.up(x)))))


class NnxVector(nnx.Module):
    def __init__(self):
        self.bias = nnx.Param(jnp.zeros(3))

    def __call__(self, x):
        return jnp.broadcast_to(self.bias[...], (len(x), 3))


def train_nnx(model, y):
    optimizer = nnx.Optimizer(model, hybrid(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer)) for _ in range(60)]


def train_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "tp"))
            return linen.Dense(3)(jnp.tanh(linen.Dense(16, kernel_init=init)(x)))

    net = Net()
    params = net.init(jax.random.key(0), X)["params"]
    state = train_state.TrainState.create(apply_fn=net.apply, params=params, tx=hybrid())

    @jax.jit
    def step(state):
        loss_of = lambda p: jnp.mean((net.apply({"params": p}, X) - Y) ** 2)  # noqa: E731
        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    return losses


def train_equinox():
    model = nn.MLP(4, 3, 16, 1, key=jax.random.key(0))
    tx = hybrid()
    params, static = filter(model, is_inexact_array), filter(model, is_inexact_array, inverse=True)
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, state):
        loss_of = lambda p: jnp.mean((jax.vmap(combine(p, static))(X) - Y) ** 2)  # noqa: E731
        loss, grads = filter_value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state, loss

    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(
    "train_model",
    [
        lambda: train_nnx(NnxNet(nnx.Rngs(0)), Y),
        # flax issue 4901: optax's Muon fails in nnx.Optimizer where no parameter is a matrix.
        lambda: train_nnx(NnxVector(), jnp.ones((16, 3))),
        train_linen,
        train_equinox,
    ],
    ids=["nnx", "nnx vector only", "linen", "equinox"],
)
def test_the_loss_of_a_real_model_falls(train_model):
    assert falls(train_model())
