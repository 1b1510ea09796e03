"""The post's claims about the four arms, and whether trainings agree with them.

A claim is that one arm is above, or below, others in a measure. With several seeds, a run agrees if
every paired difference has the claimed sign and a 95 % interval without zero; it disagrees if one
has the other sign at p < 0.05 after Holm's correction for the claim's differences. With one seed,
the signs of the differences decide, if these differ in the digits shown.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

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


class Compared(NamedTuple):
    """The measured result of a comparison.

    Attributes:
        claimed: The comparison.
        mean: The mean difference, paired by seed.
        interval: The 95 % interval of the mean; None with one seed.
        seeds: The number of seeds that both arms have.
        outcome: 1 if it is as claimed, −1 if it is the opposite, else 0.
    """

    claimed: Comparison
    mean: float
    interval: Interval | None
    seeds: int
    outcome: int


class Judged(NamedTuple):
    """The verdict on a claim.

    Attributes:
        measured: A description of the measured result; empty if an arm is missing.
    """

    claim: str
    measured: str
    verdict: Verdict
    seeds: int


def judge(values: Values) -> list[Judged]:
    """Judges every claim. If an arm is missing or diverged, the verdict is "cannot tell"."""
    return [_judge(claim, values) for claim in CLAIMS]


def _judge(claim: Claim, values: Values) -> Judged:
    results = compare([c for c in claim.comparisons if {c.ours, c.theirs} <= values.keys()], values)
    seeds = min((of.seeds for of in results), default=0)
    if len(results) < len(claim.comparisons) or not seeds:
        missing = {arm for c in claim.comparisons for arm in (c.ours, c.theirs)}
        missing -= {arm for arm in values if _known(claim, values, arm)}
        names = ", ".join(map(optimizer_label, sorted(missing)))
        return Judged(claim.text, f"Not finished: {names}." if names else "", "cannot tell", seeds)
    outcomes = [of.outcome for of in results]
    verdict: Verdict = (
        "disagrees" if min(outcomes) < 0 else "agrees" if min(outcomes) > 0 else "cannot tell"
    )
    return Judged(claim.text, " ".join(_measured_text(results, values)), verdict, seeds)


def _known(claim: Claim, values: Values, arm: str) -> bool:
    measures = {c.measure for c in claim.comparisons if arm in (c.ours, c.theirs)}
    return all(any(math.isfinite(v[m]) for v in values[arm].values()) for m in measures)


def compare(comparisons: Sequence[Comparison], values: Values) -> list[Compared]:
    """Returns the results of comparisons, with Holm's correction for all of them."""
    pairs = [_pair(c, values) for c in comparisons]
    p_values = {str(i): p_value(*pair) for i, pair in enumerate(pairs)}
    corrected = holm({i: p for i, p in p_values.items() if p is not None})
    results = []
    for i, (c, (ours, theirs)) in enumerate(zip(comparisons, pairs, strict=True)):
        seeds = sorted(ours.keys() & theirs.keys())
        gaps = [ours[seed] - theirs[seed] for seed in seeds]
        mean = sum(gaps) / len(gaps) if gaps else math.nan
        interval = difference(ours, theirs)
        results.append(
            Compared(
                c, mean, interval, len(seeds), _outcome(c, mean, interval, corrected.get(str(i)))
            )
        )
    return results


def _pair(c: Comparison, values: Values) -> tuple[dict[int, float], dict[int, float]]:
    def of(arm: ArmName) -> dict[int, float]:
        known = {seed: own[c.measure] for seed, own in values[arm].items()}
        return {seed: x for seed, x in known.items() if math.isfinite(x)}

    return of(c.ours), of(c.theirs)


def _outcome(c: Comparison, mean: float, interval: Interval | None, p: float | None) -> int:
    if not math.isfinite(mean) or not MEASURES[c.measure].differs(mean):
        return 0
    if interval is None:
        return 1 if c.sign * mean > 0 else -1
    if c.sign * mean > 0:
        return int(not interval.low <= 0 <= interval.high)
    return -int(p is not None and p < _SIGNIFICANT)


def _measured_text(results: Sequence[Compared], values: Values) -> list[str]:
    """Returns a sentence for each measure: the arms' means and the decisive difference."""
    sentences = []
    for measure in dict.fromkeys(of.claimed.measure for of in results):
        form = MEASURES[measure]
        own = [of for of in results if of.claimed.measure == measure]
        arms = dict.fromkeys(arm for of in own for arm in (of.claimed.ours, of.claimed.theirs))
        means = {arm: _mean(x[measure] for x in values[arm].values()) for arm in arms}
        each = ", ".join(f"{optimizer_label(arm)} {form.text(x)}" for arm, x in means.items())
        decides = min(own, key=lambda of: (of.outcome, of.claimed.sign * of.mean))
        sentences.append(
            f"{form.name[:1].upper()}{form.name[1:]}: {each}; "
            f"{optimizer_label(decides.claimed.ours)} minus "
            f"{optimizer_label(decides.claimed.theirs)} "
            f"{difference_text(form, decides.mean, decides.interval)}."
        )
    return sentences


def difference_text(form: Measure, mean: float, interval: Interval | None) -> str:
    """Formats a difference and its interval, e.g. as "+1.10 points [0.31, 1.89]"."""
    text = form.signed(mean) + form.of_difference
    if interval is None:
        return text
    return f"{text} [{form.signed(interval.low)}, {form.signed(interval.high)}]"


def _mean(values: Iterable[float]) -> float:
    known = [x for x in values if math.isfinite(x)]
    return sum(known) / len(known) if known else math.nan


def sentences(judged: Sequence[Judged]) -> list[str]:
    """Returns the sentence of an abstract that sums up the verdicts."""

    def by(verdict: Verdict) -> list[str]:
        return [f"“{of.claim.rstrip('.')}”" for of in judged if of.verdict == verdict]

    parts = [
        f"{verb} {len(found)} ({', '.join(found)})"
        for verb, found in (
            ("agrees with", by("agrees")),
            ("disagrees with", by("disagrees")),
            ("cannot decide", by("cannot tell")),
        )
        if found
    ]
    return [f"Of the post's {len(judged)} claims, this run {', '.join(parts)}."]
