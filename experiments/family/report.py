"""The report of the family study: every optimizer at its best rate on a small language model."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.differences import Interval
from experiments.family.config import BASELINE
from experiments.optimizers import ARMS
from experiments.report import arms
from experiments.report.figures import (
    REFERENCE,
    draw_series,
    grid_of,
    legend,
    legend_line,
    name_axes,
)
from experiments.report.names import optimizer_color, optimizer_label
from experiments.report.page import Column, Picture, Report, Table
from experiments.report.series import middle, series
from experiments.report.text import all_told, form, interval_text, number, p_text
from experiments.sweep import Files, load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
    """An arm with its costs.

    Attributes:
        step_ratio: The time of a training step over AdamW's, both medians over cells.
        cost: The cost of an update alone, from costs.json. None if it was not measured.
        to_muon: The mean difference of final losses to Muon's, paired by seed, and its p after
            Holm's correction. None if there is no Muon, or fewer than two pairs.
    """

    step_ratio: float | None = None
    cost: dict[str, float] | None = None
    to_muon: tuple[Interval | None, float | None] = (None, None)

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"step_ratio": self.step_ratio, "update": self.cost}


def aggregate(files: Files) -> list[Arm]:
    """Returns the arms, sorted by loss."""
    found = [
        Arm(
            optimizer=stored["optimizer"],
            step_ratio=stored["step_ratio"],
            cost=stored["update"],
            **arms.of_json(stored),
        )
        for stored in files.summary.get("arms", [])
        if not files.rows
    ]
    cells = arms.grouped(files, "optimizer")
    pace = {
        name: statistics.median(row["milliseconds_per_step"] for row in rows)
        for (name,), (rows, _) in cells.items()
    }
    found += arms.compared(
        [
            Arm(
                optimizer=name,
                step_ratio=pace[name] / pace[BASELINE] if BASELINE in pace else None,
                cost=files.costs.get(name),
                **arms.of_cells(*own, files.config.get("sweep_seeds")),
            )
            for (name,), own in cells.items()
        ]
    )
    beside_muon = arms.differences(found, "muon")
    found = [
        dataclasses.replace(arm, to_muon=beside_muon.get(arm.optimizer, arm.to_muon))
        for arm in found
    ]
    return sorted(found, key=lambda arm: arm.loss)


def _cost(field: str, spec: str = "", unit: float = 1) -> Callable[[Arm], str]:
    def text(arm: Arm) -> str:
        value = arm.cost and arm.cost.get(field)
        value = value if value is None else value / unit
        return form(value, spec) if spec else number(value)

    return text


COLUMNS: tuple[Column, ...] = (
    ("optimizer", "optimizer", lambda arm: arm.label),
    arms.RATE,
    ("final loss (nats per byte)", "loss", lambda arm: arm.loss_text()),
    ("minus Muon's [95 % interval]", "minus Muon's", lambda arm: interval_text(arm.to_muon[0])),
    ("p of this difference, after Holm", "p", lambda arm: p_text(arm.to_muon[1])),
    ("minus AdamW's [95 % interval]", "minus AdamW's", lambda arm: interval_text(arm.difference)),
    ("training step ÷ AdamW's", "step", lambda arm: number(arm.step_ratio)),
    ("update alone ÷ AdamW's", "update", _cost("times_baseline")),
    ("products of the update (MFLOP)", "MFLOP", _cost("flops", ".1f", 1e6)),
    ("decompositions (MFLOP)", "", _cost("decomposition_flops", ".1f", 1e6)),
    ("state (bytes per parameter)", "bytes", _cost("state_bytes_per_parameter", ".2f")),
    ("working memory of the update (bytes)", "", _cost("temp_bytes", ",")),
    ("cells", "", lambda arm: str(arm.cells)),
    ("diverged", "", lambda arm: str(arm.diverged)),
)
NOTE = (
    "loss: at the best rate, mean ± deviation over seeds\n"
    "minus Muon's, minus AdamW's: with 95 % interval, paired by seed; p: after Holm\n"
    "step, update: time ÷ AdamW's; MFLOP: of the update; bytes: of state per parameter"
)
CAPTION = (
    "Optimizers sorted by final validation loss, with its mean and standard deviation over seeds. "
    "The difference is paired by seed, with each optimizer at its own best rate. Its interval is "
    "Student's t, without correction for the number of rows or for the choice of the rate; p is "
    "corrected for the rows by Holm's procedure. "
    "“(edge)” marks a best rate that is the highest or lowest tried."
)
MEASURED = {
    "Task": "Predicting the next byte ({corpus[name]}), trained on {corpus[train_bytes]:,} bytes "
    "for {config[steps]} steps and validated on {config[validation]} fixed windows of "
    "{config[context]} bytes out of {corpus[validation_bytes]:,} others. SHA-256 {corpus[sha256]}.",
    "Seeds": "A seed sets the initial parameters and the batches, equally for all optimizers and "
    "rates.",
    "Learning rates": "The optimizer's own rate is swept by factors of "
    "{config[sweep][factor]:g}. The sweep is extended by at most {config[sweep][limit]} rates on a "
    "side, until the best rate has a neighbour on each side. Beside all other optimizers, AdamW "
    "trains embedding, head and gains at the rate {config[adamw][learning_rate]}.",
    "Training step": "Median time of a step over all trainings of the optimizer, divided by "
    "AdamW's. Trainings of different optimizers alternated.",
    "Update alone, state, working memory": "Of tx.update and optax.apply_updates on this model, "
    "in alternating rounds of many steps in one process: median ratio, exact size of the state, "
    "and memory that the compiled update allocates besides arguments and results. Products and "
    "decompositions are a step's mean FLOPs by muon_jax.plan, the latter by textbook counts.",
}


def abstract(found: Sequence[Arm], files: Files) -> list[str]:
    """Returns the results in sentences whose numbers are computed from the run."""
    if not found:
        return ["No training has finished yet."]
    sentences = [*arms.progress(files), f"{arms.lowest(found)} per byte."]
    for base, gaps in (
        ("Muon's", [(arm, *arm.to_muon) for arm in found if arm.to_muon[0]]),
        ("AdamW's", [(arm, arm.difference, arm.p) for arm in found if arm.difference]),
    ):
        if len(gaps) == 1 and base == "AdamW's":
            ((arm, gap, p),) = gaps
            told = f"{interval_text(gap)} nats per byte, p {p_text(p)}"
            sentences.append(f"{arm.label}'s loss minus AdamW's: {told}.")
        if len(gaps) > 1:
            sure = [(arm.label, gap.mean < 0) for arm, gap, p in gaps if p is not None and p < 0.05]
            below = [label for label, lower in sure if lower]
            named = f" ({', '.join(below)})" if 0 < len(below) < 9 else ""
            sentences.append(
                f"Of {len(gaps)} other optimizers, the loss of {len(below)} is below {base}{named} "
                f"and that of {len(sure) - len(below)} above it, p < 0.05 after Holm's correction."
            )
    return sentences + arms.caveats(found)


def curves_figure(found: Sequence[Arm]) -> Figure:
    """Draws validation loss against step at each optimizer's best rate, with AdamW's beside it."""
    figure, grid = grid_of(len(found), 5, 2.2, 1.9 if len(found) > 5 else 2.4, sharey=True, least=7)
    lines = [[series(h, "validation_loss") for h in arm.histories] for arm in found]
    base = next((own for a, own in zip(found, lines, strict=True) if a.optimizer == BASELINE), [])
    for arm, own, axes in zip(found, lines, grid, strict=True):
        if own is not base:
            axes.plot(*middle(base), **REFERENCE)
        draw_series(axes, own, {"color": optimizer_color(arm.optimizer)})
        axes.set_title(optimizer_label(arm.optimizer), loc="left")
    name_axes(grid, "step", "validation loss")
    handles = [
        legend_line("mean over seeds", lw=1.8),
        legend_line("one seed", lw=0.7, alpha=0.6),
        legend_line("AdamW, mean", lw=1, ls=":"),
    ]
    legend(figure, (), *handles)
    return figure


def report(folder: Path) -> Report:
    """Returns the report of the variants at their best rates."""
    files = load_run(folder)
    found, facts = aggregate(files), {"config": files.config, "corpus": files.summary["corpus"]}
    table = Table(COLUMNS, found, CAPTION, "The family, lowest loss first", NOTE).known()
    curves = Picture(
        "curves",
        lambda: curves_figure(found),
        "Validation loss during training at the best rates.",
        "Validation loss against step, with one panel for each optimizer.",
    )
    unit = "nats per byte"
    figures = [arms.finals(found, unit)]
    figures += [arms.rates(found, unit)] * any(arm.is_swept for arm in found)
    figures += [curves] * bool(files.rows)
    return arms.report(
        "Variants of Muon on a small language model",
        folder,
        files,
        "an optimizer, a learning rate and a seed",
        abstract(found, files),
        table,
        figures if found else [],
        measured=all_told(MEASURED, facts) | arms.about(found, ARMS),
        arms=[arm.as_json() for arm in found],
    )
