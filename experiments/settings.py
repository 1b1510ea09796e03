"""Rules for settings, written beside each field; `check` applies them before work begins.

`given_text` and the functions after it let a command's defaults depend on options that are given.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from experiments.commands import option

_LARGEST, _SMALLEST = 3.4028234e38, 1.1754944e-38  # float32 numbers, since training is in float32

Number = TypeVar("Number", int, float)
Defaults = TypeVar("Defaults")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The rule of a field, as part of its type: `steps: Annotated[int, Rule(...)]`.

    Attributes:
        says: The end of the sentence "--steps must be ...".
        holds: A function that returns whether a value satisfies the rule.
    """

    says: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    """Returns the rule of an inclusive lower bound."""
    return Rule(f"at least {least:g}", lambda value: value >= least)


def above(bound: float, why: str = "") -> Rule:
    """Returns the rule of an exclusive lower bound."""
    return Rule(f"greater than {bound:g}{why}", lambda value: value > bound)


def even(why: str) -> Rule:
    """Returns the rule of a positive even number. `why` completes "since ..." in the message."""
    return Rule(f"even and at least 2, since {why}", lambda value: value >= 2 and value % 2 == 0)


def below_one(what: str) -> Rule:
    """Returns the rule of a fraction that is never whole."""
    return Rule(f"at least 0 and less than 1, as {what}", lambda value: 0 <= value < 1)


Count = Annotated[int, at_least(1)]
"""A number of things of which there must be at least one."""
Whole = Annotated[int, at_least(0)]
"""A number of things, which may be 0."""
Positive = Annotated[
    float, Rule("greater than 0, in float32 too", lambda value: value >= _SMALLEST)
]
Rate = Positive
"""A learning rate."""
Decay = Annotated[float, at_least(0)]
"""A weight decay; 0 turns it off."""
Share = Annotated[float, Rule("from 0 to 1", lambda value: 0 <= value <= 1)]
Part = Annotated[float, Rule("greater than 0 and at most 1", lambda value: 0 < value <= 1)]
Average = Annotated[float, below_one("the decay rate of an average")]
Dropout = Annotated[float, below_one("a probability")]
Clip = Annotated[float, above(0, "; a large number clips nothing")]


def check(settings: Any, *path: str, named: Callable[..., str] = option) -> None:
    """Checks every rule of a dataclass and of the dataclasses in its fields.

    A float without a rule must still be finite in float32.

    Args:
        settings: The dataclass.
        *path: The fields that lead to it from the command's own settings.
        named: A function that names a field in messages, by default as the option of its path.

    Raises:
        ValueError: A value breaks a rule. The message names the option, the rule and the value.
    """
    types = _types(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check(value, *path, field.name, named=named)
        else:
            _check(named(*path, field.name), value, types[field.name])


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _check(name: str, value: Any, kind: Any) -> None:
    if value is None:
        return
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        _check(name, value, arguments[0])
        for rule in arguments[1:]:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise ValueError(f"{name} must be {rule.says}; got {_text(value)}.")
    elif get_origin(kind) in (Union, UnionType):
        for one in arguments:
            _check(name, value, one)
    elif get_origin(kind) is tuple and isinstance(value, tuple):
        of_each = arguments[:1] * len(value) if Ellipsis in arguments else arguments
        for one, its in zip(value, of_each, strict=True):
            _check(name, one, its)
    elif isinstance(value, float) and not abs(value) <= _LARGEST:
        raise ValueError(
            f"{name} must be a finite number of at most {_LARGEST:.2g}; got {_text(value)}."
        )


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_different(settings: Any, *fields: str) -> None:
    """Raises ValueError unless each field has at least one value and no value twice."""
    for field in fields:
        values = getattr(settings, field)
        if not values or len(set(values)) != len(values):
            found = " ".join(map(str, values)) or "none"
            raise ValueError(f"{option(field)} requires one or more different values; got {found}.")


def given_text(arguments: Sequence[str], name: str, known: Collection[str] | None = None) -> Any:
    """Returns the text that a command line gives to an option, before the line is parsed.

    Defaults of other options can thus depend on it. None if the option is not given, or if its
    value is not among the `known` ones, which the parser reports later.
    """
    for i in reversed(range(len(arguments))):
        word, equals, text = arguments[i].partition("=")
        if word.replace("_", "-") == name:
            text = text if equals else next(iter(arguments[i + 1 :]), "")
            return text if known is None or text in known else None
    return None


def given(arguments: Sequence[str], name: str, otherwise: Number) -> Number:
    """Returns `given_text` as a number, or `otherwise` if that is missing or not a number."""
    text = given_text(arguments, name)
    try:
        return otherwise if text is None else type(otherwise)(text)
    except ValueError:
        return otherwise


def replaced(default: Defaults, **changes: Any) -> Defaults:
    """Returns the defaults with changes. If these are wrong, which the parser reports, without."""
    try:
        return dataclasses.replace(default, **changes)
    except ValueError:
        return default


def fitting_divisor(wanted: int, of: int) -> int:
    """Returns the largest divisor of `of` that is at most `wanted`, or 1 if there is none."""
    return next((n for n in range(min(wanted, max(of, 1)), 0, -1) if of % n == 0), 1)


def tenth_at_most(steps: int, usual: int) -> int:
    """Returns the usual number of steps of a phase, limited to a tenth of all steps."""
    return min(usual, max(steps, 0) // 10)
