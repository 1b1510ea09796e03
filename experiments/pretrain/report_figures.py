"""Figures of pretraining runs: losses, rates and norms, routers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.pretrain.report_data import MEASURES, Run, loss_text, measure_of
from experiments.report.figures import (
    CENSORED_MARK,
    DASHES,
    REFERENCE,
    draw_series,
    engineering_axis,
    grid_of,
    legend,
    legend_line,
    log_if_positive,
    new_figure,
    plain_log_axis,
)

# Smaller loads are drawn here, since a log axis cannot show a load of 0.
_LEAST_LOAD = 1 / 32
_NOISY = (legend_line("smoothed", lw=1.7), legend_line("one step", lw=0.8, alpha=0.5))


def held_out_figure(runs: Sequence[Run]) -> Figure:
    """Draws the held-out measure against tokens and against time."""
    key = measure_of(runs)
    figure = new_figure(10.4, 3.7)
    left, right = figure.subplots(1, 2, sharey=True)
    for run in runs:
        tokens, losses = np.array([at for at in run.held_out(key) if at[0]]).reshape(-1, 2).T
        draw_series(left, [(tokens, losses)], run.style, thin=False, marked=True)
        if speed := run.median("tokens_per_second"):
            draw_series(right, [(tokens / speed, losses)], run.style, thin=False, marked=True)
    for axes, name in ((left, "tokens (log scale)"), (right, "training time (s, log scale)")):
        axes.set_xlabel(name)
        log_if_positive(axes, "x")
        axes.tick_params(labelleft=True)
    engineering_axis(left, "x")
    left.set_ylabel(f"held out ({MEASURES[key]})")
    _legend(figure, runs, lambda run: f": {loss_text(run.last(key))}")
    return figure


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Draws the training loss against tokens."""
    figure = new_figure(10.4, 3.9)
    axes = figure.subplots()
    lost = []
    for run in runs:
        steps, losses = run.series("loss")
        tokens = steps * run.tokens_per_step
        draw_series(axes, [(tokens, losses)], run.style)
        if (gaps := tokens[~np.isfinite(losses)]).size:
            lost = [legend_line("not finite", **CENSORED_MARK)]
            mark = CENSORED_MARK | run.style | {"clip_on": False, "in_layout": False}
            axes.plot(gaps, gaps * 0 + 1, transform=axes.get_xaxis_transform(), **mark)
    engineering_axis(axes, "x")
    axes.set_xlabel("tokens (log scale)")
    axes.set_ylabel("training loss (nats per token)")
    _legend(figure, runs, others=[*_NOISY, *lost])
    return figure


def optimization_figure(runs: Sequence[Run]) -> Figure:
    """Draws learning rate, gradient norm, update RMS and largest attention logit against step."""
    figure = new_figure(10.4, 5.6)
    (rate, gradient), (update, logit) = figure.subplots(2, 2)
    for place, run in enumerate(runs):
        # Later lines are thinner, so that equal ones remain visible.
        width = {"lw": max(3.0 - 1.2 * place, 1.2)}
        rate.plot(*run.series("learning_rate"), **run.style, **width)
        for group, dashes in (("matrices", "-"), ("others", DASHES)):
            update.plot(*run.series("update_rms", group), **run.style, lw=1.3, ls=dashes)
        draw_series(gradient, [run.series("gradient_norm")], run.style)
        draw_series(logit, [run.series("max_logit")], run.style, gaps=False)
        gradient.axhline(run.config.clip, **REFERENCE)
    titles = ("Learning rate", "Gradient norm", "RMS of the update", "Largest attention logit")
    for axes, title in zip((rate, gradient, update, logit), titles, strict=True):
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    for axes in (update, logit):
        axes.set_xlabel("step")
    for axes in (gradient, update):
        log_if_positive(axes, "y")
    peaks = [run.rate for run in runs]
    if max(peaks) > 5 * min(peaks):
        log_if_positive(rate, "y")
    else:
        rate.set_ylim(bottom=0)
    update.yaxis.set_major_formatter("{x:.0e}")
    others = [
        legend_line("hidden matrices", lw=1.3),
        legend_line("other params", lw=1.3, ls=DASHES),
        *_NOISY,
        legend_line("clipped above", lw=1, ls=":"),
    ]
    _legend(figure, runs, others=others)
    return figure


def router_figure(runs: Sequence[Run]) -> Figure:
    """Draws the busiest and the idlest expert, and the entropy of the scores, against step."""
    figure = new_figure(10.4, 3.7)
    load, entropy = figure.subplots(1, 2)
    for run in runs:
        steps, largest = run.series("largest_load")
        smallest = np.maximum(run.series("smallest_load")[1], _LEAST_LOAD)
        load.fill_between(steps, smallest, largest, **run.style, alpha=0.12, lw=0)
        load.plot(steps, largest, **run.style, lw=1.3)
        load.plot(steps, smallest, **run.style, lw=1.3, ls=DASHES)
        entropy.plot(*run.series("router_entropy"), **run.style, lw=1.5)
        entropy.axhline(math.log(run.config.model.experts), **REFERENCE)
    load.axhline(1, **REFERENCE)
    load.set_title("Load of an expert ÷ even share", loc="left")
    entropy.set_title("Entropy of the router's scores (nats)", loc="left")
    plain_log_axis(load, "y")
    _load_ticks(load.yaxis, *load.get_ylim())
    for axes in (load, entropy):
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    others = [
        legend_line("busiest expert of all layers", lw=1.3),
        legend_line("idlest", lw=1.3, ls=DASHES),
        legend_line("even", lw=1, ls=":"),
    ]
    _legend(figure, runs, others=others)
    return figure


def experts_figure(runs: Sequence[Run]) -> Figure:
    """Draws the load of every expert at the end, layer × expert, a panel for each optimizer."""
    columns = min(len(runs), 2 if len(runs) < 5 else 3)
    layers = max(len(run.final_load()) for run in runs)
    wide = 10.4 / columns if columns > 1 else 6.4
    figure, grid = grid_of(len(runs), columns, wide, 0.8 + 0.15 * max(layers, 6))
    for run, axes in zip(runs, grid, strict=True):
        load = run.final_load()
        first = run.config.model.dense_layers + 1
        image = axes.imshow(
            np.maximum(load, _LEAST_LOAD),
            cmap="PuOr_r",
            norm=LogNorm(1 / 2, 2),
            extent=(-0.5, load.shape[1] - 0.5, first + len(load) - 0.5, first - 0.5),
            aspect="auto",
            interpolation="nearest",
        )
        axes.grid(visible=False)
        axes.set_title(run.label, loc="left")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    below = {"location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.02}
    bar = figure.colorbar(image, ax=grid, extend="both", **below)
    bar.set_label("load ÷ even share")
    _load_ticks(bar.ax.xaxis, 1 / 2, 2)
    return figure


def _load_ticks(axis: Any, low: float, high: float) -> None:
    """Puts ticks at powers of two only, such as 1/4 or 4."""
    powers = [2.0**k for k in range(-5, 8) if low <= 2.0**k <= high]
    axis.set_ticks(powers, [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in powers])
    axis.set_ticks([], minor=True)


def _legend(
    figure: Figure,
    runs: Sequence[Run],
    tail: Callable[[Run], str] = lambda run: "",
    others: Sequence[Any] = (),
) -> None:
    lines = [legend_line(run.label + tail(run), **run.style, lw=4) for run in runs]
    legend(figure, (), *lines, *others, columns=8)
