"""What the report knows of a suite: the cells of each arm of a variant, and how groups differ."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.differences import Interval, difference, holm, p_value
from experiments.figures import optimizer_label
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
from experiments.sweep import Best, Files, best, chosen_by, losses_by_rate, mean

Losses = Mapping[int, float]


class Group(NamedTuple):
    """What the cells of one arm of a variant did.

    Attributes:
        losses: mean final loss by rate, over the seeds that choose it; infinite where one diverged.
        best: the rate that they chose, and the final loss of every seed there.
        trained: the cells at that rate.
        before: held-out loss of the model that all begin with; NaN if all diverged at once.
        cells: how many finished.
        diverged: how many of them diverged.
        skipped: steps of the cells at the best rate that changed nothing.
    """

    variant: str
    arm: str
    losses: dict[float, float]
    best: Best
    trained: list[Trained]
    before: float
    cells: int
    diverged: int
    skipped: int

    @property
    def label(self) -> str:
        return optimizer_label(self.arm)

    @property
    def loss(self) -> float:
        return self.best.mean

    @property
    def at_edge(self) -> bool:
        """Whether a sweep ended where a further rate might be better."""
        return self.best.at_edge and len(self.losses) > 1

    def loss_text(self) -> str:
        """The final loss with its spread, e.g. "1.6520 ± 0.0041"."""
        values = [*self.best.losses.values()]
        if not all(map(math.isfinite, values)):
            return "diverged"
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{self.loss:.4f}{spread}"

    def mean(self, name: str) -> float:
        """Of `Trained.values()`, over the seeds; NaN where none has it."""
        return self._over(lambda trained: trained.values()[name])

    def largest_logit(self) -> float:
        """Attention logit, of the whole training, mean over seeds."""
        return self._over(lambda trained: _largest(trained, "max_logit"))

    def last_logit(self) -> float:
        """Largest attention logit since the evaluation before the last, mean over seeds."""
        return self._over(lambda trained: trained.last("max_logit"))

    def gradient_norm(self) -> float:
        """Median after warm-up, before clipping, mean over seeds."""
        return self._over(_gradient_norm)

    def _over(self, of: Callable[[Trained], float]) -> float:
        known = [x for x in map(of, self.trained) if math.isfinite(x)]
        return statistics.fmean(known) if known else math.nan


def _largest(trained: Trained, name: str) -> float:
    _, values = trained.series.get(name, ((), ()))
    return max((float(x) for x in values if math.isfinite(x)), default=math.nan)


def _gradient_norm(trained: Trained) -> float:
    steps, norms = trained.series["gradient_norm"]
    known = norms[(steps > trained.warmup) & np.isfinite(norms)]
    return float(np.median(known)) if len(known) else math.nan


def groups(files: Files) -> list[Group]:
    """In the order of the variants, and of the arms in them."""
    pairs = list(zip(files.rows, files.histories, strict=True))
    keys = dict.fromkeys((row["variant"], row["arm"]) for row in files.rows)
    arms = files.config["arms"]
    variants = [*dict.fromkeys(variant for variant, _ in keys)]
    order = sorted(
        keys,
        key=lambda key: (_place(key[0], variants), arms.index(key[1]) if key[1] in arms else 0),
    )
    return [_group(files, key, pairs) for key in order]


_ORDER = (PUBLISHED, CONTROLLED, *PRETRAINED.values(), QK_NORM, NO_QK_NORM)


def _place(variant: str, variants: Sequence[str]) -> tuple[int, str]:
    known = next((i for i, name in enumerate(_ORDER) if variant.startswith(name)), len(_ORDER))
    return known, "" if variant.endswith(UNCLIPPED) else variant


def _group(files: Files, key: tuple[str, str], pairs: list[Any]) -> Group:
    own = [(row, history) for row, history in pairs if (row["variant"], row["arm"]) == key]
    rows = [row for row, _ in own]
    swept = files.config["sweep_seeds"]
    top = best(rows, swept)
    chosen = sorted(
        ((row, history) for row, history in own if row["rate"] == top.rate),
        key=lambda pair: pair[0]["seed"],
    )
    steps, warmup = files.config["steps"], files.config["warmup"]
    starts = [h[0]["validation_loss"] for _, h in own if h and h[0]["step"] == 0]
    return Group(
        variant=key[0],
        arm=key[1],
        losses={r: mean(x) for r, x in losses_by_rate(chosen_by(rows, swept)).items()},
        best=top,
        trained=[of_cell(key[1], row["seed"], h, steps, warmup) for row, h in chosen],
        before=starts[0] if starts else math.nan,
        cells=len(rows),
        diverged=sum(row["diverged"] for row in rows),
        skipped=sum(row["skipped"] for row, _ in chosen),
    )


class Contrast(NamedTuple):
    """A difference of final losses, paired by seed.

    Attributes:
        name: of the difference, for readers.
        arm: whose colour it has.
        family: contrasts of one family share Holm's correction, and a heading.
        gaps: of each seed.
        p: of the paired t test after Holm's correction; None with fewer than two seeds.
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
        """1 or −1 where it is told from zero at p < 0.05, else 0."""
        if self.p is None or self.p >= 0.05:
            return 0
        return 1 if self.mean > 0 else -1


def _contrast(name: str, arm: str, family: str, ours: Losses, theirs: Losses) -> Contrast:
    both = sorted(ours.keys() & theirs.keys())
    known = [s for s in both if math.isfinite(ours[s]) and math.isfinite(theirs[s])]
    gaps = {seed: ours[seed] - theirs[seed] for seed in known}
    zero = dict.fromkeys(gaps, 0.0)
    return Contrast(name, arm, family, gaps, difference(gaps, zero), p_value(gaps, zero))


def _corrected(found: Sequence[Contrast]) -> list[Contrast]:
    """With Holm's correction in each family."""
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
    """What a suite asks for, those whose cells are there."""
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
    """What the claims are judged by, of a variant's arms at their best rates."""
    return {
        of.arm: {trained.seed: trained.values() for trained in of.trained}
        for of in found
        if of.variant == variant
    }
