"""Figures of fine-tunings, for a command's runs and for suites' cells."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.finetune.arms import GROUPS
from experiments.finetune.report_data import Trained
from experiments.report.figures import (
    DASHES,
    GROKKED_MARK,
    POINT_MARK,
    draw_series,
    grid_of,
    legend,
    legend_line,
    name_axes,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
)
from experiments.report.page import Picture

Arms = Mapping[str, Sequence[Trained]]  # the trainings of each arm

# Okabe and Ito's colours, for the forms of Muon and for the clips of --suite qk.
_COLORS = {
    "muon_adamw": "#D55E00",
    "muon_frozen1d": "#009E73",
    "muonclip": "#CC79A7",
    "no clip": "#0072B2",
    "W_q and W_k clipped": "#D55E00",
    "gains clipped": "#009E73",
}
_DASHED = ("muonclip", "W_q and W_k clipped")  # so that they do not hide an equal line


def style_of(arm: str) -> dict[str, Any]:
    """Returns the style of an arm's lines in all figures of the study."""
    color = _COLORS.get(arm, optimizer_color(arm))
    return {"color": color, "ls": DASHES if arm in _DASHED else "-"}


def post_figure(arms: Arms) -> Figure:
    """Draws the post's plots: mean token accuracy and gradient norm against step."""
    figure = new_figure(10.4, 4.0)
    left, right = figure.subplots(1, 2)
    _draw(left, arms, "mean_token_accuracy", "Mean token accuracy in training (%)", scale=100)
    _draw(right, arms, "gradient_norm", "Gradient norm before clipping", positive=True)
    _finish(figure, [left, right], arms)
    return figure


def held_out_figure(arms: Arms) -> Figure:
    """Held-out loss and accuracy, and the largest attention logit, against step.

    And the loss on the pretraining text, if there is one.
    """
    known = [of.series["pretraining_loss"][1] for own in arms.values() for of in own]
    retained = any(np.isfinite(values).any() for values in known)
    figure = new_figure(10.4 + 3.4 * retained, 3.7)
    panels = figure.subplots(1, 3 + retained)
    shown = (
        ("validation_loss", "Held-out loss (nats per token)", {"marked": True}),
        ("validation_accuracy", "Held-out accuracy (%)", {"scale": 100, "marked": True}),
        ("max_logit", "Largest attention logit", {"gaps": False}),
        ("pretraining_loss", "Loss on the pretraining text (nats)", {"marked": True}),
    )
    for axes, (name, title, how) in zip(panels, shown, strict=False):
        _draw(axes, arms, name, title, **how)
    _finish(figure, panels, arms)
    return figure


def groups_figure(arms: Arms) -> Figure:
    """Draws the gradient norm and the update's RMS of each group of params against step."""
    names = {name for of in arms.values() for trained in of for name in trained.series}
    groups = [group for group in GROUPS if f"gradient_norms/{group}" in names]
    figure = new_figure(10.4, 5.2)
    grid = figure.subplots(2, len(groups), squeeze=False, sharex=True)
    for group, (norm, update) in zip(groups, grid.T, strict=True):
        title = "hidden matrices" if group == "matrices" else group
        _draw(norm, arms, f"gradient_norms/{group}", title, positive=True)
        _draw(update, arms, f"update_rms/{group}", "", positive=True)
        update.yaxis.set_major_formatter("{x:.2g}")
    grid[0, 0].set_ylabel("gradient norm")
    grid[1, 0].set_ylabel("RMS of the update")
    _finish(figure, grid[1], arms)
    return figure


