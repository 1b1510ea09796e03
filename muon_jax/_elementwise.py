"""The optimizers of the leaves that are not hidden matrices: Adam, heavy ball, Lion, sign momentum.

Each equals Optax's and has the same state, with three differences. Arithmetic is in float32 or
wider, with coefficients in float32, and only the state is rounded to its stored dtype. Updates
stay in float32, so that the links that follow round them once. Each entry of a finite gradient is
clipped so that the state stays finite: in Optax's Adam the square of a gradient of 1e20 is
infinite, and the entry never changes again. Infinite and NaN entries are not changed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._precision import coefficient, complement, real_dtype, widen

Number = float | jax.Array


def scale_by_adam(
    b1: Number,
    b2: Number,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` for gradients of any size and state of any precision.

    Gradients are clipped at half the square root of the largest number of the second moment's
    dtype: 9e18 in float32 and bfloat16, 128 in float16. A positive second moment in float16 is
    never rounded below the smallest positive number (6e-8), because with a zero there and a nonzero
    momentum the update would be divided by `eps` alone.

    The moments are stored in `mu_dtype` and `nu_dtype`; `None` means the dtype of each parameter.
    For complex parameters the first moment always has the parameter's dtype, and the second moment,
    the average of |g|², is real.
    """

    def init(params):
        def zeros(p):
            own = real_dtype(jnp.result_type(p))
            return jnp.zeros_like(p, own if nu_dtype is None else nu_dtype)

        mu, nu = _zeros(params, mu_dtype), jax.tree.map(zeros, params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)

        def bound(g, m, v):
            g = widen(g)
            return _bounded(g, min(_largest(g, m), _largest(g, v) ** 0.5) / 2)

        def second(g, v):
            return complement(b2, g) * _squared(g) + coefficient(b2, g) * widen(v)

        def unbiased(tree, decay, count):
            return optax.tree.bias_correction(tree, _unrounded(decay), count)

        def look_ahead(g, m):
            return coefficient(b1, g) * m + complement(b1, g) * g

        def direction(m, v):
            return m / (jnp.sqrt(v + coefficient(eps_root, v)) + coefficient(eps, v))

        gradients = jax.tree.map(bound, updates, state.mu, state.nu)
        mu = jax.tree.map(lambda g, m: _average(g, m, b1), gradients, state.mu)
        nu = jax.tree.map(second, gradients, state.nu)
        if nesterov:
            ahead = unbiased(mu, b1, optax.safe_increment(count))
            mean = jax.tree.map(look_ahead, unbiased(gradients, b1, count), ahead)
        else:
            mean = unbiased(mu, b1, count)
        updates = jax.tree.map(direction, mean, unbiased(nu, b2, count))
        nu = jax.tree.map(lambda v, old: _kept_from_zero(v, old.dtype), nu, state.nu)
        return updates, optax.ScaleByAdamState(count, _stored_like(mu, state.mu), nu)

    return optax.GradientTransformation(init, update)


def trace(
    decay: Number, *, mu_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformation:
    """Returns heavy-ball momentum, `optax.trace`; gradients are clipped so that sums are finite."""

    def init(params):
        return optax.TraceState(_zeros(params, mu_dtype))

    def update(updates, state, params=None):
        del params

        def accumulate(g, t):
            g = widen(g)
            g = _bounded(g, complement(decay, g) * (_largest(g, t) / 2))
            return g + coefficient(decay, g) * widen(t)

        new = jax.tree.map(accumulate, updates, state.trace)
        return new, optax.TraceState(_stored_like(new, state.trace))

    return optax.GradientTransformation(init, update)


def scale_by_lion(
    b1: Number,
    b2: Number = 0.99,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
    size: float = 1.0,
    state_class: type = optax.ScaleByLionState,
) -> optax.GradientTransformation:
    """Returns `size` times `optax.scale_by_lion`, with the differences described at the top."""

    def init(params):
        return state_class(jnp.zeros([], jnp.int32), _zeros(params, mu_dtype))

    def update(updates, state, params=None):
        del params
        count, mean = state

        def step(g, m):
            direction = jnp.sign(_average(g, m, b1))
            return coefficient(size, direction) * direction

        gradients = jax.tree.map(_bounded_by_state, updates, mean)
        new = jax.tree.map(lambda g, m: _average(g, m, b2), gradients, mean)
        steps = jax.tree.map(step, gradients, mean)
        return steps, state_class(optax.safe_increment(count), _stored_like(new, mean))

    return optax.GradientTransformation(init, update)


def sign_of_momentum(
    decay: Number, *, mu_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformation:
    """Returns 0.001 times the sign of the average gradient: SPlus (2506.07254) for other leaves."""
    return scale_by_lion(decay, decay, mu_dtype=mu_dtype, size=0.001, state_class=optax.EmaState)


def _zeros(params: Any, dtype: jax.typing.DTypeLike | None) -> Any:
    """Returns zeros in `dtype`; for complex leaves in their own dtype."""

    def zeros(p):
        own = jnp.result_type(p)
        return jnp.zeros_like(p, own if jnp.issubdtype(own, jnp.complexfloating) else dtype)

    return jax.tree.map(zeros, params)


def _unrounded(decay: Number) -> Number:
    """Returns a float as is, and an array in float32 or wider, so that its powers are not all 1."""
    return decay if isinstance(decay, (int, float)) else widen(decay)


def _average(g: jax.Array, mean: jax.Array, decay: Number) -> jax.Array:
    return complement(decay, g) * g + coefficient(decay, g) * widen(mean)


def _squared(g: jax.Array) -> jax.Array:
    """Returns |g|²."""
    return g.real**2 + g.imag**2 if jnp.iscomplexobj(g) else g**2


def _largest(g: jax.Array, stored: jax.Array) -> float:
    """Returns the largest number that both the arithmetic on `g` and the state can hold."""
    return min(float(jnp.finfo(x.dtype).max) for x in (g, stored))


def _bounded(g: jax.Array, limit: Any) -> jax.Array:
    if jnp.iscomplexobj(g):
        return jax.lax.complex(_bounded(g.real, limit), _bounded(g.imag, limit))
    return jnp.where(jnp.isinf(g), g, jnp.clip(g, -limit, limit))


def _bounded_by_state(g: jax.Array, mean: jax.Array) -> jax.Array:
    g = widen(g)
    return _bounded(g, _largest(g, mean) / 2)


def _stored_like(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, like: x.astype(like.dtype), new, old)


def _kept_from_zero(v: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounds to `dtype`, but never from a positive number to zero."""
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    return jnp.where(v > 0, jnp.maximum(v, smallest), v).astype(dtype)
