"""Helpers for arithmetic in float32 or wider, whatever the dtypes of gradients and state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def widen(x: jax.Array) -> jax.Array:
    """Casts `x` to float32, or leaves it in its own dtype if that is wider or complex."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def cast_like(x: Any, like: Any) -> Any:
    """Casts `x` to the dtype of `like`, if `like` has one."""
    dtype = getattr(like, "dtype", None)
    return x if dtype in (None, x.dtype) else x.astype(dtype)


def real_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """Returns the dtype of the real part of a number."""
    return np.dtype(jnp.finfo(dtype).dtype)


def coefficient(value: Any, like: jax.Array) -> jax.Array:
    """Casts `value` to the real dtype of `like`, so that the product has the dtype of `like`."""
    return jnp.asarray(value, real_dtype(like.dtype))


def complement(value: Any, like: jax.Array) -> jax.Array:
    """Returns `1 - value` as a coefficient; for a Python float it is rounded only once."""
    if isinstance(value, (int, float)):
        return coefficient(1 - value, like)
    return 1 - coefficient(value, like)
