"""The tests of grokking epochs are SciPy's on the right numbers, and censoring is never dropped."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.grok import report_tests, statistics
from experiments.grok.report_data import Run
from experiments.spikes import spikes


def test_a_ratio_is_paired_by_seed():
    slow, fast = {0: 30, 1: 60, 2: 50}, {2: 25, 0: 10, 3: 1, 1: 30}
    found = statistics.ratio([(slow, fast)], budget=100)
    assert found.value == pytest.approx((3 * 2 * 2) ** (1 / 3))
    assert (found.observations, found.bounded, found.untold) == (3, 0, 0)
    logs = np.log([3, 2, 2])
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))


def test_of_several_panels_each_is_one_observation():
    """A panel with many seeds does not outvote one with few."""
    one = (dict.fromkeys(range(9), 40), dict.fromkeys(range(9), 10))
    other = ({0: 10}, {0: 10})
    found = statistics.ratio([one, other], budget=100)
    assert found.value == pytest.approx(2.0) and found.observations == 2


def test_censored_cells_bound_the_ratio_or_tell_nothing():
    pairs = [({0: None, 1: None, 2: 50}, {0: 20, 1: None, 2: 25})]
    found = statistics.ratio(pairs, budget=100)
    assert found.value == pytest.approx(math.sqrt(5 * 2))
    assert (found.observations, found.bounded, found.untold) == (2, 1, 1)
    assert str(found) == "≥ 3.16"
    swapped = statistics.ratio([pair[::-1] for pair in pairs], budget=100)
    assert str(swapped) == "≤ 0.32" and str(statistics.ratio([*pairs, pairs[0][::-1]], 100)) == (
        "1.00 (bounds)"
    )
    assert statistics.ratio([({0: None}, {0: None})], budget=100) is None
    assert math.isnan(statistics.ratio([({0: 2}, {0: 1})], budget=100).low)


def test_mann_whitney_ranks_censored_cells_last():
    fast = {seed: 20 + seed for seed in range(6)}
    clear = statistics.mann_whitney(dict.fromkeys(range(6)), fast)
    mixed = statistics.mann_whitney({0: 1, 1: 2, 2: 3, 3: None, 4: None, 5: None}, fast)
    assert clear < 0.01 < 0.5 < mixed
    assert statistics.mann_whitney({}, fast) is None


def test_mann_whitney_of_ties_is_that_of_all_permutations():
    """Three against three are twenty ways, of which two are as far apart as can be."""
    slow, fast = {0: 25, 1: 24, 2: 25}, {0: 15, 1: 14, 2: 14}
    assert statistics.mann_whitney(slow, fast) == pytest.approx(2 / 20)
    assert statistics.mann_whitney(dict.fromkeys(range(3)), dict.fromkeys(range(3))) is None


def test_the_signed_rank_test_takes_panels_for_observations():
    rng = np.random.default_rng(1)
    panels = [({0: a, 1: a + 1}, {0: b, 1: b}) for a, b in rng.integers(10, 90, (8, 2)).tolist()]
    means = [np.mean([math.log(s[i] / f[i]) for i in (0, 1)]) for s, f in panels]
    found = statistics.signed_rank(panels, budget=100)
    assert found == pytest.approx(stats.wilcoxon(means).pvalue)
    assert statistics.signed_rank(panels[:5], budget=100) is None


def test_of_several_tasks_each_is_one_observation():
    """Two output functions of one task do not make its ratio weigh twice."""
    halves, fourth = ({0: 20, 1: 20}, {0: 10, 1: 10}), ({0: 40}, {0: 10})
    found = statistics.ratio([halves, halves, fourth], 100, ["add", "add", "mul"])
    assert found.value == pytest.approx(math.sqrt(2 * 4)) and found.observations == 2
    # Of one task its output functions are the observations, of one of these the seeds.
    assert statistics.ratio([halves, fourth], 100, ["add", "add"]).observations == 2
    assert statistics.ratio([halves], 100, ["add"]).observations == 2


@pytest.mark.parametrize(("deviation", "n"), [(0.2, 3), (0.2, 10), (0.5, 7)])
def test_the_detectable_ratio_is_found_in_four_of_five_studies(deviation, n):
    rng = np.random.default_rng(2)
    shift = math.log(statistics.detectable(deviation, n))
    found = stats.ttest_1samp(rng.normal(shift, deviation, (4000, n)), 0, axis=1)
    assert np.mean(found.pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_a_training_groks_strictly_at_twice_the_memorised_epoch():
    """Of four that grokked one is strict; two generalised within five epochs of memorising."""
    run = run_of({("add", "muon", seed): e for seed, e in enumerate([10, 15, 19, 20, None])})
    (arm,) = run.pooled()
    row = [text(arm) for *_, text in report_tests.DELAYS]
    assert row == ["Muon", "5", "4", "2", "1", "10", "9", "19"]


def test_welch_pools_what_grokked_as_the_paper_does():
    slow, fast = [90, 120, None, 200, 150], [40, 60, 80]
    expected = stats.ttest_ind([90, 120, 200, 150], fast, equal_var=False)
    found = statistics.welch(slow, fast)
    assert (found.statistic, found.pvalue) == (expected.statistic, expected.pvalue)
    assert statistics.welch([1], fast) is None


def test_log_rank_tells_what_censoring_hides_from_a_mean():
    """The few that grokked did so at one epoch; how many did is the difference."""
    slow, fast = [50] * 2 + [None] * 18, [50] * 18 + [None] * 2
    assert statistics.log_rank(slow, fast, budget=100) < 1e-4
    assert statistics.log_rank(fast, fast, budget=100) == pytest.approx(1.0)
    assert statistics.log_rank([None], [None], budget=100) is None


def test_survival_ends_at_the_budget():
    assert statistics.survival([None, None], 30) == ([0.0, 30.0], [1.0, 1.0])
    assert statistics.survival([10, 30], 30) == ([0.0, 10.0, 30.0, 30.0], [1.0, 0.5, 0.0, 0.0])


def run_of(epochs: dict[tuple[str, str, int], int | None]) -> Run:
    rows = [
        {
            **{"task": task, "optimizer": optimizer, "seed": seed, "softmax": "softmax"},
            **{"point": "", "memorized_epoch": 10, "censored": epoch is None},
            **dict.fromkeys(("grok_epoch", "grok_epoch_sustained"), epoch),
        }
        for (task, optimizer, seed), epoch in epochs.items()
    ]
    config = {"tasks": ["add", "mul"], "softmax": ["softmax"], "optimizers": ["adamw", "muon"]}
    return Run(config | {"epochs": 100, "grid": []}, "", {}, len(rows), rows, {})


def rows_of(run):
    """The rows of the table of tests, by column."""
    return [dict(zip(report_tests.COLUMNS, row, strict=True)) for row in report_tests.tests(run)]


def test_the_report_has_a_row_for_each_panel_and_one_for_all():
    cells = {("add", "adamw"): 60, ("add", "muon"): 30, ("mul", "adamw"): 80, ("mul", "muon"): 20}
    run = run_of({(*key, seed): e + seed for key, e in cells.items() for seed in range(4)})
    rows = rows_of(run)
    assert [row["on"] for row in rows] == ["all", "add · softmax", "mul · softmax"]
    assert [row["observations"] for row in rows] == ["2", "4", "4"]
    both, first, _ = rows
    # Every rank of one lies below: 2 / (8 choose 4), twice that after Holm.
    assert (first["Mann–Whitney p"], first["Mann–Whitney p, Holm"]) == ("0.029", "0.057")
    logs = [np.mean(np.log([(a + s) / (b + s) for s in range(4)])) for a, b in ((60, 30), (80, 20))]
    low, high = np.exp(stats.t.interval(0.95, 1, np.mean(logs), stats.sem(logs)))
    assert both["ratio of epochs"] == f"{math.exp(np.mean(logs)):.2f} [{low:.2f}, {high:.2f}]"
    assert both["ratio to memorise"] == "1.00 [1.00, 1.00]"
    delay = np.mean(np.log([(51 + s) / (21 + s) for s in range(4)]))
    assert first["ratio of delay + 1"].startswith(f"{math.exp(delay):.2f} [")
    assert both["Mann–Whitney p"] == "–" and both["log-rank p"] != "–"


def test_all_panels_are_tested_by_signed_ranks_after_holm():
    tasks = ["add", "sub", "mul", "div", "exp", "gcd"]
    arms = {"adamw": 60, "muon": 30, "dion": 40}
    cells = {(t, name, 0): e + i * i for i, t in enumerate(tasks) for name, e in arms.items()}
    assert [row["signed-rank p, Holm"] for row in rows_of(run_of(cells))[:2]] == ["0.062"] * 2


def test_a_baseline_that_is_not_swept_counts_once():
    """No row takes its cells for several observations, and nothing of all settings is pooled."""
    run = run_of({("add", name, 0): 40 for name in ("adamw", "muon")})
    run.rows[1:] = [run.rows[1] | {"point": f"muon.weight-decay={decay}"} for decay in (0.1, 0.2)]
    rows = rows_of(run)
    assert [row["on"] for row in rows] == [
        "add · softmax · muon.weight-decay=0.1",
        "add · softmax · muon.weight-decay=0.2",
    ]


def test_every_criterion_has_its_ratio():
    run = run_of({("add", "adamw", 0): 60, ("add", "muon", 0): 30, ("mul", "adamw", 0): 40})
    for row in run.rows:
        row |= {"first_crossing_epoch": 3, "grok_epoch_near_best": None}
    (row,) = report_tests.criteria(run)
    assert dict(zip(report_tests.CRITERIA, row[1:], strict=True)) == {
        "memorised": "1.00",
        "delay + 1": f"{51 / 21:.2f}",
        "first crossing": "1.00",
        "grok, first": "2.00",
        "grok, sustained": "2.00",
        "grok, near best": "–",
    }


def test_without_the_baseline_there_is_nothing_to_test():
    run = run_of({("add", "muon", 0): 10})
    assert report_tests.tests(run) == []


def test_spikes_are_compared_with_the_median_of_the_steps_before():
    """A norm that stays high is a spike until the median has followed it."""
    rng = np.random.default_rng(0)
    norms = rng.lognormal(size=400)
    norms[200:] *= 10
    ratios = [norms[i] / np.median(norms[i - 50 : i]) for i in range(50, 400)]
    found = spikes(norms.tolist())
    assert found["spikes"] == sum(ratio > 3 for ratio in ratios) > 20
    assert found["largest_spike"] == pytest.approx(max(ratios))
    assert spikes(norms[:50].tolist()) == {"spikes": 0, "largest_spike": 0.0}
