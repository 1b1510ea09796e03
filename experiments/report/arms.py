"""Reports of sweeps: a tidy table with one row for each arm, which summary.json stores too."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments.differences import Interval, difference, holm, p_value
from experiments.report.figures import Final, finals_figure, legible, rates_figure
from experiments.report.names import optimizer_color, optimizer_label
from experiments.report.page import Column, Picture, Report, Section, Table
from experiments.report.text import number, plural
from experiments.runs import flat
from experiments.sweep import Best, Files, Row, best, chosen_by, loss_of, losses_by_rate, mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """The results of the cells of one arm.

    Attributes:
        optimizer: The optimizer's name, or the name of whatever else is swept.
        losses: The mean final loss at each rate, over the seeds that choose the rate. Infinite if
            one of them diverged.
        best: The chosen rate, and the final loss of every seed at it.
        cells: The number of finished cells.
        diverged: The number of finished cells that diverged.
        points: The rate and the final loss of every cell. Empty for stored results.
        histories: The evaluations of the cells at the best rate. Empty for stored results.
        difference: The mean difference of final losses to the baseline's, paired by seed. None with
            fewer than two pairs.
        p: The p value of the paired t test, after Holm's correction for all arms.
    """

    optimizer: str
    losses: dict[float, float]
    best: Best
    cells: int
    diverged: int
    points: Sequence[tuple[float, float]] = ()
    histories: Sequence[Sequence[Row]] = ()
    difference: Interval | None = None
    p: float | None = None

    @property
    def label(self) -> str:
        return optimizer_label(self.optimizer)

    @property
    def loss(self) -> float:
        """The mean final loss at the best rate."""
        return self.best.mean

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the highest or lowest of a sweep."""
        return self.best.at_edge and self.is_swept

    @property
    def is_swept(self) -> bool:
        """Whether more than one rate was tried."""
        return len(self.losses) > 1

    @property
    def choosing(self) -> int:
        """The number of seeds that `losses` averages, which choose the rate."""
        seeds = [x for _, x in sorted(self.best.losses.items())]
        chosen = self.losses.get(self.best.rate, math.nan)
        means = (math.isclose(statistics.fmean(seeds[:n]), chosen) for n in range(1, len(seeds)))
        return next((n for n, same in enumerate(means, start=1) if same), len(seeds))

    @property
    def mark(self) -> tuple[float, float]:
        """The point at which a figure marks the best rate: the rate and its loss."""
        return self.best.rate, self.losses.get(self.best.rate, math.inf)

    @property
    def spread(self) -> float | None:
        """The sample standard deviation over seeds. None with one seed, or if any diverged."""
        losses = [*self.best.losses.values()]
        if len(losses) < 2 or not all(map(math.isfinite, losses)):
            return None
        return statistics.stdev(losses)

    def loss_text(self, digits: int = 3) -> str:
        """Returns the final loss with its standard deviation, e.g. "1.652 ± 0.004"."""
        if not math.isfinite(self.loss):
            return "diverged"
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.loss:.{digits}f}{spread}"

    def as_json(self) -> dict[str, Any]:
        """Returns the arm's row of summary.json, with None for numbers that are not finite."""
        return {
            "optimizer": self.optimizer,
            "best_rate": self.best.rate,
            "at_edge": self.at_edge,
            "validation_loss": finite(self.loss),
            "spread": self.spread,
            "losses_by_seed": {
                str(seed): finite(x) for seed, x in sorted(self.best.losses.items())
            },
            "losses_by_rate": {f"{rate:g}": finite(x) for rate, x in self.losses.items()},
            "difference_to_adamw": self.difference and self.difference._asdict(),
            "p_holm": self.p,
            "cells": self.cells,
            "diverged": self.diverged,
        }


AnyArm = TypeVar("AnyArm", bound=Arm)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def of_cells(rows: Sequence[Row], histories: Sequence[Any] = (), swept: int | None = None) -> dict:
    """Returns the fields of an `Arm`, except its name, from the rows and histories of its cells."""
    top = best(rows, swept)
    chosen = [place for place, row in enumerate(rows) if row["rate"] == top.rate]
    return {
        "losses": {r: mean(x) for r, x in losses_by_rate(chosen_by(rows, swept)).items()},
        "best": top,
        "cells": len(rows),
        "diverged": sum(row["diverged"] for row in rows),
        "points": [(row["rate"], loss_of(row)) for row in rows],
        "histories": [histories[place] for place in chosen] if histories else [],
    }


