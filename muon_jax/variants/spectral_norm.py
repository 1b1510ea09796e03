"""Constraints on the spectral norm of the weights: a sphere (MuonSphere) and a cap."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_integer, check_number
from muon_jax._constraint import Constraint
from muon_jax._matrices.hooks import Arrays, Hook, Step
from muon_jax._muon import muon
from muon_jax._options import takes_options_of
from muon_jax._scale import SHAPE_SCALES

_FIRST = 20  # power iterations on the initial weights


def spectral_sphere(radius: float | jax.Array = 1.0, *, iterations: int = 1) -> Constraint:
    r"""Keeps the spectral norm of weights at $c \sqrt{\mathrm{fan\_out} / \mathrm{fan\_in}}$.

    Every matrix is scaled after every step; zero matrices stay zero. With updates of that norm,
    `scale="mup"` times c, this is MuonSphere, which is the spectral sphere optimizer without its
    solver for tangent updates.

    Args:
        radius: The positive constant c.
        iterations: The number of power iterations per step, which start from the vector of the
            previous step. The state is that vector for each matrix.

    References:
        Spectral Sphere Optimizer, 2026, arXiv 2601.08393.

    Example:
        >>> import jax.numpy as jnp, muon_jax, optax
        >>> tx = muon_jax.muon(0.1, constraint=muon_jax.spectral_sphere())
        >>> params = {"kernel": 3 * jnp.eye(4, 16)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> new = optax.apply_updates(params, updates)
        >>> print(f"{jnp.linalg.norm(new['kernel'], 2):.2f}")  # sqrt(16 / 4)
        2.00
    """
    check_number("radius", radius, above=0)
    return _scaled(iterations, lambda norm, m, n: radius * SHAPE_SCALES["mup"](m, n) / norm)


def spectral_cap(bound: float | jax.Array, *, iterations: int = 1) -> Constraint:
    r"""Limits the spectral norm of weights to $c \sqrt{\mathrm{fan\_out} / \mathrm{fan\_in}}$.

    A matrix with a larger norm is scaled down; others are not changed. `bound` is the positive
    constant c, and `iterations` is as in `spectral_sphere`.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muon(0.1, constraint=muon_jax.spectral_cap(1.0))
        >>> params = {"kernel": 3 * jnp.eye(4, 16)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> print(f"{jnp.linalg.norm(params['kernel'] + updates['kernel'], 2):.2f}")
        2.00
    """
    check_number("bound", bound, above=0)

    def factor(norm: jax.Array, m: int, n: int) -> jax.Array:
        return jnp.minimum(1, bound * SHAPE_SCALES["mup"](m, n) / norm)

    return _scaled(iterations, factor)


@takes_options_of(muon, without=("scale", "constraint"))
def muon_sphere(
    learning_rate: optax.ScalarOrSchedule, *, radius: float = 1.0, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns MuonSphere: updates and weights of the same spectral norm.

    It is `muon(learning_rate, scale=..., constraint=spectral_sphere(radius))` with the shape scale
    `radius * sqrt(fan_out / fan_in)`, so the rate is the norm of a step relative to the weights'.
    """

    def scale(fan_in: int, fan_out: int) -> float:
        return radius * SHAPE_SCALES["mup"](fan_in, fan_out)

    return muon(learning_rate, scale=scale, constraint=spectral_sphere(radius), **options)


def _scaled(iterations: int, factor: Any) -> Constraint:
    """Returns a constraint that multiplies weights by `factor(spectral norm, fan_in, fan_out)`."""
    check_integer("iterations", iterations, at_least=1)

    def init(matrices: Any, params: Arrays) -> Arrays:
        # Large columns contribute much to the first singular vector; all entries start positive.
        start = matrices.sum([jnp.abs(w) for w in params], over="fan_in")
        vectors = matrices.with_norms([x + jnp.max(x) + 1 for x in start], [1.0] * len(start))
        for _ in range(_FIRST):
            _, vectors = _power(matrices, params, vectors)
        return vectors

    def update(weights: Arrays, vectors: Arrays, step: Step) -> tuple[Arrays, Arrays]:
        matrices = step.matrices
        for _ in range(iterations):
            norms, vectors = _power(matrices, weights, vectors)
        return [
            w * jnp.where(norm == 0, 1, factor(jnp.where(norm == 0, 1, norm), *part.fans))
            for w, norm, part in zip(weights, norms, matrices.parts, strict=True)
        ], vectors

    return Constraint(on_weights=Hook(update, init))


def _power(matrices: Any, weights: Arrays, vectors: Arrays) -> tuple[Arrays, Arrays]:
    """Returns the norms of W v, and W'W v scaled to norm 1, for unit vectors v along fan_out."""
    left = matrices.sum([w * v for w, v in zip(weights, vectors, strict=True)], over="fan_out")
    norms = matrices.norms(left, over="fan_in")
    left = [u / jnp.where(norm == 0, 1, norm) for u, norm in zip(left, norms, strict=True)]
    right = matrices.sum([w * u for w, u in zip(weights, left, strict=True)], over="fan_in")
    sizes = matrices.norms(right, over="fan_out")
    vectors = [
        jnp.where(size == 0, v, x / jnp.where(size == 0, 1, size))
        for x, v, size in zip(right, vectors, sizes, strict=True)
    ]
    return norms, vectors
