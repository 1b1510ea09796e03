"""Report of the suite of sizes: reads its folder, fits loss against compute, writes report.html.

It never trains: `python -m experiments.pretrain.suites.scaling_report FOLDER`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
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
from experiments.pages import flop, number, save_figure, text_table, write_page
from experiments.pretrain.suites.config import BASELINE
from experiments.pretrain.suites.fit import (
    PAPER_RATIO,
    Fit,
    Points,
    PowerLaw,
    bootstrap,
    fit,
    interval,
    overlap,
    ratio,
    without_each,
)
from experiments.pretrain.suites.results import Arm, arms, as_json, draw_rates, loss_text
from experiments.runs import write_json
from experiments.sweep import load_run

PFLOPS_DAY = 8.64e19  # FLOPs
# Of the paper's ladder: 6 FLOPs a param and token, 1.5 B params, 38.91 B tokens.
PAPER_LARGEST = 6 * 1.5e9 * 38.91e9


class Ratio(NamedTuple):
    """Compute of an optimizer over AdamW's, both at the same loss.

    Attributes:
        optimizer: whose.
        loss: that both reach, the lowest that all have seen.
        value: by the fitted curves.
        interval: of 95 %, None with fewer than three sizes.
        others: smallest and largest with one size left out; None with fewer than four.
    """

    optimizer: str
    loss: float
    value: float
    interval: tuple[float, float] | None
    others: tuple[float, float] | None


class Scaling(NamedTuple):
    """Loss against compute.

    Attributes:
        points: by optimizer.
        fit: of the curves.
        draws: laws that the data might have given as well; None with fewer than three sizes.
        ratios: of every optimizer but AdamW, at the lowest loss that all have seen.
    """

    points: dict[str, Points]
    fit: Fit
    draws: dict[str, PowerLaw] | None
    ratios: list[Ratio]


def scaling(found: Sequence[Arm], with_update: bool) -> Scaling | None:
    """The curves of all arms; None where there are fewer than two sizes with their costs."""
    names = dict.fromkeys(arm.optimizer for arm in found)
    of = {name: [arm for arm in found if arm.optimizer == name] for name in names}
    widths = {
        name: {arm.width for arm in own if arm.cost and math.isfinite(arm.loss)}
        for name, own in of.items()
    }
    shared = set.intersection(*widths.values()) if widths else set()
    if len(shared) < 2:
        return None
    points = {}
    for name, own in of.items():
        kept = [arm for arm in own if arm.width in shared]
        compute = [_compute(arm, with_update) for arm in kept]
        points[name] = Points(np.array(compute), np.array([arm.loss for arm in kept]))
    curves = fit(points)
    draws = bootstrap(points, curves)
    others = [name for name in names if name != BASELINE] if BASELINE in names else []
    ratios = [_ratio(points, curves, draws, name) for name in others]
    return Scaling(points, curves, draws, ratios)


def _ratio(
    points: Mapping[str, Points], curves: Fit, draws: dict[str, PowerLaw] | None, name: str
) -> Ratio:
    loss = overlap(points)[0]
    statistic = functools.partial(ratio, loss=loss, ours=name, theirs=BASELINE)
    value, sizes = statistic(curves.laws), len(points[name].loss)
    return Ratio(
        name,
        loss,
        value,
        draws and interval(value, statistic(draws), sizes),
        without_each(points, statistic),
    )


def _compute(arm: Arm, with_update: bool) -> float:
    steps = arm.tokens / arm.tokens_per_step
    return steps * (arm.step_flops if with_update else arm.cost["model_flops"])


def _ratio_text(found: Ratio) -> str:
    text = f"{found.value:.2f}"
    if found.interval:
        text += " [{:.2f}, {:.2f}]".format(*found.interval)
    return text


def law_text(law: PowerLaw) -> str:
    """A curve, with compute in PFLOP/s-days as the paper has it."""
    floor = f" + {law.e:.2f}" if law.e else ""
    return f"{law.a * PFLOPS_DAY**-law.b:.3g} · C^−{law.b:.3f}{floor}"


# The table: heading in the report, heading in the terminal ("" to leave it out), the text.
COLUMNS: tuple[tuple[str, str, Callable[[Arm], str]], ...] = (
    ("width", "width", lambda arm: str(arm.width)),
    ("optimizer", "optimizer", lambda arm: arm.label),
    ("tokens (millions)", "Mtokens", lambda arm: f"{1e-6 * arm.tokens:.3g}"),
    ("compute of the model", "FLOPs", lambda arm: _flop(arm, with_update=False)),
    ("and of the update", "", lambda arm: _flop(arm, with_update=True)),
    ("best rate", "rate", lambda arm: f"{arm.best.rate:g}" + " (edge)" * arm.best.at_edge),
    ("final loss (nats a token)", "loss", loss_text),
    ("bits a byte", "bits", lambda arm: number(arm.bits_per_byte)),
    ("cells", "", lambda arm: str(arm.cells)),
)


def _flop(arm: Arm, with_update: bool) -> str:
    return flop(_compute(arm, with_update)) if arm.cost else "–"


def terminal_table(folder: Path) -> Table:
    """The table for the terminal, with the numbers of the HTML table."""
    found = arms(load_run(folder))
    return text_table("Loss by size", COLUMNS, found, "\n".join(abstract(found)))


def abstract(found: Sequence[Arm]) -> list[str]:
    """The result in plain sentences, every number computed from the run."""
    model, whole = scaling(found, with_update=False), scaling(found, with_update=True)
    if model is None or whole is None:
        return ["Fewer than two sizes have finished with all optimizers: no curve yet."]
    sentences = []
    for ours, with_update in zip(model.ratios, whole.ratios, strict=True):
        name = optimizer_label(ours.optimizer)
        sentences.append(
            f"{name} reaches AdamW's lowest loss that all have seen, {ours.loss:.3f} nats a token, "
            f"with {_ratio_text(ours)} of AdamW's model FLOPs, or {_ratio_text(with_update)} with "
            f"the updates' own."
        )
    sentences.append(
        f"Liu et al. have {PAPER_RATIO} for Muon, at up to {far(model)[0]} times the compute."
    )
    laws = ", ".join(f"{optimizer_label(n)} {law_text(x)}" for n, x in model.fit.laws.items())
    sentences.append(f"Fitted with C in PFLOP/s-days: {laws}.")
    if edge := [f"{arm.label} at width {arm.width}" for arm in found if arm.best.at_edge]:
        sentences.append(f"Still best at the edge of the rates tried: {', '.join(edge)}.")
    return sentences


def far(curves: Scaling) -> tuple[str, str]:
    """How many times more compute the paper's largest model had than ours.

    And by what factor a ratio of compute changes on the way there when an exponent is off by 0.01.
    """
    largest = max(of.compute.max() for of in curves.points.values())
    times = PAPER_LARGEST / largest
    exponent = min(law.b for law in curves.fit.laws.values())
    factor = times ** (0.01 / exponent) if exponent > 0 else math.inf
    size, unit = (times / 1e6, " million") if times >= 1e6 else (times, "")
    return f"{float(f'{size:.2g}'):,.0f}{unit}", number(factor)


def fit_figure(found: Sequence[Arm], curves: Scaling) -> Figure:
    """Loss against compute with its curves, and the compute ratio against the loss."""
    figure = new_figure(8.6, 3.7)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for name, of in curves.points.items():
        color = optimizer_color(name)
        reach = np.geomspace(of.compute.min() / 1.3, of.compute.max() * 1.3, 100)
        left.plot(reach, curves.fit.laws[name].loss(reach), color=color, lw=1.6)
        for arm in found:
            if arm.optimizer == name and arm.cost and math.isfinite(arm.loss):
                losses = [*arm.best.losses.values()]
                compute = [_compute(arm, False)] * len(losses)
                left.plot(compute, losses, color=color, alpha=0.5, **POINT_MARK | {"ms": 3})
        left.plot(of.compute, of.loss, color=color, zorder=5, **POINT_MARK | {"ms": 6})
    for which in ("x", "y"):
        plain_log_axis(left, which)
    left.xaxis.set_major_formatter(lambda value, _: flop(value))
    left.set_xlabel("compute of the model")
    left.set_ylabel("final held-out loss (nats a token)")
    left.legend(
        handles=[
            legend_line(optimizer_label(name), optimizer_color(name), lw=1.6, marker="o", ms=5)
            for name in curves.points
        ]
    )
    _draw_ratios(right, curves)
    return figure


def _draw_ratios(axes: Axes, curves: Scaling) -> None:
    low, high = overlap(curves.points)
    losses = np.linspace(low, high, 12)
    for found in curves.ratios:
        color = optimizer_color(found.optimizer)
        statistics = [
            functools.partial(ratio, loss=loss, ours=found.optimizer, theirs=BASELINE)
            for loss in losses
        ]
        axes.plot(losses, [of(curves.fit.laws) for of in statistics], color=color, lw=1.6)
        if curves.draws:
            sizes = len(curves.points[found.optimizer].loss)
            bands = [interval(of(curves.fit.laws), of(curves.draws), sizes) for of in statistics]
            axes.fill_between(losses, *np.array(bands).T, color=color, alpha=0.18, lw=0)
    axes.axhline(PAPER_RATIO, color="#444444", ls=":", lw=1)
    axes.axhline(1.0, color="#444444", lw=0.8)
    axes.invert_xaxis()  # more compute to the right
    axes.set_ylim(bottom=0)
    axes.set_xlabel("loss that both reach")
    axes.set_ylabel("model FLOPs over AdamW's")
    axes.legend(
        handles=[
            *(
                legend_line(optimizer_label(r.optimizer), optimizer_color(r.optimizer), lw=1.6)
                for r in curves.ratios
            ),
            legend_line(f"Muon in the paper, {PAPER_RATIO}", lw=1, ls=":"),
        ]
    )


def rates_figure(found: Sequence[Arm]) -> Figure:
    """Final loss against learning rate, a panel for each size."""
    widths = sorted({arm.width for arm in found})
    figure = new_figure(max(4.4, 2.2 * len(widths)), 3.0)
    grid = figure.subplots(1, len(widths), squeeze=False)[0]
    for width, axes in zip(widths, grid, strict=True):
        own = [arm for arm in found if arm.width == width]
        top = ceiling(own)
        for arm in own:
            draw_rates(axes, arm, top)
        axes.set_title(f"width {width}", loc="left")
        axes.set_xlabel("learning rate")
        axes.margins(x=0.12)
        plain_log_axis(axes, "x")
        axes.set_ylim(top=top)
    grid[0].set_ylabel("final loss (nats a token)")
    names = dict.fromkeys(arm.optimizer for arm in found)
    handles = [legend_line(optimizer_label(n), optimizer_color(n), lw=2) for n in names]
    handles += [
        legend_line("best rate", **GROKKED_MARK),
        legend_line("diverged, or beyond the axis", mfc="white", **CENSORED_MARK),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def write_report(folder: Path) -> Path:
    """Writes the figures, report.html and the fits of summary.json into the suite's folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    files = load_run(folder)
    found = arms(files)
    kinds = {
        "model": scaling(found, with_update=False),
        "model_and_update": scaling(found, with_update=True),
    }
    fits = {name: of and _as_json(of) for name, of in kinds.items()}
    summary = files.summary | {"arms": [as_json(arm) for arm in found], "fits": fits}
    write_json(folder / "summary.json", summary)
    figures = {}
    with figure_style():
        if curves := kinds["model"]:
            figures["fit"] = save_figure(fit_figure(found, curves), folder / "fit.png")
        if any(math.isfinite(arm.loss) for arm in found):
            figures["rates"] = save_figure(rates_figure(found), folder / "rates.png")
    return write_page(
        Path(__file__).parent / "scaling.html.jinja",
        folder / "report.html",
        study="Loss against compute",
        command="experiments.pretrain.suites.scaling_report",
        config={key: value for key, value in files.config.items() if key != "text"},
        machine=files.summary["machine"],
        version=files.summary["version"],
        abstract=abstract(found),
        columns=[heading for heading, *_ in COLUMNS],
        rows=[[form(arm) for *_, form in COLUMNS] for arm in found],
        fits=_fit_rows(kinds),
        far=kinds["model"] and far(kinds["model"]),
        figures=figures,
        files=files,
    )


def _fit_rows(kinds: Mapping[str, Scaling | None]) -> list[list[str]]:
    """The curves as text, and each optimizer's ratio, by which compute counts."""
    rows = []
    for kind, of in kinds.items():
        ratios = {found.optimizer: found for found in of.ratios} if of else {}
        for name, law in (of.fit.laws if of else {}).items():
            found = ratios.get(name)
            others = "{:.2f} to {:.2f}".format(*found.others) if found and found.others else "–"
            share = _ratio_text(found) if found else "–"
            rows.append(
                [kind.replace("_", " "), optimizer_label(name), law_text(law), share, others]
            )
    return rows


def _as_json(of: Scaling) -> dict[str, Any]:
    return {
        "laws": {name: law._asdict() for name, law in of.fit.laws.items()},
        "error_of_log_loss": of.fit.error,
        "gain_of_irreducible_loss": of.fit.gain,
        "ratios": [found._asdict() for found in of.ratios],
    }


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the report of a suite of sizes again from its files; nothing is trained.

    Args:
        folder: The suite's folder, e.g. runs/pretrain/suite-scaling.
    """
    with reporting(folder):
        path = write_report(folder)
        Console().print(terminal_table(folder), Text(str(path)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.pretrain.suites.scaling_report")