def of_json(stored: Mapping[str, Any]) -> dict:
    """Returns the fields of an `Arm`, except its name, from its row of summary.json."""

    def known(values: Mapping[str, float | None], kind: type) -> dict[Any, float]:
        return {kind(key): math.inf if x is None else x for key, x in values.items()}

    by_seed = known(stored["losses_by_seed"], int)
    gap = stored.get("difference_to_adamw")
    return {
        "losses": known(stored["losses_by_rate"], float),
        "best": Best(stored["best_rate"], by_seed, stored["at_edge"]),
        "cells": stored["cells"],
        "diverged": stored["diverged"],
        "difference": gap and Interval(**gap),
        "p": stored.get("p_holm"),
    }


def grouped(files: Files, *keys: str) -> dict[tuple, tuple[list[Row], list[Any]]]:
    """Groups cells by their values of some keys. Returns the rows and histories of each group."""
    found: dict[tuple, tuple[list[Row], list[Any]]] = {}
    for row, history in zip(files.rows, files.histories or [()] * len(files.rows), strict=True):
        rows, histories = found.setdefault(tuple(row[key] for key in keys), ([], []))
        rows.append(row)
        histories.append(history)
    return found


def baseline_of(found: Iterable[AnyArm], name: str = "adamw") -> AnyArm | None:
    return next((arm for arm in found if arm.optimizer == name), None)


def differences(
    found: Sequence[AnyArm], base: str = "adamw"
) -> dict[str, tuple[Interval | None, float | None]]:
    """Compares the losses of all other arms with those of a base, paired by seed.

    Returns:
        By optimizer, the mean difference with its interval and p after Holm's correction; each None
        with fewer than two pairs. Empty if the base is missing.
    """
    against = baseline_of(found, base)
    if against is None:
        return {}
    losses, theirs = {arm.optimizer: arm.best.losses for arm in found}, against.best.losses
    others = {name: own for name, own in losses.items() if name != base}
    p_values = {name: p_value(own, theirs) for name, own in others.items()}
    corrected = holm({name: p for name, p in p_values.items() if p is not None})
    return {name: (difference(own, theirs), corrected.get(name)) for name, own in others.items()}


def compared(found: Sequence[AnyArm]) -> list[AnyArm]:
    """Returns the arms with `difference` and `p`, which compare them with AdamW."""
    against = {name: {"difference": gap, "p": p} for name, (gap, p) in differences(found).items()}
    return [dataclasses.replace(arm, **against.get(arm.optimizer, {})) for arm in found]


RATE: Column = (
    "best rate",
    "rate",
    lambda arm: f"{arm.best.rate:g}" + " (edge)" * arm.at_edge,
)

_CELL: dict[str, Column] = {
    key: (heading, heading, form)
    for key, heading, form in (
        ("variant", "variant", lambda row: row["variant"]),
        ("optimizer", "optimizer", lambda row: optimizer_label(row["optimizer"])),
        ("arm", "arm", lambda row: optimizer_label(row["arm"])),
        ("scale", "scale", lambda row: row["scale"]),
        ("width", "width", lambda row: str(row["width"])),
        ("rate", "rate", lambda row: f"{row['rate']:g}"),
        ("seed", "seed", lambda row: str(row["seed"])),
        ("validation_loss", "held-out loss", lambda row: _loss(row, "validation_loss")),
        ("train_loss", "training loss", lambda row: _loss(row, "train_loss")),
        ("steps_run", "steps run", lambda row: str(row["steps_run"])),
        ("skipped", "skipped steps", lambda row: str(row["skipped"])),
        ("seconds", "training time (s)", lambda row: number(row["seconds"])),
        ("milliseconds_per_step", "ms per step", lambda row: number(row["milliseconds_per_step"])),
    )
}


def _loss(row: Row, key: str) -> str:
    return "–" if row["diverged"] else f"{row[key]:.4f}"


def cells_table(rows: Sequence[Row]) -> Table | None:
    """Returns a table of the finished cells of a sweep, or None if there are none."""
    if not rows:
        return None
    columns = [column for key, column in _CELL.items() if key in rows[0]]
    names = next(i for i, (heading, *_) in enumerate(columns) if heading == "rate")
    return Table(
        columns,
        rows,
        "One row per finished training. “–” marks a training whose loss became NaN or Inf.",
        names=min(names, 3),
    )


def finished(files: Files) -> str:
    """Returns, in words, how many of a sweep's cells are finished."""
    stored = files.summary.get("arms", files.summary.get("groups", []))
    total = files.summary["cells_total"]
    count = len(files.rows) or sum(row["cells"] for row in stored) or total
    return f"{count} of {total} trainings finished"


def progress(files: Files) -> list[str]:
    """Returns a sentence about an unfinished sweep; an empty list if it is finished."""
    done = len(files.rows)
    whole = not done or done >= files.summary["cells_total"]
    return [] if whole else [f"{finished(files)} so far."]


