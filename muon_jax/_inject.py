"""`optax.inject_hyperparams` that reads from a factory's types what may be in the state."""

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
    """`optax.inject_hyperparams` without a list of what is static, and in float32.

    The factory's types decide: an argument whose annotation admits a `jax.Array`, and whose default
    is no integer, is a hyperparameter where it is given a number or a schedule. It is in
    `state.hyperparams`, where it can be read and, if a number, changed between steps. Everything
    else is static, a callable that is no schedule too. Arguments without an annotation are what
    they are to Optax.

    Updates keep their gradients' dtypes, and the state its own.

    An argument that is left at `None` is not in the state: give `adam_b2=0.95` to change it later.

    Args:
        factory: of any optimizer of this package or of Optax, or one of your own.
        static_args: names of arguments to keep out of the state besides.
        hyperparam_dtype: of the hyperparameters, whatever the params' own: in bfloat16 a decay of
            0.999 is 1. `None` is Optax's choice, the widest of the params.

    Returns:
        A function of the factory's arguments that returns a transformation whose state is
        `optax.InjectStatefulHyperparamsState`.

    Raises:
        ValueError: `static_args` that the factory does not have.

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
            factory(*args, **kwargs)  # whose own message helps more
            raise
        bound.apply_defaults()
        for name in numeric - extra:
            bound.arguments[name] = _in_dtype(bound.arguments[name], hyperparam_dtype)
        return _keep_dtypes(injected(*bound.args, **bound.kwargs))

    return make


def _keep_dtypes(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Updates in their gradients' dtypes and a state in its own, also where Optax widens them.

    Its transformations multiply by the float32 hyperparameters and keep what comes out.
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
    arms = _arms(parameter.annotation)
    return jax.Array in arms and not any(map(_is_tree, arms))


def _arms(annotation: Any) -> list[Any]:
    """What a union is of, at any depth."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [arm for part in typing.get_args(annotation) for arm in _arms(part)]
    return [annotation]


def _is_tree(arm: Any) -> bool:
    """Optax's type of params admits an array too, as a tree of one leaf."""
    origin = typing.get_origin(arm)
    return isinstance(origin, type) and issubclass(origin, Iterable)


def _in_dtype(value: Any, dtype: jax.typing.DTypeLike | None) -> Any:
    """Numbers, and what schedules return, as arrays of `dtype`; all else as it is."""
    if dtype is None or isinstance(value, bool):
        return value
    if callable(value) and not hasattr(value, "init"):  # a schedule with a state is Optax's to call
        return lambda count: jnp.asarray(value(count), dtype)
    if isinstance(value, (jax.Array, np.ndarray)):
        return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value
    return jnp.asarray(value, dtype) if isinstance(value, (int, float, np.number)) else value
