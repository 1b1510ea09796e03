"""Figures of pretraining runs: losses, rates and norms, routers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from experiments.figures import (
    CENSORED_MARK,
    DASHES,
    POINT_MARK,
    legend_line,
    new_figure,
    optimizer_label,
    plain_log_axis,
    smoothed,
)
from experiments.pretrain.report_data import (
    MEASURES,
    Run,
    final_load,
    held_out_curve,
    loss_text,
    measure_of,
    series,
)

_REFERENCE = {"color": "#444444", "linestyle": ":", "linewidth": 1, "zorder": 1.5}


# Loads below are drawn here: an expert without a token has none on a log axis.
_LEAST_LOAD = 1 / 32


def _draw_noisy(axes: Axes, x: np.ndarray, values: np.ndarray, color: str) -> None:
    axes.plot(x, values, color=color, lw=0.8, alpha=0.35)
    axes.plot(x, smoothed(values), color=color, lw=1.7)


def held_out_figure(runs: Sequence[Run]) -> Figure:
    """The held-out measure against tokens, and against time."""
    key = measure_of(runs)
    figure = new_figure(10.4, 3.7)
    left, right = figure.subplots(1, 2, sharey=True)
    for run in runs:
        curve = np.array([point for point in held_out_curve(run, key) if point[0]]).reshape(-1, 2)
        tokens, losses = curve.T
        style = {"lw": 1.6, "color": run.color}
        if len(curve) < 50:
            style = POINT_MARK | {"ls": "-"} | style
        left.plot(tokens, losses, **style)
        if speed := run.median("tokens_per_second"):
            right.plot(tokens / speed, losses, **style)
    for axes, name in ((left, "tokens (log scale)"), (right, "training time (s, log scale)")):
        axes.set_xlabel(name)
        _log_if_positive(axes, "x")
        axes.tick_params(labelleft=True)
    left.xaxis.set_major_formatter(EngFormatter())
    left.set_ylabel(f"held out ({MEASURES[key]})")
    _name_optimizers(figure, runs, lambda run: f": {loss_text(run.last(key))}")
    return figure


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Training loss against tokens."""
    figure = new_figure(10.4, 3.9)
    axes = figure.subplots()
    lost = False
    for run in runs:
        steps, losses = series(run, "loss")
        tokens = steps * run.config.tokens_per_step
        _draw_noisy(axes, tokens, losses, run.color)
        gaps = tokens[~np.isfinite(losses)]
        if gaps.size:
            lost = True
            mark = CENSORED_MARK | {"color": run.color, "clip_on": False, "in_layout": False}
            axes.plot(gaps, gaps * 0 + 1, transform=axes.get_xaxis_transform(), **mark)
    _log_if_positive(axes, "x")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens (log scale)")
    axes.set_ylabel("training loss (nats a token)")
    others = [legend_line("smoothed", lw=1.7), legend_line("one step", lw=0.8, alpha=0.5)]
    others += [legend_line("not finite", **CENSORED_MARK)] if lost else []
    _name_optimizers(figure, runs, others=others)
    return figure


def optimization_figure(runs: Sequence[Run]) -> Figure:
    """Learning rate, gradient norm, update RMS and largest attention logit against step."""
    figure = new_figure(10.4, 5.6)
    (rate, gradient), (update, logit) = figure.subplots(2, 2)
    for place, run in enumerate(runs):
        color = run.color
        # Equal lines lie on each other: the later ones are thinner.
        rate.plot(*series(run, "learning_rate"), color=color, lw=max(3.0 - 1.2 * place, 1.2))
        for group, dashes in (("matrices", "-"), ("others", DASHES)):
            update.plot(*series(run, "update_rms", group), color=color, lw=1.3, ls=dashes)
        _draw_noisy(gradient, *series(run, "gradient_norm"), color)
        steps, logits = series(run, "max_logit")
        known = np.isfinite(logits)  # of some steps it is not told
        _draw_noisy(logit, steps[known], logits[known], color)
        gradient.axhline(run.config.clip, **_REFERENCE)
    titles = ("Learning rate", "Gradient norm", "RMS of the update", "Largest attention logit")
    for axes, title in zip((rate, gradient, update, logit), titles, strict=True):
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    for axes in (update, logit):
        axes.set_xlabel("step")
    for axes in (gradient, update):
        _log_if_positive(axes, "y")
    peaks = [run.config.rate(run.optimizer) for run in runs]
    if max(peaks) > 5 * min(peaks):
        _log_if_positive(rate, "y")
    else:
        rate.set_ylim(bottom=0)
    update.yaxis.set_major_formatter("{x:.0e}")
    others = [
        legend_line("hidden matrices", lw=1.3),
        legend_line("other params", lw=1.3, ls=DASHES),
        legend_line("smoothed", lw=1.7),
        legend_line("one step", lw=0.8, alpha=0.5),
        legend_line("clipped above", lw=1, ls=":"),
    ]
    _name_optimizers(figure, runs, others=others)
    return figure


