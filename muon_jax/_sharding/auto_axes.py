"""Moves leaves under Auto axes, whose shardings only XLA knows, to known shardings.

Matrices of one shape are stacked. Full rounds of whole matrices are moved to the devices that will
orthogonalise them, and the remainder is split along its long side over all devices. XLA moves them
over one mesh axis at a time, since it would replicate them for a direct move over two axes.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from muon_jax._matrix_axes import MatrixAxes
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._orthogonalize.symmetric import joined
from muon_jax._sharding.buckets import exchange_dtype
from muon_jax._sharding.layout import PlacedArray, Placing

_UNCONSTRAINED = PartitionSpec.UNCONSTRAINED


def assume_layouts(
    leaves: Sequence[jax.Array],
    axes: Sequence[MatrixAxes],
    newton_schulz: NewtonSchulz | None,
    placing: Placing,
) -> list[Any]:
    """Returns groups of leaves such that each leaf is in one group.

    A group has the indices of its `members`, the `arrays` that replace them in the exchange, how
    these are `placed`, and a function `restore` from the results of `arrays` to the members'.
    """
    shared: dict[tuple, list[int]] = defaultdict(list)
    stacked: dict[tuple, list[int]] = defaultdict(list)
    for i, (x, a) in enumerate(zip(leaves, axes, strict=True)):
        dtype, at = exchange_dtype(x.dtype, newton_schulz), _shared_batch_axis(x.shape, a, placing)
        if at is not None:
            shared[x.shape, dtype, a.normalized(x.ndim), at].append(i)
        else:
            stacked[a.matrix_shape(x.shape)[1:], dtype].append(i)
    groups: list[Any] = []
    for (_, dtype, a, at), members in shared.items():
        groups.append(_SharedBatch(members, [leaves[i] for i in members], a, at, dtype, placing))
    for (_, dtype), members in stacked.items():
        own = [leaves[i] for i in members], [axes[i] for i in members]
        groups.append(_SameShape(members, *own, dtype, placing, fill_up=newton_schulz is not None))
    return groups


def _shared_batch_axis(shape: tuple[int, ...], axes: MatrixAxes, placing: Placing) -> int | None:
    """Returns the batch axis that is probably split over the whole mesh already, such as experts.

    Of several axes whose sizes are multiples of the number of devices it is the largest, and of
    equal ones the first. With one batch axis and several mesh axes there is none, because the leaf
    is more likely a stack of layers with sharded matrices.
    """
    batch, _, _ = axes.split(shape)
    if len(batch) < 2 and len(placing.available_axes) > 1:
        return None
    fit = [axis for axis in batch if shape[axis] and shape[axis] % placing.devices == 0]
    return max(fit, key=lambda axis: shape[axis], default=None)


class _SharedBatch:
    """Leaves of one shape whose batch axis `at` is split over the whole mesh, stacked."""

    def __init__(self, members, leaves, axes: MatrixAxes, at: int, dtype, placing: Placing):
        self.members = members
        stack = jnp.stack([x.astype(dtype) for x in leaves])
        layout = tuple(
            placing.available_axes if axis == at + 1 else () for axis in range(stack.ndim)
        )
        _, *fans = axes.split(leaves[0].shape)
        fans = [tuple(axis + 1 for axis in fan) for fan in fans]
        self.arrays = [stack]
        self.placed = [PlacedArray(stack.shape, dtype, layout, MatrixAxes(*fans))]

    def restore(self, results: Sequence[jax.Array]) -> Sequence[jax.Array]:
        return list(results[0])


class _SameShape:
    """Matrices of one shape: full rounds of whole matrices, the others split on the long side.

    With `fill_up` a long side that is not divisible by the number of devices is padded with zeros;
    without it the round is padded with matrices of zeros.
    """

    def __init__(
        self, members, leaves, axes: Sequence[MatrixAxes], dtype, placing: Placing, fill_up: bool
    ):
        self.members = members
        self.leaves, self.axes, self.placing = leaves, axes, placing
        self.arrays: list[jax.Array] = []
        self.placed: list[PlacedArray] = []
        parts = [a.to_matrices(x).astype(dtype) for x, a in zip(leaves, axes, strict=True)]
        parts = [x.reshape(-1, *x.shape[-2:]) for x in parts]
        stack = joined(parts)
        count, m, n = stack.shape
        full = count - count % placing.devices
        if full:
            self._enter(stack[:full], 0)
        if full < count:
            left = stack[full:]
            long = 1 if m >= n else 2
            at = long if fill_up or left.shape[long] % placing.devices == 0 else 0
            pad = -left.shape[at] % placing.devices
            widths = [(0, pad if axis == at else 0) for axis in range(3)]
            self._enter(jnp.pad(left, widths), at)

    def _enter(self, stack: jax.Array, at: int) -> None:
        """Moves `(matrices, fan_in, fan_out)` so that axis `at` is split over the whole mesh."""
        mesh_axes = self.placing.available_axes
        for end in range(1, len(mesh_axes) + 1):
            stack = self._constrain(stack, at, end)
        layout = tuple(mesh_axes if axis == at else () for axis in range(3))
        self.arrays.append(stack)
        self.placed.append(PlacedArray(stack.shape, stack.dtype, layout, MatrixAxes((1,), (2,))))

    def _constrain(self, x: jax.Array, at: int, end: int) -> jax.Array:
        assert self.placing.mesh is not None
        spec = [
            self.placing.available_axes[:end] if axis == at else _UNCONSTRAINED for axis in range(3)
        ]
        return lax.with_sharding_constraint(
            x, NamedSharding(self.placing.mesh, PartitionSpec(*spec))
        )

    def restore(self, results: Sequence[jax.Array]) -> Sequence[jax.Array]:
        _, m, n = self.axes[0].matrix_shape(self.leaves[0].shape)
        moved = []
        for y, item in zip(results, self.placed, strict=True):
            at = next(axis for axis in range(3) if item.layout[axis])
            for end in range(len(self.placing.available_axes) - 1, 0, -1):
                y = self._constrain(y, at, end)
            moved.append(y[:, :m, :n])
        stack = joined(moved)
        updates, start = [], 0
        for x, a in zip(self.leaves, self.axes, strict=True):
            batch, m, n = a.matrix_shape(x.shape)
            stop = start + x.size // (m * n)
            updates.append(a.from_matrices(stack[start:stop].reshape(*batch, m, n), x.shape))
            start = stop
        return updates
