"""SPlus: the sign of the momentum in Shampoo's eigenbases, with an average for evaluation."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._matrices.stages import Stages
from muon_jax._momentum import as_array_tree
from muon_jax._muon import scale_by_muon
from muon_jax._options import takes_options_of
from muon_jax._partition import hybrid
from muon_jax._sharding.explicit_axes import over_auto_axes
from muon_jax.variants.eigenbases import Eigenbases, bounded, into, out_of
from muon_jax.variants.evaluation_average import evaluation_average


class SPlusState(NamedTuple):
    """State of `scale_by_splus`.

    Attributes:
        count: The number of steps taken, an int32 scalar.
        mu: The momentum, shaped like the params.
        second: The averages of G Gᵀ and Gᵀ G, `Sides` in float32.
        bases: Their eigenvectors when they were last computed, `Sides` in float32.
    """

    count: chex.Array
    mu: optax.Updates
    second: optax.Updates
    bases: optax.Updates


@takes_options_of(
    scale_by_muon,
    without=("beta", "nesterov", "momentum", "orthogonalizer", "scale", "before", "after"),
)
def scale_by_splus(
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    every: int = 100,
    max_dim: int = 10_000,
    **options: Any,
) -> optax.GradientTransformation:
    r"""Returns a stable whitening of the momentum, for trees of matrix stacks.

    $m \leftarrow \mathrm{EMA}(g; b_1)$; $u = Q_L\,\mathrm{sign}(Q_L^\top m Q_R)\,Q_R^\top$ with the
    bases of earlier steps (initially the identity), times 2 / (fan_in + fan_out). Then
    $L, R \leftarrow \mathrm{EMA}(gg^\top, g^\top g; b_2)$, whose eigenvectors are the new bases in
    the first and every `every`-th step.

    Every finite gradient is safe: for the second moments a matrix is scaled down to a largest entry
    of 2^52, so that its square is finite. The squares of entries below 1e-19 are zero; if all are,
    the bases are the identity.

    If L or R has a repeated eigenvalue, any basis of its eigenspace is valid, and rounding errors
    decide. After k gradients of rank r this is the case for the eigenvalue zero of every side
    longer than k r. The steps of such a matrix on a mesh and on one device, or on two platforms,
    then differ by up to their own norm (0.5 of it was observed), until both sides have full rank.

    Args:
        b1, b2: The decays of the momentum and of the second moments.
        every: The number of steps between eigendecompositions.
        max_dim: A side of at least this size keeps the identity as its basis. The scale of its
            matrix is then 0.001, which the authors' code uses for leaves that are not matrices.
        mu_dtype, matrix_axes, mesh, shardings, chunk_size: As in `scale_by_muon`. Each
            eigendecomposition is computed once, on one device. XLA distributes the products; inside
            `shard_map` a sharded leaf is gathered for them.

    References:
        Frans et al., 2025, arXiv 2506.07254, algorithm 2, with the bases as in kvfrans/splus.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.scale_by_splus()
        >>> params = {"kernel": jnp.ones((4, 8))}
        >>> updates, state = tx.update(params, tx.init(params))
        >>> state.bases["kernel"].fan_out.shape
        (8, 8)
    """
    check_number("b1", b1, at_least=0, below=1)
    eigenbases = Eigenbases(b2, every, max_dim)
    stages = Stages(
        beta=b1,
        nesterov=False,
        scale=lambda m, n: 2 / (m + n) if max(m, n) < max_dim else 0.001,
        **options,
    )

    def init(params):
        matrices = stages.matrices(params)
        kept = map(matrices.pack, eigenbases.init(matrices))
        return SPlusState(jnp.zeros([], jnp.int32), stages.init_momentum(params), *kept)

    @over_auto_axes
    def update(updates, state, params):
        del params
        matrices = stages.matrices(updates)
        count = optax.safe_increment(state.count)
        _, mu = stages.average(updates, state.mu, count)
        momenta = matrices.whole(matrices.relative(matrices.split(as_array_tree(mu))))
        gradients = [bounded(g) for g in matrices.whole(matrices.split(updates))]
        bases = matrices.unpack(state.bases)
        second = eigenbases.average(matrices.unpack(state.second), gradients)
        factors = [out_of(jnp.sign(into(m, q)), q) for m, q in zip(momenta, bases, strict=True)]
        bases = eigenbases.renew(matrices, second, bases, count)
        state = SPlusState(count, mu, matrices.pack(second), matrices.pack(bases))
        return matrices.merge(matrices.scale(matrices.local(factors)), updates), state

    return optax.GradientTransformation(init, update)


@takes_options_of(hybrid)
def splus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    every: int = 100,
    max_dim: int = 10_000,
    average: float | jax.Array = 0.999,
    other_optimizer: str | optax.GradientTransformation = "sign",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Updates hidden matrices with `scale_by_splus`, other leaves with sign momentum, and averages.

    Evaluate the model at `evaluation_params(state, params)`: steps are large, so the method relies
    on the average.

    Args:
        learning_rate: The learning rate, a number or a schedule; about 0.2.
        b1, b2, every, max_dim: As in `scale_by_splus`.
        average: The decay of the average of the params.
        other_optimizer, options: As in `hybrid`. The decay is `learning_rate * weight_decay * w`;
            the authors' code multiplies this by 2 / (fan_in + fan_out).

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.splus(0.2)
        >>> params = {"embed": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 32))}}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> averaged = muon_jax.evaluation_params(state, params)
    """
    check_number("average", average, at_least=0, below=1)
    scale_by = functools.partial(scale_by_splus, b1=b1, b2=b2, every=every, max_dim=max_dim)
    return optax.chain(
        hybrid(scale_by, learning_rate, other_optimizer=other_optimizer, **options),
        evaluation_average(average),
    )
