"""Report of the suite of optimizers: reads its folder, draws its figures, writes report.html.

It never trains: `python -m experiments.pretrain.suites.optimizers_report FOLDER`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.commands import reporting
from experiments.differences import Interval, difference, holm, p_value
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
from experiments.pages import flop, number, save_figure, text_table, write_page
from experiments.pretrain.suites.config import BASELINE
from experiments.pretrain.suites.results import Arm, arms, as_json, draw_rates, loss_text
from experiments.runs import write_json
from experiments.sweep import Files, load_run

_REFERENCE = {"color": "#444444", "linestyle": ":", "linewidth": 1, "zorder": 1.5}
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


class Compared(NamedTuple):
    """An arm beside AdamW.

    Attributes:
        difference: of the final losses, paired by seed; None without two pairs.
        p: of the paired t test, corrected by Holm's method for all arms.
        tokens, flops, time: share of AdamW's whole training that the arm takes to AdamW's final
            loss; infinite if it never gets there, None where costs are not known.
    """

    arm: Arm
    difference: Interval | None
    p: float | None
    tokens: float | None
    flops: float | None
    time: float | None


def compare(found: Sequence[Arm]) -> list[Compared]:
    """All arms beside AdamW, the lowest loss first."""
    base = _baseline(found)
    others = [arm for arm in found if base and arm is not base]
    p_values = {arm.optimizer: p_value(arm.best.losses, base.best.losses) for arm in others}
    corrected = holm({name: p for name, p in p_values.items() if p is not None})
    return [_compare(arm, base if arm in others else None, corrected) for arm in found]


def _compare(arm: Arm, base: Arm | None, corrected: dict[str, float]) -> Compared:
    if base is None or not math.isfinite(base.loss):
        return Compared(arm, None, None, None, None, None)
    tokens = tokens_to(arm.curve, base.loss) / base.tokens
    flops = time = None
    if arm.cost and base.cost:
        flops = tokens * arm.step_flops / base.step_flops
        time = tokens * arm.cost["times_baseline"]
    return Compared(
        arm=arm,
        difference=difference(arm.best.losses, base.best.losses),
        p=corrected.get(arm.optimizer),
        tokens=tokens,
        flops=flops,
        time=time,
    )


def tokens_to(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """Where losses over tokens first reach a loss, between two evaluations; infinite if nowhere."""
    before = None
    for tokens, value in curve:
        if value <= loss:
            if before is None:
                return float(tokens)
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = tokens, value
    return math.inf


def _baseline(found: Sequence[Arm]) -> Arm | None:
    return next((arm for arm in found if arm.optimizer == BASELINE), None)


def _difference(row: Compared) -> str:
    if row.difference is None:
        return "–"
    center, low, high = (f"{value:+.3f}".replace("-", "−") for value in row.difference)
    return f"{center} [{low}, {high}]"


def _share(field: str) -> Callable[[Compared], str]:
    def text(row: Compared) -> str:
        share = getattr(row, field)
        return "–" if share is None else "never" if math.isinf(share) else f"{share:.0%}"

    return text


def _p(row: Compared) -> str:
    return "–" if row.p is None else "< 0.001" if row.p < 1e-3 else f"{row.p:.3f}"


def _cost(form: Callable[[Arm], str]) -> Callable[[Compared], str]:
    return lambda row: form(row.arm) if row.arm.cost else "–"


# The table: heading in the report, heading in the terminal ("" to leave it out), the text.
COLUMNS: tuple[tuple[str, str, Callable[[Compared], str]], ...] = (
    ("optimizer", "optimizer", lambda row: row.arm.label),
    ("best rate", "", lambda row: f"{row.arm.best.rate:g}" + " (edge)" * row.arm.best.at_edge),
    ("final loss (nats a token)", "loss", lambda row: loss_text(row.arm)),
    ("bits a byte", "", lambda row: number(row.arm.bits_per_byte)),
    ("minus AdamW's [95 % interval]", "minus AdamW's", _difference),
    ("p, Holm", "p", _p),
    ("to AdamW's loss: tokens", "tokens", _share("tokens")),
    ("FLOPs", "FLOPs", _share("flops")),
    ("time", "time", _share("time")),
    ("step time ÷ AdamW's", "", _cost(lambda arm: number(arm.cost["times_baseline"]))),
    ("optimizer's FLOPs a step", "", _cost(lambda arm: flop(arm.cost["optimizer_flops"]))),
    ("their share of the step", "", _cost(lambda arm: f"{arm.optimizer_share:.1%}")),
    ("cells", "", lambda row: str(row.arm.cells)),
    ("diverged", "", lambda row: str(row.arm.diverged)),
)
_CAPTION = (
    "loss: at the best rate, mean ± deviation over seeds\n"
    "minus AdamW's: with its 95 % interval, paired by seed; p after Holm\n"
    "tokens, FLOPs, time: to AdamW's final loss, of AdamW's whole training"
)


def terminal_table(folder: Path) -> Table:
    """The table for the terminal, with the numbers of the HTML table."""
    rows = compare(arms(load_run(folder)))
    return text_table("Optimizers, lowest loss first", COLUMNS, rows, _CAPTION)


def abstract(rows: Sequence[Compared], finished: int, total: int) -> list[str]:
    """The result in plain sentences, every number computed from the run."""
    if not rows:
        return ["No cell has finished yet."]
    sentences = [f"{finished} of {total} cells finished so far."] if finished < total else []
    first = rows[0]
    sentences.append(
        f"{first.arm.label} has the lowest mean loss at its best rate, {loss_text(first.arm)} nats "
        "a token."
    )
    tested = [row for row in rows if row.p is not None]
    if tested:
        below = sum(row.p < 0.05 and row.difference.mean < 0 for row in tested)
        above = sum(row.p < 0.05 and row.difference.mean > 0 for row in tested)
        sentences.append(
            f"Of {len(tested)} arms beside AdamW, {below} end lower and {above} higher at p < 0.05 "
            f"after Holm's correction."
        )
    muon = next((row for row in rows if row.arm.optimizer == "muon"), None)
    if muon and muon.tokens is not None and math.isfinite(muon.tokens):
        text = f"Muon takes {muon.tokens:.0%} of AdamW's tokens to AdamW's final loss"
        if muon.flops is not None:
            text += f", {muon.flops:.0%} of its FLOPs and {muon.time:.0%} of its time"
        sentences.append(text + ".")
    if edge := [row.arm.label for row in rows if row.arm.best.at_edge]:
        sentences.append(f"Still best at the edge of the rates tried: {', '.join(edge)}.")
    if diverged := sum(row.arm.diverged for row in rows):
        sentences.append(f"{diverged} {'cell' if diverged == 1 else 'cells'} diverged.")
    return sentences


def final_figure(found: Sequence[Arm]) -> Figure:
    """Final loss of every seed at the best rates, one line an optimizer, the lowest on top."""
    finite = [arm for arm in found if math.isfinite(arm.loss)]
    figure = new_figure(6.4, 0.26 * len(finite) + 1.2)
    axes = figure.subplots()
    base = _baseline(finite)
    if base:
        axes.axvline(base.loss, **_REFERENCE)
    for place, arm in enumerate(finite):
        color = optimizer_color(arm.optimizer)
        losses = [*arm.best.losses.values()]
        axes.plot([min(losses), max(losses)], [place, place], color=color, lw=1, alpha=0.5)
        axes.plot(losses, [place] * len(losses), color=color, **POINT_MARK)
        axes.plot(arm.loss, place, color=color, marker="|", ms=11, mew=2, ls="none")
    axes.set_yticks(range(len(finite)), [arm.label for arm in finite])
    axes.set_ylim(len(finite) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("final validation loss (nats a token)")
    handles = [
        legend_line("one seed", **POINT_MARK),
        legend_line("mean", marker="|", ms=11, mew=2, ls="none"),
        legend_line("AdamW, mean", lw=1, ls=":"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def rates_figure(found: Sequence[Arm]) -> Figure:
    """Final loss against learning rate, a panel for each optimizer."""
    columns = min(len(found), 5)
    lines = math.ceil(len(found) / columns)
    figure = new_figure(max(7.0, 2.2 * columns), (2.4 if lines == 1 else 1.9) * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    top, base = ceiling(found), _baseline(found)
    for spare in grid.flat[len(found) :]:
        spare.remove()
    for arm, axes in zip(found, grid.flat, strict=False):
        draw_rates(axes, arm, top)
        if base and base.loss < top:
            axes.axhline(base.losses[base.best.rate], **_REFERENCE)
        axes.set_title(arm.label, loc="left")
        axes.margins(x=0.15)
        plain_log_axis(axes, "x")
        axes.set_ylim(top=top)
    for axes in grid[:, 0]:
        axes.set_ylabel("final loss")
    for axes in grid.flat[max(len(found) - columns, 0) : len(found)]:
        axes.set_xlabel("learning rate")
    handles = [
        legend_line("mean over the seeds that choose", **POINT_MARK),
        legend_line("best rate", **GROKKED_MARK),
        legend_line("diverged, or beyond the axis", mfc="white", **CENSORED_MARK),
        legend_line("AdamW at its best rate", lw=1, ls=":"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def curves_figure(found: Sequence[Arm]) -> Figure:
    """Mean loss at the best rates against tokens, FLOPs and time."""
    drawn = [arm for arm in found if arm.curve]
    costs = all(arm.cost for arm in drawn)
    figure = new_figure(9.6 if costs else 4.8, 4.0)
    grid = figure.subplots(1, 3 if costs else 1, squeeze=False, sharey=True)[0]
    styles = _styles([arm.optimizer for arm in drawn])
    scales: list[tuple[str, Callable[[Arm], float]]] = [("tokens (millions)", lambda arm: 1e-6)]
    if costs:
        scales += [
            ("TFLOP, model and optimizer", lambda arm: 1e-12 * _flops_a_token(arm)),
            ("seconds of training", lambda arm: _seconds_a_token(arm, drawn)),
        ]
    for axes, (name, scale) in zip(grid, scales, strict=True):
        for arm in drawn:
            tokens, losses = np.array(arm.curve).T
            axes.plot(scale(arm) * tokens, losses, lw=1.5, **styles[arm.optimizer])
        axes.set_xlabel(name)
        axes.set_xlim(left=0)
    _show_the_end(grid[0], drawn)
    grid[0].set_ylabel("validation loss (nats a token)")
    handles = [legend_line(arm.label, lw=1.8, **styles[arm.optimizer]) for arm in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour by name; names that share one differ in their dashes."""
    dashes: dict[str, Any] = {}
    styles = {}
    for name in sorted(names):
        color = optimizer_color(name)
        style = next(dashes.setdefault(color, itertools.cycle(_DASHES)))
        styles[name] = {"color": color, "ls": style}
    return styles


