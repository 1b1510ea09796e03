"""The state that `plan` tells, against the state that a device of the mesh holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from muon_jax import MatrixAxes, muon, plan

LEAVES = {
    "last": ((64, 256), P(None, "tp")),
    "both": ((64, 256), P("fsdp", "tp")),
    "first": ((64, 256), P("fsdp")),
    "whole": ((64, 256), P()),
    "over both": ((64, 256), P(None, ("fsdp", "tp"))),
    "stack": ((8, 64, 128), P("tp", "fsdp")),
    "narrow": ((3, 64, 32), P(None, None, "tp")),
    "fused": ((16, 64), P("fsdp", "tp")),
    "heads": ((16, 4, 20), P("fsdp", "tp")),
    "embed": ((512, 64), P(None, "tp")),
    "bias": ((256,), P("tp")),
}
AXES = {"fused": MatrixAxes(split_fan_out=(20, 24, 20)), "heads": MatrixAxes(0, (1, 2), 1, 4)}


def held(state):
    """Bytes of the first device, two numbers of int4 in one; counters aside."""
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(state) if x.ndim]
    return sum(x.nbytes if x.dtype != jnp.int4 else (x.size + 1) // 2 for x in shards)


@pytest.mark.parametrize(
    "dtypes",
    [
        {},
        {"mu_dtype": jnp.int8},
        {"mu_dtype": jnp.int4},
        {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16},
    ],
    ids=["own", "int8", "int4", "bfloat16"],
)
@pytest.mark.parametrize("told", ["Explicit", "AbstractMesh"])
def test_the_momentum_is_what_a_device_holds(dtypes, told):
    mesh = mesh_of("Explicit", fsdp=4, tp=4)
    shardings = {name: NamedSharding(mesh, spec) for name, (_, spec) in LEAVES.items()}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in LEAVES.items()}
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params = jax.device_put(params, shardings)
    settings = dtypes | {"matrix_axes": {name: AXES.get(name) for name in LEAVES}}
    where = {"mesh": mesh}
    if told == "AbstractMesh":
        specs = {name: spec for name, (_, spec) in LEAVES.items()}
        where = {"mesh": mesh.abstract_mesh, "shardings": specs}
    costs = plan(params if told == "Explicit" else shapes, **where, **settings)
    with jax.set_mesh(mesh):
        state = jax.jit(muon(0.02, **settings).init)(params)
    assert costs.total("momentum_bytes") == held(state)
    assert costs.total("momentum_bytes") > 0.2 * sum(x.nbytes for x in params.values()) / 16
