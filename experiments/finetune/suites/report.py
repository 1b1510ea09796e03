"""Report of a suite of fine-tunings: each arm at its best rate, and the suite's own questions."""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.finetune import claims
from experiments.finetune.arms import QUIRKS
from experiments.finetune.claims import MEASURES, Contrast, Judged
from experiments.finetune.report import POST, about
from experiments.finetune.report_data import Trained, idle_clip
from experiments.finetune.report_figures import forgetting_figure, pictures, style_of
from experiments.finetune.suites import answers
from experiments.finetune.suites.config import (
    CONTROLLED,
    NO_QK_NORM,
    PRETRAINED,
    PUBLISHED,
    QK_NORM,
    SuiteName,
)
from experiments.finetune.suites.results import (
    TO_PUBLISHED,
    Group,
    contrasts,
    groups,
    values,
)
from experiments.report import arms
from experiments.report.figures import Final, finals_figure
from experiments.report.page import Column, Picture, Report, Section, Table
from experiments.report.text import all_told, form, number, p_text, plural, told
from experiments.sweep import Files, load_run

TITLES: dict[SuiteName, str] = {
    "as_published": "Fine-tuning as in the released code",
    "controlled": "Fine-tuning with all optimizers on equal terms",
    "mismatch": "Fine-tuning models pretrained by AdamW and by Muon",
    "qk": "QK-clip in fine-tuning, with QK-norm and without",
}
# Number of quirks' effects in the abstract, the largest first.
TOLD = 6


class Results(NamedTuple):
    """The contents of a suite's folder."""

    which: SuiteName
    files: Files
    groups: list[Group]
    contrasts: list[Contrast]
    clips: dict[str, dict[str, float]]

    @property
    def variant(self) -> str | None:
        """The variant that the post's claims are about; None if the suite does not test them."""
        return {"controlled": CONTROLLED, "as_published": PUBLISHED}.get(self.which)

    @property
    def verdicts(self) -> list[Judged]:
        """The claims that the suite tests; for stored results, as they were judged then."""
        if not self.files.rows:
            return [Judged(**stored) for stored in self.files.summary.get("claims", [])]
        if self.variant:
            return claims.judge(values(self.groups, self.variant))
        if self.which == "mismatch":
            return answers.mismatch(self.contrasts)
        return answers.clip(self.clips)


def load(folder: Path) -> Results:
    """Reads a suite's folder.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged or not of this study. The message names it.
    """
    files = load_run(folder)
    which = files.config.get("suite")
    if which not in TITLES:
        raise ValueError(
            f"{folder / 'config.json'} is not of a suite of this study; its suite is {which!r}."
        )
    found = groups(files)
    return Results(which, files, found, contrasts(found), files.config["clips"])


def _share(name: str) -> Callable[[Group], str]:
    return lambda of: form(of.mean(name), ".2%")


def _rise(of: Group) -> str:
    rises = [*of.rises.values()]
    if not rises:
        return "–"
    spread = f" ± {statistics.stdev(rises):.3f}" if len(rises) > 1 else ""
    return f"{statistics.fmean(rises):+.3f}{spread}"


