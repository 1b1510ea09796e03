"""Where arrays lie: the mesh in force, and the mesh axes along each axis of an array."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from muon_jax._matrix_axes import MatrixAxes
from muon_jax._sharding.buckets import Axes, Block, Sizes
from muon_jax._trees import KeyPath, broadcast_prefix, path_strings

AnyMesh: TypeAlias = Mesh | AbstractMesh
Layout = tuple[Axes, ...]


class Placing(NamedTuple):
    """The mesh that an update runs on.

    Attributes:
        mesh: `None` for one device, or where nothing tells of a mesh.
        inherited: it is the context's (`jax.set_mesh`, `shard_map`).
        free: its axes that no `shard_map` around us has taken, if they matter.
        taken: those that one has.
    """

    mesh: AnyMesh | None
    inherited: bool
    free: Axes
    taken: Axes

    @property
    def sizes(self) -> Sizes:
        """`(name, size)` of the axes that the update may use, major first."""
        shape = self.mesh.shape if self.mesh is not None else {}
        return tuple((name, shape[name]) for name in (self.free or self.taken))

    @property
    def local(self) -> set[str]:
        """Those that the exchange's `shard_map` takes: all that are left, of one device too.

        Where axes stay out of it, XLA's CPU compiler aborts on bfloat16 sums.
        """
        if self.mesh is None:
            return set()
        types = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return {name for name, kind in types if kind != AxisType.Manual}

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.sizes)

    @property
    def platform(self) -> str:
        """Of the mesh's devices, `"cpu"`, `"gpu"` or `"tpu"`, or else of JAX's default ones."""
        if isinstance(self.mesh, Mesh):
            return self.mesh.devices.flat[0].platform
        device = self.mesh.abstract_device if self.mesh is not None else None
        return getattr(device, "platform", None) or jax.default_backend()


class Entry(NamedTuple):
    """An array as it enters the exchange.

    Attributes:
        shape, dtype: of the whole array.
        layout: the mesh axes along each of its axes.
        axes: which of its axes make the matrix.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layout: Layout
    axes: MatrixAxes

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*(names or None for names in self.layout))

    def block(self, sizes: Sizes, dtype: np.dtype) -> Block:
        """Its matrices, as each device sees them; `dtype` is that of the exchange."""
        batch, fan_in, fan_out = (
            tuple(name for axis in group for name in self.layout[axis])
            for group in self.axes.split(self.shape)
        )
        shape, m, n = self.axes.matrix_shape(self.shape)
        size = dict(sizes)
        count = math.prod(shape) // math.prod(size[name] for name in batch)
        return Block(count, m, n, batch, fan_in, fan_out, dtype)


def find_placing(mesh: AnyMesh | None, leaves: Sequence[jax.Array]) -> Placing:
    """The mesh of the context, or else the one given, or else that of the leaves.

    Raises:
        ValueError: the one given is not the context's.
    """
    context = jax.sharding.get_abstract_mesh()
    if not context.empty:
        if mesh is not None and dict(mesh.shape) != dict(context.shape):
            raise ValueError(
                f"mesh= has the axes {dict(mesh.shape)}, but the context (jax.set_mesh or "
                f"shard_map) has {dict(context.shape)}. Give the same, or leave mesh= out."
            )
        found: Any = context
    else:
        found = mesh or next(filter(None, map(_mesh_of, leaves)), None)
    if found is None:
        return Placing(None, False, (), ())
    types = dict(zip(found.axis_names, found.axis_types, strict=True))
    # Explicit axes are part of an array's type even where one device is all they have.
    used = [a for a in found.axis_names if found.shape[a] > 1 or types[a] == AxisType.Explicit]
    free = tuple(name for name in used if types[name] != AxisType.Manual)
    taken = tuple(name for name in used if types[name] == AxisType.Manual)
    return Placing(found, not context.empty, free, taken)


