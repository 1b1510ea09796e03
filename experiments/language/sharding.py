"""Shardings of params and activations: the logical axes of each array, and their mesh axes."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# The mesh axes that split each logical axis. Other logical axes are not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocabulary": ("tensor",),
    # Each device stores whole experts, so that Newton-Schulz of the experts needs no collective.
    # The forward pass gathers the experts of a group along fsdp.
    "experts": ("expert", "fsdp"),
}

# Logical axes of the leaves, aligned to the last array axis. A leading axis of layers is never
# split. The first pattern that matches a leaf's path applies.
LEAVES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"experts/(gate|up)$", ("experts", None, None, "hidden")),
    (r"experts/down$", ("experts", None, "hidden", None)),
    (r"embedding/embedding$", ("vocabulary", "width")),
    (r"head/kernel$", ("width", "vocabulary")),
    (r"(query|key|value|key_value)/kernel$", ("width", "heads")),
    (r"attention/out/kernel$", ("heads", "width")),
    (r"(query|key|value|gate|up)/adapter/lora_a$", ("width", None)),
    (r"attention/out/adapter/lora_a$", ("heads", None)),
    (r"down/adapter/lora_a$", ("hidden", None)),
    (r"(query|key|value)/adapter/lora_b$", (None, "heads")),
    (r"(gate|up)/adapter/lora_b$", (None, "hidden")),
    (r"(out|down)/adapter/lora_b$", (None, "width")),
    (r"latent/kernel$", ("width", None)),
    (r"(gate|up)/kernel$", ("width", "hidden")),
    (r"down/kernel$", ("hidden", "width")),
    (r"router/kernel$", ("width", None)),
    (r"(query|key|value)/bias$", ("heads",)),
    (r"(scale|bias)$", (None,)),
)


def named_leaves(tree: Any, separator: str = "/") -> list[tuple[str, Any]]:
    """Returns the leaves of a tree with their names, such as "layers/up/kernel"."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator=separator), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def spec(*logical: str | None) -> PartitionSpec:
    """Returns the spec of an array with these logical axes. An axis None is never split."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in logical))


def param_specs(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the tree of specs of `params`, which are nested dicts of arrays or shapes.

    Raises:
        ValueError: If `LEAVES` has no rule for a leaf, or the mesh axes do not divide an axis.
    """

    def of(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = next((axes for regex, axes in LEAVES if re.search(regex, name)), None)
        if found is None:
            raise ValueError(f"LEAVES has no rule for the logical axes of {name!r}.")
        axes = (None,) * (len(leaf.shape) - len(found)) + found
        _check(name, leaf.shape, axes, mesh)
        return spec(*axes)

    return jax.tree_util.tree_map_with_path(of, params)


def _check(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh
) -> None:
    for position, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        names = RULES[axis] if axis else ()
        ways = math.prod(mesh.shape[a] for a in names)
        if size % ways:
            meshed = " × ".join(f"{a} {mesh.shape[a]}" for a in names)
            raise ValueError(
                f"{name}: axis {position} ({axis}) must be a multiple of the mesh axes {meshed} = "
                f"{ways}; got {size}. Change --mesh or the size of the model."
            )


def check_heads(mesh: Mesh | AbstractMesh, **heads: int) -> None:
    """Checks that the devices that split attention heads divide the number of heads.

    Otherwise a device could hold a part of a head, since the heads' columns may still divide.
    """
    ways = math.prod(mesh.shape[axis] for axis in RULES["heads"])
    for name, count in heads.items():
        if count % ways:
            fit = [str(n) for n in range(1, count + 1) if count % n == 0]
            raise ValueError(
                f"--mesh.tensor must divide the model's {name}, {count}; got {ways}. "
                f"Use --mesh.tensor {', '.join(fit)}."
            )


def state_specs(state: Any, params: Any, specs: Any) -> Any:
    """Returns specs of a tree whose leaves mirror params, such as an optimizer state.

    A leaf belongs to the param whose path is part of its own. Axes of the param's size are split
    like the param's, other axes are not. Leaves that belong to no param are replicated.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(params))
    by_path = dict(
        jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    )

    def of(path: Any, leaf: Any) -> PartitionSpec:
        stops = range(len(path), 0, -1)
        parts = (path[i:stop] for stop in stops for i in range(stop))
        own = next((part for part in parts if part in known), None)
        if own is None or len(leaf.shape) != len(known[own].shape):
            return PartitionSpec()
        kept = zip(leaf.shape, known[own].shape, by_path[own], strict=True)
        return PartitionSpec(*(names if a == b else None for a, b, names in kept))

    return jax.tree_util.tree_map_with_path(of, state)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Converts a tree of specs to NamedShardings."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns shapes with shardings, from two trees."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains the sharding of an activation on the mesh of the context."""
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def on_device(tree: Any) -> int:
    """Returns the bytes of all leaves' shards on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def platform() -> str:
    """Returns the platform of the context's mesh: "cpu", "gpu" or "tpu"."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform


def gather(x: jax.Array, axis: str) -> jax.Array:
    """Gathers all parts along a mesh axis, concatenated on the leading axis, inside `shard_map`.

    The gradient is a reduce-scatter. If the axis has all devices of a TPU slice, XLA would turn
    both into all-reduces, which move twice as many bytes. It does not do so if the gathering runs
    first along the lines of the torus and then across them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    line, count = _line(mesh, axis), mesh.shape[axis]
    if not 1 < line < count:
        return jax.lax.all_gather(x, axis, axis=0, tiled=True)
    lines = [list(range(begin, begin + line)) for begin in range(0, count, line)]
    for groups in (lines, [list(across) for across in zip(*lines, strict=True)]):
        x = jax.lax.all_gather(x, axis, axis=0, tiled=True, axis_index_groups=groups)
    return x


def _line(mesh: AbstractMesh, axis: str) -> int:
    """Returns how many devices are in a line of a torus of equal sides; 1 if it does not matter."""
    device, count = mesh.abstract_device, mesh.shape[axis]
    if device.platform != "tpu" or count < mesh.size:
        return 1
    dimensions = 2 if "lite" in device.device_kind else 3
    return math.gcd(count, 1 << (count.bit_length() - 1) // dimensions)