COLUMNS: tuple[Column, ...] = (
    ("variant", "variant", lambda of: plain(of.variant)),
    ("arm", "arm", lambda of: of.label),
    arms.RATE,
    ("final loss (nats per token)", "loss", lambda of: of.loss_text()),
    ("held-out accuracy", "accuracy", _share("validation_accuracy")),
    ("loss on the pretraining text, rise (nats per token)", "forgot", _rise),
    ("token accuracy, first quarter", "", _share("early_accuracy")),
    ("token accuracy, last quarter", "", _share("late_accuracy")),
    ("gradient norm, interquartile range ÷ median", "", _share("gradient_norm_spread")),
    (
        "spikes of the gradient norm, by seed",
        "",
        lambda of: ", ".join(str(of.spikes[seed]) for seed in sorted(of.spikes)) or "–",
    ),
    ("largest attention logit", "logit", lambda of: number(of.max_logit)),
    ("seeds", "", lambda of: str(len(of.best.losses))),
    ("cells", "", lambda of: str(of.cells)),
    ("diverged", "", lambda of: str(of.diverged)),
    ("skipped steps", "", lambda of: number(of.skipped)),
)
CAPTION = (
    "Held-out loss after {config[steps]} steps, mean ± standard deviation over the seeds at the "
    "best rate. Token accuracy: on the training examples, mean over the first and last quarter "
    "of the steps. Gradient norm: before clipping, after warm-up. Spikes: steps at which it is "
    "more than three times the median of the 50 steps before. “(edge)”: the best rate is the "
    "highest or lowest tried."
)
MATRIX = (
    "Final held-out loss of each pretrained model (base), fine-tuned with each optimizer at its "
    "best rate, mean ± standard deviation over seeds; the difference to AdamW from the same base, "
    "with its 95 % interval and p after Holm's correction; and the difference of these two "
    "differences, AdamW base minus Muon base."
)
CLIPS = (
    "One QK-clip of the models before fine-tuning, with a threshold of {config[clip_share]} times "
    "their largest attention logit on one batch, in float32. Fine-tuning has the same threshold."
)
DIFFERENCES = (
    "Paired by seed, with Student's t. p is that of the paired t test with Holm's correction for "
    "all rows of the same difference. Neither accounts for the choice of the learning rate."
)
# For each suite, the heading of its claims and their source.
ASKED = {
    "mismatch": (
        "Muon after AdamW (2605.10468), and this run",
        "2605.10468 finds that Muon degrades models that AdamW pretrained. A verdict requires p "
        "< 0.05 in the paired t test after Holm's correction.",
    ),
    "qk": (
        "What QK-clip should do, and this run",
        "RMSNorm of queries and keys cancels any scale of W_q and W_k, up to its ε. “Changes "
        "nothing” means by less than a thousandth of the logits.",
    ),
}
LIMITS = (
    "The post's model has 4 B parameters and was pretrained on trillions of tokens; without "
    "--model, the model here has thousands of times fewer, and optimizers may rank differently.",
    "Only the learning rate is swept. Hybrids use it for both of their optimizers.",
    "{config[sweep_seeds]} of {config[seeds]} seeds choose the learning rate and are also among "
    "those that evaluate it. So few seeds cannot distinguish small differences from zero. A seed "
    "sets the order of the examples only, so intervals do not cover other pretrained models.",
)
LIMITS_OF = {
    "mismatch": "Each optimizer pretrained one model, at one rate and with one seed; the two "
    "bases may differ in more than the optimizer.",
    "qk": "With QK-norm, clipping W_q and W_k leaves the logits unchanged, so that it repeats at "
    "every step. The projections shrink, so each update rotates them further, which affects "
    "training.",
}
MEASURED = {
    "Examples": "{corpus[name]}: {corpus[rows]:,}, of which {corpus[held_out_rows]:,} are held out "
    "by group. SHA-256 {corpus[sha256]}.",
    "Models": "{models}.",
    "Learning rates": "{rates}",
    "Mean token accuracy": "As in trl: the share of trained-on tokens that have the largest "
    "logit, averaged over microbatches.",
}
_SWEPT = (
    "Swept by factors of {sweep[factor]:g} around {optimizer[learning_rate]}, and extended until "
    "the best one has a neighbour on each side, by at most {sweep[limit]} learning rates."
)


def plain(name: str) -> str:
    """Returns the name of a variant or difference with quirks in words."""
    for key, quirk in QUIRKS.items():
        name = name.replace(f"without {key}", f"without {quirk.name}")
    return name


def contrast_text(of: Contrast) -> str:
    """Formats a difference, e.g. as "−0.0123 nats [−0.0200, −0.0046], p 0.012"."""
    text = of.text(MEASURES["validation_loss"])
    return text if of.p is None else f"{text}, p {p_text(of.p)}"


def abstract(results: Results) -> list[str]:
    """Returns sentences with the results, computed from the run."""
    found, files = results.groups, results.files
    if not found:
        return ["No training has finished yet."]
    sentences = arms.progress(files)
    if results.variant:
        sentences += _arms(results)
        sentences += claims.sentences(results.verdicts)
        own = [of for group in found if group.variant == results.variant for of in group.trained]
        sentences += idle_clip(own, files.config["optimizer"])
    if results.which == "as_published":
        sentences += _removals(results.contrasts)
    if results.which == "mismatch":
        sentences += answers.mismatch_sentences(results.contrasts, contrast_text)
    if results.which == "qk":
        sentences += answers.clip_sentences(results.clips, found, results.contrasts, contrast_text)
    return sentences + arms.caveats(found, lambda of: f"{of.label} ({of.variant})")


def _arms(results: Results) -> list[str]:
    """Returns sentences on the best arm and on the arms' differences from AdamW."""
    own = (of for of in results.groups if of.variant == results.variant)
    ranked = sorted((of for of in own if math.isfinite(of.loss)), key=lambda of: of.loss)
    if not ranked:
        return ["Every optimizer diverged."]
    first = ranked[0]
    names = " and ".join(of.label for of in ranked if of.loss == first.loss)
    seeds = plural(len(first.best.losses), "seed")
    before = f"; {first.before:.4f} before training" if math.isfinite(first.before) else ""
    sentences = [
        f"{names} {'has' if names == first.label else 'have'} the lowest mean held-out loss, "
        f"{first.loss_text()} nats per token over {seeds}, at the rate {first.best.rate:g}{before}."
    ]
    beside = [of for of in results.contrasts if of.family == "minus AdamW" and of.gaps]
    sentences += [f"{of.name} minus AdamW: {contrast_text(of)}." for of in beside]
    if tested := [of for of in beside if of.p is not None]:
        lower, higher = (sum(of.sign == sign for of in tested) for sign in (-1, 1))
        sentences.append(
            f"Of {plural(len(tested), 'optimizer')} besides AdamW, {lower} end lower and "
            f"{higher} higher at p < 0.05 after Holm's correction."
        )
    return sentences


def _removals(found: Sequence[Contrast]) -> list[str]:
    tested = [of for of in found if of.family == TO_PUBLISHED and of.p is not None]
    if not tested:
        return []
    told = sorted((of for of in tested if of.sign), key=lambda of: -abs(of.mean))
    names = [f"{plain(of.name)} ({contrast_text(of)})" for of in told[:TOLD]]
    if rest := told[TOLD:]:
        at_most = MEASURES["validation_loss"].text(abs(rest[0].mean))
        names.append(f"the other {len(rest)} by at most {at_most}")
    return [
        f"Of {len(tested)} removals of one quirk, {len(told)} change the final loss at "
        f"p < 0.05 after Holm's correction{': ' if told else ''}{'; '.join(names)}."
    ]


