"""The post's claims about the four arms, and whether trainings agree with them.

A claim is that one arm is above, or below, others in a measure. With several seeds, a run agrees if
every paired difference has the claimed sign and a 95 % interval without zero; it disagrees if one
has the other sign at p < 0.05 after Holm's correction for the claim's differences. With one seed,
the signs of the differences decide, if these differ in the digits shown.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments.differences import Interval, difference, holm, p_value
from experiments.finetune.arms import ARMS
from experiments.finetune.config import ArmName
from experiments.report.figures import optimizer_label

Verdict = Literal["agrees", "disagrees", "cannot tell"]
Values = Mapping[str, Mapping[int, Mapping[str, float]]]  # arm → seed → measure

_SIGNIFICANT = 0.05


class Measure(NamedTuple):
    """How to write a measure: values times `scale`, in `unit`, with `digits` decimals."""

    name: str
    scale: float
    digits: int
    unit: str
    of_difference: str

    def text(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}{self.unit}" if math.isfinite(value) else "–"

    def signed(self, value: float) -> str:
        sign = "+" if self.differs(value) else ""
        rounded = round(self.scale * value, self.digits) + 0.0  # turns −0 into 0
        return f"{rounded:{sign}.{self.digits}f}".replace("-", "−")

    def differs(self, value: float) -> bool:
        """Returns whether a difference is not 0 in the digits shown."""
        return round(self.scale * value, self.digits) != 0


MEASURES = {
    "early_accuracy": Measure(
        "mean token accuracy in the first quarter of the steps", 100, 2, " %", " points"
    ),
    "late_accuracy": Measure(
        "mean token accuracy in the last quarter of the steps", 100, 2, " %", " points"
    ),
    "gradient_norm_spread": Measure(
        "interquartile range of the gradient norm after warm-up, relative to its median",
        100,
        1,
        " %",
        " points",
    ),
    "validation_loss": Measure("held-out loss at the end", 1, 4, " nats", " nats"),
}


class Comparison(NamedTuple):
    """States that `ours` is above `theirs` in a measure, or below it if `sign` is −1."""

    ours: ArmName
    theirs: ArmName
    measure: str
    sign: int


class Claim(NamedTuple):
    """A claim of the post, which consists of comparisons."""

    text: str
    comparisons: Sequence[Comparison]


def _first(arm: ArmName, measure: str, sign: int) -> list[Comparison]:
    return [Comparison(arm, other, measure, sign) for other in ARMS if other != arm]


# KingNish, "Muon vs MuonClip vs Muon+AdamW for Fine-Tuning", Hugging Face blog, December 2025.
CLAIMS = (
    Claim("Muon alone is fastest early.", _first("muon_frozen1d", "early_accuracy", 1)),
    Claim(
        "The hybrid overtakes Muon alone.",
        [
            Comparison("muon_frozen1d", "muon_adamw", "early_accuracy", 1),
            Comparison("muon_adamw", "muon_frozen1d", "late_accuracy", 1),
        ],
    ),
    Claim(
        "The hybrid has the steadiest gradient norm.",
        _first("muon_adamw", "gradient_norm_spread", -1),
    ),
    Claim("The hybrid beats AdamW.", [Comparison("muon_adamw", "adamw", "validation_loss", -1)]),
    Claim("MuonClip has the lowest mean token accuracy.", _first("muonclip", "late_accuracy", -1)),
)


class Contrast(NamedTuple):
    """A difference of a measure, paired by seed."""

    name: str  # for readers
    arm: str  # arm whose colour it has
    family: str  # contrasts of one family share Holm's correction and a heading
    gaps: dict[int, float]  # by seed
    interval: Interval | None  # of the mean, 95 %; None with fewer than two seeds
    p: float | None  # of the paired t test, after Holm's correction; None with fewer than two seeds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gaps.values()) if self.gaps else math.nan

    @property
    def sign(self) -> int:
        """The sign of the mean if p < 0.05, else 0."""
        if self.p is None or self.p >= _SIGNIFICANT:
            return 0
        return 1 if self.mean > 0 else -1

    def text(self, form: Measure) -> str:
        """Formats the difference and its interval, e.g. as "+1.10 points [0.31, 1.89]"."""
        text = form.signed(self.mean) + form.of_difference
        if self.interval is None:
            return text
        return f"{text} [{form.signed(self.interval.low)}, {form.signed(self.interval.high)}]"

    def as_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "name": self.name,
            "by_seed": {str(seed): gap for seed, gap in self.gaps.items()},
            "mean": self.mean if self.gaps else None,
            "interval": self.interval and [self.interval.low, self.interval.high],
            "p_holm": self.p,
        }


def contrast(
    name: str, arm: str, family: str, ours: Mapping[int, float], theirs: Mapping[int, float]
) -> Contrast:
    """Returns the contrast of two arms' values by seed, over the seeds at which both are finite."""
    gaps = {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
    gaps = {seed: gap for seed, gap in gaps.items() if math.isfinite(gap)}
    zero = dict.fromkeys(gaps, 0.0)
    return Contrast(name, arm, family, gaps, difference(gaps, zero), p_value(gaps, zero))


def corrected(found: Sequence[Contrast]) -> list[Contrast]:
    """Returns contrasts, whose names differ in each family, with Holm's correction."""
    p_values: dict[str, dict[str, float]] = {}
    for of in found:
        if of.p is not None:
            p_values.setdefault(of.family, {})[of.name] = of.p
    holms = {family: holm(own) for family, own in p_values.items()}
    return [of._replace(p=holms.get(of.family, {}).get(of.name)) for of in found]


class Judged(NamedTuple):
    """The verdict on a claim."""

    claim: str
    measured: str  # description of the measured result; empty if an arm is missing
    verdict: Verdict
    seeds: int


def judge(values: Values) -> list[Judged]:
    """Judges every claim. If an arm is missing or diverged, the verdict is "cannot tell"."""
    return [_judge(claim, values) for claim in CLAIMS]


def _judge(claim: Claim, values: Values) -> Judged:
    def of(arm: ArmName, measure: str) -> dict[int, float]:
        return {seed: own[measure] for seed, own in values[arm].items()}

    asked = [c for c in claim.comparisons if {c.ours, c.theirs} <= values.keys()]
    found = [
        contrast(str(c), c.ours, "", of(c.ours, c.measure), of(c.theirs, c.measure)) for c in asked
    ]
    results = list(zip(asked, corrected(found), strict=True))
    seeds = min((len(own.gaps) for _, own in results), default=0)
    if len(results) < len(claim.comparisons) or not seeds:
        missing = {arm for c in claim.comparisons for arm in (c.ours, c.theirs)}
        missing -= {arm for arm in values if _known(claim, values, arm)}
        names = ", ".join(map(optimizer_label, sorted(missing)))
        return Judged(claim.text, f"Not finished: {names}." if names else "", "cannot tell", seeds)
    outcomes = [_outcome(*result) for result in results]
    verdict: Verdict = (
        "disagrees" if min(outcomes) < 0 else "agrees" if min(outcomes) > 0 else "cannot tell"
    )
    return Judged(claim.text, " ".join(_measured_text(results, values)), verdict, seeds)


def _known(claim: Claim, values: Values, arm: str) -> bool:
    measures = {c.measure for c in claim.comparisons if arm in (c.ours, c.theirs)}
    return all(any(math.isfinite(v[m]) for v in values[arm].values()) for m in measures)


def _outcome(c: Comparison, of: Contrast) -> int:
    """Returns 1 if a difference is as claimed, −1 if it is the opposite, else 0."""
    if not of.gaps or not MEASURES[c.measure].differs(of.mean):
        return 0
    if of.interval is None:
        return 1 if c.sign * of.mean > 0 else -1
    if c.sign * of.mean > 0:
        return int(not of.interval.low <= 0 <= of.interval.high)
    return -abs(of.sign)


def _measured_text(results: Sequence[tuple[Comparison, Contrast]], values: Values) -> list[str]:
    """Returns a sentence for each measure: the arms' means and the decisive difference."""
    sentences = []
    for measure in dict.fromkeys(c.measure for c, _ in results):
        form = MEASURES[measure]
        own = [(c, of) for c, of in results if c.measure == measure]
        arms = dict.fromkeys(arm for c, _ in own for arm in (c.ours, c.theirs))
        means = {arm: mean(x[measure] for x in values[arm].values()) for arm in arms}
        each = ", ".join(f"{optimizer_label(arm)} {form.text(x)}" for arm, x in means.items())
        c, of = min(own, key=lambda pair: (_outcome(*pair), pair[0].sign * pair[1].mean))
        sentences.append(
            f"{form.name[:1].upper()}{form.name[1:]}: {each}; {optimizer_label(c.ours)} minus "
            f"{optimizer_label(c.theirs)} {of.text(form)}."
        )
    return sentences


def mean(values: Iterable[float]) -> float:
    """Returns the mean of the finite values; NaN if there are none."""
    known = [float(x) for x in values if math.isfinite(x)]
    return statistics.fmean(known) if known else math.nan


def sentences(judged: Sequence[Judged]) -> list[str]:
    """Returns the sentence of an abstract that sums up the verdicts."""

    verbs = {"agrees": "agrees with", "disagrees": "disagrees with", "cannot tell": "cannot decide"}
    parts = []
    for verdict, verb in verbs.items():
        if own := [f"“{of.claim.rstrip('.')}”" for of in judged if of.verdict == verdict]:
            parts.append(f"{verb} {len(own)} ({', '.join(own)})")
    return [f"Of the post's {len(judged)} claims, this run {', '.join(parts)}."]
