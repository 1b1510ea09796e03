"""Figures of a suite: loss against rate, curves at the best rates, differences with intervals."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import (
    CENSORED_MARK,
    GROKKED_MARK,
    POINT_MARK,
    ceiling,
    legend_line,
    new_figure,
    optimizer_label,
    plain_log_axis,
)
from experiments.finetune import report_figures
from experiments.finetune.report_data import Trained
from experiments.finetune.report_figures import color_of, style_of
from experiments.finetune.suites.config import (
    CONTROLLED,
    NO_QK_NORM,
    PRETRAINED,
    PUBLISHED,
    QK_NORM,
    SuiteName,
)
from experiments.finetune.suites.results import Contrast, Group


def rates_figure(found: Sequence[Group]) -> Figure:
    """Final loss against learning rate, a line for each arm and a panel for each variant."""
    variants = list(dict.fromkeys(of.variant for of in found))
    figure = new_figure(max(6.4, 4.6 * len(variants)), 3.7)
    # No shared axis: a variant may have a base of its own, whose losses lie elsewhere.
    grid = figure.subplots(1, len(variants), squeeze=False)[0]
    for variant, axes in zip(variants, grid, strict=True):
        own = [of for of in found if of.variant == variant]
        top = ceiling(own)
        for of in own:
            _draw_rates(axes, of, top)
        axes.set_title(variant[:1].upper() + variant[1:], loc="left")
        axes.set_xlabel("learning rate")
        axes.margins(x=0.1)
        plain_log_axis(axes, "x")
        axes.set_ylim(top=top)
    grid[0].set_ylabel("final held-out loss (nats a token)")
    arms = dict.fromkeys(of.arm for of in found)
    handles = [legend_line(optimizer_label(arm), **style_of(arm), lw=2) for arm in arms]
    handles += [
        legend_line("best rate", **GROKKED_MARK),
        legend_line("diverged, or beyond the axis", mfc="white", **CENSORED_MARK),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _draw_rates(axes: Axes, of: Group, top: float) -> None:
    color = color_of(of.arm)
    shown = {rate: min(loss, top) for rate, loss in of.losses.items()}
    axes.plot([*shown], [*shown.values()], **style_of(of.arm), lw=1.4)
    for rate, loss in of.losses.items():
        mark = POINT_MARK if loss < top else CENSORED_MARK | {"mfc": "white"}
        axes.plot(rate, shown[rate], color=color, clip_on=False, zorder=4, **mark)
    if of.losses.get(of.best.rate, math.inf) < top:
        axes.plot(of.best.rate, of.losses[of.best.rate], color=color, zorder=5, **GROKKED_MARK)


def differences_figure(found: Sequence[Contrast]) -> Figure:
    """Mean difference with its interval and every seed, a line each and a panel for each family."""
    families = list(dict.fromkeys(of.family for of in found))
    sizes = [sum(of.family == family for of in found) for family in families]
    figure = new_figure(7.4, 0.27 * sum(sizes) + 0.75 * len(families) + 0.5)
    grid = figure.subplots(
        len(families), 1, squeeze=False, height_ratios=[size + 0.6 for size in sizes]
    )[:, 0]
    for family, axes in zip(families, grid, strict=True):
        own = [of for of in found if of.family == family]
        axes.axvline(0, color="#444444", linestyle=":", linewidth=1, zorder=1.5)
        for place, of in enumerate(own):
            color = color_of(of.arm)
            if of.interval:
                axes.plot(of.interval[1:], [place, place], color=color, lw=1.6)
            axes.plot([*of.gaps.values()], [place] * len(of.gaps), color=color, **POINT_MARK)
            axes.plot(of.mean, place, color=color, marker="|", ms=11, mew=2, ls="none")
        axes.set_yticks(range(len(own)), [of.name for of in own])
        axes.set_ylim(len(own) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_title(family, loc="left")
    grid[-1].set_xlabel("difference of the final held-out loss (nats a token); lower is better")
    handles = [
        legend_line("one seed", **POINT_MARK),
        legend_line("mean", marker="|", ms=11, mew=2, ls="none"),
        legend_line("95 % interval", lw=1.6),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def curves(which: SuiteName, found: Sequence[Group]) -> dict[str, dict[str, Sequence[Trained]]]:
    """What is drawn against step, by a title: of a variant its arms, or of qk its clips."""
    if which == "qk":
        return {
            norm: {
                of.variant.removeprefix(f"{norm}, "): of.trained
                for of in found
                if of.variant.startswith(f"{norm}, ")
            }
            for norm in (QK_NORM, NO_QK_NORM)
        }
    shown = {"controlled": (CONTROLLED,), "as_published": (PUBLISHED,)}.get(
        which, tuple(PRETRAINED.values())
    )
    return {
        variant: {of.arm: of.trained for of in found if of.variant == variant} for variant in shown
    }


def draw(
    which: SuiteName, found: Sequence[Group], contrasts: Sequence[Contrast]
) -> dict[str, tuple[str, Figure]]:
    """What there is to draw, by the name of its file, with a caption."""
    figures: dict[str, tuple[str, Figure]] = {}
    if told := [of for of in contrasts if of.gaps]:
        figures["differences"] = (
            "Differences of the final held-out loss, paired by seed, with their 95 % intervals.",
            differences_figure(told),
        )
    if any(len(of.losses) > 1 for of in found) and any(math.isfinite(of.loss) for of in found):
        figures["rates"] = (
            "The sweep: final held-out loss against learning rate, of the seeds that choose it.",
            rates_figure(found),
        )
    captions = {
        "post": "Mean token accuracy of the rows trained on, and the norm of the gradient before "
        "it is clipped",
        "held_out": "Loss and accuracy of held-out rows, and the largest attention logit",
        "groups": "Gradient norm, above, and RMS of the update, below, by group of params",
    }
    for title, arms in curves(which, found).items():
        known = {arm: trainings for arm, trainings in arms.items() if trainings}
        for name, figure in report_figures.draw(known).items() if known else ():
            place = title.lower().replace(" ", "_")
            where = f"{title[:1].upper()}{title[1:]}, at the best rates"
            figures[f"{name}_{place}"] = f"{where}. {captions[name]}.", figure
    return figures
