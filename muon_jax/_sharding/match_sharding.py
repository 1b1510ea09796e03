"""Makes XLA give two arrays the same sharding, where it chooses the sharding."""

import itertools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir


def match_sharding(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `x` with the sharding that the compiler gives to `like`, an array of the same shape.

    Under Auto axes shardings propagate from operation to operation, and the compiler may choose
    either of two that meet. Both arrays become members of one of Shardy's sharding groups, whose
    members share one sharding. The older partitioner (`jax_use_shardy_partitioner=False`) is free
    to choose.
    """
    return _match.bind(x, like)


_match = Primitive("match_sharding")
_groups = itertools.count()


def _lower(ctx, x, like):
    del ctx
    if getattr(jax.config, "jax_use_shardy_partitioner", True):
        group = next(_groups)
        sdy.sharding_group(x, group)
        sdy.sharding_group(like, group)
    return [x]


def _differentiate(primals, tangents):
    return match_sharding(*primals), tangents[0]


def _map(arrays, axes):
    sizes = [x.shape[at] for x, at in zip(arrays, axes, strict=True) if at is not None]
    x, like = (
        jnp.broadcast_to(x, (*sizes[:1], *x.shape)) if at is None else jnp.moveaxis(x, at, 0)
        for x, at in zip(arrays, axes, strict=True)
    )
    return match_sharding(x, like), 0


_match.def_impl(lambda x, like: x)
_match.def_abstract_eval(lambda x, like: x)
mlir.register_lowering(_match, _lower)
ad.primitive_jvps[_match] = _differentiate
batching.primitive_batchers[_match] = _map
