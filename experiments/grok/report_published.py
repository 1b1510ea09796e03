"""Compares a run with "Muon Optimizer Accelerates Grokking" (Tveit et al., 2504.16041)."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.grok import statistics as tests
from experiments.grok.report_data import BASELINE, Arm, Run
from experiments.grok.report_figures import many_arms
from experiments.report.figures import (
    BEYOND,
    POINT_MARK,
    REFERENCE,
    legend,
    legend_line,
    new_figure,
    plain_log_axis,
)
from experiments.report.names import optimizer_color, optimizer_label
from experiments.report.page import Picture, Table
from experiments.report.text import number, p_text, plural

PAPER_MEAN: dict[str, Any] = {"marker": "D", "ms": 6, "mfc": "white", "mew": 1.2, "ls": "none"}
MEANS = {"adamw": 153.09, "muon": 102.89}
# Quartiles, median and most extreme outlier, read off the paper's box plot.
BOXES = {
    "adamw": {"q1": 60, "med": 103, "q3": 152, "fliers": [872]},
    "muon": {"q1": 40, "med": 79, "q3": 106, "fliers": [1000]},
}
PUBLISHED = (
    "“Muon Optimizer Accelerates Grokking” (Tveit et al., arXiv 2504.16041) reports mean grokking "
    "epochs of 153.09 with AdamW and 102.89 with Muon, a ratio of 1.49, pooled over its tasks and "
    "output functions. It does not state layers, width, learning rates, weight decay or seeds. "
    "This run covers {} and {}, with our own settings."
)
BESIDE = (
    "Left: the paper's quartiles, medians and most extreme outliers, read off its figure, and its "
    "means. Right: first grokking epochs of this run. Censored trainings count at the budget of "
    "{budget} epochs; whiskers include only trainings that grokked."
)
SLIP = (
    "The paper's p ≈ 6.33e-8 at t ≈ 5.0175 seems to be a typing error. No two-sided p at this t is "
    "below 5.2e-7, and with 880 degrees of freedom, from 882 trainings, it is 6.33e-7. This p "
    "value treats tasks as repetitions of one experiment, so we do not try to reproduce it."
)
DOUBT = (
    "Essential AI (“Muon Doesn't Clearly Grok Faster”, June 2025) reports that the advantage "
    "disappears over a wider range of hyperparameters and model sizes."
)
COLUMNS = (
    "optimizer", "paper's mean epoch", "mean epoch of the trainings that grokked", "grokked",
    "mean, censored trainings at the budget", "median epoch", "AdamW's mean over it",
    "median memorised epoch", "median delay", "Welch's t against AdamW's, pooled",
)  # fmt: skip


def table(run: Run) -> list[list[str]]:
    """Returns the rows of the table, in the order of `COLUMNS`."""
    rows, base, arms = [], None, {arm.optimizer: arm for arm in run.pooled()}
    for name, arm in arms.items():
        epochs = first_epochs(arm)
        grokked = [epoch for epoch in epochs if epoch is not None]
        mean = statistics.fmean(run.budget if epoch is None else epoch for epoch in epochs)
        base = mean if name == BASELINE else base
        t = None
        if name != BASELINE and BASELINE in arms:
            t = tests.welch(first_epochs(arms[BASELINE]), epochs)
        rows.append(
            [
                arm.label,
                f"{MEANS[name]:.2f}" if name in MEANS else "–",
                number(statistics.fmean(grokked)) if grokked else "–",
                f"{len(grokked)} of {arm.n}",
                f"{'≥ ' * (len(grokked) < arm.n)}{number(mean)}",
                arm.median("grok_epoch").text(),
                f"{base / mean:.2f}" if base else "–",
                arm.median("memorized_epoch").text(),
                arm.median("delay").text(),
                f"{t.statistic:.2f} (p {p_text(t.pvalue)}, {t.df:.0f} df)" if t else "–",
            ]
        )
    return rows


def first_epochs(arm: Arm) -> list[int | None]:
    """Returns the first grokking epochs, the paper's criterion."""
    return [row["grok_epoch"] for row in arm.cells]


