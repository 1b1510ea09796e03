"""The run beside "Muon Optimizer Accelerates Grokking" (Tveit et al., 2504.16041)."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.grok import statistics as tests
from experiments.grok.report_data import BASELINE, Arm, Run
from experiments.grok.report_figures import Sample, draw_boxes, draw_quartiles, many_arms
from experiments.report.figures import (
    BEYOND,
    legend,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
)
from experiments.report.page import Picture, Table
from experiments.report.text import number, p_text, plural

PAPER_MEAN: dict[str, Any] = {"marker": "D", "ms": 6, "mfc": "white", "mew": 1.2, "ls": "none"}
MEANS = {"adamw": 153.09, "muon": 102.89}
# Read off the paper's box plot: quartiles, median, and the farthest outlier.
BOXES = {
    "adamw": {"q1": 60, "med": 103, "q3": 152, "fliers": [872]},
    "muon": {"q1": 40, "med": 79, "q3": 106, "fliers": [1000]},
}
PUBLISHED = (
    "“Muon Optimizer Accelerates Grokking” (Tveit et al., arXiv 2504.16041) reports mean grokking "
    "epochs of 153.09 with AdamW and 102.89 with Muon, a ratio of 1.49, pooled over its tasks and "
    "output functions, without its layers, width, rates, decay or seeds. This run covers {} and "
    "{}, with settings of its own."
)
BESIDE = (
    "Left: quartiles, medians and most extreme outliers, read off the paper's figure, and its "
    "means. Right: first grokking epochs of this run; censored trainings are counted at the budget "
    "of {budget} epochs, and whiskers end where trainings grokked."
)
SLIP = (
    "The paper's p ≈ 6.33e-8 at t ≈ 5.0175 seems to be a typing error: no two-sided p there is "
    "below 5.2e-7, and with 880 degrees of freedom, of 882 trainings, it is 6.33e-7. Such a "
    "p takes tasks for repetitions of one experiment, so it is not a target."
)
DOUBT = (
    "Essential AI (“Muon Doesn't Clearly Grok Faster”, June 2025) sees the advantage disappear "
    "over a wider range of hyperparameters and model sizes."
)
COLUMNS = (
    "optimizer", "paper's mean epoch", "mean epoch of the trainings that grokked", "grokked",
    "mean, censored trainings at the budget", "median epoch", "AdamW's mean over it",
    "median memorised epoch", "median delay", "Welch's t against AdamW's, pooled",
)  # fmt: skip


def pooled(run: Run, name: str) -> list[int | None]:
    """First grokking epochs, as the paper's, of all finished cells of an optimizer."""
    return [row["grok_epoch"] for row in run.of(None, name)]


def table(run: Run) -> list[list[str]]:
    """Rows in the order of `COLUMNS`."""
    rows, means = [], {}
    for name in run.optimizers():
        if not (epochs := pooled(run, name)):
            continue
        arm = Arm.of(run, run.of(None, name))
        grokked = [epoch for epoch in epochs if epoch is not None]
        means[name] = statistics.fmean(run.budget if epoch is None else epoch for epoch in epochs)
        t = None if name == BASELINE else tests.welch(pooled(run, BASELINE), epochs)
        rows.append(
            [
                arm.label,
                f"{MEANS[name]:.2f}" if name in MEANS else "–",
                number(statistics.fmean(grokked)) if grokked else "–",
                f"{len(grokked)} of {len(epochs)}",
                f"{'≥ ' * (len(grokked) < len(epochs))}{number(means[name])}",
                arm.median("grok_epoch").text(),
                f"{means[BASELINE] / means[name]:.2f}" if BASELINE in means else "–",
                arm.median("memorized_epoch").text(),
                arm.median("delay").text(),
                f"{t.t:.2f} (p {p_text(t.p)}, {t.degrees:.0f} df)" if t else "–",
            ]
        )
    return rows


def figure(run: Run) -> Figure:
    """The paper's boxes beside this run's, of all tasks and output functions together."""
    samples = [Sample(name, pooled(run, name)) for name in run.optimizers()]
    figure = new_figure(max(6.0, 1.5 * len(samples) + 3.2), 3.6)
    ratio = [2, max(2, 1.4 * len(samples))]
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=ratio)
    for place, (name, box) in enumerate(BOXES.items()):
        color = optimizer_color(name)
        draw_quartiles(left, place, color, box)
        left.plot([place] * len(box["fliers"]), box["fliers"], "x", color=color)
        left.plot(place, MEANS[name], color=color, **PAPER_MEAN)
    left.set_xticks(range(len(BOXES)), [optimizer_label(name) for name in BOXES])
    left.set_title("paper, read off its figure", loc="left")
    left.set_ylabel("grokking epoch")
    draw_boxes(right, [("all tasks", samples)], run.budget, log=True)
    right.set_title("this run", loc="left")
    plain_log_axis(left, "y")
    legend(
        figure,
        (),
        legend_line("paper's mean", "#444444", **PAPER_MEAN),
        legend_line("paper's farthest outlier", "#444444", marker="x", ls="none"),
        legend_line("censored, ×n trainings", "#444444", **BEYOND),
    )
    return figure


def items(run: Run) -> list[object]:
    """The paper beside the run, where this has its kind of grid."""
    if run.is_sweep or many_arms(run):
        return []
    facts = named("task", run.config["tasks"]), named("output function", run.config["softmax"])
    found: list[object] = [PUBLISHED.format(*facts)]
    if rows := table(run):
        found.append(Table.of_texts(COLUMNS, rows))
        if len(run.panels()) > 1:
            caption = BESIDE.format(budget=run.budget)
            alt = "Box plots of the grokking epoch: the paper's quartiles, and those of this run."
            found.append(Picture("published", lambda: figure(run), caption, alt))
        found.append(SLIP)
    return [*found, DOUBT]


def named(noun: str, names: Sequence[str]) -> str:
    """As "2 tasks (add, mul)"."""
    return f"{plural(len(names), noun)} ({', '.join(names)})"