def _mesh_of(x: Any) -> AnyMesh | None:
    if isinstance(x, jax.core.Tracer):
        mesh = getattr(jax.typeof(x).sharding, "mesh", None)
        return None if mesh is None or mesh.empty else mesh
    sharding = getattr(x, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def layout_of(x: Any, placing: Placing) -> Layout | None:
    """The layout of an array, or of a tracer over Explicit axes; `None` where only XLA knows.

    On a mesh with both kinds a tracer tells of its Explicit axes, and counts as whole along others.
    """
    assert placing.mesh is not None
    if isinstance(x, jax.core.Tracer):
        types = dict(zip(placing.mesh.axis_names, placing.mesh.axis_types, strict=True))
        if all(types[name] == AxisType.Auto for name in placing.free):
            return None
        spec = jax.typeof(x).sharding.spec
    else:
        sharding = getattr(x, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    return as_layout(spec, x.ndim, placing)


def whole_shape(shape: tuple[int, ...], layout: Layout, placing: Placing) -> tuple[int, ...]:
    """The shape of the whole array, of which we see a part inside `shard_map`."""
    if placing.free:
        return shape
    size = dict(placing.sizes)
    return tuple(
        n * math.prod(size[name] for name in names) for n, names in zip(shape, layout, strict=True)
    )


def as_layout(spec: PartitionSpec, ndim: int, placing: Placing) -> Layout:
    """A spec as the names along each axis, those left out over which nothing is spread."""
    size = dict(placing.sizes)
    named = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    named += [()] * (ndim - len(named))
    return tuple(tuple(name for name in names if name in size) for names in named)


def told_layout(sharding: Any, shape: tuple[int, ...], placing: Placing, path: str) -> Layout:
    """The layout that a user's `NamedSharding` or `PartitionSpec` gives a leaf.

    Raises:
        TypeError: neither of the two.
        ValueError: it does not fit the leaf or the mesh.
    """
    if not is_sharding(sharding):
        raise TypeError(
            f"shardings= takes NamedSharding or PartitionSpec for a leaf, got {sharding!r}."
        )
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    if len(spec) > len(shape):
        raise ValueError(
            f"{path!r} has {len(shape)} axes, but shardings= gives it {len(spec)}: {spec}."
        )
    used = [name for part in spec for name in ((part,) if isinstance(part, str) else part or ())]
    assert placing.mesh is not None
    for name in used:
        if name not in placing.mesh.axis_names:
            raise ValueError(
                f"shardings= names the mesh axis {name!r} for {path!r}; the mesh has "
                f"{', '.join(placing.mesh.axis_names)}."
            )
    if len(set(used)) != len(used):
        raise ValueError(f"shardings= uses a mesh axis twice for {path!r}: {spec}.")
    layout = as_layout(spec, len(shape), placing)
    size = dict(placing.sizes)
    for axis, names in enumerate(layout):
        parts = math.prod(size[name] for name in names)
        if placing.free and shape[axis] % parts:
            raise ValueError(
                f"shardings= splits axis {axis} of {path!r}, of size {shape[axis]}, over the mesh "
                f"axes {names} of {parts} devices, which do not divide it."
            )
    return layout


def layouts_by_path(shardings: Any, tree: Any, placing: Placing) -> dict[KeyPath, Layout]:
    """The layouts that a user's `shardings` give the leaves of `tree`, by key path."""
    if shardings is None or placing.mesh is None:
        return {}
    found = broadcast_prefix(
        shardings, tree, what="shardings", kind=SHARDING, is_value=is_sharding, partial=True
    )
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    strings = path_strings(tree)
    return {
        path: told_layout(sharding, shapes[path], placing, strings[path])
        for path, sharding in found.items()
    }


SHARDING = "NamedSharding or PartitionSpec"


def is_sharding(x: Any) -> bool:
    return isinstance(x, (PartitionSpec, NamedSharding))
