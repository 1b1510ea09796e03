"""Report of the suite of sizes: loss against compute, fitted for each optimizer."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.differences import difference
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
from experiments.pretrain.suites.results import Arm, gather
from experiments.report import arms
from experiments.report.figures import (
    POINT_MARK,
    REFERENCE,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
)
from experiments.report.page import Column, Picture, Report, Section, Table
from experiments.report.text import all_told, flop, number, told
from experiments.sweep import load_run

SEEDS: dict[str, Any] = {"lw": 2, "marker": "_", "ms": 8, "clip_on": False}
PFLOPS_DAY = 8.64e19  # FLOPs
# The paper's largest training: 6 FLOPs per parameter and token, 1.5 B params, 38.91 B tokens.
PAPER_LARGEST = 6 * 1.5e9 * 38.91e9


class Ratio(NamedTuple):
    """The compute of an optimizer over AdamW's at equal loss.

    Attributes:
        loss: The loss, the lowest that all optimizers reach.
        value: The ratio by the fitted curves.
        interval: 95 % interval from the fit's residuals; None with fewer than three sizes.
        others: Smallest and largest ratio with one size left out; None with fewer than four.
        by_seed: 95 % interval over the seeds, each fitted by itself; None with one seed.
    """

    optimizer: str
    loss: float
    value: float
    interval: tuple[float, float] | None
    others: tuple[float, float] | None
    by_seed: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.value:.2f}"
        return text + (" [{:.2f}, {:.2f}]".format(*self.interval) if self.interval else "")


class Scaling(NamedTuple):
    """Loss against compute.

    Attributes:
        points: The points by optimizer.
        fit: The fitted curves.
        draws: The laws of bootstrap samples; None with fewer than three sizes.
        ratios: The compute ratios of all optimizers except AdamW, at the lowest common loss.
    """

    points: dict[str, Points]
    fit: Fit
    draws: dict[str, PowerLaw] | None
    ratios: list[Ratio]

    def as_json(self) -> dict[str, Any]:
        return {
            "laws": {name: law._asdict() for name, law in self.fit.laws.items()},
            "error_of_log_loss": self.fit.error,
            "gain_of_irreducible_loss": self.fit.gain,
            "ratios": [found._asdict() for found in self.ratios],
        }


def scaling(found: Sequence[Arm], with_update: bool) -> Scaling | None:
    """Returns the curves of all arms; None with fewer than two sizes that have known costs."""
    of: dict[str, list[Arm]] = {arm.optimizer: [] for arm in found}
    for arm in found:
        if arm.cost and math.isfinite(arm.loss):
            of[arm.optimizer].append(arm)
    widths = [{arm.width for arm in own} for own in of.values()]
    shared = set.intersection(*widths) if widths else set()
    if len(shared) < 2:
        return None
    kept = {name: [arm for arm in own if arm.width in shared] for name, own in of.items()}

    def points_of(loss: Callable[[Arm], float]) -> dict[str, Points]:
        return {
            name: Points(
                np.array([arm.compute(with_update) for arm in own]), np.array([*map(loss, own)])
            )
            for name, own in kept.items()
        }

    points = points_of(lambda arm: arm.loss)
    seeds = set.intersection(*(set(arm.best.losses) for own in kept.values() for arm in own))
    each = [points_of(lambda arm, seed=seed: arm.best.losses[seed]) for seed in sorted(seeds)]
    curves = fit(points)
    draws = bootstrap(points, curves)
    others = [name for name in of if name != BASELINE] if BASELINE in of else []
    ratios = [
        _ratio(points, curves, draws, name, [fit(own).laws for own in each]) for name in others
    ]
    return Scaling(points, curves, draws, ratios)


def _ratio(
    points: Mapping[str, Points],
    curves: Fit,
    draws: dict[str, PowerLaw] | None,
    name: str,
    seeds: Sequence[Mapping[str, PowerLaw]],
) -> Ratio:
    loss = overlap(points)[0]
    statistic = functools.partial(ratio, loss=loss, ours=name, theirs=BASELINE)
    value, sizes = statistic(curves.laws), len(points[name].loss)
    drawn = draws and interval(value, statistic(draws), sizes)
    logs = {i: math.log(statistic(laws)) for i, laws in enumerate(seeds)}
    by_seed = difference(logs, dict.fromkeys(logs, 0.0))
    over_seeds = by_seed and (math.exp(by_seed.low), math.exp(by_seed.high))
    return Ratio(name, loss, value, drawn, without_each(points, statistic), over_seeds)


def law_text(law: PowerLaw) -> str:
    """Returns a curve as text, with compute in PFLOP/s-days as in the paper."""
    floor = f" + {law.e:.2f}" if law.e else ""
    return f"{law.a * PFLOPS_DAY**-law.b:.3g} · C^−{law.b:.3f}{floor}"


COLUMNS: tuple[Column, ...] = (
    ("width", "width", lambda arm: str(arm.width)),
    ("optimizer", "optimizer", lambda arm: arm.label),
    ("tokens (millions)", "Mtokens", lambda arm: f"{1e-6 * arm.tokens:.3g}"),
    ("model FLOPs", "FLOPs", lambda arm: flop(arm.compute(False)) if arm.cost else "–"),
    ("with the updates'", "", lambda arm: flop(arm.compute(True)) if arm.cost else "–"),
    arms.RATE,
    ("final loss (nats per token)", "loss", lambda arm: arm.loss_text()),
    ("bits per byte", "bits", lambda arm: number(arm.bits_per_byte)),
    ("cells", "", lambda arm: str(arm.cells)),
)
CAPTION = (
    "Final held-out loss, mean and standard deviation over seeds. The number of training tokens "
    "is proportional to the active parameters, without embedding and head."
)
FITS = (
    "L = a·C^−b by least squares in log L over log C; an irreducible loss, shared by all "
    "optimizers, is added only if it improves AICc by more than 2. The ratio is at the lowest loss "
    "that all optimizers reached. One 95 % interval is a bootstrap over the residuals of sizes, "
    "resampled jointly for all optimizers, times Student's t for so few sizes; the other is "
    "Student's over the seeds, each fitted by itself. Liu et al. (2502.16982) have 2.506·C^−0.052 "
    "for Muon and 2.608·C^−0.054 for AdamW, and quote 0.519; their two curves give this ratio near "
    "C = 10 PFLOP/s-days, 0.46 at 1 and 0.55 at 100."
)
LIMITS = (
    "These results do not predict the ratio at the paper's scale. The paper's largest model had "
    "{far[0]} times the compute. Extrapolated that far, the ratio would change by a factor of "
    "{far[1]} if one exponent were off by 0.01. No curve here is extrapolated.",
    "Embedding and head, which AdamW trains in both cases, are a large part of such narrow "
    "models; this understates Muon's advantage. Newton–Schulz is a large part of a step with "
    "so few tokens; this overstates its cost.",
    "The text is source code with a vocabulary of {corpus[vocabulary]}: the ratio of compute can "
    "be compared with the paper's, not the loss.",
)
MEASURED = {
    "Sizes": "The number of heads and the hidden sizes grow with the width; the size of a head, "
    "the number of layers ({config[model][layers]}) and the training tokens per active parameter "
    "({config[tokens_per_param]:g}) are constant. The schedule spans each training.",
    "Text": "{corpus[name]}: {corpus[train_tokens]:,} tokens; longer trainings repeat some of "
    "them. SHA-256 {corpus[sha256]}.",
    "Learning rates": "Swept at every size by factors of {config[sweep][factor]:g} with "
    "{config[sweep_seeds]} of {config[seeds]} seeds, and extended until the best one has a "
    "neighbour on each side. Parameters that another optimizer leaves to AdamW have the learning "
    "rate {config[adamw][learning_rate]}.",
    "Compute": "Model: analytic FLOPs of the forward and backward pass, including the head. "
    "Update: FLOPs of its matrix products.",
}


def abstract(found: Sequence[Arm], model: Scaling | None, whole: Scaling | None) -> list[str]:
    """Returns sentences with the results, computed from the run."""
    if model is None or whole is None:
        return ["Fewer than two sizes have finished with all optimizers, so there is no curve yet."]
    sentences = [
        f"{optimizer_label(ours.optimizer)} reaches the lowest loss that all optimizers reached, "
        f"{ours.loss:.3f} nats per token, with {ours} of AdamW's model FLOPs, or {with_update} "
        "with the updates' own."
        for ours, with_update in zip(model.ratios, whole.ratios, strict=True)
    ]
    sentences.append(
        f"Liu et al. have {PAPER_RATIO} for Muon, at up to {far(model)[0]} times the compute."
    )
    laws = ", ".join(f"{optimizer_label(n)} {law_text(x)}" for n, x in model.fit.laws.items())
    sentences.append(f"Fitted with C in PFLOP/s-days: {laws}.")
    return sentences + arms.caveats(found, lambda arm: f"{arm.label} at width {arm.width}")


def far(curves: Scaling) -> tuple[str, str]:
    """Returns, as text, how many times more compute the paper's largest model had than ours.

    The second text is the factor by which a compute ratio changes when it is extrapolated that far
    with an exponent that is off by 0.01.
    """
    largest = max(of.compute.max() for of in curves.points.values())
    times = PAPER_LARGEST / largest
    exponent = min(law.b for law in curves.fit.laws.values())
    factor = times ** (0.01 / exponent) if exponent > 0 else math.inf
    size, unit = (times / 1e6, " million") if times >= 1e6 else (times, "")
    return f"{float(f'{size:.2g}'):,.0f}{unit}", number(factor)


def fit_figure(found: Sequence[Arm], curves: Scaling) -> Figure:
    """Draws loss against compute with the fitted curves, and the compute ratio against loss."""
    figure = new_figure(8.6, 3.7)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for name, of in curves.points.items():
        color = optimizer_color(name)
        reach = np.geomspace(of.compute.min() / 1.3, of.compute.max() * 1.3, 100)
        left.plot(reach, curves.fit.laws[name].loss(reach), color=color, lw=1.6)
        for arm in found:
            if arm.optimizer == name and arm.cost and math.isfinite(arm.loss):
                losses = [*arm.best.losses.values()]
                compute = [arm.compute(False)] * len(losses)
                left.plot(compute, losses, color=color, alpha=0.5, **POINT_MARK | {"ms": 3})
        left.plot(of.compute, of.loss, color=color, zorder=5, **POINT_MARK | {"ms": 6})
    for which in ("x", "y"):
        plain_log_axis(left, which)
    left.xaxis.set_major_formatter(lambda value, _: flop(value))
    left.set_xlabel("compute of the model")
    left.set_ylabel("final held-out loss (nats per token)")
    line = {"lw": 1.6, "marker": "o", "ms": 5}
    left.legend(
        handles=[legend_line(optimizer_label(n), optimizer_color(n), **line) for n in curves.points]
    )
    _draw_ratios(right, curves)
    return figure


def _draw_ratios(axes: Axes, curves: Scaling) -> None:
    losses = np.linspace(*overlap(curves.points), 12)
    handles = []
    for found in curves.ratios:
        name, color = found.optimizer, optimizer_color(found.optimizer)
        statistics = [
            functools.partial(ratio, loss=loss, ours=name, theirs=BASELINE) for loss in losses
        ]
        axes.plot(losses, [of(curves.fit.laws) for of in statistics], color=color, lw=1.6)
        if curves.draws:
            sizes = len(curves.points[name].loss)
            bands = [interval(of(curves.fit.laws), of(curves.draws), sizes) for of in statistics]
            axes.fill_between(losses, *np.array(bands).T, color=color, alpha=0.18, lw=0)
        handles.append(legend_line(optimizer_label(name), color, lw=1.6))
        if found.by_seed:
            axes.plot([found.loss] * 2, found.by_seed, color=color, **SEEDS)
    if curves.draws:
        handles.append(legend_line("95 %, residuals of the fit", lw=6, alpha=0.3))
    handles += [legend_line("95 %, seeds", **SEEDS)] * any(x.by_seed for x in curves.ratios)
    axes.axhline(PAPER_RATIO, **REFERENCE)
    axes.axhline(1.0, color="#444444", lw=0.8)
    axes.invert_xaxis()  # more compute to the right
    axes.set_ylim(bottom=0)
    axes.set_xlabel("loss (nats per token)")
    axes.set_ylabel("model FLOPs over AdamW's")
    axes.legend(handles=[*handles, legend_line(f"Muon in the paper, {PAPER_RATIO}", lw=1, ls=":")])


def _fit_rows(kinds: Mapping[str, Scaling | None]) -> list[list[str]]:
    """Returns rows of curves and compute ratios, by kind of compute and optimizer."""
    rows = []
    for kind, of in kinds.items():
        ratios = {found.optimizer: found for found in of.ratios} if of else {}
        for name, law in (of.fit.laws if of else {}).items():
            found = ratios.get(name)
            others, seeds = (
                "{:.2f} to {:.2f}".format(*ends) if ends else "–"
                for ends in (found and found.others, found and found.by_seed)
            )
            row = [kind.replace("_", " "), optimizer_label(name), law_text(law), str(found or "–")]
            rows.append([*row, seeds, others])
    return rows


def report(folder: Path) -> Report:
    """Returns the report of the suite `scaling`."""
    files = load_run(folder)
    found = gather(files)
    model, whole = (scaling(found, with_update) for with_update in (False, True))
    kinds = {"model": model, "model_and_update": whole}
    facts = {"config": files.config, "corpus": files.summary["corpus"]}
    facts |= {"far": far(model)} if model else {}
    table = Table(COLUMNS, found, CAPTION, "Loss by size", names=2)
    fits = Table.of_texts(
        [
            "compute of",
            "optimizer",
            "loss, C in PFLOP/s-days",
            "compute ÷ AdamW's [95 %, residuals]",
            "95 %, seeds",
            "with one size left out",
        ],
        _fit_rows(kinds),
        FITS,
        names=2,
    )
    figures = []
    if model:
        caption = (
            "Left: means over seeds (large) and single seeds (small), with the fitted curves. "
            "Right: compute over AdamW's at equal loss by these curves, with a 95 % band from the "
            "fit's residuals, and the 95 % interval over seeds at the lowest loss. Dotted: the "
            "paper's ratio for Muon."
        )
        alt = "Loss against compute, and the compute ratio against the loss."
        figures.append(Picture("fit", lambda: fit_figure(found, model), caption, alt))
    if any(math.isfinite(arm.loss) for arm in found):
        panels: dict[str, list[Arm]] = {}
        for arm in found:
            panels.setdefault(f"width {arm.width}", []).append(arm)
        figures.append(arms.rates(found, panels=panels, shared=False))
    return arms.report(
        "Loss against compute",
        folder,
        files,
        "an optimizer, a width, a learning rate and a seed",
        abstract(found, model, whole),
        table,
        figures,
        before=[Section("fits", "Curves and compute ratios", [fits if model else None])],
        limits=[text for limit in LIMITS if (text := told(limit, facts))],
        measured=all_told(MEASURED, facts),
        arms=[arm.as_json() for arm in found],
        fits={name: of and of.as_json() for name, of in kinds.items()},
    )
