"""Results of a suite for its report: cells grouped by variant and arm, and their differences."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.differences import Interval, difference, holm, p_value
from experiments.finetune.report_data import Trained, of_cell
from experiments.finetune.suites.config import (
    BASELINE,
    CONTROLLED,
    NO_QK_NORM,
    PRETRAINED,
    PUBLISHED,
    QK_NORM,
    UNCLIPPED,
)
from experiments.report import arms
from experiments.report.figures import optimizer_label
from experiments.report.series import NOTHING
from experiments.sweep import Files

Losses = Mapping[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(arms.Arm):
    """The cells of one arm of a variant; `optimizer` is the arm.

    Attributes:
        trained: the cells at the best rate; none of stored results, which have `max_logit` and
            `forgotten`: by seed, how much the loss on the pretraining text has risen.
        forgotten_by_rate: The same by rate, over the seeds that choose the rate.
        before: held-out loss of the model that all begin with; NaN if all diverged at once.
        skipped: steps of the cells at the best rate that changed nothing.
    """

    variant: str
    trained: Sequence[Trained] = ()
    before: float = math.nan
    skipped: int | None = None
    max_logit: float | None = None
    forgotten: Mapping[str, float] = dataclasses.field(default_factory=dict)
    forgotten_by_rate: Mapping[float, float] = dataclasses.field(default_factory=dict)

    @property
    def arm(self) -> str:
        return self.optimizer

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the highest or lowest of a sweep."""
        return self.best.at_edge and len(self.losses) > 1

    def loss_text(self, digits: int = 4) -> str:
        return super().loss_text(digits)

    def mean(self, name: str) -> float:
        """Returns the mean of one of `Trained.values()` over the seeds; NaN if none has it."""
        return _known(trained.values()[name] for trained in self.trained)

    def largest_logit(self) -> float:
        """Returns the largest attention logit of the whole training, mean over seeds."""
        if not self.trained:
            return math.nan if self.max_logit is None else self.max_logit
        logits = [of.series.get("max_logit", NOTHING)[1] for of in self.trained]
        return _known(np.nanmax(x) for x in logits if np.isfinite(x).any())

    def last_logit(self) -> float:
        """Returns the largest logit between the last two evaluations, mean over seeds."""
        return _known(of.last("max_logit") for of in self.trained)

    def gradient_norm(self) -> float:
        """Returns the median gradient norm after warm-up, before clipping, mean over seeds."""
        norms = []
        for of in self.trained:
            steps, values = of.series["gradient_norm"]
            known = values[(steps > of.warmup) & np.isfinite(values)]
            norms += [float(np.median(known))] if len(known) else []
        return _known(norms)

    def as_json(self) -> dict[str, Any]:
        own = {"variant": self.variant, "arm": self.arm}
        beside = ("optimizer", "spread", "difference_to_adamw", "p_holm")
        base = {key: value for key, value in super().as_json().items() if key not in beside}
        rises: dict[str, Any] = {"pretraining_rise_by_seed": self.rises} if self.rises else {}
        if self.forgotten_by_rate:
            by_rate = {f"{rate:g}": x for rate, x in self.forgotten_by_rate.items()}
            rises["pretraining_rise_by_rate"] = by_rate
        return own | base | {"max_logit": arms.finite(self.largest_logit())} | rises

    @property
    def rises(self) -> dict[str, float]:
        """By seed, of the loss on the pretraining text, those that are known."""
        if not self.trained:
            return dict(self.forgotten)
        return {str(of.seed): of.forgot for of in self.trained if math.isfinite(of.forgot)}


def _known(values: Iterable[float]) -> float:
    known = [float(x) for x in values if math.isfinite(x)]
    return statistics.fmean(known) if known else math.nan


def groups(files: Files) -> list[Group]:
    """Returns the groups of a suite, in the order of variants and arms."""
    found = [
        _group(files, *key, *own) for key, own in arms.grouped(files, "variant", "arm").items()
    ]
    if not files.rows:
        found = [
            Group(
                variant=stored["variant"],
                optimizer=stored["arm"],
                max_logit=stored["max_logit"],
                forgotten=stored.get("pretraining_rise_by_seed", {}),
                forgotten_by_rate={
                    float(rate): x for rate, x in stored.get("pretraining_rise_by_rate", {}).items()
                },
                **arms.of_json(stored),
            )
            for stored in files.summary.get("groups", [])
        ]
    names = files.config["optimizers"]

    def order(of: Group) -> tuple[Any, ...]:
        return _place(of.variant), names.index(of.arm) if of.arm in names else 0

    return sorted(found, key=order)


_ORDER = (PUBLISHED, CONTROLLED, *PRETRAINED.values(), QK_NORM, NO_QK_NORM)


def _place(variant: str) -> tuple[int, str]:
    known = next((i for i, name in enumerate(_ORDER) if variant.startswith(name)), len(_ORDER))
    return known, "" if variant.endswith(UNCLIPPED) else variant


