"""Report of the family study: reads a run's files, draws its figures, writes report.html.

It never trains, so it can be made again at any time: `python -m experiments.family.report FOLDER`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.commands import reporting
from experiments.family.config import BASELINE
from experiments.family.report_data import Arm, aggregate, as_json, curves, points
from experiments.figures import (
    CENSORED_MARK,
    GROKKED_MARK,
    POINT_MARK,
    ceiling,
    figure_style,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
)
from experiments.optimizers import ARMS
from experiments.pages import number, save_figure, text_table, write_page
from experiments.runs import write_json
from experiments.sweep import Files, load_run, mean_curve

_REFERENCE = {"color": "#444444", "linestyle": ":", "linewidth": 1, "zorder": 1.5}


def loss_text(arm: Arm) -> str:
    """The final loss with its spread, e.g. "1.652 ± 0.004"."""
    if not math.isfinite(arm.loss):
        return "diverged"
    return f"{arm.loss:.3f}" + ("" if arm.spread is None else f" ± {arm.spread:.3f}")


def difference_text(arm: Arm) -> str:
    """The difference to AdamW with its interval, e.g. "−0.25 [−0.26, −0.23]"."""
    if arm.difference is None:
        return "–"
    mean, low, high = (f"{value:+.3f}".replace("-", "−") for value in arm.difference)
    return f"{mean} [{low}, {high}]"


def _cost(field: str, form: Callable[[float], str]) -> Callable[[Arm], str]:
    return lambda arm: form(arm.cost[field]) if arm.cost else "–"


# The table: heading in the report, heading in the terminal ("" to leave it out), the text for an
# arm.
COLUMNS: tuple[tuple[str, str, Callable[[Arm], str]], ...] = (
    ("optimizer", "optimizer", lambda arm: optimizer_label(arm.optimizer)),
    ("best rate", "rate", lambda arm: f"{arm.best.rate:g}" + " (edge)" * arm.best.at_edge),
    ("final loss (nats a byte)", "loss", loss_text),
    ("minus AdamW's [95 % interval]", "minus AdamW's", difference_text),
    ("training step ÷ AdamW's", "step", lambda arm: number(arm.step_ratio)),
    ("update alone ÷ AdamW's", "update", _cost("times_baseline", number)),
    ("state (bytes a parameter)", "bytes", _cost("state_bytes_per_parameter", "{:.2f}".format)),
    ("working memory of the update (bytes)", "", _cost("temp_bytes", "{:,}".format)),
    ("cells", "", lambda arm: str(arm.cells)),
    ("diverged", "", lambda arm: str(arm.diverged)),
)
CAPTION = (
    "loss: at the best rate, mean ± deviation over seeds\n"
    "minus AdamW's: with its 95 % interval, paired by seed\n"
    "step, update: time over AdamW's; bytes: of state a parameter"
)


def terminal_table(arms: Sequence[Arm]) -> Table:
    """The table for the terminal, with the numbers of the HTML table."""
    return text_table("The family, lowest loss first", COLUMNS, arms, CAPTION)


def abstract(arms: Sequence[Arm], finished: int, total: int) -> list[str]:
    """The result in plain sentences, every number computed from the run."""
    if not arms:
        return ["No cell has finished yet."]
    sentences = [f"{finished} of {total} cells finished so far."] if finished < total else []
    first = arms[0]
    sentences.append(
        f"{optimizer_label(first.optimizer)} has the lowest mean validation loss at its best rate, "
        f"{loss_text(first)} nats a byte."
    )
    compared = [arm for arm in arms if arm.difference]
    below = [arm for arm in compared if arm.difference.high < 0]
    above = [arm for arm in compared if arm.difference.low > 0]
    if compared:
        sentences.append(
            f"Of {len(compared)} {'arm' if len(compared) == 1 else 'arms'} beside AdamW, the 95 % "
            f"interval of the difference lies below zero for {len(below)} and above for "
            f"{len(above)}."
        )
    edge = [optimizer_label(arm.optimizer) for arm in arms if arm.best.at_edge]
    if edge:
        sentences.append(
            f"Still best at the edge of the rates tried, so perhaps better beyond: "
            f"{', '.join(edge)}."
        )
    if diverged := sum(arm.diverged for arm in arms):
        sentences.append(f"{diverged} {'cell' if diverged == 1 else 'cells'} diverged.")
    return sentences


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, which share their vertical axis."""
    columns = min(count, 5)
    lines = math.ceil(count / columns)
    figure = new_figure(max(7.0, 2.2 * columns), (2.4 if lines == 1 else 1.9) * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for spare in grid.flat[count:]:
        spare.remove()
    return figure, list(grid.flat[:count])


def rates_figure(files: Files, arms: Sequence[Arm]) -> Figure:
    """Final loss against learning rate, a panel for each optimizer."""
    figure, grid = panels(len(arms))
    top = ceiling(arms)
    baseline = _baseline(arms)
    for arm, axes in zip(arms, grid, strict=True):
        color = optimizer_color(arm.optimizer)
        for rate, loss in points(files, arm):
            mark = POINT_MARK if loss < top else CENSORED_MARK | {"mfc": "white"}
            axes.plot(rate, min(loss, top), color=color, clip_on=False, zorder=4, **mark)
        shown = {rate: min(loss, top) for rate, loss in arm.losses.items()}
        axes.plot([*shown], [*shown.values()], color=color, lw=1.4)
        if arm.loss < top:
            axes.plot(arm.best.rate, arm.loss, color=color, zorder=5, **GROKKED_MARK)
        if baseline:
            axes.axhline(baseline.loss, **_REFERENCE)
        axes.set_title(optimizer_label(arm.optimizer), loc="left")
        axes.margins(x=0.15)
        plain_log_axis(axes, "x")
        axes.set_ylim(top=top)
    _name_axes(grid, "learning rate", "final loss")
    handles = [
        legend_line("mean over seeds", lw=1.4),
        legend_line("one seed", **POINT_MARK),
        legend_line("best rate", **GROKKED_MARK),
        legend_line("diverged, or beyond the axis", mfc="white", **CENSORED_MARK),
        legend_line("AdamW at its best rate", lw=1, ls=":"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(arms) < 5 else 5)
    return figure


def _baseline(arms: Sequence[Arm]) -> Arm | None:
    found = [arm for arm in arms if arm.optimizer == BASELINE and math.isfinite(arm.loss)]
    return found[0] if found else None


def _name_axes(grid: Sequence[Axes], x: str, y: str) -> None:
    for axes in grid:
        place = axes.get_subplotspec()
        if place.is_first_col():
            axes.set_ylabel(y)
        last_line = place.rowspan.stop == place.get_gridspec().nrows
        if last_line or place.num1 + place.get_gridspec().ncols >= len(grid):
            axes.set_xlabel(x)


def curves_figure(files: Files, arms: Sequence[Arm]) -> Figure:
    """Validation loss against step at each optimizer's best rate, AdamW's beside it."""
    figure, grid = panels(len(arms))
    baseline = _baseline(arms)
    reference = mean_curve(curves(files, baseline)) if baseline else []
    for arm, axes in zip(arms, grid, strict=True):
        color = optimizer_color(arm.optimizer)
        trainings = curves(files, arm)
        if arm is not baseline:
            axes.plot(*zip(*reference, strict=True), **_REFERENCE) if reference else None
        for training in trainings:
            line = [(row["step"], row["validation_loss"]) for row in training]
            axes.plot(*zip(*line, strict=True), color=color, lw=0.7, alpha=0.45) if line else None
        if middle := mean_curve(trainings):
            axes.plot(*zip(*middle, strict=True), color=color, lw=1.8)
        axes.set_title(optimizer_label(arm.optimizer), loc="left")
    _name_axes(grid, "step", "validation loss")
    handles = [
        legend_line("mean over seeds", lw=1.8),
        legend_line("one seed", lw=0.7, alpha=0.6),
        legend_line("AdamW, mean", lw=1, ls=":"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def final_figure(files: Files, arms: Sequence[Arm]) -> Figure:
    """Final loss of every seed at the best rates, one line an optimizer, the lowest on top."""
    finite = [arm for arm in arms if math.isfinite(arm.loss)]
    figure = new_figure(6.4, 0.24 * len(finite) + 1.1)
    axes = figure.subplots()
    if baseline := _baseline(arms):
        axes.axvline(baseline.loss, **_REFERENCE)
    for place, arm in enumerate(finite):
        color = optimizer_color(arm.optimizer)
        losses = [*arm.best.losses.values()]
        axes.plot([min(losses), max(losses)], [place, place], color=color, lw=1, alpha=0.5)
        axes.plot(losses, [place] * len(losses), color=color, **POINT_MARK)
        axes.plot(arm.loss, place, color=color, marker="|", ms=11, mew=2, ls="none")
    axes.set_yticks(range(len(finite)), [optimizer_label(arm.optimizer) for arm in finite])
    axes.set_ylim(len(finite) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("final validation loss (nats a byte)")
    handles = [
        legend_line("one seed", **POINT_MARK),
        legend_line("mean", marker="|", ms=11, mew=2, ls="none"),
        legend_line("AdamW, mean", lw=1, ls=":"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def write_report(folder: Path) -> Path:
    """Writes the figures, report.html and the table of summary.json into a run's folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    files = load_run(folder)
    arms = aggregate(files.rows, files.costs)
    summary = files.summary | {"arms": [as_json(arm) for arm in arms]}
    write_json(folder / "summary.json", summary)
    with figure_style():
        figures = {
            name: save_figure(draw(files, arms), folder / f"{name}.png")
            for name, draw in (
                ("rates", rates_figure),
                ("curves", curves_figure),
                ("final", final_figure),
            )
            if arms
        }
    names = {row["optimizer"] for row in files.rows}
    return write_page(
        Path(__file__).parent / "report.html.jinja",
        folder / "report.html",
        study="The family on a small language model",
        command="experiments.family.report",
        config=files.config | {"corpus": summary["corpus"]["name"]},
        machine=summary["machine"],
        version=summary["version"],
        abstract=abstract(arms, len(files.rows), summary["cells_total"]),
        columns=[heading for heading, *_ in COLUMNS],
        arms=[[form(arm) for *_, form in COLUMNS] for arm in arms],
        about={name: arm.about for name, arm in ARMS.items() if name in names},
        figures=figures,
        rows=files.rows,
        files=files,
        summary=summary,
    )


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the report of a family run again from its files; nothing is trained.

    Args:
        folder: The run's folder, e.g. runs/family/NAME.
    """
    with reporting(folder):
        path = write_report(folder)
        files = load_run(folder)
        console = Console()
        console.print(terminal_table(aggregate(files.rows, files.costs)))
        console.print(Text(str(path)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.family.report")
