"""Grids of settings, whose points are the settings that differ between cells.

An axis is `SETTING=VALUE,VALUE,...`, such as `width=32,64` or `muon.learning-rate=0.01,0.02`, with
names of command-line options. A point has one value of each axis and is written as `width=32
muon.learning-rate=0.01`. The point without axes is "".
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from experiments.json_files import loads

# The optimizers that a setting concerns. All other settings concern every optimizer.
OWNERS = {
    "adamw": ("adamw",),
    "muon": ("muon",),
    "variants.rank": ("low_rank", "low_rank_subspace", "low_rank_whole", "dion"),
    "variants.clip-threshold": ("muonclip",),
}
SETTINGS = ("width", "layers", "heads", "batch", "dropout", "train_fraction", "warmup", "norm")

Settings = TypeVar("Settings")


class Axis(NamedTuple):
    """A setting and its values, as text."""

    setting: str
    values: tuple[str, ...]

    def concerns(self, optimizer: str) -> bool:
        """Returns whether the setting affects this optimizer."""
        group = self.setting.split(".")[0]
        owners = OWNERS.get(self.setting, OWNERS.get(group))
        return owners is None or optimizer in owners


def axis(text: str) -> Axis:
    """Parses the text of an axis.

    Raises:
        ValueError: The text is not an axis, or its setting cannot be swept.

    Example:
        >>> axis("width=32,64")
        Axis(setting='width', values=('32', '64'))
    """
    setting, equals, values = text.partition("=")
    found = tuple(value for value in values.split(",") if value)
    if not equals or not found or len(set(found)) != len(found):
        raise ValueError(
            f"--grid {text!r} is not an axis; write a setting and different values, as width=32,64."
        )
    known = setting in OWNERS or setting.replace("-", "_") in SETTINGS
    if not known and setting.split(".")[0] not in ("adamw", "muon"):
        raise ValueError(
            f"--grid {setting!r} is not a setting that can be swept. Choose from "
            f"{', '.join(SETTINGS)}, adamw.*, muon.* and variants.rank."
        )
    return Axis(setting, found)


def points(axes: Sequence[Axis], optimizer: str) -> list[str]:
    """Returns all points of the axes that concern an optimizer. The last axis varies fastest.

    Example:
        >>> points([axis("width=32,64"), axis("muon.beta=0.9")], "muon")
        ['width=32 muon.beta=0.9', 'width=64 muon.beta=0.9']
        >>> points([axis("muon.beta=0.9,0.95")], "adamw")
        ['']
    """
    own = [[f"{a.setting}={value}" for value in a.values] for a in axes if a.concerns(optimizer)]
    return [" ".join(point) for point in itertools.product(*own)]


def values(point: str) -> dict[str, float | str]:
    """Returns the settings of a point, with numbers parsed.

    Example:
        >>> values("width=32 muon.beta=0.9")
        {'width': 32, 'muon.beta': 0.9}
    """
    return {key: _value(text) for key, _, text in (pair.partition("=") for pair in point.split())}


def at(settings: Settings, point: str) -> Settings:
    """Returns a dataclass of settings with those of a point replaced.

    Raises:
        ValueError: A setting is unknown, or its value has the wrong type or is not allowed.
    """
    for name, value in values(point).items():
        settings = _replaced(settings, name.replace("-", "_").split("."), value, name)
    return settings


def _replaced(settings: Any, path: list[str], value: Any, name: str) -> Any:
    field = {field.name: field for field in dataclasses.fields(settings)}.get(path[0])
    if field is None:
        raise ValueError(
            f"--grid {name!r} is not a setting. Use the name of an option, without its dashes."
        )
    old = getattr(settings, field.name)
    if len(path) > 1 and dataclasses.is_dataclass(old):
        new = _replaced(old, path[1:], value, name)
    else:
        its = get_type_hints(type(settings))[field.name]  # without the rule beside it
        words = get_args(its) if get_origin(its) is Literal else ()
        if words and value not in words:
            raise ValueError(
                f"--grid {name}={value} is not a valid value. Choose from {', '.join(words)}."
            )
        kind = float if "float" in str(its) and not words else type(old)
        whole_is_number = kind is float and type(value) is int
        if len(path) > 1 or not (isinstance(value, kind) or whole_is_number):
            raise ValueError(
                f"--grid {name}={value} is not valid; give a value such as {name}={old}."
            )
        new = value if "int" in str(its) or not whole_is_number else float(value)
    return dataclasses.replace(settings, **{field.name: new})


def _value(text: str) -> float | str:
    try:
        value = loads(text)
    except ValueError:
        return text
    return value if type(value) in (int, float) else text