def forgetting_figure(panels: Mapping[str, Sequence[Any]]) -> Figure:
    """Draws what is forgotten against what is learnt, a line through each group's rates.

    Args:
        panels: The `suites.results.Group`s of each panel, by its title.
    """
    figure, grid = grid_of(len(panels), 3, 4.6, 3.4)
    for (title, own), axes in zip(panels.items(), grid, strict=True):
        for group in own:
            its = style_of(group.arm)
            points = [(group.losses[rate], x) for rate, x in group.rises_by_rate.items()]
            axes.plot(*zip(*points, strict=True), lw=1.4, **its)
            for rate, point in zip(group.rises_by_rate, points, strict=True):
                mark = GROKKED_MARK if rate == group.best.rate else POINT_MARK
                axes.plot(*point, **mark | {"color": its["color"], "zorder": 4})
                place = {"textcoords": "offset points", "xytext": (6, 4), "fontsize": 7}
                box = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8}
                axes.annotate(f"{rate:g}", point, color=its["color"], bbox=box, zorder=3, **place)
        axes.set_title(title, loc="left")
        axes.margins(0.13)
    name_axes(grid, "final held-out loss (nats per token)", "rise on the pretraining text (nats)")
    every = [group for own in panels.values() for group in own]
    seeds = min(group.choosing for group in every)
    label = "a learning rate, " + ("one seed" if seeds == 1 else f"mean over {seeds} seeds")
    legend(
        figure,
        (),
        *(
            legend_line(optimizer_label(arm), lw=2, **style_of(arm))
            for arm in dict.fromkeys(group.arm for group in every)
        ),
        legend_line(label, **POINT_MARK),
        legend_line("best rate", **GROKKED_MARK),
    )
    return figure


def _draw(axes: Axes, arms: Arms, name: str, title: str, **how: Any) -> None:
    """Draws trainings thin and each arm's mean, with a log axis if they span a decade."""
    for arm, trainings in arms.items():
        found = [of.series[name] for of in trainings if name in of.series]
        noisy = any(of.noisy for of in trainings) and not how.get("marked")
        draw_series(axes, found, style_of(arm), thin=len(found) > 1 or noisy, **how)
    drawn = np.concatenate([np.asarray(of.get_ydata(), float) for of in axes.lines] or [[1.0]])
    if how.get("positive") and np.nanmax(drawn) > 10 * np.nanmin(drawn):
        plain_log_axis(axes, "y")
    axes.set_title(title, loc="left")


def _finish(figure: Figure, lowest: Sequence[Axes], arms: Arms) -> None:
    for axes in lowest:
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    several = any(len(of) > 1 for of in arms.values())
    legend(
        figure,
        (),
        *(legend_line(optimizer_label(arm), **style_of(arm), lw=2.5) for arm in arms),
        legend_line("mean of the seeds, smoothed" if several else "smoothed", lw=1.7),
        legend_line("one seed" if several else "one step", lw=0.8, alpha=0.5),
    )


_PICTURES = {
    "post": (
        post_figure,
        "As plotted in the post: mean token accuracy of the training examples, and gradient "
        "norm before clipping.",
        "Mean token accuracy and gradient norm against step, a line for each optimizer.",
    ),
    "held_out": (
        held_out_figure,
        "Loss and accuracy over all trained-on tokens of the held-out examples, the largest "
        "attention logit of all layers and heads, and, where it is known, the loss on text like "
        "that of the pretraining.",
        "Held-out loss, held-out accuracy and largest attention logit against step.",
    ),
    "groups": (
        groups_figure,
        "Gradient norm (top) and RMS of the update, including learning rate and weight decay "
        "(bottom), by group of parameters. Frozen parameters have a gradient but no update.",
        "Gradient norm and update RMS by group of parameters against step.",
    ),
}


def pictures(arms: Arms, title: str = "") -> list[Picture]:
    """Returns the figures of trainings; none without records.

    Args:
        arms: The trainings of each arm.
        title: The title of the suite's variant, if they are of one.
    """
    known = {arm: trainings for arm, trainings in arms.items() if trainings}
    if not any(len(of.series["loss"][0]) for own in known.values() for of in own):
        return []
    end = f"_{title.lower().replace(' ', '_')}" if title else ""
    where = f"{title[:1].upper()}{title[1:]}, at the best rates. " if title else ""
    return [
        Picture(name + end, lambda draw=draw: draw(known), where + caption, alt)
        for name, (draw, caption, alt) in _PICTURES.items()
    ]
