"""The kinds of momentum: from gradients and the running average to the array to orthogonalise.

Sums are computed in float32 or wider, with beta in the same dtype, and are rounded once, when they
are stored or returned. A finite sum that overflows its dtype becomes the largest finite number of
that dtype; infinite and NaN gradients are not changed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muon_jax._orthogonalize.symmetric import accumulator


def _ema(g, mu, beta):
    return beta * mu + (1 - beta) * g


def _heavy_ball(g, mu, beta):
    return g + beta * mu


# The update of the running average: (g, mu, beta) -> mu.
MOMENTA = {
    # KellerJordan/Muon, torch.optim.Muon.
    "ema": _ema,
    # Liu et al. (2502.16982), eq. 1; optax.trace. It equals "ema" up to a positive factor.
    "heavy_ball": _heavy_ball,
    # optax.contrib.muon, which adds Adam's bias correction.
    "optax": _ema,
}


def _look_ahead(kind, g, mu, beta, nesterov, count):
    """Returns the array to orthogonalise.

    That is the new `mu`, or, with Nesterov momentum, `mu` averaged once more with the gradient.
    """
    if kind != "optax":
        return MOMENTA[kind](g, mu, beta) if nesterov else mu
    if not nesterov:
        return mu / (1 - beta**count)
    # As in Dozat's NAdam, the bias correction of the momentum part is that of the next step.
    return beta * mu / (1 - beta ** (count + 1)) + (1 - beta) * g / (1 - beta**count)


PACKED = (jnp.int8, jnp.int4)
"""The integer dtypes that momentum can be stored in."""


def is_packed(dtype: jax.typing.DTypeLike | None) -> bool:
    """Returns whether `dtype` is one of `PACKED`."""
    return dtype is not None and jnp.dtype(dtype) in map(jnp.dtype, PACKED)


class Packed(NamedTuple):
    """Momentum stored in one byte per entry, or in half a byte, as `values * scales`.

    The quantisation step is 1/127 of the largest entry of a row in int8 and 1/7 in int4, a row
    being the leaf's last axis. Stochastic rounding keeps the average unbiased: a constant gradient
    is learned however small it is compared with a step. The error of one rounding is less than a
    step, and its standard deviation at most half a step. In the running average the errors
    accumulate to at most half a step / sqrt(1 - beta²): in int8 1.3 % of the row's largest entry at
    a beta of 0.95 and 2.8 % at 0.99, in int4 23 % and 51 %. Zeros stay zero. The random bits depend
    only on the step and the position in the leaf, so that a run is reproducible with any sharding
    of the leaf; inside `shard_map`, with the same sharding.

    Attributes:
        values: An int8 or int4 tree, shaped like the params. XLA stores two int4 entries in a byte;
            `nbytes` of an array counts one byte for each.
        scales: A float32 tree, shaped like the params but with a last axis of size 1.
    """

    values: Any
    scales: Any

    @classmethod
    def encode(
        cls, mu: optax.Updates, count: jax.Array, dtype: jax.typing.DTypeLike = jnp.int8
    ) -> "Packed":
        """Quantises real arrays at step `count`."""
        levels = int(jnp.iinfo(dtype).max)

        def largest(m: jax.Array) -> jax.Array:
            last = -1 if m.ndim else None
            return jnp.max(jnp.abs(m), axis=last, keepdims=True, initial=0).astype(jnp.float32)

        def rounded(m: jax.Array, s: jax.Array) -> jax.Array:
            x = (m / jnp.where(s == 0, 1, s)).astype(jnp.float32)
            low = jnp.floor(x)
            up = _uniform(m.shape, count) < x - low
            return jnp.clip(low + up, -levels, levels).astype(dtype)

        scales = jax.tree.map(lambda m: largest(m) / levels, mu)
        return cls(jax.tree.map(rounded, mu, scales), scales)

    def decode(self) -> optax.Updates:
        return jax.tree.map(lambda v, s: v.astype(s.dtype) * s, self.values, self.scales)


def _uniform(shape: tuple[int, ...], count: jax.Array) -> jax.Array:
    """Returns numbers in [0, 1) from a hash of `count` and the position in the array."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = _mixed(place ^ _mixed(jnp.asarray(count).astype(jnp.uint32)))
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _mixed(bits: jax.Array) -> jax.Array:
    """Returns a 32-bit hash by multiplications and shifts: every bit depends on every input bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def init_momentum(params: optax.Params, dtype: jax.typing.DTypeLike | None) -> Any:
    """Returns zeros in `dtype`, or for int8 and int4 a `Packed`.

    `None` means each parameter's own dtype, which complex leaves always keep.
    """
    if dtype is not None and is_packed(dtype):
        dtypes = {str(x.dtype) for x in jax.tree.leaves(params) if jnp.iscomplexobj(x)}
        if dtypes:
            name = jnp.dtype(dtype).name
            raise ValueError(f"mu_dtype={name} requires real leaves; got a leaf of {min(dtypes)}.")
        return Packed.encode(optax.tree.zeros_like(params), jnp.zeros([], jnp.int32), dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"mu_dtype must be real floating point, int8 or int4; got {jnp.dtype(dtype)}."
        )
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, dtype=None if jnp.iscomplexobj(x) else dtype), params
    )


def as_array_tree(mu: Any) -> optax.Updates:
    """Returns the momentum as a tree of floating-point arrays, decoding integers if needed."""
    return mu.decode() if isinstance(mu, Packed) else mu


def update_momentum(
    updates: optax.Updates, mu: Any, *, beta, nesterov: bool, kind: str, count: jax.Array, gpu: bool
) -> tuple[optax.Updates, Any]:
    """Returns the average to orthogonalise, in the gradients' dtypes, and the new `mu`.

    `count` is the number of this step, from 1. On a GPU the same numbers take fewer kernels.
    """
    if gpu:
        # XLA merges the kernels of leaves that read one array. Scalars and constants do not count,
        # so beta becomes an array that depends on the count.
        beta = jax.lax.optimization_barrier(jnp.where(count > 0, jnp.full(2, beta), 0))[0]

    def average(g: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype = accumulator(jnp.promote_types(g.dtype, m.dtype))
        b = jnp.asarray(beta).astype(jnp.finfo(dtype).dtype)
        wide = g.astype(dtype)
        new = MOMENTA[kind](wide, m.astype(dtype), b)
        ahead = _look_ahead(kind, wide, new, b, nesterov, count)
        if gpu and g.dtype == m.dtype == dtype:
            finite = jnp.isfinite(g / 2 + m / 2)  # infinite or NaN only if g or m is
        else:
            finite = jnp.isfinite(g) & jnp.isfinite(m)
        return clipped(ahead, finite, g.dtype), clipped(new, finite, dtype)

    gradients, tree = jax.tree.flatten(updates)
    momenta = jax.tree.leaves(as_array_tree(mu))
    pairs = [average(g, m) for g, m in zip(gradients, momenta, strict=True)]
    averaged, new_mu = (jax.tree.unflatten(tree, [pair[i] for pair in pairs]) for i in (0, 1))
    return averaged, stored_like(new_mu, mu, count)


def clipped(x: jax.Array, where: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Casts `x` to `dtype`, clipped to the finite numbers of `dtype` where `where` is True."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = (clipped(part, where, jnp.finfo(dtype).dtype) for part in (x.real, x.imag))
        return jax.lax.complex(*parts)
    limit = jnp.finfo(dtype).max.astype(x.dtype)
    return jnp.where(where, jnp.clip(x, -limit, limit), x).astype(dtype)


def stored_like(mu: optax.Updates, old: Any, count: jax.Array) -> Any:
    """Returns the momentum in the format and dtypes of `old`, at step `count`."""
    if isinstance(old, Packed):
        kept = jax.tree.leaves(old.values)
        return Packed.encode(mu, count, kept[0].dtype) if kept else old
    return jax.tree.map(lambda new, like: clipped(new, jnp.isfinite(new), like.dtype), mu, old)
