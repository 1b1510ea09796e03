"""The report's figures of single cells: accuracy against epoch, and the epochs of every arm."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import (
    CENSORED_MARK,
    DASHES,
    GROKKED_MARK,
    MEMORISED_MARK,
    POINT_MARK,
    Curve,
    Milestones,
    Sample,
    draw_boxes,
    draw_curves,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
)
from experiments.grok import grid
from experiments.grok.config import Panel
from experiments.grok.report_data import Arm, Run, aggregate
from experiments.grok.report_sweep import plain
from experiments.grok.report_tests import BASELINE
from experiments.grok.train import GROKKED_ACCURACY

# More than these make a panel of curves, or a line of boxes, illegible.
FEW_OPTIMIZERS, FEW_SETTINGS = 6, 8
MEDIAN_MARK: dict[str, Any] = {"marker": "|", "ms": 11, "mew": 2.4, "ls": "none"}
LOST_MARK: dict[str, Any] = {"marker": "x", "ms": 5, "mew": 1.4, "ls": "none"}


def many_arms(run: Run) -> bool:
    """Whether the run compares more optimizers than one panel can tell apart."""
    return len(run.optimizers()) > FEW_OPTIMIZERS


def curves_figure(run: Run) -> Figure:
    """Accuracy against epoch, a panel per task, softmax and setting.

    Where there are many optimizers, a panel for each of them, beside the baseline.
    """
    everywhere = run.optimizers()
    views = [(_title(panel), panel, everywhere) for panel in run.panels()]
    if many_arms(run):
        views = [
            (f"{title}\n{optimizer_label(name)}" if len(views) > 1 else optimizer_label(name),
             panel, [*dict.fromkeys((BASELINE, name))])
            for title, panel, _ in views
            for name in everywhere
        ]  # fmt: skip
    views = views or [("no cell · begun", Panel("", ""), [])]
    kinds = len({panel.softmax for _, panel, _ in views})
    columns = min(len(views), kinds if 1 < kinds <= 4 and not many_arms(run) else 4)
    lines = math.ceil(len(views) / columns)
    wide, high = (6.6, 3.6) if len(views) == 1 else (max(3.1, 6.6 / columns), 2.3)
    figure = new_figure(wide * columns, high * lines + 0.6)
    places = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    arms = {(arm.panel, arm.optimizer): arm for arm in aggregate(run.rows, run.budget)}
    for place, axes in enumerate(places.flat):
        if place >= len(views):
            axes.remove()
            continue
        title, panel, shown = views[place]
        curves: dict[str, list[Curve]] = {}
        marks = {}
        for cell, trace in run.traces.items():
            if cell.panel != panel or cell.optimizer not in shown:
                continue
            columns_of = ("epoch", "train_accuracy", "validation_accuracy")
            curves.setdefault(cell.optimizer, []).append(
                Curve(*([r[c] for r in trace] for c in columns_of))
            )
            if arm := arms.get((cell.panel, cell.optimizer)):
                medians = (arm.memorized, arm.grok_sustained)
                found = Milestones(*(None if m.at_least else m.value for m in medians))
                marks[cell.optimizer] = found
        draw_curves(axes, curves, marks, GROKKED_ACCURACY)
        axes.set_title(title, loc="left")
        if place % columns == 0:
            axes.set_ylabel("accuracy (%)")
        if place + columns >= len(views):
            # A panel with none below it, which sharex would leave without numbers.
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("epoch (log scale)")
    named = [n for n in everywhere if n == BASELINE] if many_arms(run) else everywhere
    handles = [legend_line(optimizer_label(n), optimizer_color(n), lw=4) for n in named]
    handles += [
        legend_line("validation, median", lw=2, ls=DASHES),
        legend_line("training, median", lw=1.1, alpha=0.7),
        legend_line("one seed", lw=0.7, alpha=0.7),
        legend_line("95 %", "#444444", lw=1, ls=":"),
        legend_line("memorised", mfc="white", **MEMORISED_MARK),
        legend_line("grokked (sustained)", **GROKKED_MARK),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if columns < 4 else 8)
    return figure


def _title(panel: Panel) -> str:
    return str(panel) if not panel.point else panel.point.replace(" ", "\n")


def in_rows(run: Run) -> bool:
    """Whether the arms are too many for boxes side by side, and have a row each."""
    return many_arms(run) or len({cell.point for cell in run.cells}) > FEW_SETTINGS


def epochs_figure(run: Run) -> Figure:
    """The sustained grokking epoch of every cell, as boxes or, where arms are many, as rows."""
    return _rows_figure(run) if in_rows(run) else _boxes_figure(run)


def _boxes_figure(run: Run) -> Figure:
    """A line of boxes per softmax, a group per task."""
    kinds = list(dict.fromkeys(row["softmax"] for row in run.rows)) or ["no cell finished"]
    names = run.optimizers()
    panels = [panel for panel in run.panels() if any(run.of(panel, name) for name in names)]
    swept = [panel.point for panel in panels if panel.point]
    epochs = [row["grok_epoch_sustained"] or run.budget for row in run.rows] or [1]
    boxes = len({(row["task"], row["point"], row["optimizer"]) for row in run.rows})
    width = max(4.2, 0.5 * (boxes / len(kinds) + 0.8 * len(panels)) + 1.2)
    figure = new_figure(width, 2.3 * len(kinds) + 1.1)
    for softmax, axes in zip(
        kinds, figure.subplots(len(kinds), squeeze=False, sharey=True).flat, strict=True
    ):
        groups = []
        for panel in (panel for panel in panels if panel.softmax == softmax):
            cells = {name: run.of(panel, name) for name in names}
            samples = [
                Sample(name, [row["grok_epoch_sustained"] for row in rows])
                for name, rows in cells.items()
                if rows or not swept
            ]
            values = [pair.rpartition("=")[2] for pair in panel.point.split()]
            other = "not swept" if swept else panel.task
            groups.append(("\n".join(values) or other, samples))
        draw_boxes(axes, groups, run.budget, log=max(epochs) > 10 * min(epochs))
        if swept:
            axes.set_xlabel(", ".join(map(plain, grid.values(swept[0]))))
        axes.set_ylabel("grokking epoch")
        if len(kinds) > 1:
            axes.set_title(softmax, loc="left")
    censored = sum(row["censored"] for row in run.rows)
    handles = [legend_line(optimizer_label(n), optimizer_color(n), lw=4) for n in names]
    handles += [
        legend_line("one cell", **POINT_MARK),
        legend_line(f"{censored} censored", mfc="white", **CENSORED_MARK),
        legend_line(f"budget, {run.budget} epochs", "#444444", lw=1, ls=":"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if width < 6 else 6)
    return figure


def _rows_figure(run: Run) -> Figure:
    """A row per arm: the fastest above, a column per panel; of a sweep a column per optimizer."""
    swept = any(cell.point for cell in run.cells)
    columns: dict[str, list[Arm]] = {}
    for arm in aggregate(run.rows, run.budget):
        title = optimizer_label(arm.optimizer) if swept else str(arm.panel)
        columns.setdefault(title, []).append(arm)
    longest = max(map(len, columns.values()), default=1)
    figure = new_figure(max(6.6, 4.2 * len(columns)), 0.21 * longest + 1.3)
    panels = figure.subplots(1, len(columns) or 1, squeeze=False, sharex=True).flat
    for axes, (title, arms) in zip(panels, columns.items(), strict=False):
        if not swept:
            arms.sort(key=lambda arm: (arm.grok_sustained.at_least, arm.grok_sustained.value))
        for place, arm in enumerate(arms):
            _draw_row(axes, place, arm, run)
        labels = [_settings(arm.panel) if swept else optimizer_label(arm.optimizer) for arm in arms]
        axes.set_yticks(range(len(arms)), labels)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.axvline(run.budget, color="#444444", linestyle=":", linewidth=1, zorder=1.5)
        plain_log_axis(axes, "x")
        axes.set_title(title, loc="left")
        axes.set_xlabel("grokking epoch (log scale)")
        axes.set_ylabel(", ".join(map(plain, grid.values(arms[0].panel.point))))
    censored, lost = (
        sum(bool(row[key]) for row in run.rows) for key in ("censored", "collapse_epoch")
    )
    handles = [
        legend_line("one cell", **POINT_MARK),
        legend_line("median", **MEDIAN_MARK),
        legend_line(f"{censored} censored", mfc="white", **CENSORED_MARK),
        legend_line(f"{lost} lost again", **LOST_MARK),
        legend_line(f"budget, {run.budget} epochs", "#444444", lw=1, ls=":"),
    ]
    if not lost:
        del handles[3]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def _settings(panel: Panel) -> str:
    """A point's values without their names, as "0.01, 1"."""
    return ", ".join(p.rpartition("=")[2] for p in panel.point.split()) or "the run's"


def _draw_row(axes: Axes, place: int, arm: Arm, run: Run) -> None:
    color = optimizer_color(arm.optimizer)
    cells = run.of(arm.panel, arm.optimizer)
    found = [cell["grok_epoch_sustained"] for cell in cells]
    shown = sorted(run.budget if epoch is None else epoch for epoch in found)
    axes.plot([shown[0], shown[-1]], [place, place], color=color, lw=1.2, alpha=0.6)
    if not arm.grok_sustained.at_least:
        axes.plot(arm.grok_sustained.value, place, color=color, zorder=3, **MEDIAN_MARK)
    # Censored cells lie on one spot; a little apart, they can be counted.
    for apart, epoch in zip(np.linspace(-0.2, 0.2, len(found) or 1), found, strict=False):
        style = CENSORED_MARK | {"mfc": "white"} if epoch is None else POINT_MARK
        at = (run.budget, place + apart) if epoch is None else (epoch, place)
        axes.plot(*at, color=color, zorder=4, clip_on=False, **style)
    for cell in cells:
        if cell["collapse_epoch"]:
            axes.plot(cell["collapse_epoch"], place, color=color, zorder=4, **LOST_MARK)
