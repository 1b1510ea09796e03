"""What the figures of all studies share: colours, style, panels, saving, embedding."""

import base64
import io
import math
import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence
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
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Each arm that a study knows has its own: Okabe and Ito's for the first two, then each the farthest
# from all before it, and from white, in CIELAB; so those that come early are told apart best.
COLORS = {
    "adamw": "#0072B2",
    "muon": "#D55E00",
    "muon_equal_shrink": "#00CC00",
    "muon_equal_decay": "#FF00AA",
    "polar": "#0000FF",
    "orthogonal": "#224400",
    "spectral": "#662233",
    "normuon": "#11CC99",
    "low_rank": "#550088",
    "muonclip": "#BBBB33",
    "adamuon": "#DD99FF",
    "scion": "#FF9999",
    "splus": "#FF1155",
    "dion": "#DD33FF",
    "adamw_tuned": "#888877",
    "orthogonal_gradient": "#0077FF",
    "grokfast": "#33BBCC",
    "muon_one_step": "#886611",
    "gluon": "#228811",
    "muonbp": "#004444",
    "muon_sgd": "#FF0000",
    "muon_lion": "#992277",
    "muon_only": "#880000",
    "optax_muon": "#CCAACC",
    "low_rank_subspace": "#6644EE",
    "splus_adamw": "#443366",
    "muon_cautious": "#99BB77",
    "muon_bf16": "#FF77BB",
    "muon_int8": "#DD9900",
}
# For any other name, after Tol's muted scheme.
OTHER_COLORS = ("#332288", "#117733", "#882255", "#999933", "#661100", "#777777")

LABELS = {
    "adamw": "AdamW",
    "adamw_tuned": "AdamW, tuned",
    "adamuon": "AdaMuon",
    "low_rank": "Rank k, SVD",
    "low_rank_subspace": "Rank k, subspace",
    "muon_adamw": "Muon + AdamW",
    "muon_bf16": "Muon, bf16 state",
    "muon_cautious": "Muon, cautious",
    "muon_equal_decay": "Muon, equal decay",
    "muon_equal_shrink": "Muon, equal lr × decay",
    "muon_frozen1d": "Muon, gains frozen",
    "muon_int8": "Muon, int8 state",
    "muon_lion": "Muon + Lion",
    "muon_one_step": "Muon, 1 step",
    "muon_only": "Muon alone",
    "muon_sgd": "Muon + SGD",
    "muonbp": "MuonBP",
    "muonclip": "MuonClip",
    "normuon": "NorMuon",
    "optax_muon": "optax.contrib.muon",
    "orthogonal": "Orthogonal alone",
    "orthogonal_gradient": "⊥Grad",
    "polar": "Exact polar",
    "spectral": "Spectral alone",
    "splus": "SPlus",
    "splus_adamw": "SPlus + AdamW",
}

DASHES = (0, (3.2, 1.2))
MEMORISED_MARK: dict[str, Any] = {"marker": "o", "ms": 6, "mew": 1.4, "ls": "none"}
GROKKED_MARK: dict[str, Any] = {"marker": "D", "ms": 6, "mec": "white", "mew": 0.8, "ls": "none"}
POINT_MARK: dict[str, Any] = {"marker": "o", "ms": 4, "mec": "white", "mew": 0.5, "ls": "none"}
CENSORED_MARK: dict[str, Any] = {"marker": "^", "ms": 6, "mew": 1.2, "ls": "none"}

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
    # Names come from the data: a "$" in one must not be read as mathematics.
    "text.parse_math": False,
}


def optimizer_color(name: str) -> str:
    """The hex colour of an optimizer, the same for a name in every figure and every run.

    Args:
        name: The optimizer's name as the run files spell it; any string has a colour.
    """
    if name in COLORS:
        return COLORS[name]
    # crc32, since hash() differs from one Python process to the next.
    return OTHER_COLORS[zlib.crc32(name.encode()) % len(OTHER_COLORS)]


