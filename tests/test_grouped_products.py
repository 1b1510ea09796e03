"""Products of rows with their group's kernel: each platform's form against a loop over groups."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pretraining import SMALL, VOCABULARY, mesh_of, training

from experiments.compiled import measure
from experiments.language import sharding
from experiments.language.mesh import make_mesh
from experiments.language.sharding import spec
from experiments.pretrain import experts, grouped
from experiments.pretrain.experts import Experts
from experiments.pretrain.step import Trainer
from experiments.topology import TopologyError, topology_devices

ROWS, GROUPS = 640, 4
FORMS = {
    "cpu": functools.partial(grouped.blockwise_product, block=64),
    "gpu": functools.partial(grouped.gpu_product, expected=ROWS, interpret=True),
    "tpu": functools.partial(grouped.tpu_product, interpret=True),
}
SIZES = {
    "spread": (128, 256, 128, 128),
    "empty groups and rows": (0, 256, 0, 128),
    "all to one": (0, 0, ROWS, 0),
    "none at all": (0, 0, 0, 0),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def looped(x, kernels, sizes, g):
    """The product, and both gradients, of one group after another, in float64."""
    x, kernels, g = (a.astype(np.float64) for a in (x, kernels, g))
    y, dx, dk = np.zeros((len(x), kernels.shape[2])), np.zeros(x.shape), np.zeros(kernels.shape)
    ends = np.cumsum(sizes)
    for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        rows = slice(end - size, end)
        y[rows], dx[rows] = x[rows] @ kernels[group], g[rows] @ kernels[group].T
        dk[group] = x[rows].T @ g[rows]
    return y[: ends[-1]], dx[: ends[-1]], dk


# Of a GPU's tiles the last lies partly outside, in one axis or both; or all are whole.
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("form", "shape"),
    [("cpu", (64, 32)), ("tpu", (64, 32)), *(("gpu", s) for s in ((144, 48), (32, 704), (64, 32)))],
    ids=str,
)
def test_every_form_is_a_loop_over_groups(form, shape, sizes):
    x, kernels = normal(0, ROWS, shape[0]), normal(1, GROUPS, *shape)
    g = normal(2, ROWS, shape[1])
    used = sum(sizes)
    # Where a group's rows end, there is nothing of the others.
    x[used:] = g[used:] = 0

    @jax.jit
    def run(x, kernels, g):
        product = functools.partial(FORMS[form], group_sizes=jnp.array(sizes, jnp.int32))
        y, backward = jax.vjp(lambda x, kernels: product(x, kernels), x, kernels)
        return y, *backward(g)

    with jax.default_matmul_precision("highest"):
        y, dx, dk = run(x, kernels, g)
    for found, expected in zip(
        (y[:used], dx[:used], dk), looped(x, kernels, sizes, g), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-5)


# --- Experts of a mesh -----------------------------------------------------------------------


def gradients(mesh, count, width, hidden, active, tokens, dtype=jnp.float32):
    """The jitted gradients of experts' outputs, and the shapes that it takes."""

    def make():
        return Experts(count, width, hidden, init=nnx.initializers.normal(0.5), rngs=nnx.Rngs(0))

    graph, params = nnx.split(nnx.eval_shape(make))

    def loss(params, x, ids, weights):
        y = nnx.merge(graph, params)(x, ids, weights, "gather")
        return jnp.sum((y * jnp.cos(x)).astype(jnp.float32))

    def placed(shape, axis, dtype):
        place = jax.NamedSharding(mesh, spec(axis, None, None))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    params = jax.tree.map(lambda x: placed(x.shape, "experts", dtype), params)
    x = placed((*tokens, width), "batch", dtype)
    ids, weights = (placed((*tokens, active), "batch", d) for d in (jnp.int32, jnp.float32))
    return jax.jit(jax.grad(loss, (0, 1, 3))), (params, x, ids, weights)


