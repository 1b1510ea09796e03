"""Colours, style and kinds of figures that all studies share."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from experiments.report.names import optimizer_color, optimizer_label, optimizer_style
from experiments.report.series import NOTHING, Series, middle, smoothed

DASHES = (0, (3.2, 1.2))
MEMORISED_MARK: dict[str, Any] = {"marker": "o", "ms": 6, "mew": 1.4, "ls": "none"}
GROKKED_MARK: dict[str, Any] = {"marker": "D", "ms": 6, "mec": "white", "mew": 0.8, "ls": "none"}
POINT_MARK: dict[str, Any] = {"marker": "o", "ms": 4, "mec": "white", "mew": 0.5, "ls": "none"}
CENSORED_MARK: dict[str, Any] = {"marker": "^", "ms": 6, "mew": 1.2, "ls": "none"}
MEAN_MARK: dict[str, Any] = {"marker": "|", "ms": 11, "mew": 2, "ls": "none"}
LOST_MARK: dict[str, Any] = {"marker": "x", "ms": 5, "mew": 1.4, "ls": "none"}
REFERENCE: dict[str, Any] = {"color": "#444444", "ls": ":", "lw": 1, "zorder": 1.5}
BEYOND: dict[str, Any] = CENSORED_MARK | {"mfc": "white"}
INTERVAL_MARK: dict[str, Any] = {"lw": 1.2, "marker": "|", "ms": 4, "mew": 1.2}

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.xmargin": 0.02,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Names come from data, so a "$" in a name must not be read as mathematics.
    "text.parse_math": False,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """A context in which figures are drawn and saved in the studies' style."""
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure of a size in inches with constrained layout, without pyplot or display."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.07, hspace=0.03, wspace=0.02)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Saves a figure as PNG and replaces an existing file."""
    image = io.BytesIO()  # an object store accepts only complete files
    figure.savefig(image, format="png", dpi=dpi)
    path.write_bytes(image.getvalue())


def plain_log_axis(axes: Axes, which: str) -> None:
    """Makes an axis logarithmic, with plain numbers (10, 100) as ticks, not powers (10¹, 10²)."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    # Over less than three decades, powers of ten would give only two or three ticks.
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def log_if_positive(axes: Axes, which: str) -> None:
    """Makes an axis logarithmic if any value drawn on it is positive."""
    drawn = (line.get_xdata() if which == "x" else line.get_ydata() for line in axes.lines)
    if any(np.any(np.asarray(values, float) > 0) for values in drawn):
        plain_log_axis(axes, which)


def engineering_axis(axes: Axes, which: str) -> None:
    """Makes an axis logarithmic, with ticks such as 20 k or 5 M."""
    log_if_positive(axes, which)
    (axes.xaxis if which == "x" else axes.yaxis).set_major_formatter(EngFormatter())


def legend_line(label: str, color: str = "#555555", **style: Any) -> Line2D:
    """Returns a line or marker for a legend."""
    return Line2D([], [], label=label, **{"color": color} | style)


def legend(figure: Figure, names: Iterable[str], *others: Line2D, columns: int = 6) -> None:
    """Adds a legend below the figure: a thick line for each optimizer, then the other handles."""
    handles = [legend_line(optimizer_label(n), optimizer_color(n), lw=4) for n in names]
    handles += others
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns))


def grid_of(
    count: int, columns: int, wide: float, high: float, *, least: float = 0.0, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `count` panels of `wide` × `high` inches, with room for a legend."""
    columns = max(min(count, columns), 1)
    lines = max(math.ceil(count / columns), 1)
    figure = new_figure(max(least, wide * columns), high * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, **shared)
    for spare in grid.flat[count:]:
        spare.remove()
    return figure, list(grid.flat[:count])


def name_axes(grid: Sequence[Axes], x: str, y: str) -> None:
    """Labels the vertical axes of the first column and the horizontal axes of each last panel."""
    for axes in grid:
        place = axes.get_subplotspec()
        columns = place.get_gridspec().ncols
        if place.is_first_col():
            axes.set_ylabel(y)
        if place.num1 + columns >= len(grid):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(x)


def legible(losses: Sequence[float], reference: float, times: float) -> float:
    """Returns an upper end for an axis of losses that keeps most of them legible.

    The axis spans `times` the distance from the lowest loss to the third quartile, or to a higher
    reference. Infinite if that distance is 0.

    >>> legible([1.0, 1.1, 1.2, 1.4, 9.0], reference=2.0, times=2)
    3.0
    """
    low = min(losses)
    far = max(float(np.percentile(losses, 75)), reference if math.isfinite(reference) else low)
    return low + times * (far - low) if far > low else math.inf


