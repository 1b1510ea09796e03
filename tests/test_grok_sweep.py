"""The report of a sweep: the best setting, trends on five axes, figures; and the paper's table."""

import html
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import optimizers
from experiments.grok import report_published, report_sweep
from experiments.grok.config import Config
from experiments.grok.model import Transformer
from experiments.grok.report import abstract, report
from experiments.grok.report_data import UNCOUNTED, Run, load_run
from experiments.grok.report_sweep_figures import heat_figure, lines_figure
from tests.test_grok_report import along, cell, make_run, section, write_report


def widths(optimizer: str, epochs: dict[int, list[int | None]]):
    return along("width", epochs, optimizer)


ADAMW = widths("adamw", {32: [None, 190, None], 64: [120, 130, 110], 128: [60, 70, 80]})
MUON = widths("muon", {32: [100, 90, 95], 64: [50, 60, 55], 128: [20, 30, 25]})


def loaded(tmp_path, rows) -> Run:
    return load_run(make_run(tmp_path / "run", rows))


def test_the_best_setting_of_each_and_their_ratio(tmp_path):
    adamw, muon, *_ = report_sweep.best_table(loaded(tmp_path, ADAMW + MUON))
    assert adamw[:8] == ["epochs", "AdamW", "3", "width 128", "3", "5", "65", "70"]
    assert muon[:8] == ["epochs", "Muon", "3", "width 128", "3", "5", "20", "25"]
    ratio = (60 / 20 * 70 / 30 * 80 / 25) ** (1 / 3)
    assert re.fullmatch(rf"{ratio:.2f} \[[\d.]+, [\d.]+\]", muon[8]) and adamw[8] == "–"


def test_the_best_setting_is_that_of_each_axis(tmp_path):
    """Width 128 groks first, and at 16 times width 32's FLOPs an epoch it is the dearest."""
    adamw = [row | {"step_flops": int(row["point"][6:]) ** 2} for row in ADAMW]
    muon = [row | {"step_flops": 2 * int(row["point"][6:]) ** 2} for row in MUON]
    run = loaded(tmp_path, adamw + muon)
    assert report_sweep.axes_apart(run) == ["epochs", "FLOP", "seconds"]
    slow, fast = report_sweep.best(run, "FLOP")
    assert (slow.arm.panel.point, fast.arm.panel.point) == ("width=64", "width=32")
    epoch = run.rows[0]["steps_per_epoch"]
    assert fast.median.value == 95 * epoch * 2 * 32**2
    paired = (120 / 100 * 130 / 90 * 110 / 95) ** (1 / 3)
    assert fast.ratio.value == pytest.approx(paired * 64**2 / (2 * 32**2))
    assert fast.ratio.low < fast.ratio.value < fast.ratio.high


def test_a_cost_is_that_of_a_cell_and_not_made_of_two(tmp_path):
    """Beside other work a seed is slow: the median epoch and the median speed are of two seeds."""

    def cells(optimizer, grokked, speeds):
        found = zip(widths(optimizer, {32: grokked}), speeds, strict=True)
        return [row | {"steps_per_second": 10 / seconds} for row, seconds in found]

    adamw = cells("adamw", [100, 120, 110], [1.0, 1.0, 1.0])
    muon = cells("muon", [84, 78, 106], [1.364, 0.683, 0.667])
    run = loaded(tmp_path, adamw + muon)
    slow, fast = report_sweep.best(run, "seconds")
    assert fast.median.value == pytest.approx(106 * 0.667)
    assert slow.median.value == pytest.approx(110)
    own = 100 / (84 * 1.364), 120 / (78 * 0.683), 110 / (106 * 0.667)
    assert fast.ratio.value == pytest.approx(np.prod(own) ** (1 / 3))
    # A censored cell counts at what its own budget took.
    censored = cells("adamw", [100, None, 110], [1.0, 3.0, 1.0])
    _, fast = report_sweep.best(loaded(tmp_path / "censored", censored + muon), "seconds")
    bound = own[0] * 600 / (78 * 0.683) * own[2]
    assert fast.ratio.value == pytest.approx(bound ** (1 / 3)) and str(fast.ratio)[0] == "≥"


def test_a_bound_is_no_best_setting(tmp_path):
    # At 32 the median lies beyond the budget, though one seed was the fastest of all.
    rows = widths("muon", {32: [3, None, None], 64: [50, 60, 55]})
    (found,) = report_sweep.best(loaded(tmp_path, rows))
    assert found.arm.panel.point == "width=64" and found.median == (55, False)


