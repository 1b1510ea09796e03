"""What a setting may be: a rule beside each field, which `check` holds before work begins.

Also `given_text`, by which a command's defaults follow the options that are given.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from experiments.commands import option

_LARGEST, _SMALLEST = 3.4028234e38, 1.1754944e-38  # of float32, in which all arithmetic is

Number = TypeVar("Number", int, float)
Defaults = TypeVar("Defaults")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Of a field, as part of its type: `steps: Annotated[int, Rule(...)]`.

    Attributes:
        says: ends the sentence "--steps must be ...".
        holds: whether a value keeps to it.
    """

    says: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    """A lower bound that is allowed."""
    return Rule(f"at least {least:g}", lambda value: value >= least)


def above(bound: float, why: str = "") -> Rule:
    """A lower bound that is not."""
    return Rule(f"greater than {bound:g}{why}", lambda value: value > bound)


def even(why: str) -> Rule:
    """An even number, which is not 0; `why` goes on with "since"."""
    return Rule(f"even and at least 2, since {why}", lambda value: value >= 2 and value % 2 == 0)


def _is_positive(value: float) -> bool:
    return value >= _SMALLEST


Count = Annotated[int, at_least(1)]
"""How many of what there has to be one."""
Whole = Annotated[int, at_least(0)]
"""How many of what there may be none."""
Positive = Annotated[float, Rule("greater than 0, in float32 too", _is_positive)]
Rate = Positive
"""A learning rate."""
Decay = Annotated[float, at_least(0)]
"""A weight decay; 0 is none."""
Share = Annotated[float, Rule("from 0 to 1", lambda value: 0 <= value <= 1)]
Average = Annotated[
    float,
    Rule("at least 0 and less than 1, as the decay rate of an average",
         lambda value: 0 <= value < 1),
]  # fmt: skip
Dropout = Annotated[
    float, Rule("at least 0 and less than 1, as a probability",
                lambda value: 0 <= value < 1),
]  # fmt: skip
Clip = Annotated[float, above(0, "; a large number clips nothing")]


def check(settings: Any, *path: str, named: Callable[..., str] = option) -> None:
    """Holds every rule of a dataclass, and of those in it.

    A float that no rule concerns must still be a finite number of float32.

    Args:
        settings: the dataclass.
        *path: fields that lead to it from the command's own.
        named: what messages call a field; by default the option of its path.

    Raises:
        ValueError: a value breaks a rule; the message names option, rule and value.
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
    """Raises ValueError unless there are values, without repetition, in these fields."""
    for field in fields:
        values = getattr(settings, field)
        if not values or len(set(values)) != len(values):
            found = " ".join(map(str, values)) or "none"
            raise ValueError(f"{option(field)} requires one or more different values; got {found}.")


def given_text(arguments: Sequence[str], name: str, known: Collection[str] | None = None) -> Any:
    """What a command line gives to an option, before the whole of it is read.

    By it defaults follow what is given. What is wrong is for the whole reading to refuse.

    Args:
        arguments: of the command line.
        name: of the option.
        known: what may be given.

    Returns:
        The text; None if nothing is given, or nothing known.
    """
    for i in reversed(range(len(arguments))):
        word, equals, text = arguments[i].partition("=")
        if word.replace("_", "-") == name:
            text = text if equals else next(iter(arguments[i + 1 :]), "")
            return text if known is None or text in known else None
    return None


def given(arguments: Sequence[str], name: str, otherwise: Number) -> Number:
    """`given_text` as a number, or another one where that is none."""
    text = given_text(arguments, name)
    try:
        return otherwise if text is None else type(otherwise)(text)
    except ValueError:
        return otherwise


def replaced(default: Defaults, **changes: Any) -> Defaults:
    """The defaults with what follows; as they are if it makes no sense, which is refused later."""
    try:
        return dataclasses.replace(default, **changes)
    except ValueError:
        return default


def fitting_divisor(wanted: int, of: int) -> int:
    """The largest divisor of a number that is not above the wanted one; 1 of what has none."""
    return next((n for n in range(min(wanted, max(of, 1)), 0, -1) if of % n == 0), 1)


def tenth_at_most(steps: int, usual: int) -> int:
    """The usual steps of a phase that nobody asked for, and a tenth of all at most."""
    return min(usual, max(steps, 0) // 10)
