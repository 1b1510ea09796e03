"""What the reports know of a suite: the cells of each arm together, and its mean curve."""

import math
import statistics
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from experiments.figures import (
    CENSORED_MARK,
    GROKKED_MARK,
    POINT_MARK,
    optimizer_color,
    optimizer_label,
)
from experiments.sweep import Best, Files, best, chosen_by, losses_by_rate, mean, mean_curve


class Arm(NamedTuple):
    """What the cells of one optimizer did at one size.

    Attributes:
        losses: mean final loss by rate, over the seeds that choose it; infinite where one diverged.
        best: the rate that they chose, and the final loss of every seed there.
        curve: tokens and mean validation loss on the way, over the seeds at the best rate.
        bits_per_byte: mean at the end; None where bytes are unknown or a seed diverged.
        tokens_per_step: of all arms.
        tokens: of a whole cell.
        cost: of a step, from costs.json; None until it was measured.
        cells: how many finished.
        diverged: how many of them diverged.
    """

    optimizer: str
    width: int
    losses: dict[float, float]
    best: Best
    curve: list[tuple[int, float]]
    bits_per_byte: float | None
    tokens_per_step: int
    cost: dict[str, float] | None
    cells: int
    diverged: int

    @property
    def label(self) -> str:
        return optimizer_label(self.optimizer)

    @property
    def loss(self) -> float:
        return self.best.mean

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds."""
        losses = [*self.best.losses.values()]
        if len(losses) < 2 or not all(map(math.isfinite, losses)):
            return None
        return statistics.stdev(losses)

    @property
    def tokens(self) -> int:
        """Of a whole training."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def step_flops(self) -> float | None:
        """Of the model and the optimizer."""
        return self.cost and self.cost["model_flops"] + self.cost["optimizer_flops"]

    @property
    def optimizer_share(self) -> float | None:
        """Of the optimizer in a step's FLOPs."""
        return self.cost and self.cost["optimizer_flops"] / self.step_flops


def arms(files: Files) -> list[Arm]:
    """By width, and the lowest loss first."""
    keys = dict.fromkeys((row["optimizer"], row["width"]) for row in files.rows)
    found = [_arm(files, *key) for key in keys]
    return sorted(found, key=lambda arm: (arm.width, arm.loss))


def _arm(files: Files, optimizer: str, width: int) -> Arm:
    swept = files.config["sweep_seeds"]
    pairs = list(zip(files.rows, files.histories, strict=True))
    own = [(row, h) for row, h in pairs if (row["optimizer"], row["width"]) == (optimizer, width)]
    rows = [row for row, _ in own]
    top = best(rows, swept)
    chosen = [(row, history) for row, history in own if row["rate"] == top.rate]
    steps = mean_curve([history for _, history in chosen])
    tokens_per_step = files.config["batch"] * files.config["context"]
    bits = [row["bits_per_byte"] for row, _ in chosen]
    return Arm(
        optimizer=optimizer,
        width=width,
        losses={r: mean(x) for r, x in losses_by_rate(chosen_by(rows, swept)).items()},
        best=top,
        curve=[(step * tokens_per_step, loss) for step, loss in steps],
        bits_per_byte=None if None in bits else statistics.fmean(bits),
        tokens_per_step=tokens_per_step,
        cost=files.costs.get(str(width), {}).get(optimizer),
        cells=len(rows),
        diverged=sum(row["diverged"] for row in rows),
    )


def draw_rates(axes: Axes, arm: Arm, top: float) -> None:
    """Final loss against learning rate, up to where the axis ends, and the seeds at the best."""
    color = optimizer_color(arm.optimizer)
    shown = {rate: min(loss, top) for rate, loss in arm.losses.items()}
    axes.plot([*shown], [*shown.values()], color=color, lw=1.4)
    for rate, loss in arm.losses.items():
        mark = POINT_MARK if loss < top else CENSORED_MARK | {"mfc": "white"}
        axes.plot(rate, shown[rate], color=color, clip_on=False, zorder=4, **mark)
    if arm.loss < top:
        axes.plot(arm.best.rate, arm.losses[arm.best.rate], color=color, zorder=5, **GROKKED_MARK)


def loss_text(arm: Arm) -> str:
    """The final loss with its spread, e.g. "1.652 ± 0.004"."""
    if not math.isfinite(arm.loss):
        return "diverged"
    return f"{arm.loss:.3f}" + ("" if arm.spread is None else f" ± {arm.spread:.3f}")


def as_json(arm: Arm) -> dict[str, Any]:
    """An arm's row of summary.json; None where a number is not finite."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "optimizer": arm.optimizer,
        "width": arm.width,
        "best_rate": arm.best.rate,
        "at_edge": arm.best.at_edge,
        "validation_loss": finite(arm.loss),
        "bits_per_byte": arm.bits_per_byte,
        "spread": arm.spread,
        "losses_by_seed": {str(seed): finite(x) for seed, x in sorted(arm.best.losses.items())},
        "losses_by_rate": {f"{rate:g}": finite(x) for rate, x in arm.losses.items()},
        "tokens": arm.tokens,
        "cost": arm.cost,
        "cells": arm.cells,
        "diverged": arm.diverged,
    }
