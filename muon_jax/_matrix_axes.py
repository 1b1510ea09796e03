"""An N-D leaf as a stack of matrices, and back: batch axes stay as they are."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from muon_jax._options import accepts_old_names
from muon_jax._trees import KeyPath, values_by_path


class Interleaved(NamedTuple):
    """Parts of an axis that take turns: the sizes of one round, as many rounds as fit.

    Megatron's layout of query, key and value in one kernel is one round for each group of heads,
    `[q ... q k v]`: `MatrixAxes(split_fan_out=Interleaved((512, 128, 128)))` for four query heads
    of 128 to a key and a value.

    Attributes:
        sizes: of the parts of a round.
        together: each part of all rounds is one matrix, all queries for one; False makes those of
            each round matrices of their own.
    """

    sizes: tuple[int, ...]
    together: bool = True


Parts = int | tuple[int, ...] | Interleaved


@accepts_old_names
class MatrixAxes(NamedTuple):
    """Which axes of a leaf are contracted with the input, and which are the output.

    Every other axis is batch: a stack of matrices, each orthogonalised on its own. Negative axes
    count from the end, so one value serves a leaf and its scan-stacked form.

    Attributes:
        fan_in: an axis or several, e.g. `(0, 1, 2)` for a conv kernel `(kh, kw, in, out)`.
        fan_out: an axis or several, e.g. `(-2, -1)` for a query kernel `(d, heads, head_dim)`.
        split_fan_in, split_fan_out: the number of equal parts that the (first) axis of the fan is
            split into, or the sizes of the parts; each part is a matrix of its own.
            Parts that take turns are `Interleaved`.
            `split_fan_out=2` for gate and up in one kernel, `(2048, 512, 512)` for query, key and
            value in one, the number of heads to orthogonalise each head by itself.

    Example:
        >>> import jax.numpy as jnp
        >>> from muon_jax import MatrixAxes
        >>> MatrixAxes(fan_in=-3, fan_out=(-2, -1)).matrix_shape((12, 768, 12, 64))
        ((12,), 768, 768)
    """

    fan_in: int | Sequence[int] = -2
    fan_out: int | Sequence[int] = -1
    split_fan_in: Parts = 1
    split_fan_out: Parts = 1

    def split(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """`(batch, fan_in, fan_out)` axes of a leaf of this shape, none negative.

        Raises:
            ValueError: an axis out of range, used twice, or an empty fan.
        """
        ndim = len(shape)
        fans = [tuple(fan) if isinstance(fan, Sequence) else (fan,) for fan in self[:2]]
        axes = [axis for fan in fans for axis in fan]
        if not all(fans) or not all(_is_axis(axis, ndim) for axis in axes):
            raise ValueError(
                f"{self} does not fit a leaf of shape {tuple(shape)}: fan_in and fan_out each need "
                f"at least one axis in [-{ndim}, {ndim})."
            )
        fan_in, fan_out = (tuple(axis % ndim for axis in fan) for fan in fans)
        if len(set(fan_in + fan_out)) != len(axes):
            raise ValueError(f"{self} uses an axis of shape {tuple(shape)} twice.")
        batch = tuple(axis for axis in range(ndim) if axis not in fan_in + fan_out)
        return batch, fan_in, fan_out

    def normalized(self, ndim: int) -> "MatrixAxes":
        """The same axes as tuples, none negative."""
        _, fan_in, fan_out = self.split((1,) * ndim)
        return MatrixAxes(fan_in, fan_out, self.split_fan_in, self.split_fan_out)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """`(batch shape, fan_in, fan_out)` of a leaf of this shape, before it is split in parts."""
        batch, fan_in, fan_out = self.split(shape)
        return (
            tuple(shape[axis] for axis in batch),
            math.prod(shape[axis] for axis in fan_in),
            math.prod(shape[axis] for axis in fan_out),
        )

    def to_matrices(self, x: jax.Array) -> jax.Array:
        """Leaf -> `(*batch, fan_in, fan_out)`."""
        batch, fan_in, fan_out = self.split(x.shape)
        shape, m, n = self.matrix_shape(x.shape)
        return x.transpose(batch + fan_in + fan_out).reshape(*shape, m, n)

    def from_matrices(self, matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
        """`(*batch, fan_in, fan_out)` -> a leaf of this shape; undoes `to_matrices`."""
        order = [axis for group in self.split(shape) for axis in group]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrices.reshape([shape[axis] for axis in order]).transpose(inverse)


def _is_axis(axis: Any, ndim: int) -> bool:
    return isinstance(axis, (int, np.integer)) and bool(-ndim <= axis < ndim)


def as_matrix_axes(axes) -> MatrixAxes:
    """Accepts `MatrixAxes`, and optax's `MuonDimensionNumbers` by its fields.

    Raises:
        TypeError: neither of the two.
    """
    if isinstance(axes, MatrixAxes):
        return axes
    if is_matrix_axes(axes):
        return MatrixAxes(fan_in=axes.reduction_axis, fan_out=axes.output_axis)
    raise TypeError(
        "Matrix axes must be muon_jax.MatrixAxes(fan_in, fan_out) or "
        f"optax.contrib.MuonDimensionNumbers, got {axes!r}."
    )


def is_matrix_axes(x) -> bool:
    """Whether `as_matrix_axes` would take it; the `is_leaf` of trees of axes."""
    return isinstance(x, MatrixAxes) or (hasattr(x, "reduction_axis") and hasattr(x, "output_axis"))


def axes_by_path(matrix_axes: Any, tree: Any, partial: bool = False) -> dict[KeyPath, MatrixAxes]:
    """The axes of each leaf of `tree`, by key path, from what a user gives as `matrix_axes`."""
    given = values_by_path(
        matrix_axes,
        tree,
        what="matrix_axes",
        kind="muon_jax.MatrixAxes(fan_in, fan_out) or optax.contrib.MuonDimensionNumbers",
        is_value=is_matrix_axes,
        partial=partial,
    )
    return {path: as_matrix_axes(axes) for path, axes in given.items()}
