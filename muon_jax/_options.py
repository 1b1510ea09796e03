"""Signatures of functions that take the options of another, and old names of arguments."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)
C = TypeVar("C", bound=type)

# Old names of arguments, which still work but raise a warning.
_RENAMED = {
    "rest": "other_optimizer",
    "fan_in_parts": "split_fan_in",
    "fan_out_parts": "split_fan_out",
}

# The equivalents of those arguments of optax.contrib.muon that have another name in `muon`.
_HERE = {
    "eps": "adam_eps (Newton-Schulz does not need one)",
    "adaptive": "muon_jax.optax_muon",
    "preconditioning": "ns_coeffs with a Schedule, which has the normalization",
    "consistent_rms": 'scale="match_rms_adamw", or a function (fan_in, fan_out) -> factor',
    "muon_weight_dimension_numbers": "matrix_axes for the axes, and routing for the choice",
}


def takes_options_of(
    base: Callable, *, without: tuple[str, ...] = (), refused: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """Replaces `**options` in a function's signature with the keyword arguments of `base`.

    Then `help`, editors and `optax.inject_hyperparams` see each option as an ordinary argument. An
    argument that the function defines itself is kept, and those in `without` are not accepted.
    `refused` names options of related functions that it cannot have, with reasons for errors.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = {name: p for name, p in signature.parameters.items() if p.kind != p.VAR_KEYWORD}
        passed_on = [
            p
            for name, p in inspect.signature(base).parameters.items()
            if p.kind == p.KEYWORD_ONLY and name not in {*own, *without}
        ]
        merged = signature.replace(parameters=[*own.values(), *passed_on])

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            kwargs = _renamed(function.__name__, kwargs)
            try:
                merged.bind(*args, **kwargs)
            except TypeError as error:
                given = (name for name in refused or () if name in kwargs)
                reason = next((f"no {name}: {(refused or {})[name]}" for name in given), None)
                reason = reason or _explain(merged, args, kwargs) or f"{error}."
                raise TypeError(f"{function.__name__}: {reason}") from None
            return function(*args, **kwargs)

        checked.__signature__ = merged  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


def accepts_old_names(cls: C) -> C:
    """Lets a NamedTuple accept the old names of its fields, as arguments and as attributes."""
    create: Any = cls.__new__

    def attribute(old: str) -> property:
        return property(lambda self: getattr(self, *_renamed(cls.__name__, {old: None})))

    @functools.wraps(create)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **_renamed(cls.__name__, kwargs))

    cls.__new__ = renamed  # type: ignore[method-assign]
    for old, new in _RENAMED.items():
        if hasattr(cls, new):
            setattr(cls, old, attribute(old))
    return cls


def _renamed(function: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments under their new names."""
    for old, new in _RENAMED.items():
        if old in given:
            if new in given:
                raise TypeError(f"{function}: pass {new!r} without its old name {old!r}.")
            warnings.warn(
                f"{function}: {old!r} is now called {new!r}; the old name will be removed in the "
                "next release.",
                DeprecationWarning,
                stacklevel=3,
            )
            given = {new if name == old else name: value for name, value in given.items()}
    return given


def _explain(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Returns an explanation of why the arguments do not fit, if Python's own does not suffice."""
    unknown = [name for name in kwargs if name not in signature.parameters]
    if any(name in _HERE for name in unknown):
        here = "; ".join(f"for {name!r} use {_HERE[name]}" for name in unknown if name in _HERE)
        return f"{here}. muon_jax.optax_muon accepts the arguments of optax.contrib.muon."
    parameters = signature.parameters.values()
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(positional):
        return (
            f"only {', '.join(positional)} may be given by position. Pass "
            f'{args[len(positional)]!r} as a keyword argument, such as ns_coeffs="jordan". '
            "muon_jax.optax_muon accepts the positional arguments of optax.contrib.muon."
        )
    return None