def _group(files: Files, variant: str, arm: str, rows: list[Any], histories: list[Any]) -> Group:
    own = arms.of_cells(rows, histories, files.config["sweep_seeds"])
    chosen = sorted(
        (row["seed"], place) for place, row in enumerate(rows) if row["rate"] == own["best"].rate
    )
    steps, warmup = files.config["steps"], files.config["warmup"]
    starts = [h[0]["validation_loss"] for h in histories if h and h[0]["step"] == 0]
    by_rate = defaultdict(list)
    for row, history in zip(rows, histories, strict=True):
        rise = of_cell(arm, row["seed"], history, steps, warmup).forgot
        if row["seed"] < files.config["sweep_seeds"] and math.isfinite(rise):
            by_rate[row["rate"]].append(rise)
    return Group(
        variant=variant,
        optimizer=arm,
        forgotten_by_rate={rate: statistics.fmean(by_rate[rate]) for rate in sorted(by_rate)},
        trained=[of_cell(arm, seed, histories[place], steps, warmup) for seed, place in chosen],
        before=starts[0] if starts else math.nan,
        skipped=sum(rows[place]["skipped"] for _, place in chosen),
        **own,
    )


class Contrast(NamedTuple):
    """A difference of final losses, paired by seed.

    Attributes:
        name: The name of the difference, for readers.
        arm: The arm whose colour it has.
        family: Contrasts of one family share Holm's correction and a heading.
        gaps: The difference for each seed.
        interval: The 95 % interval of the mean; None with fewer than two seeds.
        p: The p of the paired t test after Holm's correction; None with fewer than two seeds.
    """

    name: str
    arm: str
    family: str
    gaps: dict[int, float]
    interval: Interval | None
    p: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gaps.values()) if self.gaps else math.nan

    @property
    def sign(self) -> int:
        """The sign of the mean if p < 0.05, else 0."""
        if self.p is None or self.p >= 0.05:
            return 0
        return 1 if self.mean > 0 else -1

    def as_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "name": self.name,
            "by_seed": {str(seed): gap for seed, gap in self.gaps.items()},
            "mean": arms.finite(self.mean),
            "interval": self.interval and [self.interval.low, self.interval.high],
            "p_holm": self.p,
        }


def _contrast(name: str, arm: str, family: str, ours: Losses, theirs: Losses) -> Contrast:
    both = sorted(ours.keys() & theirs.keys())
    known = [s for s in both if math.isfinite(ours[s]) and math.isfinite(theirs[s])]
    gaps = {seed: ours[seed] - theirs[seed] for seed in known}
    zero = dict.fromkeys(gaps, 0.0)
    return Contrast(name, arm, family, gaps, difference(gaps, zero), p_value(gaps, zero))


def _corrected(found: Sequence[Contrast]) -> list[Contrast]:
    """Applies Holm's correction in each family."""
    corrected: dict[tuple[str, str], float] = {}
    for family in dict.fromkeys(of.family for of in found):
        p_values = {of.name: of.p for of in found if of.family == family and of.p is not None}
        corrected |= {(family, name): p for name, p in holm(p_values).items()}
    return [of._replace(p=corrected.get((of.family, of.name))) for of in found]


TO_ADAMW = "minus AdamW"
TO_PUBLISHED = "without the quirk, minus as published"
TO_ADAMW_BY_BASE = "minus AdamW, from the same base"
BY_BASE = "minus AdamW: from the AdamW base, minus from the Muon base"
TO_UNCLIPPED = "minus no clip"


def contrasts(which: str, found: Sequence[Group]) -> list[Contrast]:
    """Returns the differences that a suite asks for and whose cells are finished."""
    losses = {(of.variant, of.arm): of.best.losses for of in found}

    def against(variant: str, family: str, name: str) -> list[Contrast]:
        base = losses.get((variant, BASELINE))
        return [
            _contrast(name.format(optimizer_label(arm)), arm, family, own, base)
            for (of, arm), own in losses.items()
            if base and of == variant and arm != BASELINE
        ]

    if which == "controlled":
        return _corrected(against(CONTROLLED, TO_ADAMW, "{}"))
    if which == "as_published":
        removed = [
            _contrast(
                f"{optimizer_label(arm)} {of}", arm, TO_PUBLISHED, own, losses[PUBLISHED, arm]
            )
            for (of, arm), own in losses.items()
            if of != PUBLISHED and (PUBLISHED, arm) in losses
        ]
        return _corrected(against(PUBLISHED, TO_ADAMW, "{}") + removed)
    if which == "mismatch":
        beside = [against(base, TO_ADAMW_BY_BASE, f"{{}}, {base}") for base in PRETRAINED.values()]
        by_arm = [{of.arm: of for of in own} for own in beside]
        crossed = [
            _contrast(optimizer_label(arm), arm, BY_BASE, by_arm[0][arm].gaps, by_arm[1][arm].gaps)
            for arm in by_arm[0]
            if arm in by_arm[1]
        ]
        return _corrected([*beside[0], *beside[1], *crossed])
    clipped = []
    for norm in (QK_NORM, NO_QK_NORM):
        plain = losses.get((f"{norm}, {UNCLIPPED}", "muon_adamw"))
        clipped += [
            _contrast(of, arm, TO_UNCLIPPED, own, plain)
            for (of, arm), own in losses.items()
            if plain and of.startswith(f"{norm},") and not of.endswith(UNCLIPPED)
        ]
    return _corrected(clipped)


def values(found: Sequence[Group], variant: str) -> dict[str, dict[int, dict[str, float]]]:
    """Returns the measures of a variant's arms, at their best rates, that claims are judged by."""
    return {
        of.arm: {trained.seed: trained.values() for trained in of.trained}
        for of in found
        if of.variant == variant
    }
