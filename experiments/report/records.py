"""The folder of a language model's run, read back."""

from typing import Any, NamedTuple

from etils import epath

from experiments.language import log
from experiments.runs import known_settings, read_json


class Records(NamedTuple):
    """The files of a language model's run, which may be unfinished.

    Attributes:
        trained: records of training steps, oldest first.
        evaluated: records of evaluations.
        summary: empty until it is finished.
        damage: what is wrong with its log, in words.
    """

    settings: dict[str, Any]
    trained: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    summary: dict[str, Any]
    damage: tuple[str, ...] = ()


def read(folder: epath.Path) -> Records:
    """Reads a run's folder.

    Raises:
        RunError: it holds no run.
        ValueError: a file is damaged; the message names it.
    """
    settings = known_settings(folder)
    records, damage = log.read(folder)
    summary = folder / "summary.json"
    return Records(
        settings,
        [record for record in records if "loss" in record],
        [record for record in records if "validation_loss" in record],
        read_json(summary) if summary.exists() else {},
        tuple(damage),
    )