def figure(run: Run) -> Figure:
    """Draws the paper's boxes beside this run's, over all tasks and output functions."""
    arms = run.pooled()
    figure = new_figure(max(6.0, 1.5 * len(arms) + 3.2), 3.6)
    ratio = [2, max(2, 1.4 * len(arms))]
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=ratio)
    for place, (name, box) in enumerate(BOXES.items()):
        color = optimizer_color(name)
        _draw_quartiles(left, place, color, box)
        left.plot([place] * len(box["fliers"]), box["fliers"], "x", color=color)
        left.plot(place, MEANS[name], color=color, **PAPER_MEAN)
    for place, arm in enumerate(arms):
        _draw_trainings(right, place, arm)
    left.set_xticks(range(len(BOXES)), [optimizer_label(name) for name in BOXES])
    right.set_xticks(range(len(arms)), [f"{arm.label}\nn = {arm.n}" for arm in arms])
    left.set_title("paper, read off its figure", loc="left")
    right.set_title("this run, all tasks", loc="left")
    left.set_ylabel("grokking epoch (log scale)")
    right.axhline(run.budget, **REFERENCE)
    plain_log_axis(left, "y")
    legend(
        figure,
        (),
        legend_line("paper's mean", "#444444", **PAPER_MEAN),
        legend_line("paper's farthest outlier", "#444444", marker="x", ls="none"),
        legend_line("censored, ×n trainings", "#444444", **BEYOND),
    )
    return figure


def _draw_trainings(axes: Axes, place: int, arm: Arm) -> None:
    """Draws all epochs, their quartiles, and the number of censored trainings at the budget."""
    color = optimizer_color(arm.optimizer)
    known = [epoch for epoch in first_epochs(arm) if epoch is not None]
    censored = arm.n - len(known)
    q1, middle, q3 = np.percentile([*known, *[arm.budget] * censored], (25, 50, 75))
    ends = {"whislo": min([*known, q1]), "whishi": max([*known, q3])}  # of those that grokked
    _draw_quartiles(axes, place, color, ends | {"q1": q1, "med": middle, "q3": q3})
    asides = np.linspace(-0.2, 0.2, len(known)) if len(known) > 1 else [0.0] * len(known)
    axes.plot(place + np.array(asides), known, color=color, zorder=4, **POINT_MARK)
    if censored:
        axes.plot(place, arm.budget, color=color, zorder=4, **BEYOND)
        at = {"xytext": (7, 4), "textcoords": "offset points"}
        axes.annotate(f"×{censored}", (place, arm.budget), color=color, **at)


def _draw_quartiles(axes: Axes, place: float, color: str, box: dict[str, Any]) -> None:
    """Draws a box with its median, and whiskers if `box` has their ends."""
    line = {"color": color, "linewidth": 1}
    axes.bxp(
        [{"whislo": box["q1"], "whishi": box["q3"]} | box],
        positions=[place],
        widths=0.6,
        showfliers=False,
        showcaps="whislo" in box,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": color + "22", "edgecolor": color, "linewidth": 1},
        medianprops={"color": color, "linewidth": 2},
        whiskerprops=line,
        capprops=line,
    )


def items(run: Run) -> list[object]:
    """Returns the comparison with the paper, or nothing for sweeps and for many optimizers."""
    if run.is_sweep or many_arms(run):
        return []
    tasks, kinds = run.config["tasks"], run.config["softmax"]
    facts = named("task", tasks), named("output function", kinds)
    found: list[object] = [PUBLISHED.format(*facts), Table.of_texts(COLUMNS, table(run))]
    if len(run.panels()) > 1:
        caption = BESIDE.format(budget=run.budget)
        alt = "Box plots of the grokking epoch: the paper's quartiles, and those of this run."
        found.append(Picture("published", lambda: figure(run), caption, alt))
    return [*found, SLIP, DOUBT]


def named(noun: str, names: Sequence[str]) -> str:
    """Returns names with their number, such as "2 tasks (add, mul)"."""
    return f"{plural(len(names), noun)} ({', '.join(names)})"
