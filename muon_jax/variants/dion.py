"""Dion: a low-rank orthogonal update from one warm-started power iteration, with error feedback."""

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
        count: The number of steps taken, an int32 scalar.
        mu: The momentum that the updates have not used yet, shaped like the params.
        q: The last right factor, `(*batch, fan_in, rank)`, float32, with columns of norm 1.
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
    r"""Returns updates of rank r for trees of matrix stacks, without iterating on whole matrices.

    For $M \leftarrow M + G$ of shape fan_out × fan_in: $P = \mathrm{qr}(MQ)$, $R = M^\top P$,
    $M \leftarrow M - (1-\beta) P R^\top$; $Q$ is R with columns scaled to norm 1, and the update is
    $PQ^\top$. The part of $M$ that the update does not use remains in $M$.

    If the rank of $M$ is less than r, the directions that QR produces from rounding noise are
    ignored: a column of R whose norm is below 3.5e-4 of $\|M\|_F$ (the square root of float32's
    rounding) is left out of the update, is not subtracted from $M$, and keeps its column of Q. A
    zero $M$ therefore gives a zero update, and neurons without a gradient move at most by float32's
    rounding.

    Every finite gradient is safe: $M$, which grows up to 1 / (1 - beta) times a gradient, is scaled
    down as a whole if its largest entry would exceed half of the largest number of `mu_dtype`.

    Args:
        rank: r, or a float in (0, 1] for a fraction of the short side, rounded up to an integer.
        beta: The fraction of the used part that stays in the momentum, from 0 to 1.
        seed: The seed of the first Q, which is Gaussian.
        eps: A number added to the norms of R's columns, which are relative to $\|M\|_F$.
        scale, options: As in `scale_by_muon`. Each QR is computed once, on one device. XLA
            distributes the products; inside `shard_map` a sharded leaf is gathered for them.

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

    @over_auto_axes
    def update(updates, state, params):
        del params
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
    """Updates the hidden matrices with Dion and all other leaves with AdamW.

    Dion makes low-rank updates with error feedback; see `scale_by_dion`. Its authors consider it
    superseded by `dion2`. All other options are those of `hybrid`.
    """
    scale_by = functools.partial(
        scale_by_dion, rank=rank, beta=beta, scale=scale, seed=seed, eps=eps
    )
    return hybrid(scale_by, learning_rate, **options)


def _half_sum(m: jax.Array, g: jax.Array) -> jax.Array:
    """Returns (m + g) / 2 without overflow. The barrier keeps XLA from adding before halving."""
    return 0.5 * widen(m) + jax.lax.optimization_barrier(0.5 * widen(g))


def _unit(half: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Scales `half` to norm 1; returns the norm of `2 * half` too, as two finite factors."""
    m, largest = relative(half)
    norm = jnp.linalg.norm(m, axis=(-2, -1), keepdims=True)
    return m / jnp.where(norm == 0, 1, norm), (2 * norm, largest)


def _sized(m: jax.Array, size: tuple[jax.Array, jax.Array], limit: float) -> jax.Array:
    """Returns `m` times its size, or less if an entry would otherwise exceed the limit."""
    norm, largest = size
    m = m * norm
    top = jnp.max(jnp.abs(m), axis=(-2, -1), keepdims=True)
    return m * jnp.minimum(largest, limit / jnp.maximum(top, 1))


def _orthonormal(y: jax.Array) -> jax.Array:
    """Returns an orthonormal basis of the span of `y`, whose columns have norms of at most 1."""
    return each_matrix(_ranked_qr, y)


def _ranked_qr(y: jax.Array) -> jax.Array:
    """Returns the first factor of a QR in which linearly dependent columns come last.

    For such a column QR produces a direction from rounding noise, which later columns then lack.
    """
    p, r = jnp.linalg.qr(y)
    own = jnp.abs(jnp.diagonal(r, axis1=-2, axis2=-1))
    # Measured on random M of rank 1 to 255 and Frobenius norm 1, with columns of Q of norm 1: the
    # noise is 0.2 to 12 times this epsilon, and more in one case of a hundred.
    is_noise = own <= 64 * jnp.finfo(own.dtype).eps

    def again(y):
        incomplete = jnp.any(is_noise, axis=-1, keepdims=True)
        order = jnp.argsort(jnp.where(incomplete, -own, 0), axis=-1)[..., None, :]
        last, _ = jnp.linalg.qr(jnp.take_along_axis(y, order, axis=-1))
        return jnp.take_along_axis(last, jnp.argsort(order, axis=-1), axis=-1)

    return jax.lax.cond(jnp.any(is_noise), again, lambda _: p, y)
