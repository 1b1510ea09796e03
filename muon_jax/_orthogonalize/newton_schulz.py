"""Newton-Schulz orthogonalisation of the last two axes, in its standard and Gram forms."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muon_jax._checks import check_number
from muon_jax._orthogonalize.coefficients import Row, Schedule, as_schedule
from muon_jax._orthogonalize.decompositions import each_matrix
from muon_jax._orthogonalize.symmetric import (
    Panels,
    accumulator,
    cut,
    gram,
    matmul,
    panel_count,
    product,
    square,
    symmetric_flops,
    whole,
)

METHODS = ("auto", "standard", "gram")

# How far rounding noise in the Gram matrix may grow, as a share of its largest eigenvalue, before
# it is formed anew. Before the first restart it may grow further: the XXᵀ of a matrix of Frobenius
# norm 1 has less noise than one whose singular values are all near 1, and the steps that follow
# correct what it does. Measured on Gaussian, 1/k, 1/k², exponential, one-decade and rank-1 spectra,
# 32 × 128 to 128 × 128, in bfloat16, float16 and float32: with these limits no schedule passes 1.21
# as its largest singular value. A first limit of 0.82 gives 1.47 (jordan, float16); 0.56 later on
# gives 1.6 (polar_express, bfloat16), and between restarts infinity (deepseek_v4, bfloat16).
_NOISE_LIMIT = 0.065
_FIRST_NOISE_LIMIT = 0.6

# Both, where float32 must agree with the standard form to 1e-5 on square matrices too: their small
# singular values lie below the noise that the limits above tolerate.
_SQUARE_NOISE_LIMIT = 5e-5

# From this short side on a CPU loops over the matrices of a stack: what a product reads is in the
# cache still. Measured on two cores: from 0 to 10 % faster for two matrices of 512 to 768, 25 % for
# eight; at 128 to 384 up to 30 % slower.
_LOOP_FROM = 512


class Form(NamedTuple):
    """The arithmetic chosen for a shape, a dtype and a platform.

    Attributes:
        method: `"standard"` or `"gram"`.
        restarts: the steps after which the Gram form forms XXᵀ anew.
        panels: how many slices symmetric products are computed in.
        one_by_one: a stack is a loop over its matrices, and no batched product.
        rounded: products are written in the dtype of their operands, and not in that of their
            sums, so that half of the bytes are read again.
        upright: matrices with more rows than columns are multiplied from the right, and not
            transposed first and last.
    """

    method: str
    restarts: tuple[int, ...] = ()
    panels: int = 1
    one_by_one: bool = False
    rounded: bool = False
    upright: bool = False

    def flops(self, short: int, long: int, rows: tuple[Row, ...]) -> int:
        """FLOPs of the matrix products for one matrix, or for a cell with `long` of its columns."""
        symmetric = symmetric_flops(short, long, self.panels)
        squared = symmetric_flops(short, short, self.panels)
        if self.method == "standard":
            return len(rows) * (symmetric + squared + 2 * long * short**2)
        passes = len(self.restarts) + 1
        return passes * (symmetric + 2 * long * short**2) + (4 * len(rows) - 3 * passes) * squared


class Share(NamedTuple):
    """How devices that hold different columns of the same matrices combine what they know.

    Attributes:
        sum: `(..., n, n)` or `(..., k, 1)` partial sums -> their totals.
    """

    sum: Callable[[jax.Array], jax.Array]


ALONE = Share(lambda x: x)


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """`newton_schulz` with its settings checked and fixed: what placement and plans reason about.

    Attributes as the arguments of `newton_schulz`, and:

        absolute_eps: added to what the matrix as it was is divided by, under the normalizations
            `"frobenius"` and `"spectral"`; gradients near it have smaller factors then, as in
            optax.contrib.muon.
    """

    coeffs: Any = "jordan"
    steps: int | None = None
    dtype: Any = None
    method: str = "auto"
    eps: Any = 1e-7
    absolute_eps: Any = None

    def __post_init__(self) -> None:
        check_number("eps", self.eps, at_least=0)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}.")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
            if not jnp.issubdtype(self.dtype, jnp.floating):
                raise TypeError(
                    "dtype, of newton_schulz's products, must be real floating point; got "
                    f"{self.dtype}."
                )
        schedule = as_schedule(self.coeffs)
        schedule.resolve(self.steps)
        object.__setattr__(self, "coeffs", schedule)

    def compute_dtype(self, dtype: jax.typing.DTypeLike) -> jnp.dtype:
        """The dtype of the matrix products for updates of `dtype`; of complex ones their own."""
        own = self.dtype is None or jnp.issubdtype(dtype, jnp.complexfloating)
        return jnp.dtype(dtype) if own else self.dtype

    def rows(self, dtype: jax.typing.DTypeLike) -> tuple[Row, ...]:
        """The `(a, b, c)` of each step for updates of `dtype`."""
        return self.coeffs.resolve(self.steps, self.compute_dtype(dtype))

    def tells_sides(self, m: int, n: int) -> bool:
        """Whether the factor of Xᵀ is not that of X transposed: AOL rescales along one side."""
        return self.coeffs.normalization == "aol" and m == n

    def form(
        self, m: int, n: int, dtype: jax.typing.DTypeLike, platform: str, local: bool = True
    ) -> Form:
        """How `m × n` matrices are orthogonalised.

        Args:
            m, n: their sides.
            dtype: of the updates.
            platform: `"cpu"`, `"gpu"`, `"tpu"`.
            local: that the matrices of a stack are all on one device is known.
        """
        rows, dtype = self.rows(dtype), self.compute_dtype(dtype)
        short, long = sorted((m, n))
        panels = panel_count(short, dtype, platform)
        one_by_one = local and platform == "cpu" and short >= _LOOP_FROM
        accelerator = platform != "cpu"
        standard = Form("standard", (), panels, one_by_one, accelerator, accelerator)
        gram_form = standard._replace(method="gram", restarts=gram_restarts(rows, dtype))
        if self.method == "auto":
            cheaper = gram_form.flops(short, long, rows) < standard.flops(short, long, rows)
            return gram_form if cheaper else standard
        return gram_form if self.method == "gram" else standard

    def cut_form(
        self, short: int, dtype: jax.typing.DTypeLike, platform: str, near_square: bool
    ) -> Form:
        """The Gram form of matrices whose columns lie on several devices.

        `near_square`: some are so close to square that their small singular values feel the
        rounding of XXᵀ.
        """
        rows, dtype = self.rows(dtype), self.compute_dtype(dtype)
        exact = near_square and jnp.finfo(dtype).bits >= 32
        limits = (_SQUARE_NOISE_LIMIT,) * 2 if exact else ()
        restarts = gram_restarts(rows, dtype, *limits)
        # Here n × n products are most of the work, so that blocks pay earlier.
        panels = max(2, panel_count(short, dtype, platform))
        return Form("gram", restarts, panels, rounded=platform != "cpu")

    def __call__(
        self, x: jax.Array, *, form: "Form | None" = None, share: Share = ALONE
    ) -> jax.Array:
        """Orthogonalises `(..., m, n)`; with `share`, n is this device's part of the long side.

        `form` is `form()`'s by default.
        """
        x = jnp.asarray(x)
        if x.ndim < 2:
            raise ValueError(
                "newton_schulz needs a matrix or a stack of them, (..., m, n); got shape "
                f"{x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(f"newton_schulz needs floating-point or complex x; got {x.dtype}.")
        if form is None:
            m, n = x.shape[-2:]
            form = self.form(m, n, x.dtype, current_platform(), local=jax.device_count() == 1)
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
            absolute_eps=self.absolute_eps,
        )


def as_newton_schulz(orthogonalizer: Callable | None) -> Callable:
    """`NewtonSchulz` for None, `newton_schulz` and partials of it; any other callable as it is.

    Raises:
        TypeError: it is not callable.
    """
    if orthogonalizer is None or orthogonalizer is newton_schulz:
        return NewtonSchulz()
    match orthogonalizer:
        case functools.partial(func=function, args=(), keywords=settings):
            return NewtonSchulz(**settings) if function is newton_schulz else orthogonalizer
    if not callable(orthogonalizer):
        raise TypeError(
            "orthogonalizer must be None, newton_schulz, a functools.partial of it, or another "
            "function of (..., fan_in, fan_out) that returns an array of that shape; got "
            f"{orthogonalizer!r}. A schedule's name goes into ns_coeffs."
        )
    return orthogonalizer


def configured(orthogonalizer: Callable | None, coeffs: Any, steps: Any, dtype: Any) -> Callable:
    """The orthogonalizer given, or `NewtonSchulz` with the settings given.

    Raises:
        ValueError: both are.
    """
    if orthogonalizer is None:
        return NewtonSchulz(coeffs, steps, dtype)
    default = isinstance(coeffs, str) and coeffs == "jordan"
    if not default or steps is not None or dtype is not None:
        raise ValueError(
            "Give either an orthogonalizer or ns_coeffs, ns_steps and ns_dtype, which configure "
            "the default one; got both."
        )
    return orthogonalizer


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
        x: `(..., m, n)`, floating point or complex; the leading axes are batch and are never
            merged. Of complex matrices the products are Hermitian, with $X^H$ for $X^\top$.
        coeffs: a schedule's name (`jordan`, `you`, `polar_express`, `polar_express_1.02`, `cans`,
            `aol`, `deepseek_v4`, `exact`), one `(a, b, c)` for all steps, one `(a, b, c)` a step,
            or a `Schedule`.
        steps: number of steps; `None` is the schedule's own. A schedule of fixed length accepts
            no other number.
        dtype: dtype of the matrix products; `None` is `x.dtype`. In bfloat16 and float16 the norm
            and the accumulation stay in float32. float32 means float32: products ask for the
            highest precision, so on GPU and TPU pass bfloat16 for speed. Complex matrices keep
            their own.
        method: `"standard"`, `"gram"`, or `"auto"`: whichever needs fewer FLOPs for this shape,
            schedule and dtype (the Gram form is restarted as often as its dtype needs).
        eps: what the Frobenius norm that divides is greater by, as a share of it.

    Returns:
        `(..., m, n)` in `x.dtype`.

    Raises:
        ValueError: fewer than two axes, an unknown schedule or method, or a step count that
            disagrees with the rows.
        TypeError: `x` is neither floating point nor complex, or `dtype` is not real floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> import muon_jax
        >>> muon_jax.newton_schulz(jnp.array([[3.0, 0.0], [0.0, -4.0]]), coeffs="exact")
        Array([[ 1.,  0.],
               [ 0., -1.]], dtype=float32)
    """
    return NewtonSchulz(coeffs, steps, dtype, method, eps)(x)


