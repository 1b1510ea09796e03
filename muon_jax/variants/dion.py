"""Dion: a low-rank orthogonal update by one warm power iteration, with error feedback."""

import functools
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_integer, check_number
from muon_jax._matrices.stages import Stages
from muon_jax._momentum import as_array_tree, stored_like
from muon_jax._muon import scale_by_muon
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.decompositions import each_matrix
from muon_jax._partition import HybridOptions, hybrid
from muon_jax._precision import widen
from muon_jax._scale import ShapeScale
from muon_jax._sharding.explicit_axes import over_auto_axes
from muon_jax.variants.low_rank import product, rank_of, relative


class DionState(NamedTuple):
    """State of `scale_by_dion`.

    Attributes:
        count: steps taken, int32 scalar.
        mu: what the updates have left over, shaped like the params.
        q: the last right factor, `(*batch, fan_in, rank)`, float32; columns of length 1.
    """

    count: chex.Array
    mu: optax.Updates
    q: optax.Updates


@takes_options_of(
    scale_by_muon, without=("nesterov", "momentum", "orthogonalizer", "before", "after")
)
def scale_by_dion(
    *,
    rank: int | float = 0.25,
    beta: float | jax.Array = 0.95,
    scale: str | ShapeScale | None = "mup",
    seed: int = 0,
    eps: float | jax.Array = 1e-8,
    **options: Any,
) -> optax.GradientTransformation:
    r"""Updates of rank r for trees of matrix stacks, without an iteration on whole matrices.

    For $M \leftarrow M + G$ of shape fan_out × fan_in: $P = \mathrm{qr}(MQ)$, $R = M^\top P$,
    $M \leftarrow M - (1-\beta) P R^\top$, $Q$ = R with columns of length 1, update $PQ^\top$. What
    the update leaves out stays in $M$.

    Where $M$ has fewer than r directions, those that QR makes up from rounding noise are left out:
    a column of R that is shorter than 3.5e-4 of $\|M\|_F$ (the root of float32's rounding) gives
    nothing to the update, takes nothing from $M$, and keeps its column of Q. So a zero $M$ gives a
    zero update, and neurons without a gradient move by float32's rounding at most.

    Safe on every finite gradient: $M$, which grows up to 1 / (1 - beta) gradients long, is scaled
    down as a whole where its largest entry would pass half of what `mu_dtype` can hold.

    Args:
        rank: r, or a share of the short side in (0, 1] as a float, rounded up to whole directions.
        beta: what is kept of the part that was used, from 0 to 1.
        scale, mu_dtype, matrix_axes, mesh, shardings, chunk_size: as in `scale_by_muon`. Each QR is
            done once, on one device; the products are spread by XLA, and inside `shard_map` a leaf
            that is a part is gathered for them.
        seed: of the first Q, Gaussian.
        eps: added to the lengths of R's columns, which are shares of $\|M\|_F$.

    Returns:
        A transformation whose state is `DionState`.

    Raises:
        TypeError: an argument of another type, or an array where the program depends on it.
        ValueError: a number out of range, an unknown name, or axes that do not fit a leaf.

    References:
        Ahn et al., 2025, Dion, arXiv 2504.05295, algorithm 1, with P on the side of fan_out as in
        microsoft/dion's `dion_simple`.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.scale_by_dion(rank=2)
        >>> tx.init({"kernel": jnp.ones((4, 8))}).q["kernel"].shape
        (4, 2)
    """
    rank_of(rank, 1, 1)
    check_number("beta", beta, at_least=0, at_most=1)
    check_integer("seed", seed, at_least=0)
    check_number("eps", eps, at_least=0)
    stages = Stages(
        scale=scale,
        **options,
    )

    def init(params):
        matrices = stages.matrices(params)
        key, q = jax.random.key(seed), []
        for i, part in enumerate(matrices.parts):
            batch, fan_in, fan_out = part.axes.matrix_shape(part.shape)
            shape = (*batch, fan_in, rank_of(rank, fan_in, fan_out))
            first = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
            first /= jnp.linalg.norm(first, axis=-2, keepdims=True)
            q.append(matrices.own_batch(part, first))
        packed = matrices.pack(q)
        return DionState(jnp.zeros([], jnp.int32), stages.init_momentum(params), packed)

    def step(updates, state):
        matrices = stages.matrices(updates)
        mu = as_array_tree(state.mu)
        half = jax.tree.map(_half_sum, mu, updates)
        units = [_unit(m) for m in matrices.whole(matrices.split(half))]
        q = matrices.unpack(state.q)
        p = [product(m.mT, x) for (m, _), x in zip(units, q, strict=True)]
        p = matrices.map_distributed(p, _orthonormal)
        limits = [0.5 * float(jnp.finfo(m.dtype).max) for m in matrices.split(mu)]
        left, factors, right = [], [], []
        for (m, size), p_, q_, limit in zip(units, p, q, limits, strict=True):
            r = product(m, p_)
            length = jnp.linalg.norm(r, axis=-2, keepdims=True)
            none = length <= jnp.finfo(length.dtype).eps ** 0.5
            r = jnp.where(none, 0, r)
            unit = r / (length + eps)
            left.append(_sized(m - (1 - beta) * product(r, p_.mT), size, limit))
            right.append(jnp.where(none, q_, unit).astype(q_.dtype))
            factors.append(product(jnp.where(none, 0, unit), p_.mT))
        kept = matrices.merge(matrices.local(left), half)
        count = optax.safe_increment(state.count)
        stored = stored_like(kept, state.mu, count)
        state = DionState(count, stored, matrices.pack(right))
        return matrices.merge(matrices.scale(matrices.local(factors)), updates), state

    def update(updates, state, params=None):
        del params
        return over_auto_axes(step, updates, state)

    return optax.GradientTransformation(init, update)


