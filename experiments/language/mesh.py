"""How devices share the work: four axes, their sizes on the command line, and the mesh of these."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import AxisType

from experiments.experimental import arrange_devices
from experiments.settings import Rule

MESH_AXES = ("data", "fsdp", "expert", "tensor")

Axis = Annotated[
    int,
    Rule(
        "at least 1, or -1 for all devices that the other axes leave",
        lambda size: size >= 1 or size == -1,
    ),
]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How devices share the work; one size may be -1, which is what the others leave."""

    data: Axis = 1
    """Devices along the axis of data parallelism, which splits the batch."""
    fsdp: Axis = -1
    """Devices along the axis that splits parameters, optimizer state and batch. -1 takes all that
    the other axes leave."""
    expert: Axis = 1
    """Devices along the axis of expert parallelism, which splits experts and batch."""
    tensor: Axis = 1
    """Devices along the axis of tensor parallelism, which splits heads and hidden sizes."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return (self.data, self.fsdp, self.expert, self.tensor)


def make_mesh(sizes: Sequence[int], devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of these sizes of `MESH_AXES`, of which one may be -1: what is left.

    Raises:
        ValueError: the sizes do not make up the devices.
    """
    devices = jax.devices() if devices is None else devices
    named = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    open_axes = sum(size == -1 for size in sizes)
    if any(size < 1 and size != -1 for size in sizes) or open_axes > 1 or len(devices) % known:
        raise ValueError(
            f"The mesh ({named}) does not fit {len(devices)} devices. Sizes must be positive, at "
            "most one may be -1 for all that the others leave, and their product must be the "
            "number of devices."
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"The mesh ({named}) uses {math.prod(sizes)} of {len(devices)} devices. Give one "
            "axis -1 to use all that the others leave."
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.Mesh(arrange_devices(sizes, devices), MESH_AXES, axis_types=auto)


def one_device(device: Any = None) -> jax.sharding.Mesh:
    """A mesh of one, by default the first."""
    return make_mesh((1, 1, 1, 1), [jax.devices()[0] if device is None else device])


def mesh_of_config(mesh: Mesh) -> jax.sharding.Mesh:
    """The configured mesh; with stand-ins if it is not one of this machine's devices.

    Then an axis of -1 has one device. Shapes and shardings can be had of it, and no program.

    Raises:
        ValueError: no number of devices makes up such a mesh.
    """
    try:
        return make_mesh(mesh.sizes)
    except ValueError:
        sizes = [1 if size == -1 else size for size in mesh.sizes]
        if min(sizes) < 1 or mesh.sizes.count(-1) > 1:
            raise
    devices = np.full(sizes, jax.devices()[0])
    auto = (AxisType.Auto,) * len(sizes)
    return jax.sharding.Mesh(devices, MESH_AXES, axis_types=auto)


def mesh_text(mesh: jax.sharding.Mesh) -> str:
    """The sizes of its axes."""
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    text = f"{sizes} = {mesh.size:,} {'device' if mesh.size == 1 else 'devices'}"
    if mesh.size == jax.device_count():
        return text
    return f"{text}; this machine has {jax.device_count()}. The options --mesh.… change the sizes."
