"""What the report knows of a family run: its files, and the cells of each optimizer together."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.differences import Interval, difference
from experiments.family.config import BASELINE
from experiments.sweep import Best, Files, Row, best, loss_of, losses_by_rate, mean


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


def aggregate(rows: Sequence[Row], costs: dict[str, dict[str, float]]) -> list[Arm]:
    """The cells by optimizer, the lowest loss first."""
    names = dict.fromkeys(row["optimizer"] for row in rows)
    of = {name: [row for row in rows if row["optimizer"] == name] for name in names}
    baseline = best(of.get(BASELINE, []))
    pace = {
        name: statistics.median(row["milliseconds_per_step"] for row in own)
        for name, own in of.items()
    }

    def against(name: str, top: Best) -> Interval | None:
        return difference(top.losses, baseline.losses) if baseline and name != BASELINE else None

    def arm(name: str, own: list[Row]) -> Arm:
        top = best(own)
        return Arm(
            optimizer=name,
            best=top,
            losses={rate: mean(losses) for rate, losses in losses_by_rate(own).items()},
            loss=top.mean,
            spread=_spread([*top.losses.values()]),
            difference=difference(top.losses, baseline.losses)
            if baseline and name != BASELINE
            else None,
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
