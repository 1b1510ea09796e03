"""Linear minimisation oracles: the steepest point of a unit ball, by name or as a function."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muon_jax._checks import check_number, check_static
from muon_jax._matrices.stages import Matrices
from muon_jax._precision import widen

Oracle = Callable[[jax.Array], jax.Array]


class Ball(NamedTuple):
    """The ball whose oracle directs the steps of a layer, and its radius.

    Attributes:
        oracle: a name of `ORACLES`, or any `(..., fan_in, fan_out) -> (..., fan_in, fan_out)` that
            takes a direction to the point of the unit ball that is furthest along it.
        radius: of the ball; greater than 0.
    """

    oracle: str | Oracle = "spectral"
    radius: float = 1.0


def checked_ball(ball: Any) -> Ball:
    """A `Ball` from itself or its fields.

    Raises:
        TypeError: something else, or a radius that is no static number.
        ValueError: an unknown oracle, or a radius out of range.
    """
    fields = ball if isinstance(ball, (tuple, list)) else None
    if fields is None or not 1 <= len(fields) <= 2:
        raise TypeError(f"A ball must be Ball(oracle, radius); got {ball!r}.")
    ball = Ball(*fields)
    as_oracle(ball.oracle)
    check_static("radius", ball.radius)
    check_number("radius", ball.radius, above=0)
    return ball


def spectral(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """RMS to RMS operator norm: sqrt(fan_out / fan_in) U Vᵀ."""
    return [
        math.sqrt(fan_out / fan_in) * widen(x)
        for x, (fan_in, fan_out) in zip(
            matrices.orthogonalize(d, like), (part.fans for part in matrices.parts), strict=True
        )
    ]


def spectral_conv(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """The same for a convolution, whose window is all axes of fan_in but the last."""
    areas = []
    for part in matrices.parts:
        _, fan_in, _ = part.axes.split(part.shape)
        areas.append(math.prod(part.shape[axis] for axis in fan_in[:-1]))
    return [x / math.sqrt(area) for x, area in zip(spectral(matrices, d, like), areas, strict=True)]


def sign(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Largest entry, times fan_in: sign / fan_in."""
    del like
    return [jnp.sign(widen(x)) / part.fans[0] for part, x in zip(matrices.parts, d, strict=True)]


def row_norm(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Each output neuron's weights of length 1 / sqrt(fan_in)."""
    del like
    unit = _unit(matrices, d, over="fan_in")
    return [x / math.sqrt(part.fans[0]) for part, x in zip(matrices.parts, unit, strict=True)]


def col_norm(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Each input's weights of root mean square 1."""
    del like
    unit = _unit(matrices, d, over="fan_out")
    return [x * math.sqrt(part.fans[1]) for part, x in zip(matrices.parts, unit, strict=True)]


def _unit(matrices: Matrices, d: Sequence[jax.Array], over: str) -> list[jax.Array]:
    d = matrices.relative(d)
    lengths = [jnp.sqrt(total) for total in matrices.sum([x * x for x in d], over)]
    return [x / jnp.where(n == 0, 1, n) for x, n in zip(d, lengths, strict=True)]


# Pethick et al. (2502.07529), tables 2 to 4; rows and columns are torch's, of (out, in).
ORACLES = {
    "spectral": spectral,
    "spectral_conv": spectral_conv,
    "sign": sign,
    "row_norm": row_norm,
    "col_norm": col_norm,
    # For vectors, one an entry of the leading axes: b / rms(b), which is col_norm with fan_in 1.
    "bias_rms": col_norm,
}


def as_oracle(oracle: str | Oracle):
    """`(matrices, parts, like) -> parts` for a name or a user's function.

    Raises:
        ValueError: an unknown name.
    """
    if callable(oracle):
        checked = _SameShape(oracle)
        return lambda matrices, d, like: matrices.orthogonalize(d, like, checked)
    if not isinstance(oracle, str) or oracle not in ORACLES:
        raise ValueError(
            f"oracle must be one of {', '.join(ORACLES)}, or a function "
            f"(..., fan_in, fan_out) -> (..., fan_in, fan_out); got {oracle!r}."
        )
    return ORACLES[oracle]


@dataclasses.dataclass(frozen=True)
class _SameShape:
    """A user's oracle, whose results are checked."""

    oracle: Oracle

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.oracle(x)
        if jnp.shape(y) != x.shape:
            name = getattr(self.oracle, "__name__", self.oracle)
            raise ValueError(
                f"The oracle {name!r} must return an array of the shape that it is given, "
                f"{x.shape}; got {jnp.shape(y)}."
            )
        return y
