"""The device mesh of a training: its four axes and their sizes on the command line."""

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
    """Sizes of the mesh axes. One of them may be -1, for all devices that the others leave."""

    data: Axis = 1
    """Number of data-parallel devices, which split the batch."""
    fsdp: Axis = -1
    """Number of devices that split the parameters, optimizer state and batch. -1 means all devices
    that the other axes leave."""
    expert: Axis = 1
    """Number of expert-parallel devices, which split the experts and the batch."""
    tensor: Axis = 1
    """Number of tensor-parallel devices, which split the attention heads and hidden sizes."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return (self.data, self.fsdp, self.expert, self.tensor)


def make_mesh(sizes: Sequence[int], devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns a mesh with the axes `MESH_AXES` of these sizes; one may be -1, for what is left.

    Raises:
        ValueError: If the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    named = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    open_axes = sum(size == -1 for size in sizes)
    if any(size < 1 and size != -1 for size in sizes) or open_axes > 1 or len(devices) % known:
        raise ValueError(
            f"The mesh ({named}) does not fit {len(devices)} devices. Sizes must be positive, at "
            "most one may be -1 (all devices that the other axes leave), and their product "
            "must be the number of devices."
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"The mesh ({named}) uses {math.prod(sizes)} of {len(devices)} devices. Give one "
            "axis the size -1 to use all of them."
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.Mesh(arrange_devices(sizes, devices), MESH_AXES, axis_types=auto)


def one_device(device: Any = None) -> jax.sharding.Mesh:
    """Returns a mesh of a single device, by default the first one."""
    return make_mesh((1, 1, 1, 1), [jax.devices()[0] if device is None else device])


def mesh_of_config(mesh: Mesh) -> jax.sharding.Mesh:
    """Returns the configured mesh, with stand-ins for the devices if it does not fit this machine.

    In that case an axis of -1 has size 1, and the mesh serves for shapes and shardings only.

    Raises:
        ValueError: If a size is less than 1 and not -1, or several are -1.
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
    """Returns the sizes of a mesh's axes as text."""
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    text = f"{sizes} = {mesh.size:,} {'device' if mesh.size == 1 else 'devices'}"
    if mesh.size == jax.device_count():
        return text
    return f"{text}; this machine has {jax.device_count()}. The options --mesh.… change the sizes."
