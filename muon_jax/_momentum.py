"""Momentum by name: gradients and the running average -> what is orthogonalised.

Sums are formed in float32 or wider, with beta in the same dtype however it was given, and rounded
once, when they are stored or passed on. A finite sum beyond the range of the dtype that it goes
into becomes the largest finite number there; infinite and NaN gradients stay as they are.
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


# How the average moves: (g, mu, beta) -> mu.
MOMENTA = {
    # KellerJordan/Muon, torch.optim.Muon.
    "ema": _ema,
    # Liu et al. (2502.16982), eq. 1; optax.trace. A positive factor away from "ema".
    "heavy_ball": _heavy_ball,
    # optax.contrib.muon: with Adam's bias correction.
    "optax": _ema,
}


def _look_ahead(kind, g, mu, beta, nesterov, count):
    """What is orthogonalised: the new `mu`, or with Nesterov's step one average further."""
    if kind != "optax":
        return MOMENTA[kind](g, mu, beta) if nesterov else mu
    if not nesterov:
        return mu / (1 - beta**count)
    # Dozat's NAdam corrects the momentum part for one step more.
    return beta * mu / (1 - beta ** (count + 1)) + (1 - beta) * g / (1 - beta**count)


PACKED = (jnp.int8, jnp.int4)
"""The dtypes of integers that momentum is stored in."""


def is_packed(dtype: jax.typing.DTypeLike | None) -> bool:
    """Whether it is one of them."""
    return dtype is not None and jnp.dtype(dtype) in map(jnp.dtype, PACKED)


class Packed(NamedTuple):
    """Momentum in one byte an entry, or in half of one: `values * scales`.

    A step of the scale is 1/127 of the largest entry of a row in int8, and 1/7 in int4; a row is
    the leaf's last axis. Entries are rounded up or down at random, so that on average nothing is
    lost: a steady gradient is learned, however far below a step it stays. One rounding is off by
    less than a step, and has a standard deviation of at most half of one. In the running average
    roundings add up to at most half a step / sqrt(1 - beta²): in int8 1.3 % of the row's largest
    entry at a beta of 0.95 and 2.8 % at 0.99, in int4 23 % and 51 %. Zeros stay zero. The random
    bits depend on the step and the place in the leaf alone, so that a run can be repeated, on any
    sharding of the leaf; inside `shard_map`, on the same one.

    Attributes:
        values: int8 or int4, shaped like the params. XLA keeps two of int4 in a byte; `nbytes` of
            an array counts one for each.
        scales: float32, the same with a last axis of 1.
    """

    values: Any
    scales: Any

    @classmethod
    def encode(
        cls, mu: optax.Updates, count: jax.Array, dtype: jax.typing.DTypeLike = jnp.int8
    ) -> "Packed":
        """Rounds real arrays at step `count`."""
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
    """Numbers in [0, 1) from a hash of `count` and the place in the array."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = _mixed(place ^ _mixed(jnp.asarray(count).astype(jnp.uint32)))
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _mixed(bits: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit: multiplications and shifts, a 32-bit hash."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def init_momentum(params: optax.Params, dtype: jax.typing.DTypeLike | None) -> Any:
    """Zeros in `dtype`; `None` is each parameter's own, `int8` and `int4` make it a `Packed`.

    Complex leaves keep their own dtype.

    Raises:
        ValueError: any other dtype that is no real floating point, or integers for a complex leaf.
    """
    if dtype is not None and is_packed(dtype):
        dtypes = {str(x.dtype) for x in jax.tree.leaves(params) if jnp.iscomplexobj(x)}
        if dtypes:
            name = jnp.dtype(dtype).name
            raise ValueError(f"mu_dtype={name} is for real leaves; got one of {min(dtypes)}.")
        return Packed.encode(optax.tree.zeros_like(params), jnp.zeros([], jnp.int32), dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"mu_dtype must be real floating point, int8 or int4, got {jnp.dtype(dtype)}."
        )
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, dtype=None if jnp.iscomplexobj(x) else dtype), params
    )


def as_array_tree(mu: Any) -> optax.Updates:
    """Momentum as numbers, however it is stored."""
    return mu.decode() if isinstance(mu, Packed) else mu


def update_momentum(
    updates: optax.Updates, mu: Any, *, beta, nesterov: bool, kind: str, count: jax.Array
) -> tuple[optax.Updates, Any]:
    """Returns the average to orthogonalise, in the gradients' dtypes, and the new `mu` in its own.

    `count` is the number of this step, from 1.
    """

    def average(g: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype = accumulator(jnp.promote_types(g.dtype, m.dtype))
        b = jnp.asarray(beta).astype(jnp.finfo(dtype).dtype)
        wide = g.astype(dtype)
        new = MOMENTA[kind](wide, m.astype(dtype), b)
        ahead = _look_ahead(kind, wide, new, b, nesterov, count)
        finite = jnp.isfinite(g) & jnp.isfinite(m)
        return clipped(ahead, finite, g.dtype), clipped(new, finite, dtype)

    gradients, tree = jax.tree.flatten(updates)
    momenta = jax.tree.leaves(as_array_tree(mu))
    pairs = [average(g, m) for g, m in zip(gradients, momenta, strict=True)]
    averaged, new_mu = (jax.tree.unflatten(tree, [pair[i] for pair in pairs]) for i in (0, 1))
    return averaged, stored_like(new_mu, mu, count)


def clipped(x: jax.Array, where: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x` in `dtype`; beyond its range the largest finite number, `where` that is wanted."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = (clipped(part, where, jnp.finfo(dtype).dtype) for part in (x.real, x.imag))
        return jax.lax.complex(*parts)
    limit = jnp.finfo(dtype).max.astype(x.dtype)
    return jnp.where(where, jnp.clip(x, -limit, limit), x).astype(dtype)


def stored_like(mu: optax.Updates, old: Any, count: jax.Array) -> Any:
    """Momentum stored as `old` is, at step `count`."""
    if isinstance(old, Packed):
        kept = jax.tree.leaves(old.values)
        return Packed.encode(mu, count, kept[0].dtype) if kept else old
    return jax.tree.map(lambda new, like: clipped(new, jnp.isfinite(new), like.dtype), mu, old)
