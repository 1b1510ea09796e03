"""Dion: a low-rank orthogonal update by one warm power iteration, with error feedback."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._auto_axes import over_auto_axes
from muon_jax._checks import check_static
from muon_jax._hybrid import hybrid
from muon_jax._lapack import each_matrix
from muon_jax._layout import AnyMesh
from muon_jax._momentum import as_array_tree, stored_like
from muon_jax._options import takes_options_of
from muon_jax._shape_scale import ShapeScale
from muon_jax._stages import Stages
from muon_jax.variants.low_rank import product, rank_of, relative


class DionState(NamedTuple):
    """State of `scale_by_dion`.

    Attributes:
        count: steps taken, int32 scalar.
        mu: what the updates have left over, shaped like the params.
        q: the last right factor, `(*batch, fan_in, rank)`, float32.
    """

    count: chex.Array
    mu: optax.Updates
    q: optax.Updates


def scale_by_dion(
    *,
    rank: int | float = 0.25,
    beta: float = 0.95,
    scale: str | ShapeScale | None = "mup",
    seed: int = 0,
    eps: float = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    matrix_axes: Any = None,
    mesh: AnyMesh | None = None,
    shardings: Any = None,
    chunk_size: int | None = None,
) -> optax.GradientTransformation:
    r"""Updates of rank r for trees of matrix stacks, without an iteration on whole matrices.

    For $M \leftarrow M + G$ of shape fan_out × fan_in: $P = \mathrm{qr}(MQ)$, $R = M^\top P$,
    $M \leftarrow M - (1-\beta) P R^\top$, $Q$ = R with columns of length 1, update $PQ^\top$. What
    the update leaves out stays in $M$. A zero $M$ gives a zero update and keeps Q.

    Args:
        rank: r, or a share of the short side in (0, 1] as a float.
        beta: what is kept of the part that was used.
        scale, mu_dtype, matrix_axes, mesh, shardings, chunk_size: as in `scale_by_muon`. Each QR is
            done once, on one device; the products are spread by XLA, and inside `shard_map` a leaf
            that is a part is gathered for them.
        seed: of the first Q, Gaussian.
        eps: added to the lengths of the columns.

    Returns:
        A transformation whose state is `DionState`.

    Raises:
        ValueError: a rank that is none, an unknown name, or axes that do not fit a leaf.

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
    check_static("seed", seed)
    stages = Stages(
        scale=scale,
        mu_dtype=mu_dtype,
        matrix_axes=matrix_axes,
        mesh=mesh,
        shardings=shardings,
        chunk_size=chunk_size,
    )

    def init(params):
        matrices = stages.matrices(params)
        key, q = jax.random.key(seed), []
        for i, piece in enumerate(matrices):
            batch, fan_in, fan_out = piece.axes.matrix_shape(piece.shape)
            shape = (*batch, fan_in, rank_of(rank, fan_in, fan_out))
            first = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
            q.append(matrices.own_batch(piece, first))
        packed = matrices.pack(q, params)
        return DionState(jnp.zeros([], jnp.int32), stages.init_momentum(params), packed)

    def step(updates, state):
        matrices = stages.matrices(updates)
        total = optax.tree.add(as_array_tree(state.mu), updates)
        scaled = [relative(m) for m in matrices.whole(matrices.take(total))]
        q = matrices.unpack(state.q, updates)
        p = [product(m.mT, x) for (m, _), x in zip(scaled, q, strict=True)]
        p = matrices.each_once(p, lambda x: each_matrix(jnp.linalg.qr, x)[0])
        left, factors, right = [], [], []
        for (m, largest), p_, q_ in zip(scaled, p, q, strict=True):
            r = product(m, p_)
            left.append((m - (1 - beta) * product(r, p_.mT)) * largest)
            right.append(_unit_columns(r, q_, eps))
            factors.append(jnp.where(largest == 0, 0, product(right[-1], p_.mT)))
        kept = matrices.give(matrices.local(left), total)
        state = DionState(
            optax.safe_increment(state.count),
            stored_like(kept, state.mu),
            matrices.pack(right, updates),
        )
        return matrices.give(matrices.scale(matrices.local(factors)), updates), state

    def update(updates, state, params=None):
        del params
        return over_auto_axes(step, updates, state)

    return optax.GradientTransformation(init, update)


@takes_options_of(hybrid)
def dion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    beta: float = 0.95,
    scale: str | ShapeScale | None = "mup",
    seed: int = 0,
    eps: float = 1e-8,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_dion` for the hidden matrices, AdamW for the rest.

    Args:
        learning_rate: of the hidden matrices; a number or a schedule.
        rank, beta, scale, seed, eps: as in `scale_by_dion`.
        options: those of `hybrid`.

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


def _unit_columns(r: jax.Array, old: jax.Array, eps: float) -> jax.Array:
    length = jnp.linalg.norm(r, axis=-2, keepdims=True)
    return jnp.where(length == 0, old, r / (length + eps))
