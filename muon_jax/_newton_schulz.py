"""Newton-Schulz orthogonalisation of the last two axes, in its standard and Gram forms."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muon_jax._coefficients import Row, Schedule, as_schedule

METHODS = ("auto", "standard", "gram")

# How far rounding noise in the Gram matrix may grow, as a share of its largest eigenvalue, before
# it is formed anew. Measured: with this limit no schedule passes 1.21 as its largest singular
# value, on Gaussian, 1/k, exponential and rank-1 spectra in float32, bfloat16 and float16; with
# 0.1, 2.0 in float16.
_NOISE_LIMIT = 0.065

# The same where float32 must agree with the standard form to 1e-5 on square matrices too: their
# small singular values lie below the noise that the limit above tolerates.
_SQUARE_NOISE_LIMIT = 5e-5


class Share(NamedTuple):
    """How devices that hold different columns of the same matrices combine what they know.

    Attributes:
        sum: `(..., n, n)` or `(..., 1, 1)` partial sums -> their totals.
        max: `(..., 1, 1)` -> the largest.
    """

    sum: Callable[[jax.Array], jax.Array]
    max: Callable[[jax.Array], jax.Array]


ALONE = Share(sum=lambda x: x, max=lambda x: x)


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """`newton_schulz` with its settings checked and fixed: what placement and plans reason about.

    Attributes as the arguments of `newton_schulz`.
    """

    coeffs: Any = "jordan"
    steps: int | None = None
    dtype: Any = None
    method: str = "auto"
    eps: Any = 1e-7

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}.")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
            _require_floating("dtype", self.dtype)
        schedule = as_schedule(self.coeffs)
        schedule.resolve(self.steps)
        object.__setattr__(self, "coeffs", schedule)

    def compute_dtype(self, dtype: jax.typing.DTypeLike) -> jnp.dtype:
        """The dtype of the matrix products for updates of `dtype`."""
        return jnp.dtype(dtype) if self.dtype is None else self.dtype

    def rows(self, dtype: jax.typing.DTypeLike) -> tuple[Row, ...]:
        """The `(a, b, c)` of each step for updates of `dtype`."""
        return self.coeffs.resolve(self.steps, self.compute_dtype(dtype))

    def form(self, m: int, n: int, dtype: jax.typing.DTypeLike) -> "Form":
        """How `m × n` matrices of `dtype` are orthogonalised: the form, and where it restarts."""
        rows, dtype = self.rows(dtype), self.compute_dtype(dtype)
        method = cheapest_method(m, n, rows, dtype) if self.method == "auto" else self.method
        return Form(method, gram_restarts(rows, dtype) if method == "gram" else ())

    def shared_form(self, dtype: jax.typing.DTypeLike, square: bool) -> "Form":
        """The Gram form of matrices whose columns lie on several devices.

        `square`: some are so close to square that their small singular values feel the Gram
        matrix's rounding.
        """
        rows, dtype = self.rows(dtype), self.compute_dtype(dtype)
        limit = _SQUARE_NOISE_LIMIT if square and jnp.finfo(dtype).bits >= 32 else _NOISE_LIMIT
        return Form("gram", gram_restarts(rows, dtype, limit))

    def flops(
        self, short: int, long: int, dtype: jax.typing.DTypeLike, form: "Form | None" = None
    ) -> int:
        """FLOPs of the matrix products for one matrix; `form` is `form()`'s by default."""
        rows = self.rows(dtype)
        form = form or self.form(short, long, dtype)
        if form.method == "gram":
            return gram_flops(short, long, rows, form.restarts)
        return standard_flops(short, long, rows)

    def __call__(
        self, x: jax.Array, *, form: "Form | None" = None, share: Share = ALONE
    ) -> jax.Array:
        """Orthogonalises `(..., m, n)`; with `share`, n is this device's part of the long side."""
        x = jnp.asarray(x)
        if x.ndim < 2:
            raise ValueError(
                "newton_schulz needs a matrix or a stack of them, (..., m, n); got shape "
                f"{x.shape}."
            )
        _require_floating("x", x.dtype)
        form = form or self.form(x.shape[-2], x.shape[-1], x.dtype)
        run = _jitted if share is ALONE else _orthogonalize
        return run(
            x,
            rows=self.rows(x.dtype),
            normalization=self.coeffs.normalization,
            safety=self.coeffs.safety,
            dtype=self.compute_dtype(x.dtype),
            form=form,
            share=share,
            eps=self.eps,
        )


