"""Muon with an all-to-all for each stack of matrices, as in MaxText since 2026.

If a mesh axis shards the matrices of a stack, an all-to-all gives each device whole matrices. A
rolled loop orthogonalises them in the leaf's dtype, and a second all-to-all restores the sharding.
A leaf without a stack keeps its sharding, and the products of its iteration are sharded too.

References:
    https://github.com/AI-Hypercomputer/maxtext, src/maxtext/optimizers/muon.py
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95


def all_to_all_muon(rate: float, shardings: Any) -> optax.GradientTransformation:
    """Returns the transformation.

    Args:
        rate: The learning rate.
        shardings: The shardings of the params, a tree of `NamedSharding` over Auto axes.
    """

    def orthogonalize(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(_orthogonalized, updates, shardings)

    return optax.chain(
        optax.trace(_MOMENTUM, nesterov=True),
        optax.stateless(orthogonalize),
        optax.scale_by_learning_rate(rate),
    )


def _orthogonalized(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Orthogonalises a leaf `(..., fan_in, fan_out)` with at most one batch axis."""
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    *stack, rows, columns = spec
    count = len(x) if stack else 1
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x, rows, columns = x.mT, columns, rows
    axes = tuple(axis for axis in (rows, columns) if axis is not None)
    if stack == [None] and axes:
        shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
        x = jnp.pad(x, ((0, -count % shards), (0, 0), (0, 0)))
        stack, rows, columns = [axes], None, None

    def placed(x: jax.Array, *last: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, P(*stack, *last)))

    def gram(x: jax.Array) -> jax.Array:
        wide = jnp.matmul(x, x.mT, preferred_element_type=jnp.float32)
        return placed(wide.astype(x.dtype), None, rows)

    def step(_: int, x: jax.Array) -> jax.Array:
        a, b, c = _COEFFICIENTS
        square = gram(x)
        polynomial = b * square + c * gram(square)
        product = jnp.matmul(polynomial, x, preferred_element_type=jnp.float32).astype(x.dtype)
        return placed(a * x + product, rows, columns)

    x = placed(x, rows, columns)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8).astype(x.dtype)
    x = jax.lax.fori_loop(0, _STEPS, step, placed(x, rows, columns))
    x = x.mT if is_tall else x
    x = jax.lax.with_sharding_constraint(x, sharding)
    return x[:count] if x.ndim == 3 else x
