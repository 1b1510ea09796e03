"""A pretraining run's files, read back."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.optimizers import ARMS, OptimizerName
from experiments.pretrain.config import Training
from experiments.pretrain.trained import told_by
from experiments.report import records
from experiments.report.figures import optimizer_label, optimizer_style
from experiments.report.series import Series, series
from experiments.runs import RunError, holds_run, read_json

MEASURES = {"bits_per_byte": "bits per byte", "validation_loss": "nats per token"}


class Run(NamedTuple):
    """The files of a run, which may be unfinished.

    Attributes:
        config: None of a stored result, of which there is the summary alone.
        records: of it.
        samples: texts that the finished model wrote.
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
        """Of its lines, in all figures."""
        return optimizer_style(self.optimizer)

    @property
    def summary(self) -> dict[str, Any]:
        return self.records.summary

    @property
    def steps(self) -> int:
        """That it has done, as far as its records tell."""
        every = self.records.trained + self.records.evaluated
        return max((record["step"] for record in every), default=0)

    @property
    def whole(self) -> int:
        """Steps of the whole training."""
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
        """Of a rate, over the records: one whose steps were compiled is an outlier."""
        found = [record[key] for record in self.records.trained if record.get(key)]
        return statistics.median(found) if found else None

    def last(self, key: str) -> float | None:
        """The value of a key in the newest record that has it, None where it was not finite."""
        own = self.records.evaluated if key in MEASURES else self.records.trained
        return own[-1].get(key) if own else None

    def series(self, *path: str) -> Series:
        """Of the training records."""
        return series(self.records.trained, *path)

    def held_out(self, key: str) -> list[tuple[int, float]]:
        """Tokens trained on, and the held-out measure there, NaN where it is not finite."""
        steps, values = series(self.records.evaluated, key)
        return [(int(n) * self.tokens_per_step, x) for n, x in zip(steps, values, strict=True)]

    def final_load(self) -> np.ndarray:
        """`(layers with experts, experts)`: mean over the last tenth of the records; 1 is even."""
        loads = [record["load"] for record in self.records.trained if "load" in record]
        return np.mean(np.array(loads[-math.ceil(len(loads) / 10) :], float), axis=0)


def load_run(folder: epath.Path) -> Run:
    """Reads a run's folder.

    Raises:
        RunError: it holds no run.
        ValueError: a file is damaged; the message names it.
    """
    found, samples = records.read(folder), folder / "samples.txt"
    optimizer, config = told_by(folder, found.settings)
    text = samples.read_bytes().decode(errors="replace") if samples.exists() else ""
    return Run(optimizer, config, found, text)


def of_summary(summary: Mapping[str, Any]) -> Run:
    """What a stored summary tells of a run: its last records."""
    trained = {"step": summary["steps"], "loss": summary["train_loss"]}
    trained |= {"skipped": summary["skipped_steps"]}
    trained |= {key: summary[key] for key in ("seconds", "tokens_per_second")}
    evaluated = {"step": summary["steps"]} | {key: summary[key] for key in MEASURES}
    found = records.Records({}, [trained], [evaluated], dict(summary))
    return Run(summary["optimizer"], None, found)


def load_runs(folder: epath.Path, optimizers: Sequence[OptimizerName] = ()) -> list[Run]:
    """The runs of a folder: itself for one optimizer, else a sub-folder for each.

    Args:
        folder: of a run, of several, or of stored results.
        optimizers: whose; by default all that there are.

    Raises:
        RunError: there is no such run, or several are asked for and the folder is one itself.
        ValueError: a file is damaged; the message names it.
    """
    found = optimizers or found_optimizers(folder)
    if len(found) == 1 and (holds_run(folder) or optimizers):
        return [load_run(folder)]
    if holds_run(folder):
        raise RunError(f"{folder} is a single run. Give a folder with a run for each optimizer.")
    if not any(holds_run(folder / name) for name in found):
        stored = read_json(folder / "summary.json")["runs"]
        return [of_summary(stored[name]) for name in found]
    return [load_run(folder / optimizer) for optimizer in found]


def found_optimizers(folder: epath.Path) -> tuple[OptimizerName, ...]:
    """Whose runs a folder has.

    Raises:
        RunError: none.
    """
    if holds_run(folder):
        return (load_run(folder).optimizer,)
    summary = folder / "summary.json"
    found = tuple(name for name in ARMS if holds_run(folder / name))
    found = found or tuple(read_json(summary).get("runs", ()) if summary.exists() else ())
    if not found:
        raise RunError(
            f"{folder} holds no run: neither it nor an optimizer's folder in it has a config.json."
        )
    return found


def measure_of(runs: Iterable[Run]) -> str:
    """The key of the held-out measure: nats per token where one run does not know its bytes."""
    known = [record for run in runs for record in run.records.evaluated]
    return "bits_per_byte" if all("bits_per_byte" in r for r in known) else "validation_loss"


def differences(runs: Sequence[Run]) -> list[str]:
    """Names of settings, other than the optimizer, in which the runs differ."""
    texts = {run.summary["data"]["sha256"] for run in runs if "data" in run.summary}
    return records.differing(runs, "optimizer") + ["the text"] * (len(texts) > 1)


def loss_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