def lowest(found: Sequence[Arm]) -> str:
    """Returns a clause that names the first arm, which has the lowest loss."""
    return (
        f"{found[0].label} has the lowest mean held-out loss at its best rate, "
        f"{found[0].loss_text()} nats"
    )


def caveats(found: Sequence[Arm], name: Any = lambda arm: arm.label) -> list[str]:
    """Returns sentences about rates at an edge, rates that were not swept and diverged cells."""
    sentences = []
    if edge := ", ".join(name(arm) for arm in found if arm.at_edge):
        sentences.append(
            "Best at the highest or lowest learning rate tried, so that a rate outside the sweep "
            f"may be better: {edge}."
        )
    if found and not any(arm.is_swept for arm in found):
        sentences.append("Each optimizer was trained at one learning rate.")
    if diverged := sum(arm.diverged for arm in found):
        sentences.append(f"{plural(diverged, 'training')} diverged.")
    return sentences


def rates(
    found: Sequence[Arm],
    unit: str = "nats per token",
    panels: Mapping[str, Sequence[Arm]] | None = None,
    **how: Any,
) -> Picture:
    """Returns a figure of final loss against rate, with one panel per optimizer or `panels`."""
    base = None if panels else baseline_of(found)
    reference = base.mark[1] if base else math.inf
    shown = panels or {arm.label: [arm] for arm in found}
    return Picture(
        "rates",
        lambda: rates_figure(shown, reference=reference, unit=unit, **how),
        "Final held-out loss against learning rate. The loss of a diverged training counts as "
        "infinite. Triangles mark losses above the upper end of the axis.",
        "Final held-out loss against learning rate, with one panel for each of "
        f"{', '.join(map(str.lower, shown)) if panels else 'the optimizers'}.",
    )


def finals(found: Sequence[Arm], unit: str) -> Picture:
    """Returns a figure of every seed's final loss at the best rates. The axis omits far losses."""
    base = baseline_of(found)
    known = [arm for arm in found if math.isfinite(arm.loss)]
    reference = ("AdamW, mean", base.loss) if base and math.isfinite(base.loss) else None
    limit = legible([arm.loss for arm in known], base.loss, 2.2) if reference else math.inf

    def line(arm: Arm) -> Final:
        far = f" ({arm.loss:.2f})" if arm.loss > limit else ""
        color = optimizer_color("adamw" if arm is base else "muon")
        return Final(arm.label + far, color, [*arm.best.losses.values()], arm.loss)

    return Picture(
        "final",
        lambda: finals_figure(
            {"": [line(arm) for arm in known]},
            f"final validation loss ({unit})",
            reference,
            limit=limit,
        ),
        "Final validation loss at each optimizer's best rate. Triangles mark losses beyond the end "
        "of the axis; the mean is then printed beside the optimizer's name.",
        "Final validation loss of every seed, with one line for each optimizer.",
    )


def about(found: Iterable[Arm], entries: Mapping[str, Any]) -> dict[str, str]:
    """Returns the description of each arm, by its label. `entries` have the field `about`."""
    known = {arm.optimizer: arm.label for arm in found if arm.optimizer in entries}
    return {label: f"{entries[name].about}." for name, label in known.items()}


def report(
    study: str,
    folder: Path,
    files: Files,
    cell: str,
    abstract: Sequence[str],
    table: Table,
    figures: Sequence[Any] = (),
    *,
    before: Sequence[Section] = (),
    beside: Sequence[Section] = (),
    limits: Sequence[str] = (),
    measured: Mapping[str, str] | None = None,
    **summary: Any,
) -> Report:
    """Returns the report of a sweep. Its last section lists all cells.

    Args:
        study: The heading of the page.
        folder: The folder of the sweep.
        files: The contents of its files.
        cell: What a training has, which completes "each with ...".
        abstract, table, figures: As in `page.Report`.
        before, beside: Sections before the table, and after it.
        limits: Sentences about the limits of the study.
        measured: Definitions of what was measured, by term.
        **summary: Further entries of summary.json. Stored results are not changed.
    """
    left_out = ("text", "suite", "clips")
    sections = [
        *before,
        Section("arms", "Every optimizer at its best rate", [table]),
        *beside,
        Section("figures", "Figures", figures),
        Section("limits", "Limits of so small a study", [[*limits]]),
        Section("criteria", "How it was measured", [measured]),
        Section("cells", "Every finished cell", [cells_table(files.rows)]),
    ]
    return Report(
        study,
        f"{folder.resolve().name} · {finished(files)}, each with {cell}",
        abstract,
        table,
        sections,
        flat({key: value for key, value in files.config.items() if key not in left_out}),
        files.summary["machine"],
        files.summary["version"],
        files.summary | summary if files.rows else None,
    )
