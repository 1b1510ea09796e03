"""Functions that pass the options of another on: one list of arguments, in one place."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def takes_options_of(base: Callable, *, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Writes the options of `base` in place of `**options` into a function's signature.

    What `help` and editors show, and what `optax.inject_hyperparams` reads, are then arguments like
    any other.

    Args:
        base: the function whose keyword arguments are passed on; those that the decorated function
            names itself are its own.
        without: options of `base` that it sets by itself.

    Example:
        >>> import inspect
        >>> def brew(*, milk=False, sugar=0): ...
        >>> @takes_options_of(brew)
        ... def latte(*, milk=True, **options): ...
        >>> str(inspect.signature(latte))
        '(*, milk=True, sugar=0)'
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = {
            name: parameter
            for name, parameter in signature.parameters.items()
            if parameter.kind != inspect.Parameter.VAR_KEYWORD
        }
        passed_on = [
            parameter
            for name, parameter in inspect.signature(base).parameters.items()
            if parameter.kind == inspect.Parameter.KEYWORD_ONLY
            and name not in own
            and name not in without
        ]
        merged = signature.replace(parameters=[*own.values(), *passed_on])

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                merged.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}.") from None
            return function(*args, **kwargs)

        checked.__signature__ = merged  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate
