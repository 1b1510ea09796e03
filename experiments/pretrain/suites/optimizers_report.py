"""Report of the suite `optimizers`: many optimizers at equal effort, compared with AdamW."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.optimizers import ARMS
from experiments.pretrain.suites.results import Arm, gather
from experiments.report import arms
from experiments.report.figures import legend, new_figure, optimizer_color
from experiments.report.page import Column, Picture, Report, Table
from experiments.report.text import all_told, flop, interval_text, number, p_text, told
from experiments.sweep import Files, load_run


def compare(found: Sequence[Arm]) -> list[Arm]:
    """Compares all arms with AdamW, and sorts them by loss."""
    base = arms.baseline_of(found)
    if base is None or not math.isfinite(base.loss):
        return list(found)
    return [
        arm if arm is base else dataclasses.replace(arm, shares=_shares(arm, base))
        for arm in arms.compared(found)
    ]


def _shares(arm: Arm, base: Arm) -> dict[str, float | None]:
    tokens = tokens_to(arm.curve, base.loss) / base.tokens
    known = arm.cost and base.cost
    return {
        "tokens": tokens,
        "flops": tokens * arm.step_flops / base.step_flops if known else None,
        "time": tokens * arm.cost["times_baseline"] if known else None,
    }


def tokens_to(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """Returns the (interpolated) tokens at which a curve first reaches a loss, or infinity."""
    before = None
    for tokens, value in curve:
        if value <= loss:
            if before is None:
                return float(tokens)
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = tokens, value
    return math.inf


def _stored(found: Sequence[Arm]) -> list[Arm]:
    """Restores the infinite shares of arms that never reach AdamW's loss, stored as None."""
    base = arms.baseline_of(found)
    return [
        arm
        if arm is base
        else dataclasses.replace(
            arm, shares={k: math.inf if x is None else x for k, x in arm.shares.items()}
        )
        for arm in found
    ]


def _share(key: str) -> Callable[[Arm], str]:
    def text(arm: Arm) -> str:
        share = arm.shares.get(key)
        return "–" if share is None else "never" if math.isinf(share) else f"{share:.0%}"

    return text


def _cost(form: Callable[[Arm], str]) -> Callable[[Arm], str]:
    return lambda arm: form(arm) if arm.cost else "–"


COLUMNS: tuple[Column, ...] = (
    ("optimizer", "optimizer", lambda arm: arm.label),
    (arms.RATE[0], "", arms.RATE[2]),
    ("final loss (nats per token)", "loss", lambda arm: arm.loss_text()),
    ("bits per byte", "", lambda arm: number(arm.bits_per_byte)),
    ("minus AdamW's [95 % interval]", "minus AdamW's", lambda arm: interval_text(arm.difference)),
    ("p, Holm", "p", lambda arm: p_text(arm.p)),
    ("to AdamW's loss: tokens", "tokens", _share("tokens")),
    ("FLOPs", "FLOPs", _share("flops")),
    ("time", "time", _share("time")),
    ("step time ÷ AdamW's", "", _cost(lambda arm: number(arm.cost["times_baseline"]))),
    ("optimizer's FLOPs per step", "", _cost(lambda arm: flop(arm.cost["optimizer_flops"]))),
    (
        "share of the step's FLOPs",
        "",
        _cost(lambda arm: f"{arm.cost['optimizer_flops'] / arm.step_flops:.1%}"),
    ),
    ("cells", "", lambda arm: str(arm.cells)),
    ("diverged", "", lambda arm: str(arm.diverged)),
)
NOTE = (
    "loss: at the best rate, mean ± standard deviation over seeds\n"
    "minus AdamW's: with its 95 % interval, paired by seed; p after Holm\n"
    "tokens, FLOPs, time: to AdamW's final loss, as a share of AdamW's training"
)
CAPTION = (
    "Final held-out loss, mean and standard deviation over seeds, lowest first. The difference is "
    "paired by seed, with Student's interval; p is that of the paired t test after Holm's "
    "correction for all rows. “To AdamW's loss”: where the mean curve first reaches AdamW's final "
    "loss, as a fraction of AdamW's whole training. The learning rate has not yet decayed there, "
    "which favours AdamW. “(edge)”: the best rate is the highest or lowest tried."
)
LIMITS = (
    "{config[model][layers]} layers of width {config[model][width]}, {config[steps]} steps of "
    "{tokens_per_step} tokens: this ranks how fast optimizers reduce the loss early in training. "
    "Long runs, in which decay and the end of the schedule matter more, may rank them differently.",
    "Only the optimizer's own learning rate is swept; other settings keep their defaults.",
    "{config[sweep_seeds]} of {config[seeds]} seeds choose the learning rate and are also among "
    "those that evaluate it. So few seeds cannot distinguish small differences from zero.",
    "With so few tokens per step, Newton–Schulz takes a far larger share of the time than in large "
    "trainings, and products of small matrices reach fewer FLOP/s than those of large ones.",
)
MEASURED = {
    "Text": "{corpus[name]}: {corpus[train_tokens]:,} tokens of a byte-level BPE of "
    "{corpus[vocabulary]}, evaluated on {config[evaluation_tokens]:,} of "
    "{corpus[validation_tokens]:,} held out, the same every time. SHA-256 {corpus[sha256]}.",
    "Seeds": "A seed sets the initial parameters and the data order, in the same way for all "
    "optimizers and learning rates.",
    "Learning rates": "Swept by factors of {config[sweep][factor]:g} around a default, and "
    "extended until the best one has a neighbour on each side, by at most "
    "{config[sweep][limit]} learning rates. In the hybrids, AdamW trains embedding, head and gains "
    "at the learning rate {config[adamw][learning_rate]}; SGD and Lion have fixed ones, too.",
    "FLOPs": "Model: analytic, forward and backward pass. Optimizer: the matrix products of its "
    "compiled update; eigendecompositions and element-wise operations are not counted.",
    "Step time": "Median ratio of whole training steps to AdamW's, in alternating rounds in one "
    "process.",
}
CURVES = (
    "Held-out loss during training at the best learning rates, mean over seeds. The vertical axis "
    "begins at AdamW's loss after a sixth of its training; optimizers above it are not shown. "
    "FLOPs are those of model and optimizer; step times are measured in alternating rounds."
)


def abstract(found: Sequence[Arm], files: Files) -> list[str]:
    """Returns sentences with the results, computed from the run."""
    if not found:
        return ["No training has finished yet."]
    sentences = [*arms.progress(files), f"{arms.lowest(found)} per token."]
    if tested := [arm for arm in found if arm.p is not None]:
        significant = [arm.difference.mean for arm in tested if arm.p < 0.05]
        below, above = sum(x < 0 for x in significant), sum(x > 0 for x in significant)
        sentences.append(
            f"Of {len(tested)} optimizers besides AdamW, {below} end lower and {above} higher at "
            "p < 0.05 after Holm's correction."
        )
    muon = arms.baseline_of(found, "muon")
    if muon and math.isfinite((muon.shares or {}).get("tokens") or math.inf):
        text = f"Muon takes {muon.shares['tokens']:.0%} of AdamW's tokens to AdamW's final loss"
        if muon.shares["flops"] is not None:
            flops, time = muon.shares["flops"], muon.shares["time"]
            text += f", {flops:.0%} of its FLOPs and {time:.0%} of its time"
        sentences.append(text + ".")
    return sentences + arms.caveats(found)


def curves_figure(found: Sequence[Arm]) -> Figure:
    """Draws the mean loss at the best rates against tokens, FLOPs and time."""
    drawn = [arm for arm in found if arm.curve]
    base = arms.baseline_of(drawn) or drawn[0]
    scales: dict[str, Callable[[Arm], float]] = {"tokens (millions)": lambda arm: 1e-6}
    if all(arm.cost for arm in drawn):

        def seconds(arm: Arm) -> float:
            """Returns the time per token, from the ratio to AdamW's step if it is known."""
            ratio, own = arm.cost["times_baseline"], arm.cost["milliseconds"]
            step = ratio * base.cost["milliseconds"] if ratio else own
            return 1e-3 * step / arm.tokens_per_step

        scales["TFLOP, model and optimizer"] = lambda arm: (
            1e-12 * arm.step_flops / arm.tokens_per_step
        )
        scales["seconds of training"] = seconds
    figure = new_figure(3.2 * len(scales) if len(scales) > 1 else 4.8, 4.0)
    grid = figure.subplots(1, len(scales), squeeze=False, sharey=True)[0]
    for axes, (name, scale) in zip(grid, scales.items(), strict=True):
        for arm in drawn:
            tokens, losses = np.array(arm.curve).T
            axes.plot(scale(arm) * tokens, losses, lw=1.5, color=optimizer_color(arm.optimizer))
        axes.set_xlabel(name)
        axes.set_xlim(left=0)
    low = min(arm.curve[-1][1] for arm in drawn)
    high = float(np.interp(base.tokens / 6, *np.array(base.curve).T))
    grid[0].set_ylim(low - 0.04 * (high - low), high)
    grid[0].set_ylabel("validation loss (nats per token)")
    legend(figure, [a.optimizer for a in drawn if min(x for _, x in a.curve) < high], columns=5)
    return figure


def report(folder: Path) -> Report:
    """Returns the report of the suite `optimizers`."""
    files = load_run(folder)
    found = compare(gather(files)) if files.rows else _stored(gather(files))
    facts = {"config": files.config, "corpus": files.summary["corpus"]}
    facts["tokens_per_step"] = found[0].tokens_per_step if found else 0
    table = Table(COLUMNS, found, CAPTION, "Optimizers, lowest loss first", NOTE)
    figures: list[Picture] = []
    if any(math.isfinite(arm.loss) for arm in found):
        unit = "nats per token"
        figures = [arms.finals(found, unit), arms.rates(found, unit)]
        if any(arm.curve for arm in found):
            alt = "Held-out loss against tokens, FLOPs and time."
            curves = Picture("curves", lambda: curves_figure(found), CURVES, alt)
            figures.insert(1, curves)
    return arms.report(
        "Optimizers at equal effort",
        folder,
        files,
        "an optimizer, a learning rate and a seed",
        abstract(found, files),
        table,
        figures,
        limits=[text for limit in LIMITS if (text := told(limit, facts))],
        measured=all_told(MEASURED, facts) | arms.about(found, ARMS),
        arms=[arm.as_json() for arm in found],
    )
