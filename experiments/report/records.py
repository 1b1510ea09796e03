"""Reads the folders of language-model runs, and makes the report of several runs."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from experiments import log
from experiments.commands import print_warning
from experiments.report.page import Report, Section, Table, together
from experiments.runs import flat, known_settings, read_json


class Records(NamedTuple):
    """The contents of a language-model run, which may be unfinished.

    Attributes:
        settings: The settings of the run.
        trained: The records of training steps, oldest first.
        evaluated: The records of evaluations, oldest first.
        summary: The contents of summary.json. Empty until the run is finished.
        damage: Descriptions of the damage to the log.
    """

    settings: dict[str, Any]
    trained: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    summary: dict[str, Any]
    damage: tuple[str, ...] = ()


def read(folder: epath.Path) -> Records:
    """Reads a run's folder.

    Raises:
        RunError: The folder holds no run.
        ValueError: A file is damaged; the message names the file.
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
    """Returns a sentence for each damage to the logs of runs, which have `label` and `records`."""
    return [
        f"The log of {run.label} is damaged: {damage}."
        for run in runs
        for damage in run.records.damage
    ]


def differing(runs: Iterable[Any], but: str) -> list[str]:
    """Returns the names of the settings, except `but`, in which runs differ."""
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
    """Returns the report of runs, which have `label` and `records`. Warns of damaged logs."""
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
