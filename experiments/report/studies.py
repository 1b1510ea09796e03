"""Finds the study to which a folder belongs, and writes and prints the folder's report."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.text import Text

from experiments.json_files import read_json
from experiments.report import page
from experiments.runs import RunError, holds_run, known_settings

GROK = "experiments.grok.report"
FAMILY = "experiments.family.report"
WIDTHS = "experiments.family.widths_report"
PRETRAIN = "experiments.pretrain.report"
OPTIMIZERS = "experiments.pretrain.suites.optimizers_report"
SCALING = "experiments.pretrain.suites.scaling_report"
FINETUNE = "experiments.finetune.report"
SUITES = "experiments.finetune.suites.report"
BENCH = "experiments.bench.report"

# Keys that identify a study, in a run's config.json or a stored summary.json. The first counts.
_CONFIG = {"tasks": GROK, "scales": WIDTHS, "head_size": FAMILY, "arm": FINETUNE}
_SUITES = {"optimizers": OPTIMIZERS, "scaling": SCALING}
_SUMMARY = {
    "cells": GROK,
    "scales": WIDTHS,
    "fits": SCALING,
    "groups": SUITES,
    "claims": FINETUNE,
    "runs": PRETRAIN,
    "sharding": BENCH,
    "speed": BENCH,
    "spectra": BENCH,
    "accelerators": BENCH,
}


def study_of(folder: Any) -> str:
    """Returns the name of the module that reports on a folder.

    Raises:
        FileNotFoundError: There is no such folder.
        RunError: The folder holds no results of any study.
        ValueError: Its config.json or summary.json is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give the folder of a run or suite.")
    return next(_names(folder), "") or _of_groups(folder)


def _names(folder: Any) -> Iterator[str]:
    config = known_settings(folder) if holds_run(folder) else {}
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    yield from (name for key, name in _CONFIG.items() if key in config)
    if config.get("suite"):
        yield _SUITES.get(config["suite"], SUITES)
    if config:
        yield PRETRAIN
    yield from (name for key, name in _SUMMARY.items() if key in summary)
    if arms := summary.get("arms"):
        yield OPTIMIZERS if "width" in arms[0] else FAMILY


def _of_groups(folder: Any) -> str:
    """Returns the study of a folder that contains one run folder for each optimizer."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and holds_run(path):
            return next(_names(path))
    raise RunError(
        f"{folder} holds no run: neither it nor a folder in it has a config.json. Give the folder "
        "of a run or suite."
    )


def report_of(folder: Any, **options: Any) -> page.Report:
    """Returns the report of a folder. `options` are passed to the `report` of its study.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        RunError: The folder holds no results of any study.
        ValueError: A file has the wrong content; the message names the file.
    """
    return importlib.import_module(study_of(folder)).report(folder, **options)


def show(folder: Any, console: Console, *, table: bool = True, **options: Any) -> None:
    """Writes the report of a folder, and prints its table, its abstract and its path.

    Args:
        folder: The folder of a run, a suite or stored results. It may be in gs:// or s3://.
        console: The console to print on.
        table: Whether to print the table and the abstract.
        options: Arguments of the study's `report`.
    """
    folder = epath.Path(folder) if "://" in str(folder) else Path(folder)
    found = report_of(folder, **options)
    path = page.write(found, folder)
    if table:
        console.print(found.table, Text("\n".join(found.abstract)), sep="\n")
    console.print(Text(f"Report: {path}"), soft_wrap=True)
