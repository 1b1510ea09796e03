"""The folder of a language model's run, read back, and the report of several."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from experiments.commands import print_warning
from experiments.language import log
from experiments.report.page import Report, Section, Table, together
from experiments.runs import flat, known_settings, read_json


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


def damaged(runs: Iterable[Any]) -> list[str]:
    """What is wrong with the logs of runs that have a `label` and `records`, in sentences."""
    return [
        f"The log of {run.label} is damaged: {damage}."
        for run in runs
        for damage in run.records.damage
    ]


def differing(runs: Iterable[Any], but: str) -> list[str]:
    """Names of settings, but for one, in which runs differ."""
    settings = [flat(run.records.settings | {but: None}) for run in runs]
    names = dict.fromkeys(name for own in settings for name in own)
    first = settings[0]
    return [name for name in names if any(own.get(name) != first.get(name) for own in settings)]


def report(
    study: str,
    folder: Any,
    runs: Sequence[Any],
    abstract: Sequence[str],
    table: Table,
    sections: Sequence[Section],
    summary: dict[str, Any] | None,
) -> Report:
    """The report of runs that have a `label` and `records`; what is wrong with them is told."""
    for text in damaged(runs):
        print_warning(text)
    named = {run.label: run.records for run in runs}
    finished = sum(bool(of.summary) for of in named.values())
    return Report(
        study,
        f"Run {folder.resolve().name} · {', '.join(named)} · {finished} of {len(runs)} finished",
        abstract,
        table,
        sections,
        together({name: flat(of.settings) for name, of in named.items()}),
        together({name: of.summary.get("machine", {}) for name, of in named.items()}),
        importlib.metadata.version("muon-jax"),
        summary,
    )
