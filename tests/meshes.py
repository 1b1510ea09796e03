"""Meshes of the sixteen CPU devices and of absent ones, and leaves that lie over them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# The products of a step are summed in another order on a mesh, and cut matrices take the Gram
# form. Five jordan steps multiply a relative error in X by up to 3.4445^5 = 485; with float32's
# 6e-8 and random signs 1e-6 to 7e-6 was measured on matrices up to 256 × 1024.
TOLERANCE = 1e-5


def devices_of(topology):
    """Devices that need not be here; without a compiler for them the test is skipped."""
    from experiments.topology import TopologyError, topology_devices  # which imports much

    try:
        return topology_devices(topology)
    except TopologyError as error:
        pytest.skip(str(error))


KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
every_kind = pytest.mark.parametrize("kind", KINDS)


def mesh_of(kind, **sizes):
    devices = np.array(jax.devices()[: int(np.prod([*sizes.values()]))])
    shape = tuple(sizes.values())
    return Mesh(devices.reshape(shape), tuple(sizes), axis_types=(KINDS[kind],) * len(sizes))


def trailing(*spec):
    """The spec of the last two axes, whatever is before them."""
    return lambda x: P(*(None,) * (x.ndim - 2), *spec)


def leading(*spec):
    return lambda x: P(*spec)


def place(params, specs, mesh):
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, specs(x)), params)
    return jax.device_put(params, shardings), shardings


def lies_like(x, sharding):
    return x.sharding.is_equivalent_to(sharding, x.ndim)