def optimizer_label(name: str) -> str:
    """An optimizer's name for readers: "AdamW" for "adamw", "Muon" for "muon".

    Args:
        name: The optimizer's name as the run files spell it.
    """
    return LABELS.get(name, name[:1].upper() + name[1:])


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw and save figures in the studies' style within a `with` block."""
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure with constrained layout on the Agg canvas: no pyplot, no display.

    Args:
        width: Width in inches.
        height: Height in inches.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.07, hspace=0.03, wspace=0.02)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def plain_log_axis(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, its ticks plain numbers (10, 100) and not powers (10¹, 10²).

    Args:
        axes: The panel.
        which: "x" or "y".
    """
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    # Over less than two decades the powers of ten alone would label one or two places.
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def save_png(figure: Figure, path: Path, dpi: int = 200) -> Path:
    """Save a figure as PNG.

    Args:
        figure: The figure.
        path: The file to write; one that is there is replaced.
        dpi: Pixels per inch.

    Returns:
        The path.
    """
    image = io.BytesIO()  # an object store takes whole files
    figure.savefig(image, format="png", dpi=dpi)
    path.write_bytes(image.getvalue())
    return path


def data_uri(path: Path) -> str:
    """A PNG file as a base64 data URI, for pages that need no second file.

    Args:
        path: The PNG file.
    """
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


class Curve(NamedTuple):
    """One training: its epochs and the accuracies, as fractions, after each."""

    epochs: list[int]
    train: list[float]
    validation: list[float]


class Milestones(NamedTuple):
    """The median epochs that a panel marks for an optimizer, None for one not reached."""

    memorised: float | None = None
    grokked: float | None = None


class Sample(NamedTuple):
    """One box: an optimizer's values, None for a censored one."""

    optimizer: str
    values: list[float | None]


def median_curve(curves: Sequence[Curve]) -> Curve:
    """The median of several trainings, at the epochs that all of them reached.

    Beyond those a median would be of whichever trainings went on, which are not a fair sample.

    Args:
        curves: The trainings, at least one.
    """
    epochs = sorted(set.intersection(*(set(curve.epochs) for curve in curves)))

    def middle(values: Sequence[list[float]]) -> list[float]:
        rows = [dict(zip(c.epochs, v, strict=True)) for c, v in zip(curves, values, strict=True)]
        return [statistics.median(row[epoch] for row in rows) for epoch in epochs]

    return Curve(epochs, middle([c.train for c in curves]), middle([c.validation for c in curves]))


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Sequence[Curve]],
    milestones: Mapping[str, Milestones],
    threshold: float,
) -> None:
    """Draw accuracy against epoch: every training thin, each optimizer's median emphasised.

    Args:
        axes: The panel.
        curves: Per optimizer, its trainings.
        milestones: Per optimizer, the median epochs to mark.
        threshold: The accuracy, a fraction, to draw a dotted line at.
    """
    axes.axhline(100 * threshold, color="#444444", linestyle=":", linewidth=1, zorder=1.5)
    for optimizer, trainings in curves.items():
        color = optimizer_color(optimizer)
        for curve in trainings:
            axes.plot(curve.epochs, _percent(curve.train), color=color, lw=0.7, alpha=0.3)
            axes.plot(
                curve.epochs, _percent(curve.validation), color=color, lw=0.7, alpha=0.45, ls="--"
            )
        middle = median_curve(trainings)
        if not middle.epochs:
            continue
        axes.plot(middle.epochs, _percent(middle.train), color=color, lw=1.1, alpha=0.55)
        axes.plot(middle.epochs, _percent(middle.validation), color=color, lw=2, ls=DASHES)
        marks = milestones.get(optimizer, Milestones())
        if marks.memorised is not None:
            axes.plot(marks.memorised, 100, color=color, mfc="white", zorder=5, **MEMORISED_MARK)
        if marks.grokked is not None:
            axes.plot(marks.grokked, 100 * threshold, color=color, zorder=5, **GROKKED_MARK)
    axes.set_ylim(-3, 105)
    axes.set_yticks(range(0, 101, 25))
    plain_log_axis(axes, "x")


