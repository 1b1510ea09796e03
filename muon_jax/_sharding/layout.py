"""The mesh in use, and the layout of an array: the mesh axes along each of its axes."""

import math
from collections.abc import Sequence
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
        mesh: `None` for one device, or where no mesh is known.
        inherited: it is the context's (`jax.set_mesh`, `shard_map`).
        available_axes: its axes that no enclosing `shard_map` uses, without those of one device.
        manual_axes: those that one uses.
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


class PlacedArray(NamedTuple):
    """An array before the exchange, with its layout.

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

    def stack(self, sizes: Sizes, dtype: np.dtype) -> Stack:
        """Its matrices, as each device holds them; `dtype` is that of the exchange."""
        batch, fan_in, fan_out = (
            tuple(name for axis in group for name in self.layout[axis])
            for group in self.axes.split(self.shape)
        )
        shape, m, n = self.axes.matrix_shape(self.shape)
        size = dict(sizes)
        count = math.prod(shape) // math.prod(size[name] for name in batch)
        return Stack(count, m, n, batch, fan_in, fan_out, dtype)


def find_placing(mesh: AnyMesh | None, leaves: Sequence[jax.Array]) -> Placing:
    """The mesh of the context, or else the one given, or else that of the leaves.

    Raises:
        ValueError: the one given is not the context's.
    """
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
    # Explicit axes are part of an array's type even where one device is all they have.
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
    """The layout of an array, or of a tracer over Explicit axes; `None` where only XLA knows.

    On a mesh with both kinds a tracer's Explicit axes are known, and it counts as whole along
    others.
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
    """The shape of the whole array; inside `shard_map` a device sees a part of it."""
    if placing.available_axes:
        return shape
    size = dict(placing.sizes)
    return tuple(
        n * math.prod(size[name] for name in names) for n, names in zip(shape, layout, strict=True)
    )


def as_layout(spec: PartitionSpec, ndim: int, placing: Placing) -> Layout:
    """The mesh axes along each axis of an array, without those of one device."""
    size = dict(placing.sizes)
    named = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    named += [()] * (ndim - len(named))
    return tuple(tuple(name for name in names if name in size) for names in named)


def layout_from_sharding(
    sharding: Any, shape: tuple[int, ...], placing: Placing, path: str
) -> Layout:
    """The layout of a leaf from a user's `NamedSharding` or `PartitionSpec`.

    Raises:
        TypeError: neither of the two.
        ValueError: it does not fit the leaf or the mesh.
    """
    if not is_sharding(sharding):
        raise TypeError(
            f"shardings= takes NamedSharding or PartitionSpec for a leaf; got {sharding!r}."
        )
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    if len(spec) > len(shape):
        raise ValueError(
            f"shardings= has {len(spec)} axes for {path!r}, which has {len(shape)}: {spec}."
        )
    names = [name for part in spec for name in ((part,) if isinstance(part, str) else part or ())]
    assert placing.mesh is not None
    for name in names:
        if name not in placing.mesh.axis_names:
            raise ValueError(
                f"shardings= names the mesh axis {name!r} for {path!r}; the mesh has "
                f"{', '.join(placing.mesh.axis_names)}."
            )
    if len(set(names)) != len(names):
        raise ValueError(f"shardings= uses a mesh axis twice for {path!r}: {spec}.")
    layout = as_layout(spec, len(shape), placing)
    size = dict(placing.sizes)
    for axis, along in enumerate(layout):
        parts = math.prod(size[name] for name in along)
        if placing.available_axes and shape[axis] % parts:
            raise ValueError(
                f"shardings= splits axis {axis} of {path!r}, of size {shape[axis]}, over the mesh "
                f"axes {along} of {parts} devices, which do not divide it."
            )
    return layout


def layouts_by_path(shardings: Any, tree: Any, placing: Placing) -> dict[KeyPath, Layout]:
    """The layouts of the leaves of `tree` from a user's `shardings`, by key path."""
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