def ceiling(arms: Sequence[Any], reference: float = math.inf) -> float:
    """Returns an upper end for an axis of losses that keeps those near the best rates legible."""
    best = [arm.loss for arm in arms if math.isfinite(arm.loss)] or [1.0]
    every = [x for arm in arms for x in arm.losses.values() if math.isfinite(x)] or [1.0]
    span = max(best) - min(best)
    top = min(max(every) + 0.02, max(best) + max(span, 0.3))
    return min(top, legible(best, reference, 1.75)) if math.isfinite(reference) else top


def rates_figure(
    panels: Mapping[str, Sequence[Any]],
    *,
    style: Callable[[str], dict[str, Any]] = optimizer_style,
    label: Callable[[str], str] = optimizer_label,
    reference: float = math.inf,
    shared: bool = True,
    width: float = 2.2,
    unit: str = "nats per token",
) -> Figure:
    """Draws final loss against learning rate, with one line for each `arms.Arm` of a panel.

    Args:
        panels: The arms of each panel, by its title. The legend names the arms if a panel has
            several.
        style, label: Functions that return the line style and the label of an arm's `optimizer`.
        reference: The loss of AdamW, at which a line is drawn if it is finite.
        shared: Whether all panels share one vertical axis.
        width: The width of a panel, in inches.
        unit: The unit of the losses.
    """
    alone = shared and all(len(own) == 1 for own in panels.values())
    high = 1.9 if len(panels) > 5 else max(2.6, 0.65 * width)
    figure, grid = grid_of(len(panels), 5, width, high, least=6.4, sharey=shared)
    every = [arm for own in panels.values() for arm in own]
    beyond = False
    for (title, own), axes in zip(panels.items(), grid, strict=True):
        top = ceiling(every, reference) if shared else ceiling(own)
        # Equal marks cover each other, so earlier ones are drawn larger.
        for place, arm in enumerate(own):
            its = style(arm.optimizer)
            mark = {"color": its["color"], "clip_on": False, "zorder": 4}
            losses = [min(x, top) for x in arm.losses.values()]
            axes.plot([*arm.losses], losses, lw=1.4, **its)
            for rate, loss in arm.points if alone and arm.points else arm.losses.items():
                kind = POINT_MARK if loss < top else BEYOND
                beyond |= loss >= top
                axes.plot(rate, min(loss, top), **mark | kind)
            if arm.mark[1] < top:
                size = {"ms": GROKKED_MARK["ms"] + 1.5 * (len(own) - 1 - place)}
                axes.plot(*arm.mark, **mark | {"zorder": 5} | GROKKED_MARK | size)
        if reference < top:
            axes.axhline(reference, **REFERENCE)
        axes.set_title(title, loc="left")
        axes.margins(x=0.13)
        plain_log_axis(axes, "x")
        low = min(axes.get_ylim()[0], top)
        axes.set_ylim(low, top + 0.06 * (top - low))  # below the title
    name_axes(grid, "learning rate", f"final loss ({unit})" if not alone else "final loss")
    names = dict.fromkeys(arm.optimizer for arm in every) if not alone else {}
    handles = [legend_line(label(name), lw=2, **style(name)) for name in names]
    seeds = min((arm.choosing for arm in every if math.isfinite(arm.loss)), default=1)
    one = seeds == 1 or (alone and every[0].points)
    handles += [
        legend_line("one seed" if one else f"mean over {seeds} seeds", **POINT_MARK),
        legend_line("best rate", **GROKKED_MARK),
    ]
    if beyond:
        handles.append(legend_line("diverged, or beyond the axis", **BEYOND))
    if math.isfinite(reference):
        handles.append(legend_line("AdamW at its best rate", lw=1, ls=":"))
    legend(figure, (), *handles, columns=4)
    return figure


class Final(NamedTuple):
    """One line of a figure of final values, with one value for each seed.

    Attributes:
        label: The label of the line.
        color: The colour of the line.
        values: The value of each seed.
        middle: The mean or median, which a bar marks.
        interval: The confidence interval of `middle`. Without one, a line spans the values.
        lost: The values marked with a cross.
    """

    label: str
    color: str
    values: Sequence[float]
    middle: float
    interval: tuple[float, float] | None = None
    lost: Sequence[float] = ()


