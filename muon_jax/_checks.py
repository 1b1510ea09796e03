"""Checks of arguments, where they are concrete: errors that name the argument, rule and value."""

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
    """Refuses a concrete number outside its range; what is traced is left alone.

    Args:
        name: of the argument, for the message.
        value: a Python or NumPy number, or an array without axes. Tracers, and arrays that are not
            on this process's devices, pass.
        at_least, above, at_most, below: the bounds.
        finite: refuse infinities too; a NaN is always refused.
        optional: `None` passes.
        schedule: a callable passes.

    Raises:
        TypeError: `value` is no real number.
        ValueError: it is out of range.

    Example:
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
    """Refuses what is no static Python integer of at least `at_least`.

    Raises:
        TypeError: `value` is an array, a tracer or no integer.
        ValueError: it is too small.

    Example:
        >>> check_integer("period", 0, at_least=1)
        Traceback (most recent call last):
            ...
        ValueError: period must be an integer of at least 1; got 0.
    """
    check_static(name, value)
    other = isinstance(value, bool) or not isinstance(value, (int, np.integer))
    if other or value < at_least:
        error = TypeError if other else ValueError
        raise error(f"{name} must be an integer of at least {at_least}; got {value!r}.")


def check_static(name: str, value: Any) -> None:
    """Refuses an array for what decides the program and not its numbers.

    Raises:
        TypeError: `value` is an array or a tracer.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a static Python value, since it decides what is compiled; got "
            f"{type(value).__name__}. Under inject_hyperparams it is not a hyperparameter: "
            "muon_jax.inject_hyperparams knows, and optax's takes it in static_args."
        )


def check_dtype(name: str, value: Any, *, or_packed: bool = False) -> None:
    """Refuses what is no real floating-point dtype (nor `None`).

    Args:
        name: of the argument, for the message.
        value: a dtype, or what JAX takes for one.
        or_packed: int8 and int4 pass.

    Raises:
        TypeError: `value` is no dtype.
        ValueError: it is of another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> check_dtype("nu_dtype", jnp.int32)
        Traceback (most recent call last):
            ...
        ValueError: nu_dtype must be real floating point or None; got int32.
    """
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
    """Refuses what is no mesh (nor `None`).

    Raises:
        TypeError: `value` is something else.

    Example:
        >>> check_mesh("data")
        Traceback (most recent call last):
            ...
        TypeError: mesh must be a jax.sharding.Mesh, as of jax.make_mesh, or None; got 'data'.
    """
    if value is not None and not isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, as of jax.make_mesh, or None; got {value!r}."
        )
