"""Aurora: a polar factor of rectangular matrices whose rows have about equal norms."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_integer, check_number
from muon_jax._muon import muon
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.newton_schulz import as_newton_schulz, configured
from muon_jax._precision import widen
from muon_jax.variants.low_rank import relative


@dataclasses.dataclass(frozen=True)
class UniformPolar:
    r"""An orthogonalizer $U = \mathrm{polar}(DX)$ with a diagonal D that makes row norms equal.

    The rows are those of the longer side, of size n; the other has size m. If $U$ has orthonormal
    columns, the norm of each row is then $\sqrt{m/n}$. The row norms of the plain polar factor
    differ, so that some neurons hardly move. Square matrices get their plain polar factor, whose
    rows already have equal norms.

    Attributes:
        iterations: The number of polar factors to compute. After each except the last,
            $D_i \leftarrow D_i \left(\frac{m/n}{\|U_i\|^2}\right)^{p}$, starting from
            $D_i = 1/\|X_i\|$. One iteration is MuonEq on the longer side.
        power: The exponent p, from 0 to 1.
        orthogonalizer: The orthogonalizer of the scaled matrices. `None` means `newton_schulz`.

    References:
        Aurora: KellerJordan/modded-nanogpt, track 3, 2026-05-05 (2 iterations, power 0.5).

    Example:
        >>> import jax, jax.numpy as jnp, muon_jax
        >>> x = jax.random.normal(jax.random.key(0), (32, 8)) * jnp.arange(1.0, 33)[:, None]
        >>> even = muon_jax.UniformPolar(orthogonalizer=muon_jax.polar_factor)(x)
        >>> plain = muon_jax.polar_factor(x)
        >>> bool(jnp.linalg.norm(even, axis=1).std() < 0.3 * jnp.linalg.norm(plain, axis=1).std())
        True
    """

    iterations: int = 2
    power: Any = 0.5
    orthogonalizer: Any = None

    def __post_init__(self) -> None:
        check_integer("iterations", self.iterations, at_least=1)
        check_number("power", self.power, at_least=0, at_most=1)
        object.__setattr__(self, "orthogonalizer", as_newton_schulz(self.orthogonalizer))

    def __call__(self, x: jax.Array) -> jax.Array:
        n, m = x.shape[-2:]
        if n == m or not x.size:
            return self.orthogonalizer(x)
        if n < m:
            return self(x.mT).mT
        wide, _ = relative(x)
        scaled = wide / _row_norms(wide)
        factor = self.orthogonalizer(scaled.astype(x.dtype))
        d: Any = 1.0
        for _ in range(self.iterations - 1):
            d = d * ((m / n) ** 0.5 / _row_norms(widen(factor))) ** (2 * self.power)
            factor = self.orthogonalizer((d * scaled).astype(x.dtype))
        return factor


@takes_options_of(muon, without=("orthogonalizer",))
def aurora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    iterations: int = 2,
    power: float | jax.Array = 0.5,
    ns_coeffs: Any = "jordan",
    ns_steps: int | None = None,
    ns_dtype: jax.typing.DTypeLike | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns Aurora: `muon(learning_rate, orthogonalizer=UniformPolar(iterations, power))`.

    Each iteration costs as much as Muon. All other options are those of `muon`.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.aurora(0.02, adam_learning_rate=3e-4)
    """
    inner = configured(None, ns_coeffs, ns_steps, ns_dtype)
    return muon(learning_rate, orthogonalizer=UniformPolar(iterations, power, inner), **options)


def _row_norms(x: jax.Array) -> jax.Array:
    """Returns the norms of rows, and 1 for rows of zeros, which thus stay zero."""
    norms = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.where(norms == 0, 1, norms)