def router_figure(runs: Sequence[Run]) -> Figure:
    """The busiest and the idlest expert, and the entropy of the scores, against step."""
    figure = new_figure(10.4, 3.7)
    load, entropy = figure.subplots(1, 2)
    for run in runs:
        color = run.color
        steps, largest = series(run, "largest_load")
        _, smallest = series(run, "smallest_load")
        smallest = np.maximum(smallest, _LEAST_LOAD)
        load.fill_between(steps, smallest, largest, color=color, alpha=0.12, lw=0)
        load.plot(steps, largest, color=color, lw=1.3)
        load.plot(steps, smallest, color=color, lw=1.3, ls=DASHES)
        entropy.plot(*series(run, "router_entropy"), color=color, lw=1.5)
        entropy.axhline(math.log(run.config.model.experts), **_REFERENCE)
    load.axhline(1, **_REFERENCE)
    load.set_title("Load of an expert ÷ even share", loc="left")
    entropy.set_title("Entropy of the router's scores (nats)", loc="left")
    plain_log_axis(load, "y")
    low, high = load.get_ylim()
    _load_ticks(load.yaxis, low, high)
    for axes in (load, entropy):
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    others = [
        legend_line("busiest expert of all layers", lw=1.3),
        legend_line("idlest", lw=1.3, ls=DASHES),
        legend_line("even", lw=1, ls=":"),
    ]
    _name_optimizers(figure, runs, others=others)
    return figure


def experts_figure(runs: Sequence[Run]) -> Figure:
    """The load of every expert at the end, layer × expert, a panel for each optimizer."""
    columns = min(len(runs), 2 if len(runs) < 5 else 3)
    lines = math.ceil(len(runs) / columns)
    layers = max(len(final_load(run)) for run in runs)
    figure = new_figure(10.4 if columns > 1 else 6.4, (0.8 + 0.15 * max(layers, 6)) * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False)
    for spare in grid.flat[len(runs) :]:
        spare.remove()
    shade = LogNorm(1 / 2, 2)
    for run, axes in zip(runs, grid.flat, strict=False):
        load = final_load(run)
        first = run.config.model.dense_layers + 1
        edges = (-0.5, load.shape[1] - 0.5, first + len(load) - 0.5, first - 0.5)
        image = axes.imshow(
            np.maximum(load, _LEAST_LOAD),
            cmap="PuOr_r",
            norm=shade,
            extent=edges,
            aspect="auto",
            interpolation="nearest",
        )
        axes.grid(visible=False)
        axes.set_title(optimizer_label(run.optimizer), loc="left")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    below = {"location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.02}
    bar = figure.colorbar(image, ax=list(grid.flat[: len(runs)]), extend="both", **below)
    bar.set_label("load ÷ even share")
    _load_ticks(bar.ax.xaxis, 1 / 2, 2)
    return figure


def _load_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at powers of two, as 1/4 or 4, and nowhere else."""
    powers = [2.0**k for k in range(-5, 8) if low <= 2.0**k <= high]
    names = [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in powers]
    axis.set_ticks(powers, names)
    axis.set_ticks([], minor=True)


def _log_if_positive(axes: Axes, which: str) -> None:
    """A log axis, if anything is drawn that has a place on it."""
    drawn = (line.get_xdata() if which == "x" else line.get_ydata() for line in axes.lines)
    if any(np.any(np.asarray(values, float) > 0) for values in drawn):
        plain_log_axis(axes, which)


def _name_optimizers(
    figure: Figure,
    runs: Sequence[Run],
    tail: Callable[[Run], str] = lambda run: "",
    others: Sequence[Any] = (),
) -> None:
    handles = [
        legend_line(optimizer_label(run.optimizer) + tail(run), run.color, lw=4) for run in runs
    ]
    handles += others
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))


def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """What there is to draw: dense models have no router, and a run may have no record yet."""
    figures = {}
    if any(record["step"] for run in runs for record in run.evaluated):
        figures["held_out"] = held_out_figure(runs)
    if any(run.trained for run in runs):
        figures |= {"loss": loss_figure(runs), "optimization": optimization_figure(runs)}
    if routed := [run for run in runs if any("load" in record for record in run.trained)]:
        figures |= {"router": router_figure(routed), "experts": experts_figure(routed)}
    return figures