@pytest.mark.parametrize("routing", ["spread", "hot"])
def test_experts_of_a_gpu_have_the_gradients_of_a_cpus(routing, monkeypatch):
    mesh = mesh_of(1, 2, 2, 1)
    rng = np.random.default_rng(0)

    def drawn(shape):
        if shape.dtype == jnp.int32:
            ids = np.argsort(rng.random((*shape.shape[:2], 8)), axis=-1)[..., :2]
            found = np.broadcast_to([6, 0], ids.shape) if routing == "hot" else ids
            return jax.device_put(found.astype(np.int32), shape.sharding)
        return jax.device_put(rng.normal(size=shape.shape).astype(shape.dtype), shape.sharding)

    found = []
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        _, shapes = gradients(mesh, 8, 32, 16, 2, (8, 12))
        arguments = jax.tree.map(drawn, shapes)
        found.append(gradients(mesh, 8, 32, 16, 2, (8, 12))[0](*arguments))
        interpreted = functools.partial(grouped.gpu_product, interpret=True)
        monkeypatch.setattr(grouped, "gpu_product", interpreted)
        monkeypatch.setattr(experts, "platform", lambda: "gpu")
        found.append(gradients(mesh, 8, 32, 16, 2, (8, 12))[0](*arguments))
    for cpu, gpu in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.max(np.abs(cpu)) > 1
        np.testing.assert_allclose(gpu, cpu, rtol=1e-4, atol=1e-4)


def devices_of(topology):
    try:
        return topology_devices(topology)
    except TopologyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("topology", "sizes"), [("h100:8", (1, 4, 2, 1)), ("v5e:2x4", (1, 8, 1, 1))]
)
def test_experts_compute_each_product_once(topology, sizes):
    mesh = make_mesh(sizes, devices_of(topology))
    count, width, hidden, active, tokens = 16, 512, 704, 4, (32, 1024)
    with jax.set_mesh(mesh):
        step, shapes = gradients(mesh, count, width, hidden, active, tokens, jnp.bfloat16)
        program = measure(step.lower(*shapes).compile())
    pairs = active * math.prod(tokens) // 8
    assert program.unread == {}
    # Three products, and two gradients of each.
    assert 0.95 < program.flops / (9 * 2 * width * hidden * pairs) < 1.1
    # XLA's own form for GPUs holds a copy of all rows for each expert.
    assert program.temp_bytes < 20 * pairs * (width + hidden) * 2


def test_no_kernel_hides_the_experts_from_the_optimizer(recwarn):
    """Where they are written as kernels, too; a guess would be warned of."""
    config = training(SMALL)
    trainer = Trainer(config, "muon", make_mesh((1, 1, 1, 1), devices_of("h100:8")[:1]), VOCABULARY)
    labels = trainer.labels["moe_layers"]["feed_forward"]["experts"]
    assert labels == {"down": "muon", "gate": "muon", "up": "muon"}
    assert not recwarn.list


# --- What devices along fsdp exchange --------------------------------------------------------


def test_a_gather_in_two_stages_is_one_gather(monkeypatch):
    mesh = mesh_of(1, 8, 1, 1)
    x, g = normal(0, 16, 3), normal(1, 8, 16, 3)

    def weighted(x, g):
        whole = sharding.gather(x, "fsdp")
        return jnp.sum(whole * g[0] + whole**2)[None]

    def run():
        mapped = jax.shard_map(weighted, in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp"))
        return jax.jit(jax.value_and_grad(lambda x, g: jnp.sum(mapped(x, g))))(x, g)

    with jax.set_mesh(mesh):
        expected = run()
        monkeypatch.setattr(sharding, "_line", lambda mesh, axis: 4)
        found = run()
    np.testing.assert_allclose(found[0], np.sum(8 * x**2 + x * g.sum(axis=0)), rtol=1e-5)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], 16 * x + g.sum(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("topology", "sizes"), [("h100:8", (1, 8, 1, 1)), ("v5p:4x4x4", (1, 64, 1, 1))]
)
def test_experts_exchange_kernels_and_gradients_once(topology, sizes):
    """Gathered for the forward pass and, anew, for the backward; gradients leave scattered."""
    mesh = make_mesh(sizes, devices_of(topology))
    with jax.set_mesh(mesh):
        step, shapes = gradients(mesh, 64, 512, 256, 2, (64, 64), jnp.bfloat16)
        program = measure(step.lower(*shapes).compile())
    kernels = 3 * 64 * 512 * 256 * 2
    found = program.collectives
    assert found["all-gather"].output_bytes <= 1.3 * kernels
    assert found["reduce-scatter"].operand_bytes <= 1.3 * kernels
    others = sum(c.output_bytes for kind, c in found.items() if "all-re" in kind)
    assert others < 0.01 * kernels
