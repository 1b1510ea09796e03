"""Dion2 and Dion3: orthogonalise the largest rows of the momentum and keep the others."""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._matrices.parts import Part
from muon_jax._matrices.stages import Stages
from muon_jax._momentum import as_array_tree, clipped, stored_like
from muon_jax._muon import hybrid_muon, muon, scale_by_muon
from muon_jax._options import takes_options_of
from muon_jax._precision import cast_like, widen
from muon_jax._sharding.explicit_axes import over_auto_axes
from muon_jax.variants.low_rank import relative

SIDES = ("short", "fan_in", "fan_out")


class Dion2State(NamedTuple):
    """State of `scale_by_dion2`.

    Attributes:
        count: The number of steps taken, an int32 scalar.
        mu: The sum of the gradients that have not been used yet, shaped like the params.
        nu: For Dion3 the mean square of the orthogonal factor of each selected row, float32; empty
            for Dion2.
    """

    count: chex.Array
    mu: optax.Updates
    nu: Any


@takes_options_of(scale_by_muon, without=("beta", "nesterov", "momentum", "before", "after"))
def scale_by_dion2(
    *,
    fraction: float = 0.25,
    beta: float | jax.Array = 0.95,
    side: str = "short",
    beta2: float | jax.Array | None = None,
    eps: float | jax.Array = 1e-10,
    **options: Any,
) -> optax.GradientTransformation:
    r"""Orthogonalises a fraction of each matrix's rows per step, for trees of matrix stacks.

    $M \leftarrow M + G$. S is the given `fraction` of the rows of M, those with the largest sums of
    absolute values. $U_S = \mathrm{NS}(M_S)$, the other rows of U are zero, and
    $M_S \leftarrow \beta M_S$. A row that is not selected keeps its whole sum for a later step
    (error feedback). The shape scale is that of the whole matrix.

    On the short side the cost of Newton-Schulz falls with the square of `fraction`. On a mesh only
    the selected rows are exchanged. If the mesh splits the side whose rows are selected, each
    device selects among its own rows, so that the selection depends on the number of devices.

    Args:
        fraction: The fraction of the rows, greater than 0 and at most 1; their number is rounded
            up.
        beta: The fraction of a used row that is kept, from 0 to 1.
        side: The side whose rows are selected: `"short"`, `"fan_in"` or `"fan_out"` (torch's rows).
            For square matrices the short side is fan_out.
        beta2: The decay of NorMuon's second moment of the selected rows, which makes this Dion3.
            `None` means Dion2.
        eps: A number added to the square root of the second moment.
        options: The options of `scale_by_muon`.

    References:
        Ahn et al., 2025, Dion2, arXiv 2512.16928, and microsoft/dion, whose `selection_scope`
        `"local"` this is on a split side.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.scale_by_dion2(fraction=0.5)
        >>> params = {"kernel": jnp.arange(32.0).reshape(4, 8)}
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> print(jnp.any(updates["kernel"] != 0, axis=1))
        [False False  True  True]
    """
    check_number("fraction", fraction, above=0, at_most=1)
    check_number("beta", beta, at_least=0, at_most=1)
    check_number("beta2", beta2, at_least=0, at_most=1, optional=True)
    check_number("eps", eps, at_least=0)
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}; got {side!r}.")
    stages = Stages(**options)
    rows_of = functools.partial(_Rows, side=side, fraction=fraction)

    def init(params):
        nu = ()
        if beta2 is not None:
            matrices = stages.matrices(params)
            kept = []
            for part in matrices.parts:
                batch, *fans = part.axes.matrix_shape(part.shape)
                zeros = jnp.zeros((*batch, fans[rows_of(part).side]), jnp.float32)
                kept.append(matrices.own_batch(part, zeros))
            nu = matrices.pack(kept)
        return Dion2State(jnp.zeros([], jnp.int32), stages.init_momentum(params), nu)

    @over_auto_axes
    def update(updates, state, params):
        del params
        matrices = stages.matrices(updates)
        total = jax.tree.map(_sum, as_array_tree(state.mu), updates)
        rows = [rows_of(part, ways=matrices.ways(part)) for part in matrices.parts]
        whole = matrices.whole(matrices.split(total))
        chosen = [r.largest(w) for r, w in zip(rows, whole, strict=True)]
        taken = [r.take(w, at) for r, w, at in zip(rows, whole, chosen, strict=True)]
        taken = matrices.map_distributed(
            map(cast_like, taken, matrices.split(updates)), stages.orthogonalizer, split=True
        )
        factors, kept = [], []
        for r, w, at, y in zip(rows, whole, chosen, taken, strict=True):
            factors.append(r.put(jnp.zeros_like(w), at, widen(y)))
            kept.append(r.put(w, at, beta * r.take(w, at)))
        nu = state.nu
        if beta2 is not None:
            pairs = zip(rows, factors, matrices.unpack(nu), strict=True)
            evened = [r.even(o, v, beta2, eps) for r, o, v in pairs]
            factors, nu = [x for x, _ in evened], matrices.pack([v for _, v in evened])
        count = optax.safe_increment(state.count)
        mu = stored_like(matrices.merge(matrices.local(kept), total), state.mu, count)
        factors = matrices.scale(matrices.local(factors))
        return matrices.merge(factors, updates), Dion2State(count, mu, nu)

    return optax.GradientTransformation(init, update)


