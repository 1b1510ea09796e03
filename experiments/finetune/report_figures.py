"""Figures of fine-tunings, a colour for each arm: of one command's runs, and of suites' cells."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import (
    DASHES,
    POINT_MARK,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
    smoothed,
)
from experiments.finetune.arms import GROUPS
from experiments.finetune.report_data import Trained, mean_series

Arms = Mapping[str, Sequence[Trained]]  # the trainings of each arm

# Okabe and Ito's, of the forms of Muon, and of what --suite qk clips.
_COLORS = {
    "muon_adamw": "#D55E00",
    "muon_frozen1d": "#009E73",
    "muonclip": "#CC79A7",
    "no clip": "#0072B2",
    "W_q and W_k clipped": "#D55E00",
    "gains clipped": "#009E73",
}
_DASHED = ("muonclip", "W_q and W_k clipped")  # else they hide the line that they may lie on
_GROUP_NAMES = {"matrices": "hidden matrices"}


def color_of(arm: str) -> str:
    """The arm's, in all figures of the study."""
    return _COLORS.get(arm, optimizer_color(arm))


def style_of(arm: str) -> dict[str, Any]:
    """Of the arm's lines."""
    return {"color": color_of(arm), "ls": DASHES if arm in _DASHED else "-"}


def post_figure(arms: Arms) -> Figure:
    """The post's plots: mean token accuracy and gradient norm against step."""
    figure = new_figure(10.4, 4.0)
    left, right = figure.subplots(1, 2)
    _draw(left, arms, "mean_token_accuracy", scale=100)
    _draw(right, arms, "gradient_norm", log=True)
    left.set_title("Mean token accuracy in training (%)", loc="left")
    right.set_title("Gradient norm before clipping", loc="left")
    _finish(figure, [left, right], arms)
    return figure


def held_out_figure(arms: Arms) -> Figure:
    """Held-out loss and accuracy, and the largest attention logit, against step."""
    figure = new_figure(10.4, 3.7)
    panels = figure.subplots(1, 3)
    _draw(panels[0], arms, "validation_loss", marked=True)
    _draw(panels[1], arms, "validation_accuracy", scale=100, marked=True)
    _draw(panels[2], arms, "max_logit", gaps=False)
    titles = ("Held-out loss (nats a token)", "Held-out accuracy (%)", "Largest attention logit")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left")
    _finish(figure, panels, arms)
    return figure


def groups_figure(arms: Arms) -> Figure:
    """Gradient norm, and RMS of the update, of each group of params against step."""
    names = {name for of in arms.values() for trained in of for name in trained.series}
    groups = [group for group in GROUPS if f"gradient_norms/{group}" in names]
    figure = new_figure(10.4, 5.2)
    grid = figure.subplots(2, len(groups), squeeze=False, sharex=True)
    for group, (norm, update) in zip(groups, grid.T, strict=True):
        _draw(norm, arms, f"gradient_norms/{group}", log=True)
        _draw(update, arms, f"update_rms/{group}", log=True)
        norm.set_title(_GROUP_NAMES.get(group, group), loc="left")
        update.yaxis.set_major_formatter("{x:.2g}")
    grid[0, 0].set_ylabel("gradient norm")
    grid[1, 0].set_ylabel("RMS of the update")
    _finish(figure, grid[1], arms)
    return figure


def _draw(
    axes: Axes,
    arms: Arms,
    name: str,
    *,
    scale: float = 1.0,
    log: bool = False,
    marked: bool = False,
    gaps: bool = True,
) -> None:
    """Every training thin, and each arm's mean, smoothed where it is of single steps.

    With `log` the axis is logarithmic if there is a decade to show; without `gaps` lines go on
    where a value is not known.
    """

    def line(steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
        shown = np.where(values > 0, values, np.nan) if log else scale * values
        known = np.isfinite(shown)
        if known.any():  # the updates of frozen params are 0
            drawn = slice(None) if gaps else known
            axes.plot(steps[drawn], shown[drawn], **style)

    for arm, trainings in arms.items():
        color = color_of(arm)
        found = [of.series[name] for of in trainings if name in of.series]
        if len(found) > 1 or (any(of.noisy for of in trainings) and not marked):
            for steps, values in found:
                line(steps, values, color=color, lw=0.7, alpha=0.3)
        steps, values = mean_series(trainings, name)
        mark = POINT_MARK if marked and len(steps) < 40 else {}
        line(steps, smoothed(values), **mark | style_of(arm) | {"lw": 1.7})
    drawn = np.concatenate([np.asarray(of.get_ydata(), float) for of in axes.lines] or [[1.0]])
    if log and np.nanmax(drawn) > 10 * np.nanmin(drawn):
        plain_log_axis(axes, "y")


def _finish(figure: Figure, lowest: Sequence[Axes], arms: Arms) -> None:
    for axes in lowest:
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    handles = [legend_line(optimizer_label(arm), **style_of(arm), lw=2.5) for arm in arms]
    several = any(len(of) > 1 for of in arms.values())
    handles += [
        legend_line("mean of the seeds, smoothed" if several else "smoothed", lw=1.7),
        legend_line("one seed" if several else "one step", lw=0.8, alpha=0.5),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))


def draw(arms: Arms) -> dict[str, Figure]:
    """What there is to draw: a run may have no record yet."""
    if not any(len(of.series["loss"][0]) for trainings in arms.values() for of in trainings):
        return {}
    return {
        "post": post_figure(arms),
        "held_out": held_out_figure(arms),
        "groups": groups_figure(arms),
    }