def finals_figure(
    panels: Mapping[str, Sequence[Final]],
    name: str,
    reference: tuple[str, float] | None = None,
    *,
    width: float = 6.4,
    columns: int = 1,
    middle: str = "mean",
    limit: float = math.inf,
    beyond: str = "beyond the axis",
    log: bool = False,
) -> Figure:
    """Draws the value of every seed, with one line for each arm and its interval or range.

    Args:
        panels: The lines of each panel, by its title. The first line is at the top.
        name: The label of the horizontal axis.
        reference: The name and the position of a reference line. The name "" keeps it out of the
            legend.
        width: The width of the figure in inches, if it has one column.
        columns: The number of columns of panels. Panels in one row have the same lines.
        middle: The legend's name of what a bar marks.
        limit: The position at which larger values are drawn, as one triangle for each.
        beyond: The legend's name of these triangles.
        log: Whether the horizontal axis is logarithmic.
    """
    sizes = [len(own) + 0.6 for own in panels.values()][::columns] or [1.6]
    figure = new_figure(
        width if columns == 1 else 3 * columns + 1.4, 0.27 * sum(sizes) + 0.5 * len(sizes) + 0.6
    )
    shared = {"sharex": log or math.isfinite(limit), "squeeze": False, "height_ratios": sizes}
    grid = [*figure.subplots(len(sizes), columns, **shared).flat]
    for spare in grid[len(panels) :]:
        spare.remove()
    every = [final for own in panels.values() for final in own]
    for axes, (title, own) in zip(grid, panels.items(), strict=False):
        if reference:
            axes.axvline(reference[1], **REFERENCE)
        for place, final in enumerate(own):
            _draw_final(axes, place, final, limit)
        named = axes.get_subplotspec().is_first_col()
        axes.set_yticks(range(len(own)), [final.label if named else "" for final in own])
        axes.set_ylim(len(own) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_title(title, loc="left")
        if log:
            plain_log_axis(axes, "x")
    for axes in grid[: len(panels)][-columns:]:
        axes.set_xlabel(name)
    handles = [legend_line("one seed", **POINT_MARK), legend_line(middle, **MEAN_MARK)]
    if any(final.interval for final in every):
        handles.append(legend_line("95 % interval", **INTERVAL_MARK))
    if far := sum(x > limit for final in every for x in final.values):
        handles.append(legend_line(f"{far} {beyond}", **BEYOND))
    if lost := sum(len(final.lost) for final in every):
        handles.append(legend_line(f"{lost} lost again", **LOST_MARK))
    handles += [legend_line(reference[0], lw=1, ls=":")] if reference and reference[0] else []
    legend(figure, (), *handles, columns=5)
    return figure


def _draw_final(axes: Axes, place: float, final: Final, limit: float) -> None:
    color: dict[str, Any] = {"color": final.color, "zorder": 4}
    inside = [x for x in final.values if x <= limit]
    if final.interval:  # drawn lower than the points, which would hide a short interval
        axes.plot(final.interval, [place + 0.3] * 2, **INTERVAL_MARK | {"color": final.color})
    elif final.values:
        ends = [min([*inside, limit]), min(max(final.values), limit)]
        axes.plot(ends, [place] * 2, lw=1.6, alpha=0.6, **color | {"zorder": 2})
    if final.middle <= limit:
        axes.plot(final.middle, place, **color | MEAN_MARK | {"zorder": 3})
    for value in inside:
        axes.plot(value, place, clip_on=False, **color | POINT_MARK)
    far = len(final.values) - len(inside)
    asides = np.linspace(-0.2, 0.2, far) if far > 1 else [0.0] * far
    for aside in asides:
        axes.plot(limit, place + aside, clip_on=False, **color | BEYOND)
    for value in final.lost:
        axes.plot(value, place, **color | LOST_MARK)


def draw_series(
    axes: Axes,
    trainings: Sequence[Series],
    style: Mapping[str, Any],
    *,
    thin: bool = True,
    scale: float = 1.0,
    positive: bool = False,
    marked: bool = False,
    gaps: bool = True,
    smooth: bool = True,
    statistic: Callable[[list[float]], Any] = np.mean,
) -> Series:
    """Draws each training as a thin line, and their smoothed mean as a thick one.

    Args:
        axes: The panel.
        trainings: The series of one arm.
        style: The style of its lines. `lw` is the width of the mean's.
        thin: Whether to draw the thin lines.
        scale: A factor of the values.
        positive: Whether to omit values that are not positive, for a logarithmic axis.
        marked: Whether to mark the points of the mean, if there are fewer than 50.
        gaps: Whether a missing value breaks a line. If not, the line connects its neighbours.
        smooth: Whether the mean is smoothed, over 6 % of the records.
        statistic: The statistic to draw instead of the mean.

    Returns:
        The series of the thick line.
    """

    def line(places: np.ndarray, values: np.ndarray, **its: Any) -> None:
        shown = np.where(values > 0, values, np.nan) if positive else scale * values
        known = np.isfinite(shown)
        if known.any():  # none may be known: updates of frozen parameters are 0
            drawn = slice(None) if gaps else known
            axes.plot(places[drawn], shown[drawn], **its)

    found = [of for of in trainings if len(of[0])]
    for places, values in found if thin else ():
        faint = dict(style) | {"lw": 0.7, "alpha": 0.35}
        line(np.asarray(places), np.asarray(values, float), **faint)
    places, values = middle(found, statistic)
    mark = POINT_MARK | {"ls": "-"} if marked and len(places) < 50 else {}
    if len(places):
        values = smoothed(values) if smooth else values
        line(places, values, **mark | {"lw": 1.7} | dict(style))
    return (places, values) if len(places) else NOTHING
