"""Which study a folder is of, and its report: drawn after a run, or again from its files."""

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

# What config.json of a run, or summary.json of stored results, has in each study; the first counts.
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
    """The module that knows a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        RunError: it holds nothing of any study.
        ValueError: its config.json or summary.json is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
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
    """Of a folder that has one for each optimizer."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and holds_run(path):
            return next(_names(path))
    raise RunError(f"{folder} holds no run: neither it nor a folder in it has a config.json.")


def report_of(folder: Any, **options: Any) -> page.Report:
    """What the study that a folder is of tells of it; `options` are of its `report`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        RunError: it holds nothing of any study.
        ValueError: a file is not what it should be; the message names it.
    """
    return importlib.import_module(study_of(folder)).report(folder, **options)


def show(folder: Any, console: Console, *, table: bool = True, **options: Any) -> None:
    """Writes a folder's report, and prints its table, its abstract and where it is.

    Args:
        folder: of a run, a suite or stored results; in gs:// or s3://, too.
        console: to print on.
        table: whether to print the table and the abstract.
        options: of the study's `report`.
    """
    folder = epath.Path(folder) if "://" in str(folder) else Path(folder)
    found = report_of(folder, **options)
    path = page.write(found, folder)
    if table:
        console.print(found.table, Text(" ".join(found.abstract)), sep="\n")
    console.print(Text(f"Report: {path}"), soft_wrap=True)