def draw_boxes(
    axes: Axes, groups: Sequence[tuple[str, Sequence[Sample]]], budget: int, log: bool
) -> None:
    """Draw a box per optimizer, in groups, with all points; censored ones open, at the budget.

    Args:
        axes: The panel.
        groups: Per group its label and its samples.
        budget: The epoch at which a training is censored.
        log: Whether the vertical axis is logarithmic.
    """
    axes.axhline(budget, color="#444444", linestyle=":", linewidth=1, zorder=1.5)
    places, names, centers = [], [], []
    start = 0.0
    # Where there is room each box says whose it is; else the legend's colours do.
    roomy = sum(len(samples) for _, samples in groups) <= 8
    for _, samples in groups:
        for place, sample in enumerate(samples, start=1):
            if sample.values:
                _draw_box(axes, start + place, sample, budget)
            places.append(start + place)
            size = f"n={len(sample.values)}"
            names.append(f"{optimizer_label(sample.optimizer)}\n{size}" if roomy else size)
        centers.append(start + (1 + len(samples)) / 2)
        start += len(samples) + 0.8
    axes.set_xlim(0.3, start - 0.8 + 0.7)
    axes.grid(visible=False, axis="x")
    axes.xaxis.remove_overlapping_locs = False  # a group's middle box keeps its n
    axes.set_xticks(places, names, minor=True)
    axes.set_xticks(centers, [label for label, _ in groups])
    # Two rows of labels: the sizes below the boxes, the group's name below those.
    axes.tick_params(axis="x", which="minor", length=0, labelsize=8 if roomy else 7, pad=4)
    axes.tick_params(axis="x", which="major", length=0, labelsize=9, pad=30 if roomy else 17)
    if log:
        plain_log_axis(axes, "y")
    else:
        axes.set_ylim(bottom=0)


def _draw_box(axes: Axes, place: float, sample: Sample, budget: int) -> None:
    color = optimizer_color(sample.optimizer)
    values = [budget if value is None else value for value in sample.values]
    line = {"color": color, "linewidth": 1}
    axes.boxplot(
        values,
        positions=[place],
        widths=0.6,
        whis=(0, 100),
        showfliers=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": color + "22", "edgecolor": color, "linewidth": 1},
        medianprops={"color": color, "linewidth": 2},
        whiskerprops=line,
        capprops=line,
    )
    offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [0.0]
    for offset, value, shown in zip(offsets, sample.values, values, strict=True):
        mark = CENSORED_MARK if value is None else POINT_MARK
        face = "white" if value is None else color
        axes.plot(place + offset, shown, color=color, mfc=face, zorder=4, clip_on=False, **mark)


def legend_line(label: str, color: str = "#555555", **style: Any) -> Line2D:
    """A line or marker for a legend.

    Args:
        label: Its text.
        color: Its colour.
        **style: Further properties of the line.
    """
    return Line2D([], [], label=label, color=color, **style)


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over the 6 % of the records about each, over fewer where the curve is steep."""
    reach = round(0.03 * len(values))
    means = np.array(values)
    for i in np.flatnonzero(np.isfinite(values)):
        near = min(i // 4, reach)
        means[i] = np.nanmean(values[i - near : i + near + 1])
    return means


def ceiling(arms: Sequence[Any]) -> float:
    """Where the axis of the losses ends: the best rates and what is near them stay legible.

    Each arm has its final `loss`, and `losses` by learning rate; infinite where it diverged.
    """
    best = [arm.loss for arm in arms if math.isfinite(arm.loss)] or [1.0]
    every = [x for arm in arms for x in arm.losses.values() if math.isfinite(x)] or [1.0]
    span = max(best) - min(best)
    return min(max(every) + 0.02, max(best) + max(span, 0.3))
