"""The mesh in use, and the layout of an array: the mesh axes along each of its axes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from muon_jax._matrix_axes import MatrixAxes
from muon_jax._sharding.buckets import Axes, Sizes, Stack
from muon_jax._trees import KeyPath, broadcast_prefix, path_strings

AnyMesh: TypeAlias = Mesh | AbstractMesh
Layout = tuple[Axes, ...]


class Placing(NamedTuple):
    """The mesh that an update runs on.

    Attributes:
        mesh: The mesh; `None` on a single device, or if no mesh is known.
        inherited: Whether it is the mesh of the context (`jax.set_mesh`, `shard_map`).
        available_axes: The mesh axes that no enclosing `shard_map` uses, without axes of size 1.
        manual_axes: The mesh axes that an enclosing `shard_map` uses.
    """

    mesh: AnyMesh | None
    inherited: bool
    available_axes: Axes
    manual_axes: Axes

    @property
    def sizes(self) -> Sizes:
        """`(name, size)` of the axes that the update may use, major first."""
        shape = self.mesh.shape if self.mesh is not None else {}
        return tuple((name, shape[name]) for name in (self.available_axes or self.manual_axes))

    @property
    def local(self) -> set[str]:
        """The axes of the exchange's `shard_map`: all that are not manual, even those of size 1.

        If an axis is left out, XLA's CPU compiler aborts on bfloat16 sums.
        """
        if self.mesh is None:
            return set()
        types = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return {name for name, kind in types if kind != AxisType.Manual}

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.sizes)

    def ways(self, names: Iterable[str]) -> int:
        """Returns the number of devices along these mesh axes."""
        size = dict(self.sizes)
        return math.prod(size[name] for name in names)

    @property
    def platform(self) -> str:
        """The platform of the mesh, or else of JAX's default devices: `"cpu"`, `"gpu"`, `"tpu"`."""
        if isinstance(self.mesh, Mesh):
            return self.mesh.devices.flat[0].platform
        device = self.mesh.abstract_device if self.mesh is not None else None
        return getattr(device, "platform", None) or jax.default_backend()


class PlacedArray(NamedTuple):
    """The shape and layout of an array before the exchange.

    Attributes:
        shape, dtype: The shape and dtype of the whole array.
        layout: The mesh axes along each of its axes.
        axes: Its matrix axes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layout: Layout
    axes: MatrixAxes

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*(names or None for names in self.layout))

    def stack(self, sizes: Sizes, dtype: np.dtype) -> Stack:
        """Returns the stack of its matrices on each device; `dtype` is that of the exchange."""
        batch, fan_in, fan_out = (
            tuple(name for axis in group for name in self.layout[axis])
            for group in self.axes.split(self.shape)
        )
        shape, m, n = self.axes.matrix_shape(self.shape)
        size = dict(sizes)
        count = math.prod(shape) // math.prod(size[name] for name in batch)
        return Stack(count, m, n, batch, fan_in, fan_out, dtype)


def find_placing(mesh: AnyMesh | None, leaves: Sequence[jax.Array]) -> Placing:
    """Returns the placing on the mesh of the context, else on `mesh`, else on the leaves' mesh."""
    context: Any = jax.sharding.get_abstract_mesh()
    if not context.empty:
        if mesh is not None and dict(mesh.shape) != dict(context.shape):
            raise ValueError(
                f"mesh= has the axes {dict(mesh.shape)}, but the context (jax.set_mesh or "
                f"shard_map) has {dict(context.shape)}. Pass the same mesh, or omit mesh=."
            )
        mesh = context
    elif mesh is None:
        mesh = next((known for x in leaves if (known := _mesh_of(x)) is not None), None)
    if mesh is None:
        return Placing(None, False, (), ())
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Explicit axes are part of an array's type even if their size is 1.
    names = [a for a in mesh.axis_names if mesh.shape[a] > 1 or types[a] == AxisType.Explicit]
    available_axes = tuple(name for name in names if types[name] != AxisType.Manual)
    manual_axes = tuple(name for name in names if types[name] == AxisType.Manual)
    return Placing(mesh, not context.empty, available_axes, manual_axes)


