"""Linear minimisation oracles: the steepest point of a unit ball, by name or as a function."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from muon_jax._stages import Matrices

Oracle = Callable[[jax.Array], jax.Array]


class Ball(NamedTuple):
    """The ball whose oracle directs the steps of a layer, and its radius.

    Attributes:
        oracle: a name of `ORACLES`, or any `(..., fan_in, fan_out) -> (..., fan_in, fan_out)` that
            takes a direction to the point of the unit ball that is furthest along it.
        radius: of the ball.
    """

    oracle: str | Oracle = "spectral"
    radius: float = 1.0


def spectral(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """RMS to RMS operator norm: sqrt(fan_out / fan_in) U Vᵀ."""
    return [
        math.sqrt(fan_out / fan_in) * x
        for x, (fan_in, fan_out) in zip(
            matrices.orthogonalize(d, like), (piece.fans for piece in matrices), strict=True
        )
    ]


def spectral_conv(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """The same for a convolution, whose window is all axes of fan_in but the last."""
    areas = []
    for piece in matrices:
        _, fan_in, _ = piece.axes.split(piece.shape)
        areas.append(math.prod(piece.shape[axis] for axis in fan_in[:-1]))
    return [x / math.sqrt(area) for x, area in zip(spectral(matrices, d, like), areas, strict=True)]


def sign(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Largest entry, times fan_in: sign / fan_in."""
    del like
    return [jnp.sign(x) / piece.fans[0] for piece, x in zip(matrices, d, strict=True)]


def row_norm(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Each output neuron's weights of length 1 / sqrt(fan_in)."""
    del like
    unit = _unit(matrices, d, over="fan_in")
    return [x / math.sqrt(piece.fans[0]) for piece, x in zip(matrices, unit, strict=True)]


def col_norm(matrices: Matrices, d: Sequence[jax.Array], like) -> list[jax.Array]:
    """Each input's weights of root mean square 1."""
    del like
    unit = _unit(matrices, d, over="fan_out")
    return [x * math.sqrt(piece.fans[1]) for piece, x in zip(matrices, unit, strict=True)]


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
    """`(matrices, pieces, like) -> pieces` for a name or a user's function.

    Raises:
        ValueError: an unknown name.
    """
    if callable(oracle):
        return lambda matrices, d, like: matrices.orthogonalize(d, like, oracle)
    if oracle not in ORACLES:
        raise ValueError(
            f"Unknown oracle {oracle!r}. Known: {', '.join(ORACLES)}; or pass a function "
            "(..., fan_in, fan_out) -> (..., fan_in, fan_out)."
        )
    return ORACLES[oracle]