def current_platform() -> str:
    """The platform of the mesh in use, or JAX's default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "platform", None) or jax.default_backend()


def _orthogonalize(
    x, *, rows, normalization, safety, dtype, form, share=ALONE, eps, absolute_eps=None
):
    if x.size == 0:
        return x
    if form.one_by_one and x.ndim > 2:
        one = functools.partial(
            _orthogonalize,
            rows=rows,
            normalization=normalization,
            safety=safety,
            dtype=dtype,
            form=form,
            eps=eps,
            absolute_eps=absolute_eps,
        )
        return jax.lax.map(one, x)
    out_dtype = x.dtype
    tall = x.shape[-2] > x.shape[-1] and share is ALONE
    upright = tall and form.upright
    turned = tall and not upright
    x, norm = _unit_norm(x, eps, form, share)
    x = x.mT if turned else x
    factor = 1
    if normalization != "frobenius":
        written = _written(x, dtype)
        written = written.mT if upright else written
        factor = _rescaling(share.sum(whole(gram(written, 1))), normalization)
        factor = factor.mT if upright else factor
        x = x * factor
    if absolute_eps is not None:
        x = x / (1 + absolute_eps * factor / norm)
    x = _written(x / safety, dtype)
    x = _FORMS[form.method](x, rows, _Products(form, x.dtype, upright, share))
    return (x.mT if turned else x).astype(out_dtype)


_jitted = jax.jit(
    _orthogonalize,
    static_argnames=("rows", "normalization", "safety", "dtype", "form", "share"),
)


class _Products(NamedTuple):
    """The products of a form, each rounded to `dtype` once; its symmetric matrices are panels.

    Attributes:
        form: of the arithmetic.
        dtype: of the operands.
        upright: X has more rows than columns, and Xᵀ takes its place.
        share: how partial sums are combined.
    """

    form: Form
    dtype: jnp.dtype
    upright: bool
    share: Share

    @property
    def written(self) -> jnp.dtype | None:
        return self.dtype if self.form.rounded else None

    def gram(self, x: jax.Array) -> Panels:
        """XXᵀ."""
        x = x.mT if self.upright else x
        if self.share is ALONE:
            return _rounded(gram(x, self.form.panels, self.written), self.dtype)
        total = self.share.sum(whole(gram(x, self.form.panels)))
        return _rounded(cut(total, self.form.panels), self.dtype)

    def symmetric(self, p: Panels, q: Panels) -> Panels:
        """PQ."""
        return _rounded(product(p, q, self.written), self.dtype)

    def apply(self, p: Panels, x: jax.Array) -> jax.Array:
        """PX."""
        p_ = whole(p)
        pair = (x, jnp.conj(p_)) if self.upright else (p_, x)
        [x] = _rounded((matmul(*pair, dtype=self.written),), self.dtype)
        return x

    def polynomial(self, row: Row, r: Panels) -> Panels:
        """aI + bR + cR², which a step multiplies X by; summed in `accumulator`, rounded once.

        A number of Python's takes the dtype of the array that it meets: in bfloat16, 3.4445 would
        be 3.4375.
        """
        a, b, c = row
        wide = accumulator(self.dtype)
        eye = jnp.expand_dims(jnp.eye(r[0].shape[-1], dtype=wide), range(r[0].ndim - 2))
        squared = square(r, self.written)
        sums = tuple(
            a * one + (b * u.astype(wide) + c * v.astype(wide))
            for one, u, v in zip(cut(eye, self.form.panels), r, squared, strict=True)
        )
        return _rounded(sums, self.dtype)


def _standard_form(x: jax.Array, rows: tuple[Row, ...], products: _Products) -> jax.Array:
    for row in rows:
        x = products.apply(products.polynomial(row, products.gram(x)), x)
    return x


def _gram_form(x: jax.Array, rows: tuple[Row, ...], products: _Products) -> jax.Array:
    """The same polynomial, iterated on R = XXᵀ; Q collects the factor that X still lacks."""
    restarts = products.form.restarts
    r = products.gram(x)
    q: Panels | None = None  # the identity
    for step, row in enumerate(rows, start=1):
        p = products.polynomial(row, r)
        q = p if q is None else products.symmetric(q, p)
        if step in restarts or step == len(rows):
            x = products.apply(q, x)
        if step in restarts:
            r, q = products.gram(x), None
        elif step < len(rows):
            r = products.symmetric(p, products.symmetric(r, p))
    return x


_FORMS = {"standard": _standard_form, "gram": _gram_form}


def _rounded(panels: Panels, dtype: jnp.dtype) -> Panels:
    """In `dtype`, and the same numbers for every reader.

    XLA drops a rounding where float32 arithmetic follows. R would then be exact in bR and rounded
    in cR², and where the two cancel the rounding would be what is left.
    """
    if dtype == accumulator(dtype):
        return panels
    return jax.lax.optimization_barrier(tuple(panel.astype(dtype) for panel in panels))


def _unit_norm(x: jax.Array, eps, form: Form, share: Share = ALONE) -> tuple[jax.Array, jax.Array]:
    """X over its Frobenius norm without overflow or underflow, in float32 or wider, and that norm.

    The norm itself may be 0 or infinite.
    """
    x = x.astype(accumulator(x.dtype))
    # XLA:CPU would run through X for each of three sums, and form the momentum anew for each.
    two_passes = not form.rounded and share is ALONE
    root, norm = _norm_in_two_passes(x) if two_passes else _norm_in_one_pass(x, share)
    x = x * root * root / (jnp.where(norm == 0, 1, norm) * (1 + eps))
    return x, norm / root / root


def _norm_in_two_passes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A factor r, and the norm of r²X, whose largest entry is 1."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    # XLA turns division into a product with 1 / largest, which above 2^126 is flushed to zero.
    root = jax.lax.rsqrt(jnp.where(largest == 0, 1, largest))
    x = x * root * root
    return root, jnp.sqrt(jnp.sum(jnp.real(x * jnp.conj(x)), axis=(-2, -1), keepdims=True))


def _norm_in_one_pass(x: jax.Array, share: Share) -> tuple[jax.Array, jax.Array]:
    """A factor r, and the norm of r²X, whose square is a number.

    The squares of huge, of usual and of tiny entries are summed apart, in scales of their own
    (Blue, 1978, A portable Fortran program to find the Euclidean norm of a vector).
    """
    bits = jnp.finfo(x.dtype).maxexp
    edge, root = 2.0 ** (2 * bits // 5), 2.0 ** (7 * bits // 20)
    scale = root * root
    sums = []
    for part in (x.real, x.imag) if jnp.iscomplexobj(x) else (x,):
        size = jnp.abs(part)
        is_huge, is_tiny = size > edge, size < 1 / edge
        scaled = (
            jnp.where(is_huge, size / scale, 0),
            jnp.where(is_huge | is_tiny, 0, size),
            jnp.where(is_tiny, size * scale, 0),
        )
        sums.append([jnp.sum(s * s, axis=(-2, -1), keepdims=True) for s in scaled])
    totals = share.sum(jnp.concatenate([sum(same) for same in zip(*sums, strict=True)], axis=-2))
    huge, usual, tiny = jnp.split(jnp.sqrt(totals), 3, axis=-2)
    norm = jnp.where(usual == 0, tiny, jnp.hypot(usual, tiny / scale))
    norm = jnp.where(huge > 0, jnp.hypot(huge, usual / scale), norm)
    factor = jnp.where(huge > 0, 1 / root, jnp.where(usual == 0, root, 1.0))
    return factor.astype(norm.dtype), norm


def _rescaling(r: jax.Array, normalization: str) -> jax.Array:
    """What the matrix, or each of its rows, is multiplied by; R is its XXᵀ."""
    size = jnp.abs(r)
    if normalization == "aol":
        size = jnp.sum(size, axis=-1, keepdims=True)
    elif normalization == "schatten":
        size = jnp.sqrt(jnp.sum(size * size, axis=(-2, -1), keepdims=True))
    else:
        size = each_matrix(jnp.linalg.eigvalsh, r)[..., -1:, None]
    return jax.lax.rsqrt(jnp.where(size == 0, 1, size))


def _written(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """X in `dtype`, in row-major order.

    To XLA:CPU a transpose is the same numbers in another layout, which its bfloat16 products do
    not take: some versions run them in float32, others refuse. What is reshaped is row-major.
    """
    [x] = _rounded((jnp.expand_dims(x, -1),), dtype)
    return jnp.squeeze(x, -1)


def gram_restarts(
    rows: tuple[Row, ...],
    dtype: jnp.dtype,
    limit: float = _NOISE_LIMIT,
    first: float = _FIRST_NOISE_LIMIT,
) -> tuple[int, ...]:
    """The steps after which the Gram form forms XXᵀ anew: as few as the noise allows.

    A step multiplies the small eigenvalues of XXᵀ, rounding noise included, by a². From the last
    step backwards, as many steps go by one XXᵀ as the limits allow.
    """
    noise = float(jnp.finfo(dtype).eps) / 2
    growth = [row[0] ** 2 for row in rows]
    restarts: list[int] = []
    stop = len(rows) - 1
    for start in range(stop - 1, -1, -1):
        whole = first if restarts else limit
        fits = noise * math.prod(growth[:stop]) <= whole
        if not fits and noise * math.prod(growth[start:stop]) > limit:
            restarts.append(start + 1)
            stop = start
    return tuple(reversed(restarts))
