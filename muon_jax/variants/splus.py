"""SPlus: the sign of the momentum in the eigenbases of Shampoo, evaluated at an average."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_integer, check_number
from muon_jax._matrices.stages import Stages
from muon_jax._momentum import as_array_tree
from muon_jax._muon import scale_by_muon
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.decompositions import each_matrix
from muon_jax._partition import hybrid
from muon_jax._precision import widen
from muon_jax._sharding.explicit_axes import over_auto_axes
from muon_jax.variants.evaluation_average import evaluation_average
from muon_jax.variants.low_rank import product, relative

# Of the entries of gradients in the second moments: the squares of 2^23 of them are a number.
_LARGEST = 2.0**52


class Sides(NamedTuple):
    """Square matrices of the two sides of a part, `(*batch, fan, fan)`; `None` where too long."""

    fan_in: Any
    fan_out: Any


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
    check_number("b2", b2, at_least=0, below=1)
    check_integer("every", every, at_least=1)
    check_integer("max_dim", max_dim, at_least=1)
    stages = Stages(
        beta=b1,
        nesterov=False,
        scale=lambda m, n: 2 / (m + n) if max(m, n) < max_dim else 0.001,
        **options,
    )

    def sides(matrices, square):
        """`square(batch, size)` for the sides of every part that are short enough."""
        pairs = []
        for part in matrices.parts:
            batch, *fans = part.axes.matrix_shape(part.shape)
            both = (
                matrices.own_batch(part, square(batch, n)) if n < max_dim else None for n in fans
            )
            pairs.append(Sides(*both))
        return pairs

    def init(params):
        matrices = stages.matrices(params)
        zeros = sides(matrices, lambda batch, n: jnp.zeros((*batch, n, n), jnp.float32))
        eyes = sides(
            matrices,
            lambda batch, n: jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32), (*batch, n, n)),
        )
        return SPlusState(
            jnp.zeros([], jnp.int32),
            stages.init_momentum(params),
            matrices.pack(zeros),
            matrices.pack(eyes),
        )

    def step(updates, state):
        matrices = stages.matrices(updates)
        count = optax.safe_increment(state.count)
        _, mu = stages.average(updates, state.mu, count)
        momenta = matrices.whole(matrices.relative(matrices.split(as_array_tree(mu))))
        gradients = [_bounded(g) for g in matrices.whole(matrices.split(updates))]
        bases = matrices.unpack(state.bases)
        second = [
            Sides(
                _average(old.fan_in, lambda g=g: product(g, g.mT), b2),
                _average(old.fan_out, lambda g=g: product(g.mT, g), b2),
            )
            for old, g in zip(matrices.unpack(state.second), gradients, strict=True)
        ]
        factors = [_whitened_sign(m, q) for m, q in zip(momenta, bases, strict=True)]

        def fresh(second):
            halves = [
                matrices.map_distributed(half, _eigenvectors) for half in zip(*second, strict=True)
            ]
            return [Sides(*pair) for pair in zip(*halves, strict=True)]

        due = (count == 1) | (count % every == 0)
        bases = jax.lax.cond(due, fresh, lambda _: bases, second) if second else bases
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


def _eigenvectors(x: jax.Array) -> jax.Array:
    return each_matrix(jnp.linalg.eigh, relative(x)[0])[1]


def _bounded(g: jax.Array) -> jax.Array:
    g = widen(g)
    largest = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
    root = jnp.sqrt(_LARGEST) * jax.lax.rsqrt(jnp.maximum(largest, _LARGEST))
    return (g * root * root).astype(jnp.float32)


def _average(old, new, decay):
    return None if old is None else (decay * old + (1 - decay) * new()).astype(old.dtype)


def _whitened_sign(m: jax.Array, bases: Sides) -> jax.Array:
    left, right = bases
    m = m if left is None else product(left.mT, m)
    m = jnp.sign(m if right is None else product(m, right))
    m = m if left is None else product(left, m)
    return m if right is None else product(m, right.mT)
