"""What a step costs each device: figures of compiled programs, and the plan that tells them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import muon_jax
from experiments.compiled import measure

DEVICES, WIDTH, HIDDEN = 16, 256, 1024
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(kind, **sizes):
    devices = np.array(jax.devices()[:DEVICES]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(kind,) * len(sizes))


def abstract(shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}


def layers(count, stacked):
    """Three square kernels a layer, up and down."""
    kernels = dict.fromkeys(("query", "key", "out"), (WIDTH, WIDTH))
    kernels |= {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    if stacked:
        return {name: abstract((count, *shape)) for name, shape in kernels.items()}
    return {
        f"layer_{i}": {name: abstract(shape) for name, shape in kernels.items()}
        for i in range(count)
    }


def experts(first, second):
    up, down = (first, second, 64, 128), (first, second, 128, 64)
    return {"experts": {"up": abstract(up), "down": abstract(down)}}


def trailing(*spec):
    return lambda x: P(*(None,) * (len(x.shape) - 2), *spec)


# kind, mesh, params, specs; at most: FLOPs against an even share of the standard form's, bytes
# against the bfloat16 shard of the params, collectives for each shape of matrix; and which.
LINE, PLANE = {"fsdp": 16}, {"fsdp": 4, "tp": 4}
ON_FAN_IN, ON_BOTH = trailing("fsdp", None), trailing("fsdp", "tp")
ROUNDS = {"all-to-all"}
CUT = {"all-to-all", "all-reduce"}
BARS = {
    "stacked": (AUTO, LINE, layers(16, True), ON_FAN_IN, 1.05, 4.5, 4, ROUNDS),
    "separate": (AUTO, LINE, layers(16, False), ON_FAN_IN, 1.05, 4.5, 4, ROUNDS),
    "fsdp × tp": (AUTO, PLANE, layers(16, True), ON_BOTH, 1.05, 8.5, 4, ROUNDS),
    "fsdp × tp, separate": (AUTO, PLANE, layers(16, False), ON_BOTH, 1.05, 8.5, 4, ROUNDS),
    "explicit": (EXPLICIT, LINE, layers(16, True), ON_FAN_IN, 1.05, 4.5, 4, ROUNDS),
    "explicit, separate": (EXPLICIT, LINE, layers(16, False), ON_FAN_IN, 1.05, 4.5, 4, ROUNDS),
    "explicit, fsdp × tp": (EXPLICIT, PLANE, layers(16, True), ON_BOTH, 1.05, 4.5, 2, ROUNDS),
    "10 matrices": (AUTO, LINE, layers(2, True), ON_FAN_IN, 1.3, 30, 4, CUT),
    "10 matrices, separate": (AUTO, LINE, layers(2, False), ON_FAN_IN, 1.3, 30, 4, CUT),
    "10 matrices, explicit": (EXPLICIT, LINE, layers(2, True), ON_FAN_IN, 1.3, 30, 4, CUT),
    "experts [E, L]": (AUTO, PLANE, experts(16, 3), lambda x: P(("fsdp", "tp")), 1, 0, 0, set()),
    "experts [L, E]": (
        AUTO,
        PLANE,
        experts(3, 16),
        lambda x: P(None, ("fsdp", "tp")),
        1,
        0,
        0,
        set(),
    ),
    "experts, explicit": (
        EXPLICIT,
        PLANE,
        experts(16, 3),
        lambda x: P(("fsdp", "tp")),
        1,
        0,
        0,
        set(),
    ),
}


def standard_flops(params):
    total = 0
    for x in jax.tree.leaves(params):
        short, long = sorted(x.shape[-2:])
        total += np.prod(x.shape[:-2]) * 5 * (4 * long * short**2 + 2 * short**3)
    return total


def compiled_step(tx, params, shardings):
    """A training step's optimizer part, nothing of it told but where params and state lie."""

    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    mesh = jax.tree.leaves(shardings)[0].mesh
    by_shape = dict(
        zip([x.shape for x in jax.tree.leaves(params)], jax.tree.leaves(shardings), strict=True)
    )
    in_state = jax.tree.map(lambda x: by_shape.get(x.shape, NamedSharding(mesh, P())), state)

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    args = jax.tree.map(placed, (params, params, state), (shardings, shardings, in_state))
    out = (shardings, in_state)
    return jax.jit(step, out_shardings=out, donate_argnums=(0, 2)).lower(*args).compile()


