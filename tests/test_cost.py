"""What a step costs each device: figures of compiled programs, and the plan that tells them."""

import functools
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muon_jax
from experiments.bench.cases import OURS, Case, layer, make_mesh, on_mesh, separate, stacked
from experiments.bench.sharding import compile_step
from experiments.compiled import measure
from experiments.topology import TopologyError, topology_devices

# Three square kernels a layer, up and down: 16 layers, or 2 of 5 matrices.
LAYER = layer(3, 256, 1024)
DEEP, DEEP_LEAVES = stacked(LAYER, 16), separate(LAYER, 16)
FEW, FEW_LEAVES = stacked(LAYER, 2), separate(LAYER, 2)
EXPERTS = {"experts": {"up": (16, 3, 64, 128), "down": (16, 3, 128, 64)}}
TURNED = {"experts": {"up": (3, 16, 64, 128), "down": (3, 16, 128, 64)}}

LINE, PLANE, EVERY = {"fsdp": 16}, {"fsdp": 4, "tp": 4}, ("fsdp", "tp")
FAN_IN, BOTH = ("fsdp", None), ("fsdp", "tp")
FIRST, SECOND = (EVERY, None, None, None), (None, EVERY, None, None)
MOVED, CUT = {"all-to-all"}, {"all-to-all", "all-reduce"}

# Explicit axes?, mesh, shapes, spec; at most: FLOPs against an even share of the standard form's,
# bytes against the bfloat16 shard of the params, collectives for each shape; and which.
BARS = {
    "stacked": (False, LINE, DEEP, FAN_IN, 1.05, 4.5, 4, MOVED),
    "separate": (False, LINE, DEEP_LEAVES, FAN_IN, 1.05, 4.5, 4, MOVED),
    "fsdp × tp": (False, PLANE, DEEP, BOTH, 1.05, 8.5, 4, MOVED),
    "fsdp × tp, separate": (False, PLANE, DEEP_LEAVES, BOTH, 1.05, 8.5, 4, MOVED),
    "explicit": (True, LINE, DEEP, FAN_IN, 1.05, 4.5, 4, MOVED),
    "explicit, separate": (True, LINE, DEEP_LEAVES, FAN_IN, 1.05, 4.5, 4, MOVED),
    "explicit, fsdp × tp": (True, PLANE, DEEP, BOTH, 1.05, 4.5, 2, MOVED),
    "10 matrices": (False, LINE, FEW, FAN_IN, 1.3, 30, 4, CUT),
    "10 matrices, separate": (False, LINE, FEW_LEAVES, FAN_IN, 1.3, 30, 4, CUT),
    "10 matrices, explicit": (True, LINE, FEW, FAN_IN, 1.3, 30, 4, CUT),
    "experts [E, L]": (False, PLANE, EXPERTS, FIRST, 1, 0, 0, set()),
    "experts [L, E]": (False, PLANE, TURNED, SECOND, 1, 0, 0, set()),
    "experts, explicit": (True, PLANE, EXPERTS, FIRST, 1, 0, 0, set()),
}


def on_line(devices, explicit):
    return make_mesh(devices, {"fsdp": len(devices)}, explicit)


def case_of(row):
    explicit, sizes, shapes, spec = BARS[row][:4]
    mesh = make_mesh(jax.devices(), sizes, explicit)
    return on_mesh(row, mesh, shapes, spec, (OURS,))


@pytest.mark.parametrize("row", BARS)
def test_a_step_meets_its_bars_and_its_plan(row):
    explicit, sizes, _, _, most_flops, most_bytes, most_collectives, kinds = BARS[row]
    case = case_of(row)
    program = measure(compile_step(case, muon_jax.muon(0.02, mesh=case.mesh)))
    assert program.flops <= most_flops * case.standard_flops() / case.mesh.size
    assert program.exchanged_bytes <= most_bytes * case.shard_bytes()
    assert set(program.collectives) <= kinds
    assert program.in_loops == 0
    shapes = {x.shape[-2:] for x in jax.tree.leaves(case.params)}
    count = sum(collective.count for collective in program.collectives.values())
    assert count <= most_collectives * len(shapes)

    plan = muon_jax.plan(case.params, mesh=case.mesh)
    moves = 1 if explicit else len(sizes)  # untold, XLA moves a leaf once for each mesh axis
    told = plan.total("exchanged_bytes") * moves
    assert plan.total("device_flops") == pytest.approx(program.flops, rel=0.05)
    assert told == pytest.approx(program.exchanged_bytes, rel=0.05)
    assert plan.total("standard_flops") == case.standard_flops()
    assert plan.total("momentum_bytes") == 2 * case.shard_bytes()