@takes_options_of(muon, without=("beta", "nesterov", "momentum", "before", "after"))
def dion2(
    learning_rate: optax.ScalarOrSchedule,
    *,
    fraction: float = 0.25,
    beta: float | jax.Array = 0.95,
    side: str = "short",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Updates the hidden matrices with Dion2 and all other leaves with AdamW.

    Dion2 orthogonalises a fraction of each matrix's rows per step; see `scale_by_dion2`. All other
    options are those of `muon`.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.dion2(0.01, fraction=0.5, adam_learning_rate=3e-4)
    """
    scale_by = functools.partial(scale_by_dion2, fraction=fraction, beta=beta, side=side)
    return hybrid_muon(scale_by, learning_rate, **options)


@takes_options_of(muon, without=("beta", "nesterov", "momentum", "before", "after"))
def dion3(
    learning_rate: optax.ScalarOrSchedule,
    *,
    fraction: float = 0.25,
    beta: float | jax.Array = 0.95,
    beta2: float | jax.Array = 0.95,
    side: str = "short",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Updates the hidden matrices with Dion3, which is `dion2` with NorMuon's second moment."""
    scale_by = functools.partial(
        scale_by_dion2, fraction=fraction, beta=beta, beta2=beta2, side=side
    )
    return hybrid_muon(scale_by, learning_rate, **options)


class _Rows:
    """Selects rows along one side of a part's matrices `(*batch, fan_in, fan_out)`.

    If the mesh splits that side, the same number of rows is selected on each device.
    """

    def __init__(self, part: Part, *, side: str, fraction: float, ways: tuple[int, int] = (1, 1)):
        m, n = part.fans
        self.of_fan_in = m < n if side == "short" else side == "fan_in"
        self.side = 0 if self.of_fan_in else 1
        self.groups = ways[self.side]
        each = (m, n)[self.side] // self.groups
        # Rounding must not add a row: 0.07 * 100 is 7.000000000000001.
        self.count = max(1, math.ceil(round(fraction * each, 9)))

    def first(self, w: jax.Array) -> jax.Array:
        """Returns `(*batch, rows, other side)`; this function is its own inverse."""
        return w if self.of_fan_in else w.mT

    def _grouped(self, w: jax.Array) -> jax.Array:
        rows = self.first(w)
        *batch, n, other = rows.shape
        return rows.reshape(*batch, self.groups, n // self.groups, other)

    def _merged(self, x: jax.Array) -> jax.Array:
        *batch, groups, n, other = x.shape
        return self.first(x.reshape(*batch, groups * n, other))

    def largest(self, w: jax.Array) -> jax.Array:
        """Returns the sorted indices of the largest rows, `(*batch, groups, count, 1)`."""
        # Entries are divided by the largest one, so that the sum of a row cannot overflow.
        shares, _ = relative(w)
        sums = jnp.sum(jnp.abs(self._grouped(shares)), axis=-1)
        return jnp.sort(jax.lax.top_k(sums, self.count)[1], axis=-1)[..., None]

    def take(self, w: jax.Array, at: jax.Array) -> jax.Array:
        """Returns matrices with only the rows at these indices."""
        return self._merged(jnp.take_along_axis(self._grouped(w), at, axis=-2))

    def put(self, w: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
        """Returns `w` with the rows at these indices replaced."""
        old, new = self._grouped(w), self._grouped(rows)
        row = jax.lax.broadcasted_iota(at.dtype, (*old.shape[:-1], self.count), old.ndim - 2)
        chosen = jnp.any(at.mT == row, axis=-1, keepdims=True)
        place = jnp.cumsum(chosen, axis=-2) - 1
        new = jnp.take_along_axis(new, jnp.maximum(place, 0), axis=-2)
        return self._merged(jnp.where(chosen, new, old))

    def even(
        self, o: jax.Array, nu: jax.Array, beta2: Any, eps: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Applies NorMuon's second moment to nonzero rows, and returns `(o, nu)`."""
        rows = self.first(o)
        squares = jnp.mean(rows * rows, axis=-1)
        nu = jnp.where(squares == 0, nu, beta2 * nu + (1 - beta2) * squares).astype(nu.dtype)
        even = rows / (jnp.sqrt(nu)[..., None] + eps)
        norm, own = (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in (rows, even))
        return self.first(even * norm / (own + eps)), nu


def _sum(m: jax.Array, g: jax.Array) -> jax.Array:
    """Returns m + g in float32 or wider; sums of finite numbers that overflow are clipped."""
    m, g = widen(m), widen(g)
    return clipped(m + g, jnp.isfinite(m) & jnp.isfinite(g), m.dtype)