def as_newton_schulz(orthogonalizer: Callable | None) -> Callable:
    """`NewtonSchulz` for None, `newton_schulz` and partials of it; any other callable as it is."""
    if orthogonalizer is None or orthogonalizer is newton_schulz:
        return NewtonSchulz()
    match orthogonalizer:
        case functools.partial(func=function, args=(), keywords=settings):
            return NewtonSchulz(**settings) if function is newton_schulz else orthogonalizer
    return orthogonalizer


class Form(NamedTuple):
    """The arithmetic chosen for a shape.

    Attributes:
        method: `"standard"` or `"gram"`.
        restarts: the steps after which the Gram form forms XXᵀ anew.
    """

    method: str
    restarts: tuple[int, ...] = ()


def _require_floating(what: str, dtype: jnp.dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"newton_schulz works on real floating point; {what} is {dtype}.")


def newton_schulz(
    x: jax.Array,
    *,
    coeffs: str | Schedule | Row | Sequence[Row] = "jordan",
    steps: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    method: str = "auto",
    eps: float = 1e-7,
) -> jax.Array:
    r"""Orthogonalises every matrix of a stack: $U \Sigma V^\top \mapsto U\,p(\Sigma)\,V^\top$.

    $p(\sigma) \approx 1$ on (0, 1], so the result is close to the polar factor $UV^\top$. Each
    step is $A = XX^\top,\; X \leftarrow aX + (bA + cA^2)X$ on the short side (Jordan, 2024). The
    Gram form runs the same polynomial on the small $XX^\top$ and touches $X$ only at the ends.

    Safe on every finite input: a zero matrix gives zeros, and the scale of the input does not
    matter from the smallest normal to the largest finite number of its dtype. Matrices of a stack
    do not touch each other: a NaN stays in its own matrix.

    Args:
        x: `(..., m, n)`, floating point; the leading axes are batch and are never merged.
        coeffs: a schedule's name (`jordan`, `you`, `polar_express`, `polar_express_1.02`, `cans`,
            `aol`, `deepseek_v4`, `exact`), one `(a, b, c)` for all steps, one `(a, b, c)` a step,
            or a `Schedule`.
        steps: number of steps; `None` is the schedule's own. A schedule of fixed length accepts
            no other number.
        dtype: dtype of the matrix products; `None` is `x.dtype`. In bfloat16 and float16 the norm
            and the accumulation stay in float32. float32 means float32: products ask for the
            highest precision, so on GPU and TPU pass bfloat16 for speed.
        method: `"standard"`, `"gram"`, or `"auto"`: whichever needs fewer FLOPs for this shape,
            schedule and dtype (the Gram form is restarted as often as its dtype needs).
        eps: added to the Frobenius norm once the largest entry is 1, so it is relative.

    Returns:
        `(..., m, n)` in `x.dtype`.

    Raises:
        ValueError: fewer than two axes, an unknown schedule or method, or a step count that
            disagrees with the rows.
        TypeError: `x` or `dtype` is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> import muon_jax
        >>> muon_jax.newton_schulz(jnp.array([[3.0, 0.0], [0.0, -4.0]]), coeffs="exact")
        Array([[ 1.,  0.],
               [ 0., -1.]], dtype=float32)
    """
    return NewtonSchulz(coeffs, steps, dtype, method, eps)(x)


def _orthogonalize(x, *, rows, normalization, safety, dtype, form, share=ALONE, eps):
    if x.size == 0:
        return x
    out_dtype = x.dtype
    tall = x.shape[-2] > x.shape[-1] and share is ALONE
    if tall:
        x = x.mT
    x = _normalize(x, dtype, safety, eps, share)
    if normalization == "aol":
        x = _rescale_short_side(x, eps, share)
    if form.method == "gram":
        x = _gram_form(x, rows, form.restarts, share)
    else:
        x = _standard_form(x, rows)
    return (x.mT if tall else x).astype(out_dtype)


_jitted = jax.jit(
    _orthogonalize,
    static_argnames=("rows", "normalization", "safety", "dtype", "form", "share"),
)