def _flops_a_token(arm: Arm) -> float:
    return arm.step_flops / arm.tokens_per_step


def _seconds_a_token(arm: Arm, found: Sequence[Arm]) -> float:
    """By the ratio to AdamW's step where there is one, as turns are fairer than medians."""
    base, cost = _baseline(found), arm.cost
    step = cost["milliseconds"]
    if base and cost["times_baseline"]:
        step = cost["times_baseline"] * base.cost["milliseconds"]
    return 1e-3 * step / arm.tokens_per_step


def _show_the_end(axes: Axes, drawn: Sequence[Arm]) -> None:
    """Up to where AdamW, or else the lowest arm, is after a sixth of its training."""
    base = _baseline(drawn) or drawn[0]
    low = min(arm.curve[-1][1] for arm in drawn)
    high = float(np.interp(base.tokens / 6, *np.array(base.curve).T))
    axes.set_ylim(low - 0.04 * (high - low), high)


def write_report(folder: Path) -> Path:
    """Writes the figures, report.html and the table of summary.json into the suite's folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    files = load_run(folder)
    found = arms(files)
    rows = compare(found)
    write_json(folder / "summary.json", files.summary | {"arms": [_as_json(row) for row in rows]})
    with figure_style():
        figures = {
            name: save_figure(draw(found), folder / f"{name}.png")
            for name, draw in (
                ("final", final_figure),
                ("curves", curves_figure),
                ("rates", rates_figure),
            )
            if any(math.isfinite(arm.loss) for arm in found)
        }
    return write_page(
        Path(__file__).parent / "optimizers.html.jinja",
        folder / "report.html",
        study="Optimizers at equal effort",
        command="experiments.pretrain.suites.optimizers_report",
        config=_settings(files),
        machine=files.summary["machine"],
        version=files.summary["version"],
        abstract=abstract(rows, len(files.rows), files.summary["cells_total"]),
        columns=[heading for heading, *_ in COLUMNS],
        rows=[[form(row) for *_, form in COLUMNS] for row in rows],
        about={optimizer_label(arm.optimizer): ARMS[arm.optimizer].about for arm in found},
        figures=figures,
        files=files,
    )


def _settings(files: Files) -> dict[str, Any]:
    return {key: value for key, value in files.config.items() if key != "text"}


def _as_json(row: Compared) -> dict[str, Any]:
    shares = {name: getattr(row, name) for name in ("tokens", "flops", "time")}
    return as_json(row.arm) | {
        "difference_to_adamw": row.difference and row.difference._asdict(),
        "p_holm": row.p,
        "to_adamw_loss": {
            name: None if share is None or math.isinf(share) else share
            for name, share in shares.items()
        },
    }


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the report of a suite of optimizers again from its files; nothing is trained.

    Args:
        folder: The suite's folder, e.g. runs/pretrain/suite-optimizers.
    """
    with reporting(folder):
        path = write_report(folder)
        Console().print(terminal_table(folder), Text(str(path)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.pretrain.suites.optimizers_report")
