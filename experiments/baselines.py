"""What critics set beside Muon: changes to the gradient before AdamW, and parts of Muon alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

_SQUARINGS = 6


def orthogonal_gradient() -> optax.GradientTransformation:
    """⊥Grad (Prieto et al., 2501.04697): no step along a parameter itself.

    Of each array `w` with gradient `g`: `g - (w·g / w·w) w`, with the norm of `g`. An array of
    zeros keeps its gradient.

    Example:
        >>> w, g = jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0])
        >>> print(orthogonal_gradient().update(g, optax.EmptyState(), w)[0])
        [0. 5.]
    """

    def without_growth(gradient: jax.Array, param: jax.Array) -> jax.Array:
        size = jnp.vdot(param, param)
        along = jnp.vdot(param, gradient) / jnp.where(size > 0, size, 1.0)
        rest = gradient - along * param
        norm = jnp.linalg.norm(rest)
        factor = jnp.linalg.norm(gradient) / jnp.where(norm > 0, norm, 1.0)
        return (factor * rest).astype(gradient.dtype)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("orthogonal_gradient needs the params: update(grads, state, params).")
        return jax.tree.map(without_growth, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class SlowGradient(NamedTuple):
    """State of `grokfast`: gradients so far, and their running mean in their shapes and dtypes."""

    count: jax.Array
    mean: optax.Updates


def grokfast(decay: float = 0.98, factor: float = 2.0) -> optax.GradientTransformation:
    """Grokfast-EMA (Lee et al., 2405.20233): the slow part of a gradient counts more.

    `mean = decay * mean + (1 - decay) * g` begins at the first gradient; the update is
    `g + factor * mean`.

    Example:
        >>> tx = grokfast(decay=0.5, factor=2.0)
        >>> first, state = tx.update(jnp.array(1.0), tx.init(jnp.array(0.0)))
        >>> second, _ = tx.update(jnp.array(3.0), state)
        >>> print(first, second)
        3.0 7.0
    """

    def update(updates, state, params=None):
        old = jnp.where(state.count > 0, decay, 0.0)
        mean = jax.tree.map(lambda m, g: old * m + (1 - old) * g, state.mean, updates)
        slow = jax.tree.map(lambda g, m: g + factor * m, updates, mean)
        return slow, SlowGradient(optax.safe_increment(state.count), mean)

    def init(params):
        return SlowGradient(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    return optax.GradientTransformation(init, update)


def unit_spectral_norm(x: jax.Array) -> jax.Array:
    """`x` of spectral norm 1, its singular values otherwise as they are; zeros stay zero.

    By squaring its Gram matrix the norm of the 128th powers of the singular values is found, which
    is at most `min(m, n) ** (1 / 128)` times the largest: 4 % at a short side of 128. It takes
    products of matrices alone, and no decomposition.

    Args:
        x: `(..., m, n)`, floating point.

    Returns:
        `(..., m, n)` in `x.dtype`.

    Example:
        >>> print(unit_spectral_norm(jnp.diag(jnp.array([4.0, 2.0]))))
        [[1.  0. ]
         [0.  0.5]]
    """
    wide = x if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(x, -1, -2)
    wide = wide.astype(jnp.float32)
    gram = wide @ jnp.swapaxes(wide, -1, -2)
    log_norm = jnp.zeros(x.shape[:-2])
    for squaring in range(_SQUARINGS + 1):
        trace = jnp.trace(gram, axis1=-2, axis2=-1)
        trace = jnp.where(trace > 0, trace, 1.0)
        log_norm += jnp.log(trace) / 2 ** (squaring + 1)
        gram = gram / trace[..., None, None]
        gram = gram @ gram
    return (x / jnp.exp(log_norm)[..., None, None]).astype(x.dtype)