def test_trends_differ_by_axis(tmp_path):
    """Twice the batch, half the steps an epoch: epochs rise while steps fall."""
    rows = []
    for place, batch in enumerate((64, 128, 256, 512)):
        epochs = [20 + 6 * place + seed for seed in range(3)]
        rows += along("batch", {batch: epochs}, steps_per_epoch=800 // 2**place)
    run = loaded(tmp_path, rows)
    trends = {unit: report_sweep.trend(run, "muon", "batch", unit) for unit in report_sweep.UNITS}
    assert trends["epochs"][0] > 0.9 and trends["tokens"][0] > 0.9
    assert trends["steps"][0] < -0.9 and trends["FLOP"][0] < -0.9
    text = " ".join(abstract(run))
    assert "Muon's rises (epochs, tokens); Muon's falls (steps, FLOP, seconds)" in text


def test_a_trend_does_not_come_from_budgets_that_fall(tmp_path):
    """In steps the budget of a larger batch is smaller: a censored cell there tells nothing."""
    rows = []
    for batch, epoch in {64: 50, 128: 90, 256: 170, 512: None, 1024: None}.items():
        epochs = [epoch and epoch + seed for seed in range(3)]
        rows += along("batch", {batch: epochs}, steps_per_epoch=6400 // batch)
    run = loaded(tmp_path, rows)
    epochs, steps = (report_sweep.trend(run, "muon", "batch", u) for u in ("epochs", "steps"))
    assert epochs.rho > 0.9 and (epochs.values, epochs.left_out) == (5, 0)
    assert (steps.values, steps.left_out) == (3, 2)
    assert "over the 3 values without a censored training (steps, FLOP, seconds)" in " ".join(
        abstract(run)
    )


def test_the_sweep_is_told_in_sentences(tmp_path):
    text = " ".join(abstract(loaded(tmp_path, ADAMW + MUON)))
    assert "AdamW 70, the best of 3 settings (width 128); Muon 25" in text
    assert re.search(
        r"AdamW over Muon, each at its best setting, with 95 % interval: 2.82 \[.*?\] in epochs",
        text,
    )
    assert "Cost of grokking with larger width: AdamW's falls" in text


def test_the_abstract_counts_cells_and_those_censored(tmp_path):
    text = " ".join(abstract(loaded(tmp_path, ADAMW + MUON)))
    assert "18 trainings, 3 seeds per setting; 2 censored at 200 epochs: AdamW 2 of 9." in text
    text = " ".join(abstract(loaded(tmp_path / "all", MUON)))
    assert "All of 9 trainings, 3 seeds per setting, grokked within 200 epochs." in text


@pytest.mark.parametrize(
    ("setting", "epochs"),
    [
        ("muon.scale", {"spectral": [40, 41], "mup": [20, 21], "none": [60, 61]}),
        ("dropout", {0: [9, 10], 0.1: [7, 8]}),
    ],
)
def test_words_and_zero_lie_side_by_side_in_their_order(tmp_path, setting, epochs):
    rows = [cell("div", "softmax", "adamw", 0, 5, 80), *along(setting, epochs)]
    folder = make_run(tmp_path / "run", rows)
    assert "Cost to grok against the swept setting" in write_report(folder).read_text()
    run = load_run(folder)
    axes, *_ = lines_figure(run).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [*map(str, epochs)]
    assert [*axes.get_xticks()] == [*range(len(epochs))]
    assert report_sweep.trends(run) == [] and "of its grid" not in " ".join(abstract(run))


def test_flops_that_xla_does_not_count_are_not_compared(tmp_path):
    rows = widths("adamw", {32: [90, 80, 85], 64: [95, 85, 90]}) + widths(
        "polar", {32: [40, 50, 45]}
    )
    rows += [row | {"step_flops": 9e9} for row in widths("muon", {32: [40, 50, 45]})]
    run = loaded(tmp_path, rows)
    flops = {row[1]: row[2:] for row in report_sweep.best_table(run) if row[0] == "FLOP"}
    assert flops["Exact polar"] == ["–"] * 7 and flops["Muon"][6] != "–"
    text = " ".join(abstract(run))
    (polar,) = re.findall(r"AdamW over Exact polar.*?\.(?= [A-Z])", text)
    assert "in epochs" in polar and "FLOP" not in polar
    assert "FLOPs of Exact polar are unknown (–): XLA's count omits decompositions" in text
    panels = {axes.get_title("left"): axes for axes in lines_figure(run).axes}
    drawn = {unit: {line.get_color() for line in panels[unit].lines} for unit in ("steps", "FLOP")}
    assert len(drawn["steps"]) == 3 and len(drawn["FLOP"]) == 2
    assert panels["FLOP"].get_title("right") == "– Exact polar"
    polar = along("variants.rank", {1: [90, 91], 2: [60, 61], 4: [40, 41]}, "low_rank")
    ranks = loaded(tmp_path / "rank", polar)
    assert report_sweep.trend(ranks, "low_rank", "variants.rank", "FLOP") is None
    assert report_sweep.trend(ranks, "low_rank", "variants.rank", "steps").rho < -0.9


def test_uncounted_are_those_whose_step_has_a_decomposition_or_a_loop():
    config = Config(width=16)

    def model():
        return nnx.state(Transformer(9, width=16, layers=1, heads=2, rngs=nnx.Rngs(0)), nnx.Param)

    params = nnx.eval_shape(model)
    largest = {"blocks/0/attention": jax.ShapeDtypeStruct((2,), "float32")}
    found = set()
    for name in optimizers.ARMS:
        tx = optimizers.build(name, config, optax.constant_schedule(1.0))
        state = jax.eval_shape(tx.init, params)
        step = jax.make_jaxpr(lambda s, p, m, tx=tx: tx.update(p, s, p, max_logits=m))
        if re.search(r"= (svd|qr|eigh|scan|while)\[", str(step(state, params, largest))):
            found.add(name)
    assert found == UNCOUNTED


def triangles(axes):
    """Where censored marks are, in the axes' own units, and what is written in the axes."""
    marks = [line for line in axes.lines if line.get_marker() == "^"]
    where = [line.get_transform().transform(line.get_xydata())[0] for line in marks]
    return [axes.transData.inverted().transform(at) for at in where], [
        t.get_text() for t in axes.texts
    ]


def test_censored_cells_are_counted_and_stand_on_their_tick(tmp_path):
    rows = along("variants.rank", {1: [None], 2: [None] * 2, 4: [60, 61]}, "low_rank")
    rows += [cell("div", "softmax", name, 0, 5, 80) for name in ("adamw", "muon", "polar")]
    run = loaded(tmp_path, rows)
    figure = lines_figure(run)
    figure.draw_without_rendering()
    found, texts = triangles(figure.axes[0])
    assert np.array(found) == pytest.approx(np.array([[1, 200], [2, 200]]), rel=1e-6)
    assert texts == ["×2"]  # one seed of rank 1
    assert figure.axes[0].get_ylim()[1] > 200
    told = " ".join(figure.axes[5].texts[0].get_text().split())
    assert told.startswith(
        "8 trainings, 2 seeds per setting; 3 censored at 200 epochs: Rank k, SVD 3 of"
    )


def test_censored_cells_of_two_optimizers_stand_apart(tmp_path):
    rows = widths("adamw", {32: [None] * 3, 64: [None] * 3})
    rows += widths("muon", {32: [None] * 3, 64: [9]})
    figure = lines_figure(loaded(tmp_path, rows))
    figure.draw_without_rendering()
    found, texts = triangles(figure.axes[0])
    left, right, alone = sorted(x for x, _ in found)
    assert 30 < left < 31.5 and 32.5 < right < 34 and alone == pytest.approx(64)
    assert texts == ["×3"] * 3


def test_two_settings_of_all_are_heat_maps_in_what_they_make_differ(tmp_path):
    rows = [
        cell("div", "softmax", name, s, 5, None if batch == 2048 else width // 8 + batch // 64 + s)
        | {
            "point": f"width={width} batch={batch}",
            "steps_per_epoch": 4656 // batch,
            "tokens_per_epoch": 4656 // batch * batch * 4,
            "step_flops": batch * width**2,
        }
        for name in ("muon", "polar")
        for width in (32, 64)
        for batch in (256, 1024, 2048)
        for s in range(2)
    ]
    run = loaded(tmp_path, rows)
    assert [picture.name for picture in report_sweep.pictures(run)] == ["heat"]
    axes = {axes.get_title("left"): axes for axes in heat_figure(run).axes}
    units = ("epochs", "tokens", "steps", "FLOP")
    maps = [title for title in axes if title]  # the others are keys of colours
    assert maps == [f"{name}: {unit}" for unit in units for name in ("Muon", "Exact polar")]
    texts = [text.get_text() for text in axes["Muon: steps"].texts]
    assert texts == [
        "153\n144 to 162", "82\n80 to 84", "> 400\n2 censored",
        "225\n216 to 234", "98\n96 to 100", "> 400\n2 censored",
    ]  # fmt: skip
    (image,) = axes["Muon: steps"].images
    assert image.get_array().mask.tolist() == [[False, False, True]] * 2  # a bound has no colour
    texts = [text.get_text() for text in axes["Muon: tokens"].texts]
    assert [text.split("\n")[0] for text in texts[:3]] == ["157k", "336k", "> 3.28M"]
    assert {text.get_text() for text in axes["Exact polar: FLOP"].texts} == {"–"}
    # What an epoch takes is the same at each decay, but for what XLA folds.
    same = [
        cell("div", "softmax", "muon", s, 5, 30, point=f"muon.beta={b} muon.weight-decay={d}")
        | {"step_flops": 1e9 + 1e5 * d}
        for b in (0.9, 0.95)
        for d in (0, 1)
        for s in range(2)
    ]
    run = loaded(tmp_path / "same", same)
    titles = [axes.get_title("left") for axes in heat_figure(run).axes]
    assert titles == ["Muon: epochs", ""]


def test_settings_of_an_optimizers_own_make_a_heat_map_each(tmp_path):
    rows = [
        cell("div", "softmax", name, s, 5, 30 * (1 + i) + 7 * j + s, point=point)
        for name in ("adamw", "muon")
        for i, rate in enumerate(("0.001", "0.01"))
        for j, decay in enumerate(("0.1", "1"))
        for s in range(2)
        for point in [f"{name}.learning-rate={rate} {name}.weight-decay={decay}"]
    ]
    folder = make_run(tmp_path / "run", rows)
    page = write_report(folder).read_text()
    assert (folder / "heat.png").stat().st_size > 10_000 and not (folder / "sweep.png").exists()
    assert "learning rate 0.001, weight decay 0.1" in page
    assert "Muon's learning rate is the lowest tried; " in html.unescape(page)
    # No setting has both optimizers, so nothing is tested setting by setting.
    assert 'id="tests"' not in page and 'id="sweep"' in page


def test_settings_of_one_value_are_not_drawn(tmp_path):
    points = ("adamw.learning-rate=0.001 adamw.weight-decay=1", "muon.learning-rate=0.02")
    rows = [
        cell("div", "softmax", point[: point.index(".")], s, 5, 30 + s, point=point)
        for point in points
        for s in range(2)
    ]
    run = loaded(tmp_path, rows)
    assert report_sweep.best_table(run) and not report_sweep.pictures(run)


def test_a_best_setting_inside_its_grid_is_told(tmp_path):
    rows = along("muon.learning-rate", {0.1: [60, 61], 0.2: [30, 31], 0.4: [50, 51]})
    inside = " ".join(abstract(loaded(tmp_path, rows)))
    assert "No best setting is the lowest or highest of its grid." in inside
    assert "with larger" not in inside  # a rate has a best value, and no trend
    # A folder whose grid grew keeps what it had at the default rate.
    plain = [cell("div", "softmax", "muon", s, 5, 90 + s) for s in range(2)]
    grown = " ".join(abstract(loaded(tmp_path / "grown", [*plain, *rows])))
    assert "No best setting is the lowest or highest of its grid." in grown
    assert "of 4 settings" in grown
    assert "of its grid" not in " ".join(abstract(loaded(tmp_path / "widths", ADAMW + MUON)))


def table_of(folder):
    """The lines of the table of tests."""
    _, table, *_ = section(report(folder), "tests")
    return table.lines


def test_a_sweep_of_one_setting_is_lines_and_tests_at_each(tmp_path):
    folder = make_run(tmp_path / "run", ADAMW + MUON)
    (picture,) = report_sweep.pictures(load_run(folder))
    assert picture.name == "sweep" and len(picture.draw().axes) == 6
    settings = [f"div · softmax · width={width}" for width in (32, 64, 128)]
    assert [line[:2] for line in table_of(folder)] == [["Muon", on] for on in ("all", *settings)]
    assert table_of(folder)[1][2] == "> 200 (2 of 3 censored)"


def test_an_optimizer_that_the_axis_does_not_concern_is_the_baseline_of_each(tmp_path):
    rows = [cell("div", "softmax", "adamw", s, 5, 80 + s) for s in range(3)]
    rows += along("variants.rank", {k: [40 // k, 41 // k, 42] for k in (1, 2, 4)}, "low_rank")
    # Not over all of them: that would count the baseline's cells three times.
    assert len(table_of(make_run(tmp_path / "run", rows))) == 3


def test_the_papers_table_counts_what_the_mean_leaves_out(tmp_path):
    rows = [cell("add", "softmax", "adamw", s, 5, e) for s, e in enumerate([100, 150, None])]
    rows += [cell("add", "softmax", "muon", s, 5, e) for s, e in enumerate([50, 60, 70])]
    adamw, muon = report_published.table(loaded(tmp_path, rows))
    assert adamw[:5] == ["AdamW", "153.09", "125", "2 of 3", "≥ 150"]
    assert muon[:5] == ["Muon", "102.89", "60", "3 of 3", "60"]
    assert muon[6] == "2.50"  # (100 + 150 + 200) / 180: the censored cell counts


def test_the_papers_boxes_stand_beside_the_runs(tmp_path):
    rows = [
        cell(task, "softmax", name, s, 5, 40 + 9 * s)
        for task in ("add", "mul")
        for name in ("adamw", "muon")
        for s in range(3)
    ]
    folder = make_run(tmp_path / "run", rows)
    page = write_report(folder).read_text()
    assert (folder / "published.png").stat().st_size > 10_000
    assert "5.2e-7" in page and "882" in page
