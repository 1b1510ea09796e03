"""Arithmetic in float32 or wider, whatever the dtypes of gradients and state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def widen(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own dtype where that is wider or complex."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def cast_like(x: Any, like: Any) -> Any:
    """`x` in the dtype of `like`, if that has one."""
    dtype = getattr(like, "dtype", None)
    return x if dtype in (None, x.dtype) else x.astype(dtype)


def real_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype of the real part."""
    return np.dtype(jnp.finfo(dtype).dtype)


def coefficient(value: Any, like: jax.Array) -> jax.Array:
    """A number or an array in the real precision of `like`, so that the product keeps its dtype."""
    return jnp.asarray(value, real_dtype(like.dtype))


def complement(value: Any, like: jax.Array) -> jax.Array:
    """`1 - value` as a coefficient: of a Python float in double precision, then rounded once."""
    if isinstance(value, (int, float)):
        return coefficient(1 - value, like)
    return 1 - coefficient(value, like)
