"""The report of a sweep: the best setting, trends on five axes, figures; and the paper's table."""

import html
import re

import pytest

from experiments.grok import report_published, report_sweep
from experiments.grok.report import abstract, load_run, write_report
from experiments.grok.report_data import Run
from tests.test_grok_report import cell, make_run

WIDTHS = ("width=32,64,128",)


def widths(optimizer: str, epochs: dict[int, list[int | None]], **changes):
    """Seeds of an optimizer at each width."""
    return [
        cell("div", "softmax", optimizer, seed, 5, epoch, point=f"width={width}", **changes)
        for width, found in epochs.items()
        for seed, epoch in enumerate(found)
    ]


ADAMW = widths("adamw", {32: [None, 190, None], 64: [120, 130, 110], 128: [60, 70, 80]})
MUON = widths("muon", {32: [100, 90, 95], 64: [50, 60, 55], 128: [20, 30, 25]})


def loaded(tmp_path, rows, grid=WIDTHS) -> Run:
    return load_run(make_run(tmp_path / "run", rows, grid=grid))


def test_the_best_setting_of_each_and_their_ratio(tmp_path):
    adamw, muon, *_ = report_sweep.best_table(loaded(tmp_path, ADAMW + MUON))
    assert adamw[:6] == ["epochs", "AdamW", "3", "width 128", "3", "70"]
    assert muon[:6] == ["epochs", "Muon", "3", "width 128", "3", "25"]
    ratio = (60 / 20 * 70 / 30 * 80 / 25) ** (1 / 3)
    assert muon[6] == f"{ratio:.2f}" and " to " in muon[7] and adamw[6] == "–"


def test_the_best_setting_is_that_of_each_axis(tmp_path):
    """Width 128 groks first, and at 16 times width 32's FLOPs an epoch it is the dearest."""
    adamw = [row | {"step_flops": int(row["point"][6:]) ** 2} for row in ADAMW]
    muon = [row | {"step_flops": 2 * int(row["point"][6:]) ** 2} for row in MUON]
    run = loaded(tmp_path, adamw + muon)
    assert report_sweep.axes_apart(run) == ["epochs", "FLOP", "seconds"]
    slow, fast = report_sweep.best(run, "FLOP")
    assert (slow.panel.point, fast.panel.point) == ("width=64", "width=32")
    epoch = run.rows[0]["steps_per_epoch"]
    assert fast.median.value == 95 * epoch * 2 * 32**2
    paired = (120 / 100 * 130 / 90 * 110 / 95) ** (1 / 3)
    assert fast.ratio.value == pytest.approx(paired * 64**2 / (2 * 32**2))
    assert fast.ratio.low < fast.ratio.value < fast.ratio.high


def test_a_bound_is_no_best_setting(tmp_path):
    # At 32 the median lies beyond the budget, though one seed was the fastest of all.
    rows = widths("muon", {32: [3, None, None], 64: [50, 60, 55]})
    (found,) = report_sweep.best(loaded(tmp_path, rows))
    assert found.panel.point == "width=64" and found.median == (55, False)