def matrix(results: Results) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of the table base × arm of the suite `mismatch`."""
    by_name = {of.name: contrast_text(of) for of in results.contrasts}
    losses = {(of.variant, of.label): of.loss_text() for of in results.groups}
    columns = ["fine-tuned with"]
    for base in PRETRAINED.values():
        columns += [f"{base}: final loss", f"{base}: minus AdamW"]
    rows = []
    for label in dict.fromkeys(of.label for of in results.groups):
        row = [label]
        for base in PRETRAINED.values():
            row += [losses.get((base, label), "–"), by_name.get(f"{label}, {base}", "–")]
        rows.append([*row, by_name.get(label, "–")])
    return [*columns, "difference of the two differences"], rows


def curves(which: SuiteName, found: Sequence[Group]) -> dict[str, dict[str, Sequence[Trained]]]:
    """Returns the trainings to draw against step, by title: a variant's arms, or qk's clips."""
    titles = {"controlled": [CONTROLLED], "as_published": [PUBLISHED], "qk": [QK_NORM, NO_QK_NORM]}
    drawn: dict[str, dict[str, Sequence[Trained]]] = {}
    for title in titles.get(which, PRETRAINED.values()):
        own = [(of, of.variant.removeprefix(title)) for of in found if of.variant.startswith(title)]
        drawn[title] = {rest.removeprefix(", ") or of.arm: of.trained for of, rest in own}
    return drawn


def drawn_differences(told: Sequence[Contrast]) -> Figure:
    """Draws differences with intervals and single seeds, a line each, a panel for each family."""
    panels: dict[str, list[Final]] = {}
    for of in told:
        span = of.interval and (of.interval.low, of.interval.high)
        line = Final(plain(of.name), style_of(of.arm)["color"], [*of.gaps.values()], of.mean, span)
        panels.setdefault(of.family, []).append(line)
    return finals_figure(panels, "final held-out loss, difference (nats)", ("", 0), width=7.4)


def rates(found: Sequence[Group]) -> list[Picture]:
    """Draws final loss against learning rate, a line for each arm, a panel for each variant.

    A second figure has the rise of the loss on the pretraining text, where it is known. The panels
    do not share an axis, since variants may have different bases and so other losses.
    """
    panels: dict[str, list[Group]] = {}
    for of in found:
        panels.setdefault(plain(of.variant[:1].upper() + of.variant[1:]), []).append(of)
    forgetting = Picture(
        "forgetting",
        lambda: forgetting_figure(panels),
        "Rise of the loss on the pretraining text against the final held-out loss, a point for "
        "each learning rate. Lower left is better.",
        "What is forgotten against what is learnt, a line through each optimizer's learning rates.",
    )
    losses = arms.rates(found, panels=panels, style=style_of, shared=False, width=4.6)
    return [losses] + [forgetting] * all(of.rises_by_rate for of in found)


def figures(results: Results) -> list[Picture]:
    """Returns the figures of a suite."""
    found, pairs = results.groups, [of for of in results.contrasts if of.gaps]
    several = any(len(of.losses) > 1 for of in found)
    drawn = curves(results.which, found)
    differences = Picture(
        "differences",
        lambda: drawn_differences(pairs),
        "Differences of the final held-out loss per token, paired by seed, with 95 % intervals. "
        "Below 0 is better.",
        "Differences of the final held-out loss, with every seed.",
    )
    return [
        *[differences] * bool(pairs),
        *(rates(found) if several and any(math.isfinite(of.loss) for of in found) else []),
        *(picture for title, own in drawn.items() for picture in pictures(own, title)),
    ]


def report(folder: Path) -> Report:
    """Returns the report of a suite."""
    results = load(folder)
    files, found, which = results.files, results.groups, results.which
    config, verdicts = files.config, results.verdicts
    swept = config["sweep"]["reach"] or config["sweep"]["limit"]
    tried = told(_SWEPT if swept else "{optimizer[learning_rate]} for all.", config)
    facts = {"config": config, "corpus": files.summary["corpus"], "rates": tried}
    facts["models"] = ", ".join(config["models"])
    table = Table(COLUMNS, found, told(CAPTION, facts), TITLES[which], names=2).known()
    headings = ["difference of the final loss", "of", "mean [95 % interval]", "p, Holm", "n"]
    loss = MEASURES["validation_loss"]
    differences = [
        [of.family, plain(of.name), of.text(loss), p_text(of.p), str(len(of.gaps))]
        for of in results.contrasts
    ]
    heading, whose = ASKED.get(which, ("The post's claims and this run", POST))
    limits = [*(told(limit, facts) for limit in LIMITS), LIMITS_OF.get(which, "")]
    of_arms = about([of.arm for of in found], config["optimizer"]["quirks"])
    of_texts = functools.partial(Table.of_texts, names=2)
    crossed = of_texts(*matrix(results), MATRIX) if which == "mismatch" else None
    paired = differences and of_texts(headings, differences, DIFFERENCES)
    clips = of_texts(answers.CLIP, answers.clip_rows(results.clips), told(CLIPS, facts))
    return arms.report(
        TITLES[which],
        folder,
        files,
        "a variant, an optimizer, a learning rate and a seed",
        abstract(results),
        table,
        figures(results),
        before=[
            Section("matrix", "Base and arm", [crossed]),
            Section("clips", "One clip, before any training", [results.clips and clips]),
            Section("claims", heading, [whose, verdicts] if verdicts else []),
        ],
        beside=[Section("differences", "Differences", [paired])],
        limits=limits,
        measured=of_arms | all_told(MEASURED, facts),
        groups=[of.as_json() for of in found],
        contrasts=[of.as_json() for of in results.contrasts],
        claims=[of._asdict() for of in verdicts],
    )
