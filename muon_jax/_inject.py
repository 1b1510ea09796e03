"""A version of `optax.inject_hyperparams` that finds the hyperparameters from type annotations."""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muon_jax._precision import cast_like


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: jax.typing.DTypeLike | None = jnp.float32,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Wraps a factory like `optax.inject_hyperparams`, without a list of static arguments.

    The factory's annotations decide: an argument is a hyperparameter if its annotation admits a
    `jax.Array`, its default is not an integer, and its value is a number or a schedule. It is in
    `state.hyperparams`, where it can be read and, if it is a number, changed between steps. All
    other arguments are static, including callables that are not schedules. Arguments without an
    annotation are treated as Optax treats them.

    Updates keep their gradients' dtypes, and state keeps its own.

    An argument that is `None` is not in the state: pass `adam_b2=0.95` in order to change it later.

    Args:
        factory: A function that makes an optimizer: of this package, of Optax, or your own.
        static_args: The names of further arguments to keep out of the state.
        hyperparam_dtype: The dtype of the hyperparameters, whatever the dtype of the params,
            because in bfloat16 a decay of 0.999 rounds to 1. `None` means Optax's choice, the
            widest dtype of the params.

    Returns:
        A function of the factory's arguments that returns a transformation whose state is
        `optax.InjectStatefulHyperparamsState`.

    Raises:
        ValueError: `static_args` has a name that is not an argument of the factory.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.inject_hyperparams(muon_jax.muon)(0.02, ns_steps=3, weight_decay=0.1)
        >>> state = tx.init({"kernel": jnp.ones((4, 8))})
        >>> sorted(state.hyperparams)
        ['beta', 'learning_rate', 'weight_decay']
        >>> state.hyperparams["learning_rate"] = jnp.float32(0.01)
    """
    signature = inspect.signature(factory, eval_str=True)
    numeric = {
        name for name, parameter in signature.parameters.items() if _may_be_injected(parameter)
    }
    extra = {static_args} if isinstance(static_args, str) else set(static_args)
    static = extra | (set(signature.parameters) - numeric)
    injected = optax.inject_hyperparams(factory, static, hyperparam_dtype)

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            factory(*args, **kwargs)  # its own error message is more helpful
            raise
        bound.apply_defaults()
        for name in numeric - extra:
            bound.arguments[name] = _in_dtype(bound.arguments[name], hyperparam_dtype)
        return _keep_dtypes(injected(*bound.args, **bound.kwargs))

    return make


def _keep_dtypes(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `tx` so that updates keep their gradients' dtypes and state keeps its own.

    Optax's transformations multiply by the float32 hyperparameters and return the promoted dtype.
    """

    def update(updates, state, params=None, **extra_args):
        new, after = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(cast_like, new, updates), jax.tree.map(cast_like, after, state)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _may_be_injected(parameter: inspect.Parameter) -> bool:
    if parameter.annotation is parameter.empty:
        return True
    if isinstance(parameter.default, int):  # a count or a flag
        return False
    members = _union_members(parameter.annotation)
    return jax.Array in members and not any(map(_is_tree, members))


def _union_members(annotation: Any) -> list[Any]:
    """Returns the members of a union and of the unions nested in it."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for arg in typing.get_args(annotation) for member in _union_members(arg)]
    return [annotation]


def _is_tree(member: Any) -> bool:
    """Whether this is the tree in `optax.Params`, a type that admits a single array as well."""
    origin = typing.get_origin(member)
    return isinstance(origin, type) and issubclass(origin, Iterable)


def _in_dtype(value: Any, dtype: jax.typing.DTypeLike | None) -> Any:
    """Converts numbers and the values of schedules to arrays of `dtype`; anything else is kept."""
    if dtype is None or isinstance(value, bool):
        return value
    if callable(value) and not hasattr(value, "init"):  # Optax itself calls stateful schedules
        return lambda count: jnp.asarray(value(count), dtype)
    if isinstance(value, (jax.Array, np.ndarray)):
        return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value
    return jnp.asarray(value, dtype) if isinstance(value, (int, float, np.number)) else value
