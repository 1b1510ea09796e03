"""The run beside "Muon Optimizer Accelerates Grokking" (Tveit et al., 2504.16041)."""

import statistics

from matplotlib.figure import Figure

from experiments.grok import statistics as tests
from experiments.grok.report_data import BASELINE, Run, censored_median
from experiments.grok.report_figures import Sample, draw_boxes
from experiments.report.figures import (
    BEYOND,
    legend,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
)
from experiments.report.text import number

MEANS = {"adamw": 153.09, "muon": 102.89}
# Read off the paper's box plot: quartiles, median, and the farthest outlier.
BOXES = {
    "adamw": {"q1": 60, "med": 103, "q3": 152, "fliers": [872]},
    "muon": {"q1": 40, "med": 79, "q3": 106, "fliers": [1000]},
}
COLUMNS = (
    "optimizer", "paper's mean epoch", "mean epoch of the trainings that grokked", "grokked",
    "mean, censored trainings at the budget", "median epoch", "AdamW's mean over it",
)  # fmt: skip


def pooled(run: Run, name: str) -> list[int | None]:
    """First grokking epochs, as the paper's, of all finished cells of an optimizer."""
    return [row["grok_epoch"] for row in run.of(None, name)]


def table(run: Run) -> list[list[str]]:
    """Rows in the order of `COLUMNS`."""
    rows, means = [], {}
    for name in run.optimizers():
        epochs = pooled(run, name)
        if not epochs:
            continue
        grokked = [epoch for epoch in epochs if epoch is not None]
        means[name] = statistics.fmean(run.budget if epoch is None else epoch for epoch in epochs)
        bound = "≥ " if len(grokked) < len(epochs) else ""
        rows.append(
            [
                optimizer_label(name),
                f"{MEANS[name]:.2f}" if name in MEANS else "–",
                number(statistics.fmean(grokked)) if grokked else "–",
                f"{len(grokked)} of {len(epochs)}",
                f"{bound}{number(means[name])}",
                censored_median(epochs, [run.budget] * len(epochs)).text(),
                f"{means[BASELINE] / means[name]:.2f}" if BASELINE in means else "–",
            ]
        )
    return rows


def welch(run: Run) -> str:
    """Welch's t of AdamW and Muon over all cells, as the paper pools them, in a sentence."""
    found = tests.welch(pooled(run, "adamw"), pooled(run, "muon"))
    if found is None:
        return ""
    return (
        f"In this run, pooled the same way without censored trainings, t is {found.t:.2f} with "
        f"{number(found.degrees)} degrees of freedom, p {found.p:.2g}. "
    )


def figure(run: Run) -> Figure:
    """The paper's boxes beside this run's, of all tasks and output functions together."""
    samples = [Sample(name, pooled(run, name)) for name in run.optimizers()]
    figure = new_figure(max(6.0, 1.5 * len(samples) + 3.2), 3.6)
    ratio = [2, max(2, 1.4 * len(samples))]
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=ratio)
    for place, (name, box) in enumerate(BOXES.items()):
        color = optimizer_color(name)
        left.bxp(
            [{"label": optimizer_label(name), "whislo": box["q1"], "whishi": box["q3"]} | box],
            positions=[place],
            widths=0.6,
            patch_artist=True,
            showcaps=False,
            manage_ticks=False,
            boxprops={"facecolor": color + "22", "edgecolor": color},
            medianprops={"color": color, "linewidth": 2},
            flierprops={"marker": "x", "markeredgecolor": color},
        )
        left.plot(place, MEANS[name], "_", color=color, ms=18, mew=1, ls="none")
    left.set_xticks(range(len(BOXES)), [optimizer_label(name) for name in BOXES])
    left.set_title("paper, read off its figure", loc="left")
    left.set_ylabel("grokking epoch")
    draw_boxes(right, [("all tasks", samples)], run.budget, log=True)
    right.set_title("this run", loc="left")
    plain_log_axis(left, "y")
    legend(
        figure,
        (),
        legend_line("paper's mean", "#444444", marker="_", ms=12, ls="none"),
        legend_line("paper's farthest outlier", "#444444", marker="x", ls="none"),
        legend_line("censored", "#444444", **BEYOND),
    )
    return figure
