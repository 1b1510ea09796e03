"""Linear minimisation oracles, which return the steepest point of a unit ball."""

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
    """The ball of a layer: its oracle, which gives the direction of steps, and its radius.

    Attributes:
        oracle: A name in `ORACLES`, or a function `(..., fan_in, fan_out) -> (..., fan_in,
            fan_out)` that maps a direction to the point of the unit ball furthest along it.
        radius: The radius of the ball, greater than 0.
    """

    oracle: str | Oracle = "spectral"
    radius: float = 1.0


def checked_ball(ball: Any) -> Ball:
    """Returns a checked `Ball` from a `Ball` or a tuple of its fields."""
    fields = ball if isinstance(ball, (tuple, list)) else None
    if fields is None or not 1 <= len(fields) <= 2:
        raise TypeError(f"A ball must be a muon_jax.Ball(oracle, radius); got {ball!r}.")
    ball = Ball(*fields)
    as_oracle(ball.oracle)
    check_static("radius", ball.radius)
    check_number("radius", ball.radius, above=0)
    return ball


def spectral(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Returns sqrt(fan_out / fan_in) U Vᵀ, the oracle of the RMS-to-RMS operator norm."""
    return [
        math.sqrt(fan_out / fan_in) * widen(x)
        for x, (fan_in, fan_out) in zip(
            matrices.orthogonalize(d, like), (part.fans for part in matrices.parts), strict=True
        )
    ]


def spectral_conv(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Returns the same for a convolution, whose window is all axes of fan_in except the last."""
    areas = []
    for part in matrices.parts:
        _, fan_in, _ = part.axes.split(part.shape)
        areas.append(math.prod(part.shape[axis] for axis in fan_in[:-1]))
    return [x / math.sqrt(area) for x, area in zip(spectral(matrices, d, like), areas, strict=True)]


def sign(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Returns sign(d) / fan_in, the oracle of fan_in times the largest absolute entry."""
    del like
    return [jnp.sign(widen(x)) / part.fans[0] for part, x in zip(matrices.parts, d, strict=True)]


def row_norm(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Scales each output neuron's weights to norm 1 / sqrt(fan_in)."""
    del like
    unit = _unit(matrices, d, over="fan_in")
    return [x / math.sqrt(part.fans[0]) for part, x in zip(matrices.parts, unit, strict=True)]


def col_norm(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Scales each input's weights to root mean square 1."""
    del like
    unit = _unit(matrices, d, over="fan_out")
    return [x * math.sqrt(part.fans[1]) for part, x in zip(matrices.parts, unit, strict=True)]


def _unit(matrices: Matrices, d: Sequence[jax.Array], over: str) -> list[jax.Array]:
    d = matrices.relative(d)
    lengths = [jnp.sqrt(total) for total in matrices.sum([x * x for x in d], over)]
    return [x / jnp.where(n == 0, 1, n) for x, n in zip(d, lengths, strict=True)]


# Pethick et al. (2502.07529), tables 2 to 4. Rows and columns are those of torch's (out, in).
ORACLES = {
    "spectral": spectral,
    "spectral_conv": spectral_conv,
    "sign": sign,
    "row_norm": row_norm,
    "col_norm": col_norm,
    # For vectors along the last axis: b / rms(b), which is col_norm with a fan_in of 1.
    "bias_rms": col_norm,
}


def as_oracle(oracle: str | Oracle):
    """Returns the function `(matrices, parts, like) -> parts` of a name or a user's function."""
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
    """A user's oracle with a check of the shape of its result."""

    oracle: Oracle

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.oracle(x)
        if jnp.shape(y) != x.shape:
            name = getattr(self.oracle, "__name__", self.oracle)
            raise ValueError(
                f"The oracle {name!r} must return an array with the shape of its argument, "
                f"{x.shape}; got {jnp.shape(y)}."
            )
        return y
