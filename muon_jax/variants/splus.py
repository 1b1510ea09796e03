"""SPlus: the sign of the momentum in the eigenbases of Shampoo, evaluated at an average."""

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
        count: steps taken, int32 scalar.
        mu: momentum, shaped like the params.
        second: averages of G Gᵀ and Gᵀ G, `Sides` in float32.
        bases: their eigenvectors when they were last computed, `Sides` in float32.
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
    r"""Stable whitening of the momentum, for trees of matrix stacks.

    $m \leftarrow \mathrm{EMA}(g; b_1)$; $u = Q_L\,\mathrm{sign}(Q_L^\top m Q_R)\,Q_R^\top$ with the
    bases of earlier steps (the identity at first), times 2 / (fan_in + fan_out); then
    $L, R \leftarrow \mathrm{EMA}(gg^\top, g^\top g; b_2)$, whose eigenvectors are the new bases on
    the first and every `every`-th step.

    Safe on every finite gradient: what the second moments take of a matrix is scaled down to a
    largest entry of 2^52, since its square must be a number. Entries below 1e-19 have none: bases
    that know of no others are the identity.

    Where L or R has an eigenvalue several times, any basis of its eigenvectors is as good, and
    rounding chooses: after k gradients of rank r that is so of a side longer than k r, with zeros.
    Steps of such a matrix on a mesh and on one device, or on two platforms, then differ by up to
    their own length (0.5 of it was seen), until both sides have full rank.

    Args:
        b1, b2: decays of the momentum and of the second moments.
        every: steps between eigendecompositions.
        max_dim: a side this long keeps the identity as its basis, and its matrix the scale 0.001,
            which the authors' code gives to what is no matrix.
        mu_dtype, matrix_axes, mesh, shardings, chunk_size: as in `scale_by_muon`. Each
            eigendecomposition is done once, on one device; the products are spread by XLA, and
            inside `shard_map` a leaf that is a part is gathered for them.

    Returns:
        A transformation whose state is `SPlusState`.

    Raises:
        TypeError: an argument of another type, or an array where the program depends on it.
        ValueError: a number out of range, or axes that do not fit a leaf.

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

    def step(updates, state):
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

    def update(updates, state, params=None):
        del params
        return over_auto_axes(step, updates, state)

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
    """`scale_by_splus` for the hidden matrices, sign momentum for the others, and an average.

    Evaluate at `evaluation_params(state, params)`: the step is large, and the average is what the
    method is about.

    Args:
        learning_rate: a number or a schedule; about 0.2.
        b1, b2, every, max_dim: as in `scale_by_splus`.
        average: decay of the average of the params.
        other_optimizer: as in `hybrid`.
        options: those of `hybrid`. Its decay is `learning_rate * weight_decay * w`; that of the
            authors' code is 2 / (fan_in + fan_out) of it.

    Returns:
        A transformation that takes (and needs) `params` in `update`.

    References:
        Frans et al., 2025, arXiv 2506.07254.

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
