"""Baselines beside Muon: gradient transformations before AdamW, and a part of Muon alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

_SQUARINGS = 6


def orthogonal_gradient() -> optax.GradientTransformation:
    """Removes from each gradient its component along the parameter: ⊥Grad (2501.04697).

    The update of an array `w` with gradient `g` is `g - (w·g / w·w) w`, rescaled to the norm of
    `g`. An array of zeros keeps its gradient.

    References:
        Prieto et al., https://arxiv.org/abs/2501.04697

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
    """State of `grokfast`: the number of gradients so far, and their moving average."""

    count: jax.Array
    mean: optax.Updates


def grokfast(decay: float = 0.98, factor: float = 2.0) -> optax.GradientTransformation:
    """Amplifies the slow component of each gradient: Grokfast-EMA (Lee et al., 2405.20233).

    The update is `g + factor * mean`, where `mean = decay * mean + (1 - decay) * g` starts at the
    first gradient.

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
    """Divides each matrix by an estimate of its spectral norm; zero matrices stay zero.

    The estimate is the 128-norm of the singular values, computed by repeated squaring of the Gram
    matrix. It exceeds the spectral norm by a factor of at most `min(m, n) ** (1 / 128)`, which is
    4 % at a short side of 128. It needs only matrix products, no decomposition.

    Args:
        x: Matrices `(..., m, n)` of any floating-point dtype.

    Returns:
        Matrices `(..., m, n)` in `x.dtype`.

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
