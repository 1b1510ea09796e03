"""Newton-Schulz orthogonalisation of the last two axes, in its standard and Gram forms."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from muon_jax._checks import check_number
from muon_jax._orthogonalize.coefficients import Row, Schedule, as_schedule
from muon_jax._orthogonalize.devices import device_of
from muon_jax._orthogonalize.forms import Form
from muon_jax._orthogonalize.iteration import ALONE, Arithmetic, Share, orthogonalize_stacks
from muon_jax._orthogonalize.symmetric import panel_count

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

# Below this short side what is not a product is a good part of the work on a GPU or a TPU: matrices
# of several shapes share their n × n products, and a TPU scales the arrays of a stack one by one
# and so multiplies them last, which XLA fuses with the momentum before and the step after. The
# compiler of TPUs estimates 17 % fewer cycles at 768; at 2048 it is 2 % for a third more time to
# compile.
SMALL = 1024

# From this short side on a CPU loops over the matrices of a stack: what a product reads is in the
# cache still. Measured on two cores: from 0 to 10 % faster for two matrices of 512 to 768, 25 % for
# eight; at 128 to 384 up to 30 % slower.
_LOOP_FROM = 512


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

    def is_oriented(self, m: int, n: int) -> bool:
        """Whether the factor of Xᵀ is not that of X transposed: AOL rescales along one side."""
        return self.coeffs.normalization == "aol" and m == n

    def form(
        self,
        m: int,
        n: int,
        dtype: jax.typing.DTypeLike,
        platform: str,
        local: bool = True,
        by_time: bool = True,
    ) -> Form:
        """Returns the form for `m × n` updates of `dtype` on `"cpu"`, `"gpu"` or `"tpu"`.

        Args:
            local: Whether the matrices of a stack are known to be on one device.
            by_time: Whether to choose the method of the least time in a large stack, where
                launches count for nothing; otherwise that of the fewest FLOPs.
        """
        rows, dtype = self.rows(dtype), self.compute_dtype(dtype)
        short, long = sorted((m, n))
        accelerator = platform != "cpu"
        standard = Form(
            method="standard",
            panels=panel_count(short, dtype, platform),
            one_by_one=local and not accelerator and short >= _LOOP_FROM,
            rounded=accelerator,
            upright=accelerator,
            apart=platform == "tpu" and short < SMALL,
            joint_sums=platform == "gpu",
        )
        gram_form = standard._replace(method="gram", restarts=gram_restarts(rows, dtype))
        if self.method != "auto":
            return gram_form if self.method == "gram" else standard
        device = device_of(platform)

        def cost(form: Form) -> float:
            if not by_time:
                return form.flops(short, long, rows)
            kernels = form.kernels(short, ((1, long),), rows, device)
            return device.seconds(kernels, dtype, launches=False)

        return gram_form if cost(gram_form) < (1 - 1e-9) * cost(standard) else standard

    def cut_form(
        self, short: int, dtype: jax.typing.DTypeLike, platform: str, near_square: bool
    ) -> Form:
        """The Gram form of matrices whose columns are split over several devices.

        `near_square`: some are so close to square that their small singular values feel the
        rounding of XXᵀ.
        """
        rows, dtype = self.rows(dtype), self.compute_dtype(dtype)
        exact = near_square and jnp.finfo(dtype).bits >= 32
        limits = (_SQUARE_NOISE_LIMIT,) * 2 if exact else ()
        restarts = gram_restarts(rows, dtype, *limits)
        panels = panel_count(short, dtype, platform)
        if platform != "gpu":
            # A CPU: here n × n products are most of the work, so that blocks pay earlier. A TPU:
            # a pod's FLOPs, a quarter fewer; the compiler estimates 19 to 50 % more cycles.
            panels = max(2, panels)
        rounded, joint_sums = platform != "cpu", platform == "gpu"
        return Form("gram", restarts, panels, rounded=rounded, joint_sums=joint_sums)

    def padded_form(self, short: int, long: int, dtype: jax.typing.DTypeLike) -> Form:
        """Of few matrices of one short side on a GPU, as one stack that is so long."""
        panels = panel_count(short, self.compute_dtype(dtype), "gpu")
        return Form(
            "standard", panels=panels, rounded=True, upright=True, padded=long, joint_sums=True
        )

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
        [y] = self.together([x], form, share)
        return y

    def together(
        self, xs: Sequence[jax.Array], form: Form, share: Share = ALONE
    ) -> tuple[jax.Array, ...]:
        """Orthogonalises stacks `(count, m, n)` of one dtype and short side in shared products.

        A single one may have any batch axes.
        """
        dtype, schedule = xs[0].dtype, self.coeffs
        arithmetic = Arithmetic(
            self.rows(dtype),
            schedule.normalization,
            schedule.safety,
            self.compute_dtype(dtype),
            form,
        )
        run = _jitted if share is ALONE else orthogonalize_stacks
        return run(tuple(xs), arithmetic, share, eps=self.eps, absolute_eps=self.absolute_eps)


def as_newton_schulz(orthogonalizer: Callable | None) -> Callable:
    """Returns `NewtonSchulz` for None, `newton_schulz` and its partials; other callables as is."""
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
    """Returns the given orthogonalizer, or `NewtonSchulz` with the given settings."""
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
    Gram form iterates the same polynomial on the small $XX^\top$ and needs $X$ only at the ends.

    Every finite input is safe: a zero matrix gives zeros, and the scale of the input does not
    matter from the smallest normal to the largest finite number of its dtype. A NaN stays in its
    own matrix.

    Args:
        x: An array `(..., m, n)` of floating-point or complex numbers. The leading axes are batch
            axes and are never merged. Complex matrices have $X^H$ in place of $X^\top$.
        coeffs: The name of a schedule (`jordan`, `you`, `polar_express`, `polar_express_1.02`,
            `cans`, `aol`, `deepseek_v4`, `exact`, `cubic`), one `(a, b, c)` for all steps, one
            `(a, b, c)` per step, or a `Schedule`.
        steps: The number of steps. `None` means the schedule's own; a schedule of fixed length
            accepts no other.
        dtype: The dtype of the matrix products. `None` means `x.dtype`, which complex matrices
            always keep. In bfloat16 and float16 the norm and the sums stay in float32. Products in
            float32 have the highest precision, so on GPU and TPU pass bfloat16 for speed.
        method: `"standard"`, `"gram"`, or `"auto"`, the one of the shorter predicted time for this
            shape, schedule, dtype and platform. The Gram form restarts as often as its dtype needs.
        eps: The fraction by which the Frobenius norm that divides the matrix is increased.
            KellerJordan/Muon adds 1e-7 to the norm itself.

    Returns:
        An array `(..., m, n)` in `x.dtype`.

    Raises:
        ValueError: `x` has fewer than two axes, a schedule or method is unknown, or the number of
            steps does not fit the rows.
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


_jitted = jax.jit(orthogonalize_stacks, static_argnames=("arithmetic", "share"))


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
