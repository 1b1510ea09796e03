"""Results of a suite for its report: cells grouped by variant and arm, and their differences."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.finetune.claims import Contrast, contrast, corrected, mean
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
from experiments.sweep import Files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(arms.Arm):
    """The cells of one arm of a variant; `optimizer` is the arm."""

    variant: str
    max_logit: float  # largest attention logit of the whole training, mean over seeds
    # How much the loss on the pretraining text has risen, by seed, where it is known.
    rises: Mapping[str, float]
    spikes: Mapping[str, int]  # of the gradient norm, by seed; empty where they were not counted
    trained: Sequence[Trained] = ()  # at the best rate; none of stored results
    # Held-out loss of the initial model; NaN if all cells diverged at once.
    before: float = math.nan
    skipped: int | None = None  # steps of the cells at the best rate
    # The rise by rate, mean over the seeds that choose the rate.
    rises_by_rate: Mapping[float, float] = dataclasses.field(default_factory=dict)

    @property
    def arm(self) -> str:
        return self.optimizer

    def loss_text(self, digits: int = 4) -> str:
        return super().loss_text(digits)

    def mean(self, name: str) -> float:
        """Returns the mean of one of `Trained.values()` over the seeds; NaN if none has it."""
        return mean(trained.values()[name] for trained in self.trained)

    def last_logit(self) -> float:
        """Returns the largest logit between the last two evaluations, mean over seeds."""
        return mean(of.last("max_logit") for of in self.trained)

    def gradient_norm(self) -> float:
        """Returns the median gradient norm after warm-up, before clipping, mean over seeds."""
        medians = [of.steadiness()[0] for of in self.trained]
        return mean(median for median in medians if median is not None)

    def as_json(self) -> dict[str, Any]:
        own = {"variant": self.variant, "arm": self.arm}
        beside = ("optimizer", "spread", "difference_to_adamw", "p_holm")
        base = {key: value for key, value in super().as_json().items() if key not in beside}
        rises: dict[str, Any] = {"pretraining_rise_by_seed": self.rises} if self.rises else {}
        if self.rises_by_rate:
            by_rate = {f"{rate:g}": x for rate, x in self.rises_by_rate.items()}
            rises["pretraining_rise_by_rate"] = by_rate
        logit = {"max_logit": arms.finite(self.max_logit)}
        return own | base | logit | {"spikes_by_seed": self.spikes} | rises


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
                max_logit=math.nan if stored["max_logit"] is None else stored["max_logit"],
                rises=stored.get("pretraining_rise_by_seed", {}),
                spikes=stored.get("spikes_by_seed", {}),
                rises_by_rate={
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
    trained = [of_cell(arm, seed, histories[place], steps, warmup) for seed, place in chosen]
    logits = [of.series["max_logit"][1] for of in trained]
    return Group(
        variant=variant,
        optimizer=arm,
        max_logit=mean(np.nanmax(x) for x in logits if np.isfinite(x).any()),
        rises={str(of.seed): of.forgot for of in trained if math.isfinite(of.forgot)},
        spikes={str(of.seed): of.spikes() for of in trained},
        rises_by_rate={rate: statistics.fmean(by_rate[rate]) for rate in sorted(by_rate)},
        trained=trained,
        before=starts[0] if starts else math.nan,
        skipped=sum(rows[place]["skipped"] for _, place in chosen),
        **own,
    )


TO_ADAMW = "minus AdamW"
TO_PUBLISHED = "without the quirk, minus as published"
TO_ADAMW_BY_BASE = "minus AdamW, from the same base"
BY_BASE = "minus AdamW: from the AdamW base, minus from the Muon base"
TO_UNCLIPPED = "minus no clip"


def contrasts(found: Sequence[Group]) -> list[Contrast]:
    """Returns the differences that a suite asks for and whose cells are finished."""
    losses = {(of.variant, of.arm): of.best.losses for of in found}
    pairs = []
    for key, own in losses.items():
        family, name, reference = _reference(*key)
        if key != reference and reference in losses:
            pairs.append(contrast(name, key[1], family, own, losses[reference]))
    gaps = {of.name: of.gaps for of in pairs}
    for arm in dict.fromkeys(of.arm for of in pairs if of.family == TO_ADAMW_BY_BASE):
        label = optimizer_label(arm)
        sides = [gaps.get(f"{label}, {base}") for base in PRETRAINED.values()]
        if None not in sides:
            pairs.append(contrast(label, arm, BY_BASE, *sides))
    return corrected(pairs)


def _reference(variant: str, arm: str) -> tuple[str, str, tuple[str, str]]:
    """Returns the family, the name and the subtrahend of a variant's and an arm's contrast."""
    label = optimizer_label(arm)
    if variant in (CONTROLLED, PUBLISHED):
        return TO_ADAMW, label, (variant, BASELINE)
    if variant in PRETRAINED.values():
        return TO_ADAMW_BY_BASE, f"{label}, {variant}", (variant, BASELINE)
    if variant.startswith((QK_NORM, NO_QK_NORM)):
        return TO_UNCLIPPED, variant, (f"{variant.split(', ')[0]}, {UNCLIPPED}", "muon_adamw")
    return TO_PUBLISHED, f"{label} {variant}", (PUBLISHED, arm)


def values(found: Sequence[Group], variant: str) -> dict[str, dict[int, dict[str, float]]]:
    """Returns the measures of a variant's arms, at their best rates, that claims are judged by."""
    return {
        of.arm: {trained.seed: trained.values() for trained in of.trained}
        for of in found
        if of.variant == variant
    }