def _standard_form(x: jax.Array, rows: tuple[Row, ...]) -> jax.Array:
    for a, b, c in rows:
        gram = _matmul(x, x.mT)
        polynomial = b * gram + c * _matmul(gram.astype(x.dtype), gram.astype(x.dtype))
        x = (a * x + _matmul(polynomial.astype(x.dtype), x)).astype(x.dtype)
    return x


def _gram_form(
    x: jax.Array, rows: tuple[Row, ...], restarts: tuple[int, ...], share: Share = ALONE
) -> jax.Array:
    """The same polynomial, iterated on R = XXᵀ; Q collects the factor that X still lacks."""
    dtype = x.dtype
    r = share.sum(_matmul(x, x.mT).astype(dtype))
    q: jax.Array | None = None  # the identity
    for step, (a, b, c) in enumerate(rows, start=1):
        z = (b * r + c * _matmul(r, r)).astype(dtype)
        if q is None:
            identity = jnp.eye(z.shape[-1], dtype=dtype)
            q = (z + a * jnp.expand_dims(identity, range(z.ndim - 2))).astype(dtype)
        else:
            q = (a * q + _matmul(q, z)).astype(dtype)
        if step in restarts or step == len(rows):
            x = _matmul(q, x).astype(dtype)
        if step in restarts:
            r, q = share.sum(_matmul(x, x.mT).astype(dtype)), None
        elif step < len(rows):
            w = (a * r + _matmul(r, z)).astype(dtype)
            r = (a * w + _matmul(z, w)).astype(dtype)
    return x


def _normalize(
    x: jax.Array, dtype: jnp.dtype, safety: float, eps, share: Share = ALONE
) -> jax.Array:
    """Singular values into [0, 1] without overflow or underflow, then into `dtype`."""
    x = x.astype(_accumulator(x.dtype))
    largest = share.max(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    # XLA turns division into a product with 1 / largest, which above 2^126 is flushed to zero.
    root = jax.lax.rsqrt(jnp.where(largest == 0, 1, largest))
    x = x * root * root
    norm = jnp.sqrt(share.sum(jnp.sum(x * x, axis=(-2, -1), keepdims=True)))
    return (x / (safety * norm + eps)).astype(dtype)


def _rescale_short_side(x: jax.Array, eps, share: Share) -> jax.Array:
    """AOL: row i is divided by sqrt(sum_j |XXᵀ|_ij), which bounds the spectral norm by 1."""
    bound = jnp.sum(jnp.abs(share.sum(_matmul(x, x.mT))), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.where(bound == 0, 1, bound + eps))).astype(x.dtype)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(
        x,
        y,
        precision=jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None,
        preferred_element_type=_accumulator(x.dtype),
    )


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def gram_restarts(
    rows: tuple[Row, ...], dtype: jnp.dtype, limit: float = _NOISE_LIMIT
) -> tuple[int, ...]:
    """The steps after which the Gram form forms XXᵀ anew.

    A step multiplies the small eigenvalues of XXᵀ, rounding noise included, by a². The restart
    comes as late as the noise allows.
    """
    noise = float(jnp.finfo(dtype).eps) / 2
    restarts, growth = [], 1.0
    for step, (a, _, _) in enumerate(rows[:-1], start=1):
        growth *= a * a
        if noise * growth > limit:
            restarts.append(step)
            growth = 1.0
    return tuple(restarts)


def standard_flops(short: int, long: int, rows: tuple[Row, ...]) -> int:
    """FLOPs of the matrix products of the standard form, for one short × long matrix."""
    return len(rows) * (4 * long * short**2 + 2 * short**3)


def gram_flops(short: int, long: int, rows: tuple[Row, ...], restarts: tuple[int, ...]) -> int:
    """FLOPs of the matrix products of the Gram form, for one short × long matrix.

    Or for a cell of one, whose `long` may be below `short`.
    """
    passes = len(restarts) + 1
    square_products = 4 * len(rows) - 3 * passes
    return passes * 4 * long * short**2 + square_products * 2 * short**3


def cheapest_method(m: int, n: int, rows: tuple[Row, ...], dtype: jnp.dtype) -> str:
    """`"gram"` or `"standard"`, by FLOPs with the restarts that `dtype` needs."""
    short, long = sorted((m, n))
    gram = gram_flops(short, long, rows, gram_restarts(rows, dtype))
    return "gram" if gram < standard_flops(short, long, rows) else "standard"
