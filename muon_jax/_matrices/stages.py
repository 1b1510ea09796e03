"""The stages that Muon and its variants share: momentum, orthogonalisation, shape scale.

A variant calls these stages and adds its own formula in between. Between the stages a tree is a
list with an array for each part of each leaf, `(*batch, fan_in, fan_out)` up to the order of axes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_integer, check_mesh, check_number
from muon_jax._matrices.hooks import as_hooks
from muon_jax._matrices.parts import Part, merge_parts, split_into_parts
from muon_jax._matrix_axes import MatrixAxes, axes_by_path
from muon_jax._momentum import MOMENTA, as_array_tree, init_momentum, update_momentum
from muon_jax._orthogonalize.newton_schulz import as_newton_schulz
from muon_jax._orthogonalize.symmetric import accumulator
from muon_jax._precision import coefficient, widen
from muon_jax._scale import ShapeScale, as_shape_scale
from muon_jax._sharding.buckets import Axes
from muon_jax._sharding.layout import (
    AnyMesh,
    Layout,
    find_placing,
    layout_of,
    layouts_by_path,
    whole_shape,
)
from muon_jax._sharding.placement import orthogonalize_leaves
from muon_jax._trees import KeyPath, naming, path_strings

Orthogonalizer = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Stages:
    """The settings of the stages, which `scale_by_muon` documents, with checks of their values."""

    beta: Any = 0.95
    nesterov: bool = True
    momentum: str = "ema"
    orthogonalizer: Any = None
    scale: str | ShapeScale | None = "spectral"
    mu_dtype: Any = None
    matrix_axes: Any = None
    mesh: AnyMesh | None = None
    shardings: Any = None
    chunk_size: int | None = None
    before: Any = None
    after: Any = None

    def __post_init__(self) -> None:
        check_number("beta", self.beta, at_least=0, below=1, schedule=True)
        if self.momentum not in MOMENTA:
            known = ", ".join(MOMENTA)
            raise ValueError(f"momentum must be one of {known}; got {self.momentum!r}.")
        check_mesh(self.mesh)
        if self.chunk_size is not None:
            check_integer("chunk_size", self.chunk_size, at_least=1)
        if self.mu_dtype is not None:
            init_momentum({}, self.mu_dtype)
        for place in ("before", "after"):
            object.__setattr__(self, place, as_hooks(place, getattr(self, place)))
        object.__setattr__(self, "orthogonalizer", as_newton_schulz(self.orthogonalizer))
        object.__setattr__(self, "scale", as_shape_scale(self.scale))

    def init_momentum(self, params: optax.Params) -> Any:
        return init_momentum(params, self.mu_dtype)

    def average(
        self, updates: optax.Updates, mu: Any, count: jax.Array
    ) -> tuple[optax.Updates, Any]:
        """Returns the average to orthogonalise at step `count`, from 1, and the new momentum."""
        beta = self.beta(count - 1) if callable(self.beta) else self.beta
        gpu = find_placing(self.mesh, jax.tree.leaves(updates)).platform == "gpu"
        kind, nesterov = self.momentum, self.nesterov
        return update_momentum(
            updates, mu, beta=beta, nesterov=nesterov, kind=kind, count=count, gpu=gpu
        )

    def matrices(self, tree: Any, axes: Any = None) -> "Matrices":
        """Returns the leaves of a tree as matrices with their layouts."""
        return Matrices(tree, self, axes)


class Matrices:
    """The leaves of a tree as a list of parts; leaves without entries have none.

    Attributes:
        parts: The parts of all leaves, in the tree's order.
    """

    def __init__(self, tree: Any, stages: Stages, axes: Any = None):
        self._tree, self._stages = tree, stages
        self._placing = find_placing(stages.mesh, jax.tree.leaves(tree))
        self._layouts = layouts_by_path(stages.shardings, tree, self._placing)
        axes = axes if axes is not None else stages.matrix_axes
        self._axes = axes_by_path(MatrixAxes() if axes is None else axes, tree)
        self._strings = path_strings(tree)
        self._parts: dict[KeyPath, list[Part]] = {}
        ways = self._placing.ways
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if math.prod(x.shape):
                layout = self._layouts.get(path)
                shape = whole_shape(x.shape, layout or ((),) * x.ndim, self._placing)
                with naming(self._strings[path]):
                    self._parts[path] = split_into_parts(shape, self._axes[path], layout, ways)
                if self._placing.manual_axes and not self._placing.available_axes and layout:
                    _check_slices(self._strings[path], x.shape, layout, self._parts[path])
        self.parts = [part for parts in self._parts.values() for part in parts]

    def in_blocks(self, blocks: tuple[int, int] | None) -> "Matrices":
        """Returns the same leaves with every matrix split into `blocks` along each fan.

        With `None`, each device's shard of a matrix is a block.
        """

        def parts(path: KeyPath, x: jax.Array) -> MatrixAxes:
            axes = self._axes[path]
            if (axes.split_fan_in, axes.split_fan_out) != (1, 1) or path not in self._parts:
                return axes
            if blocks is not None:
                return axes._replace(split_fan_in=blocks[0], split_fan_out=blocks[1])
            layout = self._layouts.get(path)
            if layout is None and self._placing.available_axes:
                layout = layout_of(x, self._placing)
                if layout is None:
                    raise ValueError(
                        f"Cannot determine the sharding of {self._strings[path]!r}, a traced array "
                        "under Auto axes; pass shardings= or blocks=."
                    )
            if layout is None:
                return axes
            _, *fans = axes.split(x.shape)
            ways = [self._placing.ways(layout[fan[0]]) for fan in fans]
            return axes._replace(split_fan_in=ways[0], split_fan_out=ways[1])

        axes = jax.tree_util.tree_map_with_path(parts, self._tree)
        return Matrices(self._tree, self._stages, axes)

    def split(self, tree: Any) -> list[jax.Array]:
        """Splits a tree whose leaves have the same shapes into its parts."""
        leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
        return [p.split(leaves[path]) for path, parts in self._parts.items() for p in parts]

    def merge(self, arrays: Sequence[jax.Array], tree: Any) -> Any:
        """Merges parts into a tree with the dtypes, shardings and empty leaves of `tree`."""
        remaining = iter(arrays)

        def leaf(path, x):
            if path not in self._parts:
                return x
            parts = self._parts[path]
            y = merge_parts(parts, [next(remaining) for _ in parts]).astype(x.dtype)
            sharding = getattr(jax.typeof(x), "sharding", None)
            moved = sharding is not None and jax.typeof(y).sharding != sharding
            return jax.reshard(y, sharding) if moved and any(sharding.spec) else y

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def pack(self, arrays: Sequence[Any]) -> Any:
        """Returns a tree of the leaves with the value of each part; a tuple for several parts."""
        remaining = iter(arrays)

        def leaf(path, x):
            kept = tuple(next(remaining) for _ in self._parts.get(path, ()))
            return kept[0] if len(kept) == 1 else kept

        return jax.tree_util.tree_map_with_path(leaf, self._tree)

    def unpack(self, packed: Any) -> list[Any]:
        """Inverts `pack`."""
        kept: list[Any] = []

        def leaf(path, _, value):
            parts = self._parts.get(path, ())
            kept.extend([value] if len(parts) == 1 else value)

        jax.tree_util.tree_map_with_path(leaf, self._tree, packed)
        return kept

    def orthogonalize(
        self, arrays: Iterable[jax.Array], like: Any, orthogonalizer: Orthogonalizer | None = None
    ) -> list[jax.Array]:
        """Orthogonalises the parts, each matrix only once on any mesh.

        `like` is a tree with the shardings of the leaves, namely the momentum.
        """
        return orthogonalize_leaves(
            list(arrays),
            [part.axes for part in self.parts],
            orthogonalizer or self._stages.orthogonalizer,
            placing=self._placing,
            layouts=[part.layout for part in self.parts],
            like=self.split(as_array_tree(like)),
            chunk_size=self._stages.chunk_size,
        )

    def scale(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Multiplies each part by the shape scale of its fan_in and fan_out."""
        assert callable(self._stages.scale)
        scaled = []
        for part, x in zip(self.parts, arrays, strict=True):
            factor = self._stages.scale(*part.fans)
            check_number(f"The result of scale{part.fans}", factor)
            wide = widen(x)
            scaled.append((coefficient(factor, wide) * wide).astype(x.dtype))
        return scaled

    def sum(self, arrays: Iterable[jax.Array], over: str) -> list[jax.Array]:
        """Sums in float32 or wider over `"fan_in"`, `"fan_out"` or `"matrix"`, keeping the axes."""

        def total(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            return jnp.sum(x, axis=axes, keepdims=True, dtype=accumulator(x.dtype))

        return self._reduced(arrays, over, total, jax.lax.psum)

    def relative(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Divides each matrix by its largest entry, in float32 or wider, so squares are finite."""
        roots = (jax.lax.rsqrt(jnp.where(x == 0, 1, x)) for x in self.largest(arrays))
        return [x * root * root for x, root in zip(arrays, roots, strict=True)]

    def largest(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns the largest absolute entry of each matrix, in float32 or wider, keeping axes."""

        def largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            return jnp.max(jnp.abs(widen(x)), axis=axes, keepdims=True)

        return self._reduced(arrays, "matrix", largest, jax.lax.pmax)

    def _reduced(
        self, arrays: Iterable[jax.Array], over: str, here: Callable, across: Callable
    ) -> list[jax.Array]:
        """Reduces `here` over axes of each array, and `across` devices that split these axes."""
        results = []
        for part, x in zip(self.parts, arrays, strict=True):
            _, fan_in, fan_out = part.axes.split(part.shape)
            axes = {"fan_in": fan_in, "fan_out": fan_out, "matrix": fan_in + fan_out}[over]
            split = [names for axis, names in self._split_fans(part) if axis in axes]
            names = tuple(itertools.chain(*split))
            results.append(across(here(x, axes), names) if names else here(x, axes))
        return results

    def norms(self, arrays: Sequence[jax.Array], over: str = "matrix") -> list[jax.Array]:
        """Returns Frobenius norms, or norms over one of the fans, in float32 or wider."""
        squares = [jnp.real(x * jnp.conj(x)) for x in map(widen, arrays)]
        return [jnp.sqrt(total) for total in self.sum(squares, over)]

    def safe_norms(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns Frobenius norms without overflow or underflow of the squares of entries."""
        norms = zip(self.norms(self.relative(arrays)), self.largest(arrays), strict=True)
        return [norm * largest for norm, largest in norms]

    def with_norms(
        self, arrays: Sequence[jax.Array], norms: Iterable[Any], over: str = "matrix"
    ) -> list[jax.Array]:
        """Scales arrays to the given norms over the same axes; zeros stay zeros."""
        own = self.norms(arrays, over)
        return [
            x * (new / jnp.where(old == 0, 1, old))
            for x, new, old in zip(arrays, norms, own, strict=True)
        ]

    def whole(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns parts as `(*batch, fan_in, fan_out)`, in `shard_map` gathered along the fans."""
        matrices = []
        for part, x in zip(self.parts, arrays, strict=True):
            for axis, names in self._split_fans(part):
                x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
            matrices.append(part.axes.to_matrices(x))
        return matrices

    def local(self, matrices: Sequence[jax.Array]) -> list[jax.Array]:
        """Inverts `whole`."""
        arrays = []
        for part, y in zip(self.parts, matrices, strict=True):
            batch, *_ = part.axes.split(part.shape)
            own = dict(zip(batch, y.shape, strict=False))  # in shard_map less than part.shape
            shape = [own.get(axis, size) for axis, size in enumerate(part.shape)]
            arrays.append(_own_shard(part.axes.from_matrices(y, shape), self._split_fans(part)))
        return arrays

    def own_batch(self, part: Part, x: jax.Array) -> jax.Array:
        """Returns this device's shard of `(*batch, ...)`, inside `shard_map`; elsewhere `x`."""
        if self._placing.available_axes or part.layout is None:
            return x
        batch, *_ = part.axes.split(part.shape)
        split = [(at, part.layout[axis]) for at, axis in enumerate(batch) if part.layout[axis]]
        return _own_shard(x, split)

    def _split_fans(self, part: Part) -> list[tuple[int, Axes]]:
        """Returns the fan axes that an enclosing `shard_map` splits, with their mesh axes."""
        if self._placing.available_axes or part.layout is None:
            return []
        _, fan_in, fan_out = part.axes.split(part.shape)
        return [(axis, part.layout[axis]) for axis in fan_in + fan_out if part.layout[axis]]

    def ways(self, part: Part) -> tuple[int, int]:
        """Returns into how many shards the mesh splits fan_in and fan_out; 1 if that is unknown."""
        *_, along_in, along_out = self._whole_layout(part) or ((), ())
        return self._placing.ways(along_in), self._placing.ways(along_out)

    def _whole_layout(self, part: Part) -> Layout | None:
        """Returns the layout of the matrices that `whole` returns, or None if it is unknown."""
        if part.layout is None:
            return None
        batch, *fans = part.axes.split(part.shape)
        outer = tuple(part.layout[axis] for axis in batch)
        if not self._placing.available_axes:
            return (*outer, (), ())
        if any(part.layout[axis] for fan in fans for axis in fan[1:]):
            return None
        return (*outer, *(part.layout[fan[0]] for fan in fans))

    def map_distributed(
        self, matrices: Iterable[Any], function: Orthogonalizer, split: bool = False
    ) -> list[Any]:
        """Applies `function` to a stack `(*batch, m, n)` for each part, each matrix on one device.

        Parts with None are skipped. With `split` the stacks have the shardings of `whole` matrices,
        including those of m and n; without it XLA chooses them.
        """
        matrices = list(matrices)

        def layout(part: Part) -> Layout | None:
            if self._placing.available_axes and not split:
                return None
            return self._whole_layout(part)

        present = [i for i, x in enumerate(matrices) if x is not None]
        results = orthogonalize_leaves(
            [matrices[i] for i in present],
            [MatrixAxes()] * len(present),
            function,
            placing=self._placing,
            layouts=[layout(self.parts[i]) for i in present],
            like=[matrices[i] for i in present],
            chunk_size=self._stages.chunk_size if split else None,
        )
        by_part = dict(zip(present, results, strict=True))
        return [by_part.get(i) for i in range(len(matrices))]


def _own_shard(x: jax.Array, split: Iterable[tuple[int, Axes]]) -> jax.Array:
    """Returns this device's shard of `x`, whose axes are split over mesh axes of a `shard_map`."""
    for axis, names in split:
        size = x.shape[axis] // jax.lax.axis_size(names)
        start = jax.lax.axis_index(names) * size
        x = jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)
    return x


def _check_slices(path: str, shape: tuple[int, ...], layout: Layout, parts: Sequence[Part]) -> None:
    """Checks that devices hold whole parts, since inside `shard_map` splitting moves no data."""
    for part in parts:
        for axis, size, whole in part.cuts():
            if layout[axis] and (shape[axis] % size or not whole):
                raise ValueError(
                    f"Inside shard_map each device must hold whole parts of {path!r}; it has "
                    f"{shape[axis]} entries of axis {axis}, in parts of {size}. Split the axis "
                    "into equal parts, a multiple of the number of devices along it."
                )
