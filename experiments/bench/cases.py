"""The cases of the benchmark: parameter trees on meshes, as shapes and shardings without data."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

NS_STEPS = 5

OURS, TOLD = "muon_jax", "muon_jax, shardings="
PLAIN, OPTAX = "plain propagation", "optax.contrib"
EXCHANGED, FLOOR = "all-to-all", "floor"


@dataclasses.dataclass(frozen=True)
class Case:
    """A tree of kernels on a mesh.

    Attributes:
        name: The name in tables.
        mesh: The mesh.
        params: A tree of `jax.ShapeDtypeStruct` with shardings. The last two axes of a leaf are
            (fan_in, fan_out), the others batch axes.
        arms: The implementations that are compared on it.
    """

    name: str
    mesh: Mesh
    params: Any
    arms: tuple[str, ...]

    @property
    def explicit(self) -> bool:
        """Whether the mesh has Explicit axes."""
        return AxisType.Explicit in self.mesh.axis_types

    def standard_flops(self) -> int:
        """Returns the FLOPs of standard Newton-Schulz of each matrix once, over all devices."""
        return standard_flops([leaf.shape for leaf in jax.tree.leaves(self.params)])

    @property
    def shardings(self) -> Any:
        """The shardings of the params."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.params)

    def shard_bytes(self) -> int:
        """Returns the bytes of one device's shard of the params in bfloat16."""
        leaves = jax.tree.leaves(self.params)
        return sum(2 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def standard_flops(shapes: Any) -> int:
    """Returns the FLOPs of standard Newton-Schulz for a tree of shapes `(..., fan_in, fan_out)`."""
    total = 0
    for *batch, fan_in, fan_out in jax.tree.leaves(shapes, is_leaf=is_shape):
        short, long = sorted((fan_in, fan_out))
        total += math.prod(batch) * NS_STEPS * (4 * long * short**2 + 2 * short**3)
    return total


def least_flops(shapes: Any) -> int:
    """Returns the fewest known FLOPs of Newton-Schulz, with symmetric products at half cost.

    For an n × m matrix, n ≤ m, each step of the standard form takes at least 3n²m + n³ FLOPs, with
    two FLOPs for a multiply-add and symmetric products at half. The Gram form takes 3n²m in total,
    and 4n³ in each step, except for 3n³ in the first step and 2n³ in the last.

    >>> least_flops([(2, 2)]), least_flops([(2, 20)]) == 3 * 4 * 20 + 17 * 8
    (160, True)
    """
    total = 0
    for *batch, fan_in, fan_out in jax.tree.leaves(shapes, is_leaf=is_shape):
        short, long = sorted((fan_in, fan_out))
        standard = NS_STEPS * (3 * long * short**2 + short**3)
        gram = 3 * long * short**2 + (4 * NS_STEPS - 3) * short**3
        total += math.prod(batch) * min(standard, gram)
    return total


def is_shape(x: Any) -> bool:
    """Returns whether a node of a tree is a shape; used as `is_leaf`."""
    return isinstance(x, tuple)


def layer(squares: int, width: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Returns (fan_in, fan_out) of a layer's kernels: squares of attention, then up and down."""
    names = ("query", "key", "value", "out")[:squares]
    shapes = dict.fromkeys(names, (width, width))
    return shapes | {"up": (width, hidden), "down": (hidden, width)}


def stacked(shapes: dict[str, tuple[int, int]], layers: int) -> Any:
    """Returns one leaf per kernel, `(layers, fan_in, fan_out)`, as for a scan over layers."""
    return {"layers": {name: {"kernel": (layers, *shape)} for name, shape in shapes.items()}}


def separate(shapes: dict[str, tuple[int, int]], layers: int) -> Any:
    """Returns one leaf per kernel and layer."""
    layer = {name: {"kernel": shape} for name, shape in shapes.items()}
    return {"layers": {str(i): dict(layer) for i in range(layers)}}


def on_mesh(
    name: str,
    mesh: Mesh,
    shapes: Any,
    spec: Any,
    arms: tuple[str, ...] = (OURS, PLAIN, OPTAX),
    dtype: Any = jnp.float32,
) -> Case:
    """Returns a case in which all kernels have the same sharding.

    Args:
        name: The name in tables.
        mesh: The mesh.
        shapes: A tree of shapes.
        spec: The mesh axes along (fan_in, fan_out), or along these and the batch axes before them.
        arms: The implementations that are compared.
        dtype: The dtype of the kernels.
    """

    def leaf(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        axes = P(*[None] * (len(shape) - len(spec)), *spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))

    return Case(name, mesh, jax.tree.map(leaf, shapes, is_leaf=is_shape), arms)


def make_mesh(devices: Any, sizes: dict[str, int], explicit: bool = False) -> Mesh:
    """Returns a mesh of the first devices, in their order."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    chosen = np.array(devices[: math.prod(sizes.values())]).reshape(tuple(sizes.values()))
    return Mesh(chosen, tuple(sizes), axis_types=(kind,) * len(sizes))


def simulated_cases(devices: Any, layers: int, width: int, hidden: int) -> list[Case]:
    """Returns the cases on CPU devices.

    A layer has three square kernels, up and down; experts have only up and down.

    Args:
        devices: The devices, an even number of at least four.
        layers: The number of layers of the deep trees.
        width: The width of the model, D.
        hidden: The width of the MLP, F.
    """
    count = len(devices)
    tp = 4 if count % 4 == 0 and count >= 16 else 2
    line = make_mesh(devices, {"fsdp": count})
    explicit = make_mesh(devices, {"fsdp": count}, explicit=True)
    plane = make_mesh(devices, {"fsdp": count // tp, "tp": tp})
    shapes = layer(3, width, hidden)
    deep, leaves = stacked(shapes, layers), separate(shapes, layers)
    few, expert = separate(shapes, 2), layer(0, width, hidden)
    experts_first = {"experts": {k: {"kernel": (count, 4, *s)} for k, s in expert.items()}}
    layers_first = {"experts": {k: {"kernel": (4, count, *s)} for k, s in expert.items()}}
    grid, everything = f"fsdp {count // tp} × tp {tp}", ("fsdp", "tp")
    rows, blocks = ("fsdp", None), ("fsdp", "tp")
    on_experts, inside = (everything, None, None, None), (None, everything, None, None)
    return [
        on_mesh(f"fsdp {count}, {layers} layers stacked", line, deep, rows),
        on_mesh(f"fsdp {count}, {layers} layers separate", line, leaves, rows, (OURS, OPTAX)),
        on_mesh(
            f"{grid}, {layers} layers stacked", plane, deep, blocks, (OURS, TOLD, PLAIN, OPTAX)
        ),
        on_mesh(f"{grid}, {layers} layers separate", plane, leaves, blocks, (OURS, TOLD, OPTAX)),
        on_mesh(f"fsdp {count} Explicit, stacked", explicit, deep, rows, (OURS, OPTAX)),
        on_mesh(f"fsdp {count} Explicit, separate", explicit, leaves, rows, (OURS, OPTAX)),
        on_mesh(f"fsdp {count}, 2 layers (10 matrices)", line, few, rows),
        on_mesh(f"{grid}, experts [E, L, D, F]", plane, experts_first, on_experts),
        on_mesh(f"{grid}, experts [L, E, D, F]", plane, layers_first, inside),
    ]


def topology_cases(devices: Any, name: str, layers: int, width: int, hidden: int) -> list[Case]:
    """Returns cases of stacked layers: two squares, up and down, with fan_in over all devices."""
    tree = stacked(layer(2, width, hidden), layers)
    kinds = {"Auto": (False, (OURS, PLAIN, OPTAX)), "Explicit": (True, (OURS, OPTAX))}
    return [
        on_mesh(
            f"{name}, {layers} layers stacked, {kind}",
            make_mesh(devices, {"fsdp": len(devices)}, explicit),
            tree,
            ("fsdp", None),
            arms,
        )
        for kind, (explicit, arms) in kinds.items()
    ]
