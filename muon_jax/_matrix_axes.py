"""Which axes of a leaf form its matrices, and the conversion from leaf to matrices and back."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from muon_jax._options import accepts_old_names
from muon_jax._trees import KeyPath, values_by_path


class Interleaved(NamedTuple):
    """The parts of an axis that repeat in rounds, such as `q k v q k v`.

    Megatron stores query, key and value in one kernel with one round per group of heads,
    `[q ... q k v]`: `MatrixAxes(split_fan_out=Interleaved((512, 128, 128)))` describes four query
    heads of size 128 for each key and value head.

    Attributes:
        sizes: The size of each part within one round. The rounds fill the axis.
        together: Whether a part of all rounds forms one matrix, for example all queries. If False,
            each part of each round is a matrix of its own.
    """

    sizes: tuple[int, ...]
    together: bool = True


Parts = int | tuple[int, ...] | Interleaved


@accepts_old_names
class MatrixAxes(NamedTuple):
    """Which axes of a leaf are contracted with the input, and which are the output.

    All other axes are batch axes: the leaf is a stack of matrices, and each is orthogonalised
    separately. Negative axes count from the end, so that one value fits a leaf and its
    scan-stacked form.

    Attributes:
        fan_in: An axis or several, such as `(0, 1, 2)` for a conv kernel `(kh, kw, in, out)`.
        fan_out: An axis or several, such as `(-2, -1)` for a query kernel `(d, heads, head_dim)`.
        split_fan_in, split_fan_out: The number of equal parts into which the (first) axis of the
            fan is split, the sizes of the parts, or `Interleaved`. Each part is a matrix of its
            own. Examples: `split_fan_out=2` if gate and up share one kernel, `(2048, 512, 512)` if
            query, key and value do, the number of heads to orthogonalise each head separately.

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
        """Returns the `(batch, fan_in, fan_out)` axes of a leaf of this shape, none negative.

        Raises:
            ValueError: An axis is out of range or used twice, or a fan is empty.
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
            raise ValueError(
                f"{self} uses an axis of shape {tuple(shape)} twice; each may be used only once."
            )
        batch = tuple(axis for axis in range(ndim) if axis not in fan_in + fan_out)
        return batch, fan_in, fan_out

    def normalized(self, ndim: int) -> "MatrixAxes":
        """Returns the same axes as tuples, none negative."""
        _, fan_in, fan_out = self.split((1,) * ndim)
        return MatrixAxes(fan_in, fan_out, self.split_fan_in, self.split_fan_out)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """Returns `(batch shape, fan_in, fan_out)` of a leaf of this shape, ignoring its parts."""
        batch, fan_in, fan_out = self.split(shape)
        return (
            tuple(shape[axis] for axis in batch),
            math.prod(shape[axis] for axis in fan_in),
            math.prod(shape[axis] for axis in fan_out),
        )

    def to_matrices(self, x: jax.Array) -> jax.Array:
        """Transposes and reshapes a leaf to `(*batch, fan_in, fan_out)`."""
        batch, fan_in, fan_out = self.split(x.shape)
        shape, m, n = self.matrix_shape(x.shape)
        return x.transpose(batch + fan_in + fan_out).reshape(*shape, m, n)

    def from_matrices(self, matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Returns the leaf of this shape from its matrices; the inverse of `to_matrices`."""
        order = [axis for group in self.split(shape) for axis in group]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrices.reshape([shape[axis] for axis in order]).transpose(inverse)


def _is_axis(axis: Any, ndim: int) -> bool:
    return isinstance(axis, (int, np.integer)) and bool(-ndim <= axis < ndim)


def as_matrix_axes(axes) -> MatrixAxes:
    """Converts `MatrixAxes` or optax's `MuonDimensionNumbers` to `MatrixAxes`."""
    if isinstance(axes, MatrixAxes):
        return axes
    if is_matrix_axes(axes):
        return MatrixAxes(fan_in=axes.reduction_axis, fan_out=axes.output_axis)
    raise TypeError(
        "Matrix axes must be muon_jax.MatrixAxes(fan_in, fan_out) or "
        f"optax.contrib.MuonDimensionNumbers; got {axes!r}."
    )


def is_matrix_axes(x) -> bool:
    """Whether `as_matrix_axes` accepts `x`; also the `is_leaf` of trees of axes."""
    return isinstance(x, MatrixAxes) or (hasattr(x, "reduction_axis") and hasattr(x, "output_axis"))


def axes_by_path(matrix_axes: Any, tree: Any, partial: bool = False) -> dict[KeyPath, MatrixAxes]:
    """Returns the axes of each leaf of `tree`, by key path, from a user's `matrix_axes`."""
    given = values_by_path(
        matrix_axes,
        tree,
        what="matrix_axes",
        kind="muon_jax.MatrixAxes(fan_in, fan_out) or optax.contrib.MuonDimensionNumbers",
        is_value=is_matrix_axes,
        partial=partial,
    )
    return {path: as_matrix_axes(axes) for path, axes in given.items()}
