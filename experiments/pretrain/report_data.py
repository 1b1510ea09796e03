"""A pretraining run's files, read back."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.commands import flat
from experiments.figures import optimizer_color
from experiments.language import log
from experiments.optimizers import ARMS, OptimizerName
from experiments.pretrain.config import Training
from experiments.pretrain.trained import told_by
from experiments.runs import RunError, holds_run, known_settings, read_json


class Run(NamedTuple):
    """The files of a run, which may be unfinished.

    Attributes:
        color: of its lines, in all figures.
        trained: records of training steps, oldest first.
        evaluated: records of evaluations.
        summary: empty until it is finished.
        samples: texts that the finished model wrote.
        damage: what is wrong with its log, in words.
    """

    optimizer: OptimizerName
    color: str
    config: Training
    settings: dict[str, Any]
    trained: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    summary: dict[str, Any]
    samples: str
    damage: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """That it has done, as far as its records tell."""
        return max((record["step"] for record in self.trained + self.evaluated), default=0)

    def median(self, key: str) -> float | None:
        """Of a rate, over the records: one whose steps were compiled is an outlier."""
        found = [record[key] for record in self.trained if record.get(key)]
        return statistics.median(found) if found else None

    def last(self, key: str) -> float | None:
        """The value of a key in the newest record that has it, None where it was not finite."""
        records = self.evaluated if key in MEASURES else self.trained
        return records[-1].get(key) if records else None


MEASURES = {"bits_per_byte": "bits a byte", "validation_loss": "nats a token"}


def load_run(folder: epath.Path) -> Run:
    """Reads a run's folder.

    Raises:
        RunError: it holds no run.
        ValueError: a file is damaged; the message names it.
    """
    settings = known_settings(folder)
    optimizer, config = told_by(folder, settings)
    records, damage = log.read(folder)
    summary, samples = folder / "summary.json", folder / "samples.txt"
    return Run(
        optimizer,
        optimizer_color(optimizer),
        config,
        settings,
        [record for record in records if "loss" in record],
        [record for record in records if "validation_loss" in record],
        read_json(summary) if summary.exists() else {},
        samples.read_bytes().decode(errors="replace") if samples.exists() else "",
        tuple(damage),
    )


def load_runs(folder: epath.Path, optimizers: Sequence[OptimizerName]) -> list[Run]:
    """The runs of a folder: itself for one optimizer, else a sub-folder for each.

    Raises:
        RunError: there is no such run, or several are asked for and the folder is one itself.
        ValueError: a file is damaged; the message names it.
    """
    if len(optimizers) == 1:
        return [load_run(folder)]
    if holds_run(folder):
        raise RunError(f"{folder} is a run itself. Compare optimizers in another folder.")
    return [load_run(folder / optimizer) for optimizer in optimizers]


def found_optimizers(folder: epath.Path) -> tuple[OptimizerName, ...]:
    """Whose runs a folder has.

    Raises:
        RunError: none.
    """
    if holds_run(folder):
        return (load_run(folder).optimizer,)
    found = tuple(name for name in ARMS if holds_run(folder / name))
    if not found:
        raise RunError(
            f"{folder} holds no run: neither it nor a folder of an optimizer in it has a "
            "config.json."
        )
    return found


def measure_of(runs: Iterable[Run]) -> str:
    """The key of the held-out measure: nats a token where one run does not know its bytes."""
    known = [record for run in runs for record in run.evaluated]
    return "bits_per_byte" if all("bits_per_byte" in r for r in known) else "validation_loss"


def differences(runs: Sequence[Run]) -> list[str]:
    """Names of settings, other than the optimizer, in which the runs differ."""
    settings = [flat(run.settings | {"optimizer": None}) for run in runs]
    texts = {run.summary["data"]["sha256"] for run in runs if "data" in run.summary}
    names = dict.fromkeys(name for own in settings for name in own)
    found = [
        name for name in names if any(own.get(name) != settings[0].get(name) for own in settings)
    ]
    return found + ["the text"] * (len(texts) > 1)


def held_out_curve(run: Run, key: str) -> list[tuple[int, float]]:
    """Tokens trained on, and the held-out measure there, NaN where it is not finite."""
    return [
        (record["step"] * run.config.tokens_per_step, as_number(record[key]))
        for record in run.evaluated
    ]


def series(run: Run, *path: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key, or of one in another, NaN where one is not finite or missing."""

    def value(record: Any) -> float:
        for key in path:
            record = record.get(key) if record else None
        return as_number(record)

    steps = np.array([record["step"] for record in run.trained])
    return steps, np.array([value(record) for record in run.trained], float)


def as_number(value: float | None) -> float:
    return math.nan if value is None else value


def final_load(run: Run) -> np.ndarray:
    """`(layers with experts, experts)`: mean over the last tenth of the records; 1 is even."""
    loads = [record["load"] for record in run.trained if "load" in record]
    return np.mean(np.array(loads[-math.ceil(len(loads) / 10) :], float), axis=0)


def loss_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