def test_trends_differ_by_axis(tmp_path):
    """Twice the batch, half the steps an epoch: epochs rise while steps fall."""
    rows = []
    for place, batch in enumerate((64, 128, 256, 512)):
        changes = {"steps_per_epoch": 800 // 2**place, "tokens_per_epoch": 20_480}
        rows += [
            cell("div", "softmax", "muon", s, 5, 20 + 6 * place + s, point=f"batch={batch}")
            | changes
            for s in range(3)
        ]
    run = loaded(tmp_path, rows, ("batch=64,128,256,512",))
    trends = {unit: report_sweep.trend(run, "muon", "batch", unit) for unit in report_sweep.UNITS}
    assert trends["epochs"][0] > 0.9 and trends["tokens"][0] > 0.9
    assert trends["steps"][0] < -0.9 and trends["FLOP"][0] < -0.9
    text = " ".join(abstract(run))
    assert "Muon's rises (epochs, tokens); Muon's falls (steps, FLOP, seconds)" in text


def test_a_trend_does_not_come_from_budgets_that_fall(tmp_path):
    """In steps the budget of a larger batch is smaller: a censored cell there tells nothing."""
    rows = []
    for batch, epochs in {64: 50, 128: 90, 256: 170, 512: None, 1024: None}.items():
        changes = {"steps_per_epoch": 64 * 100 // batch, "tokens_per_epoch": 20_480}
        rows += [
            cell("div", "softmax", "muon", s, 5, epochs and epochs + s, point=f"batch={batch}")
            | changes
            for s in range(3)
        ]
    run = loaded(tmp_path, rows, ("batch=64,128,256,512,1024",))
    epochs, steps = (report_sweep.trend(run, "muon", "batch", u) for u in ("epochs", "steps"))
    assert epochs.rho > 0.9 and (epochs.values, epochs.left_out) == (5, 0)
    assert (steps.values, steps.left_out) == (3, 2)
    assert "over the 3 values without a censored cell (steps, FLOP, seconds)" in " ".join(
        abstract(run)
    )


def test_the_sweep_is_told_in_sentences(tmp_path):
    text = " ".join(abstract(loaded(tmp_path, ADAMW + MUON)))
    assert "AdamW 70, the best of 3 settings (width 128); Muon 25" in text
    assert re.search(r"AdamW over Muon, 95 % interval: 2.82 \[.*?\] in epochs", text)
    assert "With larger width, what grokking takes: AdamW's falls" in text


def test_settings_of_an_optimizers_own_make_a_heat_map_each(tmp_path):
    rows = [
        cell("div", "softmax", name, s, 5, 30 * (1 + i) + 7 * j + s, point=point)
        for name in ("adamw", "muon")
        for i, rate in enumerate(("0.001", "0.01"))
        for j, decay in enumerate(("0.1", "1"))
        for s in range(2)
        for point in [f"{name}.learning-rate={rate} {name}.weight-decay={decay}"]
    ]
    grid = [
        f"{name}.{key}={values}"
        for name in ("adamw", "muon")
        for key, values in (("learning-rate", "0.001,0.01"), ("weight-decay", "0.1,1"))
    ]
    folder = make_run(tmp_path / "run", rows, grid=grid)
    page = write_report(folder).read_text()
    assert (folder / "heat.png").stat().st_size > 10_000 and not (folder / "sweep.png").exists()
    assert "learning rate 0.001, weight decay 0.1" in page
    assert "Muon's learning rate is the lowest tried; " in html.unescape(page)
    # No setting has both optimizers, so nothing is tested setting by setting.
    assert 'id="tests"' not in page and 'id="sweep"' in page


def test_a_best_setting_inside_its_grid_is_told(tmp_path):
    points = {0.1: 60, 0.2: 30, 0.4: 50}
    rows = [
        cell("div", "softmax", "muon", s, 5, epoch + s, point=f"muon.learning-rate={rate}")
        for rate, epoch in points.items()
        for s in range(2)
    ]
    grid = ("muon.learning-rate=0.1,0.2,0.4",)
    inside = " ".join(abstract(loaded(tmp_path, rows, grid)))
    assert "No best setting lies at an end of its grid." in inside
    assert "With larger" not in inside  # a rate has a best value, and no trend
    # A folder whose grid grew keeps what it had at the default rate.
    plain = [cell("div", "softmax", "muon", s, 5, 90 + s) for s in range(2)]
    grown = " ".join(abstract(loaded(tmp_path / "grown", [*plain, *rows], grid)))
    assert "No best setting lies at an end of its grid." in grown and "of 4 settings" in grown
    assert "end of its grid" not in " ".join(abstract(loaded(tmp_path / "widths", ADAMW + MUON)))


def test_a_sweep_of_one_setting_is_lines_and_tests_at_each(tmp_path):
    folder = make_run(tmp_path / "run", ADAMW + MUON, grid=WIDTHS)
    page = write_report(folder).read_text()
    assert (folder / "sweep.png").stat().st_size > 10_000
    tested = page.split('id="tests"')[1].split("</section>")[0]
    on = re.findall(r"<tr>\s*<td>Muon</td><td>(.*?)</td>", tested)
    assert on == ["all", *(f"div · softmax · width={width}" for width in (32, 64, 128))]
    assert "<td>&gt; 200 (2 of 3 censored)</td>" in tested


def test_an_optimizer_that_the_axis_does_not_concern_is_the_baseline_of_each(tmp_path):
    rows = [cell("div", "softmax", "adamw", s, 5, 80 + s) for s in range(3)]
    rows += [
        cell("div", "softmax", "low_rank", s, 5, 40 // k + s, point=f"variants.rank={k}")
        for k in (1, 2, 4)
        for s in range(3)
    ]
    folder = make_run(tmp_path / "run", rows, grid=("variants.rank=1,2,4",))
    tested = write_report(folder).read_text().split('id="tests"')[1].split("</section>")[0]
    assert len(re.findall(r"<td>Rank k, SVD</td>", tested)) == 4


def test_the_papers_table_counts_what_the_mean_leaves_out(tmp_path):
    rows = [cell("add", "softmax", "adamw", s, 5, e) for s, e in enumerate([100, 150, None])]
    rows += [cell("add", "softmax", "muon", s, 5, e) for s, e in enumerate([50, 60, 70])]
    adamw, muon = report_published.table(loaded(tmp_path, rows, ()))
    assert adamw[:5] == ["AdamW", "153.09", "125", "2 of 3", "≥ 150"]
    assert muon[:5] == ["Muon", "102.89", "60", "3 of 3", "60"]
    assert muon[6] == "2.50"  # (100 + 150 + 200) / 180: the censored cell counts


@pytest.mark.parametrize("tasks", [("add", "mul")])
def test_the_papers_boxes_stand_beside_the_runs(tmp_path, tasks):
    rows = [
        cell(task, "softmax", name, s, 5, 40 + 9 * s)
        for task in tasks
        for name in ("adamw", "muon")
        for s in range(3)
    ]
    folder = make_run(tmp_path / "run", rows)
    page = write_report(folder).read_text()
    assert (folder / "published.png").stat().st_size > 10_000
    assert "5.2e-7" in page and "882" in page