@pytest.mark.parametrize("row", BARS)
def test_a_step_meets_its_bars_and_its_plan(row):
    kind, sizes, params, specs, most_flops, most_bytes, most_collectives, kinds = BARS[row]
    mesh = mesh_of(kind, **sizes)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, specs(x)), params)
    tx = muon_jax.muon(0.02, mesh=mesh)
    program = measure(compiled_step(tx, params, shardings))
    shard = 2 * sum(x.size for x in jax.tree.leaves(params)) / DEVICES
    shapes = {tuple(sorted(x.shape[-2:])) for x in jax.tree.leaves(params)}

    assert program.flops <= most_flops * standard_flops(params) / DEVICES
    assert program.exchanged_bytes <= most_bytes * shard
    assert set(program.collectives) <= kinds
    count = sum(collective.count for collective in program.collectives.values())
    orientations = {x.shape[-2:] for x in jax.tree.leaves(params)}
    assert count <= most_collectives * (len(orientations) if kinds == ROUNDS else len(shapes))
    assert program.in_loops == 0

    plan = muon_jax.plan(params, mesh=mesh, shardings=shardings)
    moves = len(sizes) if kind == AUTO else 1  # untold, XLA moves a leaf axis by axis
    assert plan.total("device_flops") == pytest.approx(program.flops, rel=0.05)
    assert plan.total("exchanged_bytes") * moves == pytest.approx(program.exchanged_bytes, rel=0.05)
    assert plan.total("standard_flops") == standard_flops(params)
    assert plan.total("momentum_bytes") == 2 * shard


def test_rivals_stand_where_the_table_says():
    """optax.contrib.muon on the first row, so that the bars keep their meaning."""
    params = layers(16, False)
    mesh = mesh_of(AUTO, **LINE)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, ON_FAN_IN(x)), params)
    program = measure(compiled_step(optax.contrib.muon(0.02), params, shardings))
    shard = 2 * sum(x.size for x in jax.tree.leaves(params)) / DEVICES
    assert 1.5 < program.flops / (standard_flops(params) / DEVICES) < 1.6
    assert program.exchanged_bytes / shard > 100


# --- Plans -----------------------------------------------------------------------------------


def moonlight():
    """Moonlight 16B-A3B: 27 layers, the first dense; 15.289 B parameters beside its ends."""
    d, moe, experts = 2048, 26, 64
    attention = {
        "q_proj": abstract((27, d, 16 * 192)),
        "kv_down": abstract((27, d, 512 + 64)),
        "kv_up": abstract((27, 512, 16 * 256)),
        "o_proj": abstract((27, 16 * 128, d)),
    }
    dense = {"gate": abstract((d, 11264)), "up": abstract((d, 11264)), "down": abstract((11264, d))}
    routed = {
        "gate": abstract((experts, moe, d, 1408)),
        "up": abstract((experts, moe, d, 1408)),
        "down": abstract((experts, moe, 1408, d)),
    }
    shared = {
        "gate": abstract((moe, d, 2816)),
        "up": abstract((moe, d, 2816)),
        "down": abstract((moe, 2816, d)),
    }
    return {
        "embedding": jax.ShapeDtypeStruct((163840, d), jnp.float32),
        "lm_head": abstract((d, 163840)),
        "attention": attention,
        "mlp": dense,
        "moe": {"router": abstract((moe, d, experts)), "experts": routed, "shared": shared},
    }


def test_the_plan_of_moonlight():
    params = moonlight()
    ends = params["embedding"].size + params["lm_head"]["kernel"].size
    assert sum(x.size for x in jax.tree.leaves(params)) - ends == pytest.approx(15.289e9, rel=1e-3)
    active = 2_244_000_000 + 2 * 163840 * 2048
    plan = muon_jax.plan(params, tokens_per_step=3_100_000, active_params=active)
    assert plan.total("standard_flops") == pytest.approx(590e12, rel=0.005)
    assert plan.overhead == pytest.approx(0.01, abs=0.002)
    assert plan.total("matrices") == 26 * (64 * 3 + 3 + 1) + 27 * 4 + 3


def test_a_plan_spreads_experts_and_prints_and_saves():
    params = moonlight()
    mesh = jax.sharding.AbstractMesh((64,), ("expert",))
    shardings = jax.tree.map(
        lambda x: P("expert") if x.shape[0] == 64 else P(*(None,) * (x.ndim - 2), "expert"), params
    )
    settings = {"ns_dtype": jnp.bfloat16, "mu_dtype": jnp.bfloat16, "tokens_per_step": 3_100_000}
    plan = muon_jax.plan(params, mesh=mesh, shardings=shardings, **settings)
    routed = [row for row in plan.rows if any("experts" in leaf for leaf in row.leaves)]
    assert all(row.exchanged_bytes == 0 for row in routed)
    assert plan.devices == 64
    assert plan.total("flops") < 1.1 * plan.total("standard_flops")
    text, saved = str(plan), json.loads(json.dumps(plan.to_dict()))
    assert "moe/experts" in text and "where it lies" in text and "adamw" in text
    assert "Muon's overhead" in text
    assert saved["total"]["flops"] == plan.total("flops")
    assert len(saved["rows"]) == len(plan.rows)


def test_a_plan_without_muon_leaves():
    plan = muon_jax.plan({"scale": jnp.ones(4)}, tokens_per_step=10)
    assert plan.total("flops") == 0 and plan.overhead == 0
    assert "adamw" in str(plan)
