"""Results of a suite for its reports: the cells grouped by optimizer and size."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.report import arms
from experiments.report.series import middle, series
from experiments.sweep import Files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
    """The results of one optimizer at one size.

    Attributes:
        tokens_per_step: Tokens of a step.
        tokens: Tokens of the whole training.
        curve: tokens and mean validation loss on the way, over the seeds at the best rate.
        curves: the losses of each seed, at the same tokens.
        bits_per_byte: mean at the end; None where bytes are unknown or a seed diverged.
        cost: The cost of a step, from costs.json; None until it is measured.
        shares: Tokens, FLOPs and time to AdamW's final loss as fractions of AdamW's whole training;
            infinite if that loss is never reached, None if costs are unknown.
    """

    width: int
    tokens_per_step: int
    tokens: int
    curve: Sequence[tuple[int, float]] = ()
    curves: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    bits_per_byte: float | None = None
    cost: dict[str, float] | None = None
    shares: dict[str, float | None] = dataclasses.field(default_factory=dict)

    @property
    def step_flops(self) -> float | None:
        """FLOPs of a step: those of the model and of the optimizer."""
        return self.cost and self.cost["model_flops"] + self.cost["optimizer_flops"]

    def compute(self, with_update: bool) -> float:
        """Returns the FLOPs of a whole training, of the model alone or including the updates."""
        steps = self.tokens / self.tokens_per_step
        return steps * (self.step_flops if with_update else self.cost["model_flops"])

    def as_json(self) -> dict[str, Any]:
        own = ("width", "bits_per_byte", "tokens_per_step", "tokens", "curve", "curves", "cost")
        shares = {
            key: None if share is None else arms.finite(share) for key, share in self.shares.items()
        }
        fields = {key: getattr(self, key) for key in own}
        return super().as_json() | fields | {"to_adamw_loss": shares}


def gather(files: Files) -> list[Arm]:
    """Returns the arms of a suite, sorted by width and then by loss."""
    own = ("optimizer", "width", "bits_per_byte", "tokens_per_step", "tokens", "cost")
    found = [
        Arm(
            **{key: stored[key] for key in own},
            **arms.of_json(stored),
            curve=stored.get("curve", ()),
            curves=stored.get("curves") or {},
            shares=stored.get("to_adamw_loss") or {},
        )
        for stored in files.summary.get("arms", [])
        if not files.rows
    ]
    cells = arms.grouped(files, "optimizer", "width")
    found += [_arm(files, *key, *cells_) for key, cells_ in cells.items()]
    return sorted(found, key=lambda arm: (arm.width, arm.loss))


def _arm(files: Files, optimizer: str, width: int, rows: list[Any], histories: list[Any]) -> Arm:
    own = arms.of_cells(rows, histories, files.config["sweep_seeds"])
    tokens_per_step = files.config["batch"] * files.config["context"]
    steps, losses = middle([series(history, "validation_loss") for history in own["histories"]])
    curve = list(zip((steps * tokens_per_step).tolist(), losses.tolist(), strict=True))
    curves = {
        str(history[0]["seed"]): [row["validation_loss"] for row in history]
        for history in own["histories"]
        if history
    }
    bits = [row["bits_per_byte"] for row in rows if row["rate"] == own["best"].rate]
    return Arm(
        optimizer=optimizer,
        width=width,
        tokens_per_step=tokens_per_step,
        tokens=curve[-1][0] if curve else 0,
        curve=curve,
        curves=curves,
        bits_per_byte=None if None in bits else statistics.fmean(bits),
        cost=files.costs.get(str(width), {}).get(optimizer),
        **own,
    )
