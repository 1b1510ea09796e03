"""Reads the studies' stored results, and the statistics that the READMEs quote of them."""

import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "experiments"


def stored(study, name, file="summary"):
    return json.loads((STUDIES / study / "results" / name / f"{file}.json").read_text())


def arms(study, name):
    """By optimizer, the lowest loss first."""
    found = sorted(stored(study, name)["arms"], key=lambda arm: arm["validation_loss"])
    return {arm["optimizer"]: arm for arm in found}


def interval(found):
    """Of logarithms: the geometric mean and its 95 % interval."""
    low, high = stats.t.interval(0.95, len(found) - 1, np.mean(found), stats.sem(found))
    return f"{math.exp(np.mean(found)):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]"


def gap(ours, theirs, digits=3):
    """A difference paired by seed, with its interval, of losses by seed."""
    gaps = [ours[seed] - theirs[seed] for seed in sorted(ours)]
    ends = stats.t.interval(0.95, len(gaps) - 1, np.mean(gaps), stats.sem(gaps))
    mean, low, high = (f"{x:+.{digits}f}".replace("-", "−") for x in (np.mean(gaps), *ends))
    return f"{mean} [{low}, {high}]"


def p_of(ours, theirs):
    return stats.ttest_1samp([ours[seed] - theirs[seed] for seed in ours], 0).pvalue


def spread(losses):
    values = [*losses.values()]
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def holm(p_values):
    order = np.argsort(p_values)
    steps = [(len(order) - place) * p_values[i] for place, i in enumerate(order)]
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def small(p):
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def signed(value, digits=2):
    return f"{value:+.{digits}f}".replace("-", "−")


def power(shift, deviation, n):
    """Of the two-sided paired t test at p < 0.05."""
    critical = stats.t.ppf(0.975, n - 1)
    moved = shift / deviation * math.sqrt(n)
    return stats.nct.sf(critical, n - 1, moved) + stats.nct.cdf(-critical, n - 1, moved)


def detectable(deviation, n):
    """By halving."""
    low, high = 0.0, 5.0
    for _ in range(60):
        half = (low + high) / 2
        low, high = (half, high) if power(half, deviation, n) < 0.8 else (low, half)
    return math.exp(high)


def found_by(ours, theirs):
    """The difference that so many seeds, which deviate as these do, show in 80 % of studies."""
    gaps = [ours[seed] - theirs[seed] for seed in ours]
    return math.log(detectable(np.std(gaps, ddof=1), len(gaps)))
