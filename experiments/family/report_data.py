"""What the report knows of a family run: its files, and the cells of each optimizer together."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.family.config import BASELINE
from experiments.family.sweep import Best, Row, best, loss_of, losses_by_rate, mean
from experiments.runs import read_blocks

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean of paired differences and its Student-t confidence interval."""

    mean: float
    low: float
    high: float


class Arm(NamedTuple):
    """What the cells of one optimizer did.

    Attributes:
        best: its best rate; None if no cell has finished.
        losses: mean final loss by rate, infinite where a seed diverged.
        loss: mean final validation loss at the best rate.
        spread: sample standard deviation over the seeds there.
        difference: to AdamW at its own best rate, paired by seed; None without two pairs.
        step_ratio: milliseconds of a training step over AdamW's, medians over the cells.
        cost: of an update alone, from costs.json; None if not measured.
        cells: how many finished.
        diverged: how many of them diverged.
    """

    optimizer: str
    best: Best
    losses: dict[float, float]
    loss: float
    spread: float | None
    difference: Interval | None
    step_ratio: float | None
    cost: dict[str, float] | None
    cells: int
    diverged: int


class Files(NamedTuple):
    """A run's files; `histories` are the evaluations of each finished cell, beside its row."""

    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Row]
    histories: list[list[Row]]
    costs: dict[str, dict[str, float]]


def load_run(folder: Path) -> Files:
    """Reads the files of a finished or partly finished run.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: has a cell of the run finished?")
    blocks, _ = read_blocks(folder / "metrics.jsonl")
    costs = folder / "costs.json"
    return Files(
        read_json(folder / "config.json"),
        read_json(folder / "summary.json"),
        [block.cell for block in blocks],
        [block.records for block in blocks],
        read_json(costs)["costs"] if costs.exists() else {},
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a fault names the file.

    Raises:
        ValueError: the file has no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is wanted, found {type(value).__name__}")
    return value


def aggregate(rows: Sequence[Row], costs: dict[str, dict[str, float]]) -> list[Arm]:
    """The cells by optimizer, the lowest loss first."""
    names = dict.fromkeys(row["optimizer"] for row in rows)
    of = {name: [row for row in rows if row["optimizer"] == name] for name in names}
    baseline = best(of.get(BASELINE, []))
    pace = {
        name: statistics.median(row["milliseconds_per_step"] for row in own)
        for name, own in of.items()
    }

    def arm(name: str, own: list[Row]) -> Arm:
        top = best(own)
        return Arm(
            optimizer=name,
            best=top,
            losses={rate: mean(losses) for rate, losses in losses_by_rate(own).items()},
            loss=top.mean,
            spread=_spread([*top.losses.values()]),
            difference=difference(top, baseline) if baseline and name != BASELINE else None,
            step_ratio=pace[name] / pace[BASELINE] if BASELINE in pace else None,
            cost=costs.get(name),
            cells=len(own),
            diverged=sum(row["diverged"] for row in own),
        )

    return sorted((arm(*item) for item in of.items()), key=lambda arm: arm.loss)


def _spread(losses: list[float]) -> float | None:
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return None
    return statistics.stdev(losses)


def difference(ours: Best, theirs: Best) -> Interval | None:
    """Our loss minus theirs over the seeds that both have; None with fewer than two."""
    seeds = ours.losses.keys() & theirs.losses.keys()
    pairs = [ours.losses[seed] - theirs.losses[seed] for seed in sorted(seeds)]
    if len(pairs) < 2 or not all(map(math.isfinite, pairs)):
        return None
    center = statistics.fmean(pairs)
    half = student_t(len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Interval(center, center - half, center + half)


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """How many standard errors a two-sided confidence interval reaches.

    >>> round(student_t(2), 2)
    4.3
    """
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        beyond = jax.scipy.special.betainc(degrees / 2, 0.5, degrees / (degrees + middle**2))
        low, high = (low, middle) if beyond < 1 - confidence else (middle, high)
    return low


def as_json(arm: Arm) -> dict[str, Any]:
    """An arm's row of summary.json; None where a number is not finite."""
    return {
        "optimizer": arm.optimizer,
        "best_rate": arm.best.rate,
        "at_edge": arm.best.at_edge,
        "validation_loss": _finite(arm.loss),
        "spread": arm.spread,
        "losses_by_seed": {str(seed): _finite(x) for seed, x in sorted(arm.best.losses.items())},
        "losses_by_rate": {f"{rate:g}": _finite(x) for rate, x in arm.losses.items()},
        "difference_to_adamw": arm.difference and arm.difference._asdict(),
        "step_ratio": arm.step_ratio,
        "update": arm.cost,
        "cells": arm.cells,
        "diverged": arm.diverged,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def curves(files: Files, arm: Arm) -> list[list[Row]]:
    """The evaluations of an arm's cells at its best rate, a list for each seed."""
    return [
        history
        for row, history in zip(files.rows, files.histories, strict=True)
        if (row["optimizer"], row["rate"]) == (arm.optimizer, arm.best.rate)
    ]


def points(files: Files, arm: Arm) -> list[tuple[float, float]]:
    """Rate and final loss of every cell of an arm; infinite where it diverged."""
    return [(row["rate"], loss_of(row)) for row in files.rows if row["optimizer"] == arm.optimizer]
