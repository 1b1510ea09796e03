"""Checks of arguments whose values are known; errors name the argument, the rule and the value."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = True,
    optional: bool = False,
    schedule: bool = False,
) -> None:
    """Checks that a number is within the bounds and finite, or at least, without `finite`, no NaN.

    `optional` accepts `None`, and `schedule` a callable. Tracers and arrays that are not on this
    process's devices are accepted unchecked.

    >>> check_number("beta", 1.5, at_least=0, below=1)
    Traceback (most recent call last):
        ...
    ValueError: beta must be at least 0 and less than 1; got 1.5.
    """
    if (optional and value is None) or (schedule and callable(value)):
        return
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return
    kinds = ["a number", *["a schedule"] * schedule, *["None"] * optional]
    wanted = kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    try:
        array = np.asarray(value)
        number = float(array) if array.ndim == 0 and array.dtype.kind != "S" else None
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be {wanted}; got {value!r}.")
    rules = [
        (at_least, "at least", lambda x, bound: x >= bound),
        (above, "greater than", lambda x, bound: x > bound),
        (at_most, "at most", lambda x, bound: x <= bound),
        (below, "less than", lambda x, bound: x < bound),
    ]
    given = [(bound, words, holds) for bound, words, holds in rules if bound is not None]
    inside = all(holds(number, bound) for bound, _, holds in given)
    if math.isnan(number) or (finite and math.isinf(number)) or not inside:
        rule = " and ".join(f"{words} {bound:g}" for bound, words, _ in given)
        raise ValueError(f"{name} must be {rule or 'a finite number'}; got {value!r}.")


def check_integer(name: str, value: Any, *, at_least: int) -> None:
    """Checks that `value` is a Python integer and at least `at_least`.

    Arrays are an error, since the value decides what is compiled.
    """
    check_static(name, value)
    other = isinstance(value, bool) or not isinstance(value, (int, np.integer))
    if other or value < at_least:
        error = TypeError if other else ValueError
        raise error(f"{name} must be an integer of at least {at_least}; got {value!r}.")


def check_static(name: str, value: Any) -> None:
    """Checks that `value`, which decides what is compiled, is not an array."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a static Python value, since it decides what is compiled; got "
            f"{type(value).__name__}. With optax.inject_hyperparams, add it to static_args, or use "
            "muon_jax.inject_hyperparams."
        )


def check_dtype(name: str, value: Any, *, or_packed: bool = False) -> None:
    """Checks that `value` is real floating point, `None`, or with `or_packed` int8 or int4."""
    if value is None:
        return
    wanted = f"{name} must be real floating point{', int8, int4' * or_packed} or None"
    if isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{wanted}; got an array.")
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{wanted}; got {value!r}.") from None
    if not (jnp.issubdtype(dtype, jnp.floating) or (or_packed and dtype in (jnp.int8, jnp.int4))):
        raise ValueError(f"{wanted}; got {dtype}.")


def check_mesh(value: Any) -> None:
    """Checks that `value` is a mesh or `None`."""
    if value is not None and not isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, as made by jax.make_mesh, or None; got {value!r}."
        )
