"""Figures of the diagnostics that `experiments.grok.probes` recorded."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.grok.config import Cell, Panel
from experiments.grok.report_data import Run
from experiments.report.figures import (
    DASHES,
    GROKKED_MARK,
    draw_series,
    grid_of,
    legend,
    legend_line,
    name_axes,
    new_figure,
    plain_log_axis,
)
from experiments.report.names import optimizer_color, optimizer_label
from experiments.report.page import Picture
from experiments.report.series import Series
from experiments.report.text import number

MOST_PANELS = 8

Record = Mapping[str, Any]  # the value of `probes.record`, and its epoch
Diagnostics = Mapping[str, Mapping[Cell, Sequence[Record]]]  # by optimizer and cell, in epoch order
Grokked = Mapping[Cell, float | None]  # the sustained grokking epoch, or None


class Measure(NamedTuple):
    """A panel of the figure, with a measure drawn solid and perhaps another drawn dashed."""

    title: str
    label: str
    solid: tuple[str, str]
    dashed: tuple[str, str] = ("", "")
    log: bool = False
    percent: bool = False


MEASURES = (
    Measure(
        "Fourier components", "Gini coefficient",
        ("logits", "logit_gini"), ("embedding", "embedding_gini"),
    ),
    Measure(
        "Norm of the weights", "L2 norm",
        ("hidden matrices", "norm_hidden"), ("embedding", "norm_embedding"),
    ),
    Measure(
        "Five frequencies alone", "loss",
        ("restricted", "restricted_loss"), ("validation", "validation_loss"), log=True,
    ),
    Measure(
        "Without five frequencies", "loss",
        ("excluded", "excluded_loss"), ("training", "train_loss"), log=True,
    ),
    Measure(
        "Rank of the weights", "rank, median matrix",
        ("stable", "weight_stable_rank"), ("effective", "weight_effective_rank"), log=True,
    ),
    Measure(
        "Rank of the updates", "rank, median matrix",
        ("stable", "update_stable_rank"), ("effective", "update_effective_rank"), log=True,
    ),
    Measure("Softmax collapse", "training rows (%)", ("", "collapse_share"), percent=True),
    Measure(
        "RMS of an update", "RMS of one step",
        ("hidden matrices", "update_rms_hidden"), ("embedding", "update_rms_embedding"), log=True,
    ),
)  # fmt: skip
# The measures whose last values the caption states.
STATED = {"logit_gini": "Gini of the logits", "weight_stable_rank": "stable rank of the weights"}

MEASURES_CAPTION = (
    "Thin lines are single seeds, thick lines the median over the epochs that all seeds reached. "
    "Diamonds mark the median sustained grokking epoch. Gini coefficient: inequality of the "
    "Fourier components, near 1 if only one remains. Restricted loss: the loss with only the "
    "constant and the five strongest frequencies of the logits. Excluded loss: the loss of "
    "training examples without these five (Nanda et al., 2301.05217; here they are chosen anew at "
    "each diagnostic, and for other operations too). Stable rank: ‖W‖_F² / ‖W‖₂². Effective rank: "
    "exponential of the entropy of the singular values. Updates include weight decay. Softmax "
    "collapse: fraction of training examples for which float32 absorbs all but the largest logit "
    "(2501.04697)."
)
POWER_CAPTION = (
    "Fraction of Fourier power at each frequency, for the first seed of each optimizer. Embedding: "
    "power of the number tokens over the residues, which mul, div and exp order by discrete "
    "logarithm to base 5. Logits: power over the answers. With equal power, each frequency would "
    "have 2 %. The dashed line is the grokking epoch."
)
SPECTRA_CAPTION = (
    "Singular values, divided by the largest, of the first of the largest matrices and of its "
    "change in one step, for the first seed of each optimizer. Lines range from the first "
    "diagnostic (pale) to the last. Values below a thousandth of the largest are not accurate."
)


def figures(run: Run) -> list[Picture]:
    """Returns figures of measures, spectra and, except for parity, Fourier power of each panel.

    Only the first eight panels with diagnostics are drawn; metrics.jsonl has all of them.

    Args:
        run: The run, whose records of epochs may have diagnostics under "probe".
    """
    found: dict[Panel, dict[str, dict[Cell, list[Record]]]] = {}
    for cell, trace in run.traces.items():
        if own := [{"epoch": row["epoch"]} | row["probe"] for row in trace if "probe" in row]:
            found.setdefault(cell.panel, {}).setdefault(cell.optimizer, {})[cell] = own
    grokked = {Cell.of(row): row["grok_epoch_sustained"] for row in run.rows}
    drawn = []
    for place, (panel, diagnostics) in enumerate([*found.items()][:MOST_PANELS], start=1):
        more = "" if len(found) <= MOST_PANELS else f" Panel {place} of {len(found)}."
        measures = " ".join([*last_values(diagnostics), MEASURES_CAPTION])
        kinds: list[tuple[str, str, Callable[..., Figure]]] = [
            ("measures", measures, measures_figure),
            ("spectra", SPECTRA_CAPTION, spectra_figure),
        ]
        if _powers(diagnostics):
            kinds.append(("power", POWER_CAPTION, power_figure))
        alt = f"Diagnostics of the models over training, on {panel}."
        drawn += [
            Picture(
                f"inside_{place}_{kind}",
                functools.partial(draw, diagnostics, grokked),
                f"{panel}: {caption}{more}",
                alt,
            )
            for kind, caption, draw in kinds
        ]
    return drawn


def last_values(diagnostics: Diagnostics) -> list[str]:
    """Returns sentences on the last medians of the measures in `STATED` and on collapse."""
    clauses, sentences = [], []
    for key, words in STATED.items():
        medians = []
        for name, of in diagnostics.items():
            if values := [x for own in of.values() for x in _series(own[-1:], key)[1]]:
                medians.append(f"{optimizer_label(name)} {number(statistics.median(values))}")
        if medians:
            clauses.append(f"{words} {', '.join(medians)}")
    if clauses:
        sentences.append(f"At the last diagnostic, median over seeds: {'; '.join(clauses)}.")
    shares = _values(diagnostics, "collapse_share")
    if len(shares) and not shares.any():
        sentences.append("No training example is in softmax collapse.")
    return sentences


def measures_figure(diagnostics: Diagnostics, grokked: Grokked) -> Figure:
    """Draws measures against the epoch, with one panel for each of `MEASURES` that has values.

    Args:
        diagnostics: The diagnostics of one panel, at least one.
        grokked: The epochs to mark.
    """
    known = {measure: _values(diagnostics, measure.solid[1]) for measure in MEASURES}
    # If no example is in softmax collapse, the caption says so.
    shown = [of for of, values in known.items() if len(values) and (values.any() or not of.percent)]
    figure, panels = grid_of(len(shown), 2, 3.3, 2.05, sharex=True)
    marked = False
    for axes, measure in zip(panels, shown, strict=True):
        for name, of in diagnostics.items():
            mark = statistics.median(grokked.get(cell) or np.inf for cell in of)
            marked |= _draw(axes, measure, [*of.values()], optimizer_color(name), mark)
        axes.set_title(measure.title, loc="left")
        if measure.dashed[0]:
            named = zip((measure.solid[0], measure.dashed[0]), ("-", DASHES), strict=True)
            lines = [legend_line(name, lw=1.5, ls=style) for name, style in named]
            axes.legend(handles=lines, loc="best", fontsize=7)
        plain_log_axis(axes, "x")
        if measure.log:
            plain_log_axis(axes, "y")
        else:
            axes.set_ylim(0, max(axes.get_ylim()[1], 1 if measure.percent else 0))
    name_axes(panels, "epoch (log scale)", "")
    for axes, measure in zip(panels, shown, strict=True):
        axes.set_ylabel(measure.label)
    others = [legend_line("median", lw=1.8), legend_line("one seed", lw=0.7, alpha=0.7)]
    others += [legend_line("grokked (sustained)", **GROKKED_MARK)] if marked else []
    legend(figure, diagnostics, *others, columns=5)
    return figure


def spectra_figure(diagnostics: Diagnostics, grokked: Grokked) -> Figure:
    """Draws singular values of weights and updates, with one line for each of four diagnostics.

    Args:
        diagnostics: Those of one panel, of which the first cell of each optimizer is drawn.
        grokked: The grokking epochs, which this figure does not show.
    """
    figure = new_figure(6.6, 2.9)
    both = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(both, ("weight", "update"), strict=True):
        key = f"{kind}_singular_values"
        for name, of in diagnostics.items():
            records = [r for r in next(iter(of.values())) if _known(r.get(key))]
            shown = sorted({*np.linspace(0, len(records) - 1, 4).round().astype(int).tolist()})
            for place in shown if records else []:
                values = np.array(records[place][key])
                ranks = np.linspace(0, 100, len(values))
                strength = 0.25 + 0.75 * (place + 1) / len(records)
                color = optimizer_color(name)
                axes.plot(ranks, values / max(values[0], 1e-30), color=color, alpha=strength)
        axes.set_title(f"{kind.capitalize()}s", loc="left")
        axes.set_xlabel("rank (% of all)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(1e-3, 1.5)
    both[0].set_ylabel("singular value / largest")
    others = [legend_line("first diagnostic", alpha=0.3), legend_line("last diagnostic")]
    legend(figure, diagnostics, *others, columns=5)
    return figure


def _powers(diagnostics: Diagnostics) -> list[tuple[str, str]]:
    """Returns labels and keys of the recorded kinds of power; none without frequencies."""
    records = [record for of in diagnostics.values() for record in next(iter(of.values()))]
    return [
        (label, key)
        for label, key in (("embedding", "embedding_power"), ("logits", "logit_power"))
        if any(_known(record.get(key)) for record in records)
    ]


def power_figure(diagnostics: Diagnostics, grokked: Grokked) -> Figure:
    """Draws the power of embedding and logits by frequency and epoch, in one row per optimizer.

    Args:
        diagnostics: Those of one panel, of which the first cell of each optimizer is drawn.
        grokked: The epochs to mark.
    """
    cells = {name: next(iter(of.items())) for name, of in diagnostics.items()}
    kinds = _powers(diagnostics)
    high = 1.75 if len(cells) <= 4 else 1.2
    figure = new_figure(6.6 if len(kinds) > 1 else 4.2, high * len(cells) + 0.6)
    grid = figure.subplots(len(cells), len(kinds), squeeze=False, sharex=True, sharey=True)
    shares = (x for _, of in cells.values() for r in of for _, k in kinds for x in r.get(k) or [0])
    # A square-root scale keeps the small power of noise visible beside that of one frequency.
    scale = PowerNorm(0.5, vmin=0, vmax=100 * max(filter(None, shares), default=0.3))
    shades = ScalarMappable(scale, "Greys")
    for line, (name, (cell, records)) in zip(grid, cells.items(), strict=True):
        for axes, (label, key) in zip(line, kinds, strict=True):
            axes.set_title(f"{optimizer_label(name)}, seed {cell.seed}: {label}", loc="left")
            axes.grid(visible=False)
            known = [record for record in records if _known(record.get(key))]
            if known:
                percent = 100 * np.array([record[key] for record in known]).T
                borders = _borders([record["epoch"] for record in known])
                frequencies = np.arange(len(percent) + 1) + 0.5
                axes.pcolormesh(borders, frequencies, percent, norm=scale, cmap=shades.cmap)
            if (epoch := grokked.get(cell)) is not None:
                axes.axvline(epoch, color=optimizer_color(name), lw=1.6, ls=DASHES)
            plain_log_axis(axes, "x")
        line[0].set_ylabel("frequency k")
    for axes in grid[-1]:
        axes.set_xlabel("epoch (log scale)")
    bar = figure.colorbar(shades, ax=grid, aspect=12 * len(cells))
    bar.set_label("share of power (%)")
    return figure


def _known(value: Any) -> bool:
    return value is not None and None not in value


def _values(diagnostics: Diagnostics, name: str) -> np.ndarray:
    """Returns all values of a measure."""
    cells = [own for of in diagnostics.values() for own in of.values()]
    return np.concatenate([_series(own, name)[1] for own in cells])


def _series(records: Sequence[Record], name: str) -> Series:
    """Returns a measure by epoch: its value, or the median if it has one value per matrix."""
    found = {}
    for record in records:
        value = record.get(name)
        if isinstance(value, list):
            value = statistics.median(value) if _known(value) else None
        if value is not None:
            found[record["epoch"]] = value
    return np.array([*found], float), np.array([*found.values()], float)


def _draw(
    axes: Axes, measure: Measure, cells: list[Sequence[Record]], color: str, mark: float
) -> bool:
    """Draws the cells of one optimizer, and a diamond on the solid median at the marked epoch.

    Returns:
        Whether a diamond was drawn. It is omitted if the epoch is outside of the diagnostics.
    """
    marked, scale = False, 100 if measure.percent else 1
    for name, dashes, width in ((measure.solid[1], "-", 1.8), (measure.dashed[1], DASHES, 1.3)):
        every = [_series(records, name) for records in cells]
        epochs, middle = draw_series(
            axes,
            every,
            {"color": color, "lw": width, "ls": dashes},
            thin=sum(len(of[0]) > 0 for of in every) > 1,
            scale=scale,
            positive=measure.log,
            smooth=False,
            statistic=statistics.median,
        )
        if name == measure.solid[1] and len(epochs) and epochs[0] <= mark <= epochs[-1]:
            height = scale * np.interp(mark, epochs, middle)
            axes.plot(mark, height, color=color, zorder=5, clip_on=False, **GROKKED_MARK)
            marked = True
    return marked


def _borders(epochs: Sequence[int]) -> np.ndarray:
    """Returns the borders of an image's columns, midway between epochs on a log axis."""
    logs = np.log(epochs)
    steps = np.diff(logs) / 2 if len(logs) > 1 else np.array([0.1])
    return np.exp([logs[0], *logs[:-1] + steps[: len(logs) - 1], logs[-1] + steps[-1]])