def _mesh_of(x: Any) -> AnyMesh | None:
    if isinstance(x, jax.core.Tracer):
        mesh = getattr(jax.typeof(x).sharding, "mesh", None)
        return None if mesh is None or mesh.empty else mesh
    sharding = getattr(x, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def layout_of(x: Any, placing: Placing) -> Layout | None:
    """Returns the layout of an array, or of a tracer over Explicit axes; `None` if only XLA knows.

    On a mesh with Explicit and Auto axes, a tracer counts as replicated over the Auto axes.
    """
    assert placing.mesh is not None
    if isinstance(x, jax.core.Tracer):
        types = dict(zip(placing.mesh.axis_names, placing.mesh.axis_types, strict=True))
        if all(types[name] == AxisType.Auto for name in placing.available_axes):
            return None
        spec = jax.typeof(x).sharding.spec
    else:
        sharding = getattr(x, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    return as_layout(spec, x.ndim, placing)


def whole_shape(shape: tuple[int, ...], layout: Layout, placing: Placing) -> tuple[int, ...]:
    """Returns the shape of the whole array, of which a device sees a shard inside `shard_map`."""
    if placing.available_axes:
        return shape
    return tuple(n * placing.ways(names) for n, names in zip(shape, layout, strict=True))


def as_layout(spec: PartitionSpec, ndim: int, placing: Placing) -> Layout:
    """Returns the mesh axes along each axis of an array, without mesh axes of size 1."""
    size = dict(placing.sizes)
    named = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    named += [()] * (ndim - len(named))
    return tuple(tuple(name for name in names if name in size) for names in named)


def layout_from_sharding(
    sharding: Any, shape: tuple[int, ...], placing: Placing, path: str
) -> Layout:
    """Returns the layout of a leaf from a user's `NamedSharding` or `PartitionSpec`."""
    if not is_sharding(sharding):
        raise TypeError(
            f"shardings= must have a NamedSharding or PartitionSpec for a leaf; got {sharding!r}."
        )
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    if len(spec) > len(shape):
        raise ValueError(
            f"shardings= has {len(spec)} axes for {path!r}, which has {len(shape)}; got {spec}."
        )
    names = [name for part in spec for name in ((part,) if isinstance(part, str) else part or ())]
    assert placing.mesh is not None
    for name in names:
        if name not in placing.mesh.axis_names:
            raise ValueError(
                f"shardings= names the mesh axis {name!r} for {path!r}, but the mesh has only "
                f"{', '.join(placing.mesh.axis_names)}."
            )
    if len(set(names)) != len(names):
        raise ValueError(f"shardings= uses a mesh axis twice for {path!r}; got {spec}.")
    layout = as_layout(spec, len(shape), placing)
    for axis, along in enumerate(layout):
        parts = placing.ways(along)
        if placing.available_axes and shape[axis] % parts:
            raise ValueError(
                f"shardings= splits axis {axis} of {path!r}, of size {shape[axis]}, over the mesh "
                f"axes {along} of {parts} devices. The size must be a multiple of that number."
            )
    return layout


def layouts_by_path(shardings: Any, tree: Any, placing: Placing) -> dict[KeyPath, Layout]:
    """Returns the layouts of the leaves of `tree` from a user's `shardings`, by key path."""
    if shardings is None or placing.mesh is None:
        return {}
    given = broadcast_prefix(
        shardings, tree, what="shardings", kind=SHARDING, is_value=is_sharding, partial=True
    )
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    strings = path_strings(tree)
    return {
        path: layout_from_sharding(sharding, shapes[path], placing, strings[path])
        for path, sharding in given.items()
    }


SHARDING = "NamedSharding or PartitionSpec"


def is_sharding(x: Any) -> bool:
    return isinstance(x, (PartitionSpec, NamedSharding))
