"""Orthogonalizers from singular value decompositions: the polar factor, exact or of rank k."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_integer, check_number, check_static
from muon_jax._muon import muon
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.decompositions import each_matrix
from muon_jax._precision import widen

# The iteration uses this many more directions than the rank, so that the last ones converge too.
_OVERSAMPLING = 8


def polar_factor(x: jax.Array) -> jax.Array:
    r"""Returns the polar factor $UV^\top$ of $x = U \Sigma V^\top$ by SVD, exact to rounding.

    This is the matrix that Newton-Schulz approximates. Null directions stay zero, so a zero matrix
    gives zeros.

    Args:
        x: An array `(..., m, n)` of floating-point numbers.

    Returns:
        An array `(..., m, n)` in `x.dtype`, computed in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> print(muon_jax.polar_factor(jnp.array([[3.0, 0.0], [0.0, -4.0]])).round(6) + 0)
        [[ 1.  0.]
         [ 0. -1.]]
        >>> tx = muon_jax.muon(0.02, orthogonalizer=muon_jax.polar_factor)
    """
    return _truncated(x, min(x.shape[-2:]))


@dataclasses.dataclass(frozen=True)
class TruncatedPolar:
    r"""An orthogonalizer that returns $U_k V_k^\top$ from the top k singular triplets.

    Attributes:
        rank: k, or a float in (0, 1] for a fraction of the short side, rounded up to an integer
            (0.07 of 100 is 7, of 101 is 8). If k is at least the short side, the result is the
            polar factor.
        method: `"svd"` is exact. `"subspace"` is block power iteration from a fixed random start;
            its cost grows with k, and its error with the ratio of the singular values around k.
        iterations: The number of iterations of `"subspace"`, each of which takes two products with
            `x` and a QR.

    References:
        Essential AI, 2025, the rank study; Halko et al., 2011, arXiv 0909.4061, algorithm 4.4.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> top = muon_jax.TruncatedPolar(rank=1)
        >>> print(top(jnp.array([[3.0, 0.0], [0.0, 4.0]])).round(6) + 0)
        [[0. 0.]
         [0. 1.]]
    """

    rank: int | float
    method: str = "svd"
    iterations: int = 2

    def __post_init__(self) -> None:
        if self.method not in ("svd", "subspace"):
            raise ValueError(f"method must be svd or subspace; got {self.method!r}.")
        rank_of(self.rank, 1, 1)
        check_integer("iterations", self.iterations, at_least=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        m, n = x.shape[-2:]
        rank = rank_of(self.rank, m, n)
        carried = rank + _OVERSAMPLING
        if self.method == "svd" or carried >= min(m, n):
            return _truncated(x, rank)
        if m > n:
            return self(x.mT).mT
        wide, largest = relative(x)
        q = jax.random.normal(jax.random.key(0), (n, carried), wide.dtype)
        q = jnp.broadcast_to(q, (*x.shape[:-2], n, carried))
        for _ in range(self.iterations):
            p, _ = each_matrix(jnp.linalg.qr, product(wide, q))
            q, r = each_matrix(jnp.linalg.qr, product(wide.mT, p))
        # x ≈ p rᵀ qᵀ, whose SVD follows from that of the small r.
        left, values, right = each_matrix(_svd, r.mT)
        kept = _kept(values, rank)
        p, q = product(p, left[..., :rank] * kept), product(q, right.mT[..., :rank])
        factor = product(p, q.mT)
        return jnp.where(largest == 0, 0, factor).astype(x.dtype)


@takes_options_of(muon, without=("orthogonalizer", "ns_coeffs", "ns_steps", "ns_dtype"))
def low_rank(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float,
    *,
    method: str = "svd",
    iterations: int = 2,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns `muon` with `TruncatedPolar`, which keeps the k strongest directions of the momentum.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.low_rank(0.02, rank=2, adam_learning_rate=3e-4)
    """
    factor = TruncatedPolar(rank, method, iterations)
    return muon(learning_rate, orthogonalizer=factor, **options)


def rank_of(rank: int | float, m: int, n: int) -> int:
    """Returns a rank from an integer or a fraction of the short side, for `m × n` matrices."""
    check_static("rank", rank)
    check_number("rank", rank)
    short = min(m, n)
    if isinstance(rank, float) and 0 < rank <= 1:
        # Rounding must not add a direction: 0.07 * 100 is 7.000000000000001.
        return max(1, math.ceil(round(rank * short, 9)))
    if isinstance(rank, int) and rank >= 1:
        return min(rank, short)
    raise ValueError(
        "rank must be an integer of at least 1, or a float in (0, 1] as a fraction of the short "
        f"side; got {rank!r}."
    )


def _svd(x: jax.Array) -> Any:
    return jnp.linalg.svd(x, full_matrices=False)


def _truncated(x: jax.Array, rank: int) -> jax.Array:
    if not x.size:
        return x
    wide, largest = relative(x)
    u, values, vt = each_matrix(_svd, wide)
    factor = product(u[..., :rank] * _kept(values, rank), vt[..., :rank, :])
    return jnp.where(largest == 0, 0, factor).astype(x.dtype)


def relative(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides `x` by its largest absolute entry, in float32 or wider, and returns both."""
    x = widen(x)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    root = jax.lax.rsqrt(jnp.where(largest == 0, 1, largest))
    return x * root * root, largest


def _kept(values: jax.Array, rank: int) -> jax.Array:
    """Returns `(..., 1, rank)`: 1 for singular values above the rounding error, 0 for others."""
    noise = values[..., :1] * values.shape[-1] * jnp.finfo(values.dtype).eps
    values = values[..., :rank]
    kept = jnp.where(jnp.isnan(values), values, (values > noise).astype(values.dtype))
    return kept[..., None, :]


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `a @ b`, in full float32 precision on every platform."""
    return jnp.matmul(a, b, precision="highest")