@takes_options_of(hybrid)
def dion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    beta: float | jax.Array = 0.95,
    scale: str | ShapeScale | None = "mup",
    seed: int = 0,
    eps: float | jax.Array = 1e-8,
    **options: Unpack[HybridOptions],
) -> optax.GradientTransformationExtraArgs:
    """Dion: updates of low rank with error feedback, AdamW for the other leaves.

    Its authors call it legacy: see `dion2`. The formulas are in `scale_by_dion`.

    Args:
        learning_rate: of the hidden matrices; a number or a schedule.
        rank, beta, scale, seed, eps: as in `scale_by_dion`.
        options: those of `hybrid`.

    Returns:
        A transformation that takes (and needs) `params` in `update`.

    References:
        Ahn et al., 2025, Dion, arXiv 2504.05295.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.dion(0.01, rank=0.5, adam_learning_rate=3e-4)
        >>> params = {"embed": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 32))}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    scale_by = functools.partial(
        scale_by_dion, rank=rank, beta=beta, scale=scale, seed=seed, eps=eps
    )
    return hybrid(scale_by, learning_rate, **options)


def _half_sum(m: jax.Array, g: jax.Array) -> jax.Array:
    """(m + g) / 2, finite where they are: the barrier keeps XLA from halving their sum."""
    return 0.5 * widen(m) + jax.lax.optimization_barrier(0.5 * widen(g))


def _unit(half: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Matrices of Frobenius norm 1, and that of twice `half` as two factors: it may overflow."""
    m, largest = relative(half)
    norm = jnp.linalg.norm(m, axis=(-2, -1), keepdims=True)
    return m / jnp.where(norm == 0, 1, norm), (2 * norm, largest)


def _sized(m: jax.Array, size: tuple[jax.Array, jax.Array], limit: float) -> jax.Array:
    """`m` times its size, or as much of it as no entry passes the limit."""
    norm, largest = size
    m = m * norm
    top = jnp.max(jnp.abs(m), axis=(-2, -1), keepdims=True)
    return m * jnp.minimum(largest, limit / jnp.maximum(top, 1))


def _orthonormal(y: jax.Array) -> jax.Array:
    """An orthonormal P with the span of `y`, whose columns are of length 1 at most."""
    return each_matrix(_ranked_qr, y)


def _ranked_qr(y: jax.Array) -> jax.Array:
    """P of a QR in which columns without a direction of their own come last.

    For such a column QR makes one up from rounding noise, and takes it from the columns behind it.
    """
    p, r = jnp.linalg.qr(y)
    own = jnp.abs(jnp.diagonal(r, axis1=-2, axis2=-1))
    # Measured on random M of rank 1 to 255 and Frobenius norm 1, with columns of Q of length 1:
    # noise is 0.2 to 12 of these, and more in one of a hundred.
    made_up = own <= 64 * jnp.finfo(own.dtype).eps

    def again(y):
        incomplete = jnp.any(made_up, axis=-1, keepdims=True)
        order = jnp.argsort(jnp.where(incomplete, -own, 0), axis=-1)[..., None, :]
        last, _ = jnp.linalg.qr(jnp.take_along_axis(y, order, axis=-1))
        return jnp.take_along_axis(last, jnp.argsort(order, axis=-1), axis=-1)

    return jax.lax.cond(jnp.any(made_up), again, lambda _: p, y)