@pytest.mark.parametrize("how", ["told", "untold", "Explicit"])
def test_matrices_of_one_shape_share_a_bucket_whatever_the_axes_of_their_leaves(how):
    """Six (16, 4, 4) and two (4, 4, 16), all of them 16 × 16: one for each of eight devices."""
    mesh = make_mesh(jax.devices(), {"fsdp": 4, "tp": 2}, how == "Explicit")
    leaf = {
        "query": ((16, 4, 4), P("fsdp", "tp"), muon_jax.MatrixAxes(0, (1, 2))),
        "out": ((4, 4, 16), P("tp", None, "fsdp"), muon_jax.MatrixAxes((0, 1), 2)),
    }
    kinds = {"a": "query", "b": "query", "c": "query", "d": "out"}
    tree = {f"{name}{i}": leaf[kind] for i in range(2) for name, kind in kinds.items()}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec, _) in tree.items()
    }
    axes = {name: found for name, (_, _, found) in tree.items()}
    case = Case(how, mesh, params, (OURS,))
    told = {"shardings": case.shardings} if how == "told" else {}
    tx = muon_jax.scale_by_muon(mesh=mesh, matrix_axes=axes, **told)
    plan = muon_jax.plan(params, mesh=mesh, matrix_axes=axes, routing=[("", "muon")])
    assert [row.matrices for row in plan.rows] == [8]
    standard = plan.total("standard_flops")
    assert standard == plan.total("flops") == 8 * measure(compile_step(case, tx)).flops


def test_rivals_stand_where_the_table_says():
    """optax.contrib.muon on a row, so that the bars keep their meaning."""
    case = case_of("10 matrices, separate")
    program = measure(compile_step(case, optax.contrib.muon(0.02)))
    assert 1.5 < program.flops * case.mesh.size / case.standard_flops() < 1.6
    assert 250 < program.exchanged_bytes / case.shard_bytes() < 300


@functools.cache
def step_on(name, explicit):
    """A step compiled for a TPU that is not there: the case, the program, the plan."""
    try:
        mesh = on_line(topology_devices(name), explicit)
    except TopologyError as error:
        pytest.skip(str(error))
    case = on_mesh(name, mesh, stacked(layer(2, 2048, 8192), 64), FAN_IN, (OURS,))
    tx = muon_jax.muon(0.02, mesh=mesh, ns_dtype=jnp.bfloat16)
    plan = muon_jax.plan(case.params, mesh=mesh, ns_dtype=jnp.bfloat16)
    return case, measure(compile_step(case, tx)), plan


@pytest.mark.parametrize("explicit", [False, True], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["v5e:16x16", "v5p:8x8x8"])
def test_a_step_on_a_tpu_that_is_not_there_takes_what_its_plan_says(name, explicit):
    case, program, plan = step_on(name, explicit)
    assert program.flops <= 1.15 * case.standard_flops() / case.mesh.size
    assert set(program.collectives) <= CUT
    assert plan.total("device_flops") == pytest.approx(program.flops, rel=0.05)
    assert plan.total("exchanged_bytes") == pytest.approx(program.exchanged_bytes, rel=0.05)


# Cut matrices add their Grams up in float32, which is 4.80 shards in bytes; and XLA for TPUs writes
# a float32 copy of what the norm is taken of, 3 % above what the plan has room for.
MISSED = pytest.mark.xfail(strict=True, reason="4.80 shards exchanged, temporaries 3 % over")


@pytest.mark.parametrize("explicit", [False, True], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["v5e:16x16", pytest.param("v5p:8x8x8", marks=MISSED)])
def test_a_step_on_a_tpu_that_is_not_there_meets_its_bars(name, explicit):
    case, program, plan = step_on(name, explicit)
    assert program.exchanged_bytes <= 4.5 * case.shard_bytes()
    assert program.temp_bytes <= 2 * case.shard_bytes() + plan.peak()


# --- Plans -----------------------------------------------------------------------------------


def abstract(shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}


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
    with pytest.raises(ValueError, match=r"'moe/experts/\w+/kernel' is a stack of.*active_params="):
        muon_jax.plan(params, mesh=mesh, shardings=shardings, **settings)
    settings["active_params"] = 2_244_000_000
    plan = muon_jax.plan(params, mesh=mesh, shardings=shardings, **settings)
    routed = [row for row in plan.rows if any("experts" in leaf for leaf in row.leaves)]
    assert all(row.exchanged_bytes == 0 for row in routed)
    assert plan.devices == 64
    assert plan.total("flops") < 1.1 * plan.total("standard_flops")
    text, saved = str(plan), json.loads(json.dumps(plan.to_dict()))
    assert "moe/experts" in text and "local, not moved" in text and "other" in text
    assert "Muon's overhead" in text
    assert saved["total"]["flops"] == plan.total("flops")
    assert len(saved["rows"]) == len(plan.rows)


def test_a_plan_without_muon_leaves():
    plan = muon_jax.plan({"scale": jnp.ones(4)}, tokens_per_step=10)
    assert plan.total("flops") == 0 and plan.overhead == 0
    assert "other" in str(plan)


def test_a_plan_is_for_the_platform_that_it_is_told():
    """Of 20 leaves a GPU makes one stack; symmetric products in panels are a CPU's."""
    params = [{"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)} for _ in range(20)]
    mesh = jax.sharding.AbstractMesh((1,), ("fsdp",))
    cpu, gpu = (muon_jax.plan(params, mesh=mesh, platform=name) for name in ("cpu", "gpu"))
    assert [row.matrices for row in cpu.rows] == [row.matrices for row in gpu.rows] == [20]
    assert "panels" in cpu.rows[0].form and "panels" not in gpu.rows[0].form
    assert cpu.total("flops") < gpu.total("flops") == gpu.total("standard_flops")
    assert 10 < gpu.peak() / cpu.peak() < 40
    with pytest.raises(ValueError, match="platform must be one of cpu, gpu, tpu; got 'cuda'"):
        muon_jax.plan(params, platform="cuda")
