"""Reads the files of pretraining runs for reports."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.optimizers import ARMS, OptimizerName
from experiments.pretrain.config import Training
from experiments.pretrain.trained import settings_of, told_by
from experiments.report import records
from experiments.report.figures import optimizer_label, optimizer_style
from experiments.report.series import Series, series
from experiments.runs import RunError, holds_run, read_json

MEASURES = {"bits_per_byte": "bits per byte", "validation_loss": "nats per token"}


class Run(NamedTuple):
    """The files of a run, which may be unfinished.

    Attributes:
        config: The settings; None for a stored result, which has only a summary.
        records: The run's records.
        samples: The texts that the finished model generated.
    """

    optimizer: OptimizerName
    config: Training | None
    records: records.Records
    samples: str = ""

    @property
    def label(self) -> str:
        return optimizer_label(self.optimizer)

    @property
    def style(self) -> dict[str, Any]:
        """The style of the run's lines in all figures."""
        return optimizer_style(self.optimizer)

    @property
    def summary(self) -> dict[str, Any]:
        return self.records.summary

    @property
    def steps(self) -> int:
        """The number of steps done so far, according to the records."""
        every = self.records.trained + self.records.evaluated
        return max((record["step"] for record in every), default=0)

    @property
    def whole(self) -> int:
        """The number of steps of the whole training."""
        return self.config.steps if self.config else self.summary["steps"]

    @property
    def tokens_per_step(self) -> int:
        if self.config:
            return self.config.tokens_per_step
        return self.summary["tokens"] // self.summary["steps"]

    @property
    def rate(self) -> float | None:
        return self.config and self.config.rate(self.optimizer)

    def median(self, key: str) -> float | None:
        """Returns the median of a rate over the records, since compilation causes outliers."""
        values = [record[key] for record in self.records.trained if record.get(key)]
        return statistics.median(values) if values else None

    def last(self, key: str) -> float | None:
        """Returns a value of the newest record; None if it is missing or not finite."""
        own = self.records.evaluated if key in MEASURES else self.records.trained
        return own[-1].get(key) if own else None

    def series(self, *path: str) -> Series:
        """Returns the series of a value in the training records."""
        return series(self.records.trained, *path)

    def held_out(self, key: str) -> list[tuple[int, float]]:
        """Returns pairs of training tokens and held-out measure, NaN if it is not finite."""
        steps, values = series(self.records.evaluated, key)
        return [(int(n) * self.tokens_per_step, x) for n, x in zip(steps, values, strict=True)]

    def final_load(self) -> np.ndarray:
        """Returns `(layers with experts, experts)`: mean load over the last tenth; 1 is even."""
        loads = [record["load"] for record in self.records.trained if "load" in record]
        return np.mean(np.array(loads[-math.ceil(len(loads) / 10) :], float), axis=0)


def load_run(folder: epath.Path) -> Run:
    """Reads a run's folder.

    Raises:
        RunError: If it contains no run.
        ValueError: If a file is damaged. The message names it.
    """
    stored, samples = records.read(folder), folder / "samples.txt"
    optimizer, config = told_by(folder, stored.settings)
    stored = stored._replace(settings=settings_of(optimizer, config))
    text = samples.read_bytes().decode(errors="replace") if samples.exists() else ""
    return Run(optimizer, config, stored, text)


def of_summary(summary: Mapping[str, Any]) -> Run:
    """Returns a run with the last records that a stored summary contains."""
    trained = {"step": summary["steps"], "loss": summary["train_loss"]}
    trained |= {"skipped": summary["skipped_steps"]}
    trained |= {key: summary[key] for key in ("seconds", "tokens_per_second")}
    evaluated = {"step": summary["steps"]} | {key: summary[key] for key in MEASURES}
    stored = records.Records({}, [trained], [evaluated], dict(summary))
    return Run(summary["optimizer"], None, stored)


def load_runs(folder: epath.Path, optimizers: Sequence[OptimizerName] = ()) -> list[Run]:
    """Returns the runs in a folder: one in the folder itself, or one per sub-folder.

    Args:
        folder: The folder of a run, of several runs, or of stored results.
        optimizers: The optimizers to read. By default, all in the folder.

    Raises:
        RunError: If there is no such run, or `folder` is a single run and several were requested.
        ValueError: If a file is damaged. The message names it.
    """
    names = optimizers or found_optimizers(folder)
    if len(names) == 1 and (holds_run(folder) or optimizers):
        return [load_run(folder)]
    if holds_run(folder):
        raise RunError(f"{folder} is a single run. Give a folder with a run for each optimizer.")
    if not any(holds_run(folder / name) for name in names):
        stored = read_json(folder / "summary.json")["runs"]
        return [of_summary(stored[name]) for name in names]
    return [load_run(folder / optimizer) for optimizer in names]


def found_optimizers(folder: epath.Path) -> tuple[OptimizerName, ...]:
    """Returns the optimizers whose runs a folder contains.

    Raises:
        RunError: If it contains no run.
    """
    if holds_run(folder):
        return (load_run(folder).optimizer,)
    summary = folder / "summary.json"
    names = tuple(name for name in ARMS if holds_run(folder / name))
    names = names or tuple(read_json(summary).get("runs", ()) if summary.exists() else ())
    if not names:
        raise RunError(
            f"{folder} holds no run: neither it nor an optimizer's folder in it has a config.json."
        )
    return names


def measure_of(runs: Iterable[Run]) -> str:
    """Returns the key of the held-out measure: bits per byte if all runs know their bytes."""
    known = [record for run in runs for record in run.records.evaluated]
    return "bits_per_byte" if all("bits_per_byte" in r for r in known) else "validation_loss"


def differences(runs: Sequence[Run]) -> list[str]:
    """Returns the names of settings, other than the optimizer, in which the runs differ."""
    texts = {run.summary["data"]["sha256"] for run in runs if "data" in run.summary}
    return records.differing(runs, "optimizer") + ["the text"] * (len(texts) > 1)


def loss_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
