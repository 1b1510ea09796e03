import io
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from experiments import runs
from experiments.grok import report_tests
from experiments.grok.report import abstract, report, terminal_table
from experiments.grok.report_data import aggregate, censored_median, load_run
from experiments.grok.report_figures import epochs_figure, pictures
from experiments.optimizers import ARMS
from experiments.report.__main__ import main
from experiments.report.names import optimizer_color
from experiments.report.page import write
from experiments.report.series import middle

SPEED = {"adamw": 210.0, "muon": 130.0}


def cell(task, softmax, optimizer, seed, memorized, grok, budget=200, point="", **changes):
    """A row of summary.json; `grok` None makes a censored cell."""
    speed = SPEED.get(optimizer, 100.0)
    return {
        "task": task,
        "softmax": softmax,
        "optimizer": optimizer,
        "seed": seed,
        "point": point,
        "memorized_epoch": memorized,
        "first_crossing_epoch": grok,
        "grok_epoch": grok,
        "grok_epoch_sustained": grok,
        "grok_epoch_near_best": grok,
        "collapse_epoch": None,
        "censored": grok is None,
        "diverged": False,
        "epochs_run": budget,
        "seconds": budget * 10 / speed,
        "steps_per_second": speed,
        "steps_per_epoch": 10,
        "tokens_per_epoch": 20_480,
        "step_flops": 4.1e9,
        "parameters": 223_000,
    } | changes


def epochs(row):
    """Records of some epochs, with accuracies that are 0 until a milestone and 1 from there on."""
    memorized, grok = row["memorized_epoch"] or 12, row["grok_epoch_sustained"] or 260
    for epoch in (1, 2, 5, 10, 20, 50, 100, 200):
        yield {key: row[key] for key in ("task", "softmax", "optimizer", "seed", "point")} | {
            "epoch": epoch,
            "train_accuracy": float(epoch >= memorized),
            "validation_accuracy": float(epoch >= grok),
        }


def make_run(folder: Path, rows, total=None, **settings) -> Path:
    """A run folder as experiments.grok writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    axes: dict[str, dict[str, None]] = {}
    for setting, _, value in (p.partition("=") for row in rows for p in row["point"].split()):
        axes.setdefault(setting, {})[value] = None

    def names(key):
        return list(dict.fromkeys(row[key] for row in rows))

    config = {
        "tasks": names("task"),
        "softmax": names("softmax"),
        "optimizers": names("optimizer"),
        "epochs": 200,
        "grid": [f"{setting}={','.join(values)}" for setting, values in axes.items()],
        "full_length": False,
        "width": 128,
    }
    run = runs.Run(folder, config | settings)
    run.extend([(list(epochs(row)), row) for row in rows])
    run.close()
    about = {"version": "0.1.0", "machine": {"device": "TFRT_CPU_0", "jax": "0.0"}}
    cells = {"cells_total": total or len(rows), "cells": rows}
    runs.write_json(folder / "summary.json", about | cells)
    return folder


def write_report(folder: Path) -> Path:
    return write(report(folder), folder)


def section(of, name):
    """The items of a section of a report."""
    return next(part.items for part in of.sections if part.id == name)


def along(setting, epochs, optimizer="muon", **changes):
    """Seeds of an optimizer at each value of a setting, with the epoch at which each grokked."""
    return [
        cell("div", "softmax", optimizer, seed, 5, epoch, point=f"{setting}={value}", **changes)
        for value, found in epochs.items()
        for seed, epoch in enumerate(found)
    ]


def three_seeds(optimizer, epochs_to_grok, memorized=10, task="add", **changes):
    return [
        cell(task, "standard", optimizer, seed, memorized, grok, **changes)
        for seed, grok in enumerate(epochs_to_grok)
    ]


ADAMW = three_seeds("adamw", [90, 97, 110])
MUON = three_seeds("muon", [15, 17, 21])


def text_of(tmp_path, rows, **options) -> str:
    return " ".join(abstract(load_run(make_run(tmp_path / "run", rows, **options))))


def test_abstract_of_a_whole_run(tmp_path):
    assert text_of(tmp_path, ADAMW + MUON) == (
        "Muon reached 95 % validation accuracy, and held it, in 3 of 3 trainings, at a median of"
        " 17 epochs; AdamW in 3 of 3 trainings, at a median of 97 epochs."
        " Grokked strictly, at twice the memorised epoch or later: AdamW 3 of 3; Muon 1 of 3"
        " trainings that grokked at all."
        " Grokked within 5 epochs of memorising: AdamW 0 of 3; Muon 1 of 3."
        " Ratio of grokking epochs, AdamW over Muon, paired by training, with 95 % interval: 5.64"
        " [4.75, 6.69] (n = 3 seeds); of epochs to memorise 1.00 [1.00, 1.00]; of delay + 1 10.77"
        " [5.98, 19.40]."
        " Median training time to grok: Muon 1.31 s; AdamW 4.62 s."
    )


def test_abstract_counts_the_panels(tmp_path):
    rows = [*ADAMW, *MUON]
    rows += [row | {"task": "gcd", "optimizer": "adamw"} for row in MUON]
    rows += [row | {"task": "gcd", "optimizer": "muon"} for row in ADAMW]
    for optimizer in ("adamw", "muon"):
        rows += three_seeds(optimizer, [None] * 3, task="exp")
    text = text_of(tmp_path, rows)
    # Of three tasks one tells nothing, and the other two cancel.
    assert (
        "AdamW over Muon, paired by training, with 95 % interval: 1.00 [" in text
        and "(n = 2 tasks)" in text
    )


def test_abstract_with_censored_cells(tmp_path):
    one = three_seeds("adamw", [90, 97, None])
    text = text_of(tmp_path, one + MUON)
    assert "AdamW in 2 of 3 trainings, at a median of 97 epochs" in text
    # 90 / 15, 97 / 17 and 200 / 21, at least.
    assert "≥ 6.88 [3.41, 13.88] (n = 3 seeds; 1 pair with a censored training" in text

    two = three_seeds("adamw", [90, None, None])
    text = text_of(tmp_path, two + MUON)
    assert "AdamW in 1 of 3 trainings, so at a median beyond 200 epochs" in text
    assert "≥ 8.76 [" in text

    slow = three_seeds("muon", [None, None, 30])
    assert "≤ 0.93 [" in text_of(tmp_path, ADAMW + slow)


def test_abstract_where_nothing_grokked(tmp_path):
    text = text_of(tmp_path, three_seeds("adamw", [None] * 3) + three_seeds("muon", [None] * 3))
    assert "in 0 of 3 trainings within the budget of 200 epochs; AdamW in 0 of 3" in text
    assert "No ratio AdamW over Muon: neither grokked within the budget." in text
    assert "strictly" not in text


def test_abstract_of_a_partial_run(tmp_path):
    text = text_of(tmp_path, [*ADAMW, MUON[0]], total=6)
    assert text.startswith("4 of 6 trainings finished so far.")
    # Only seed 0 has both optimizers: 90 / 15.
    assert "AdamW over Muon, paired by training, with 95 % interval: 6.00 (n = 1 seed);" in text


def test_abstract_of_one_optimizer_and_of_divergence(tmp_path):
    text = text_of(tmp_path, MUON)
    assert "AdamW" not in text and "ratio" not in text and "in 3 of 3 trainings" in text
    text = text_of(tmp_path, [*MUON[:2], MUON[2] | {"diverged": True}])
    assert "1 training diverged." in text


MANY = [
    row
    for place, name in enumerate(["adamw", "muon", "polar", "spectral", "scion", "dion", "gluon"])
    for row in three_seeds(name, [90 - 10 * place, 91, 100 + place], collapse_epoch=None)
]


def test_many_optimizers_are_ranked_and_have_rows_and_panels_of_their_own(tmp_path):
    rows = MANY + three_seeds("adamw_tuned", [80, None, None])
    rows[0] |= {"collapse_epoch": 150}
    rows[:3] = [row | {"steps_per_second": 1.0} for row in rows[:3]]
    folder = make_run(tmp_path / "run", rows)
    text = " ".join(abstract(load_run(folder)))
    assert text.startswith(
        "Grokked strictly, at twice the memorised epoch or later: all optimizers 22 of 22 trainings"
    )
    assert "7 of 8 optimizers grokked, at a median epoch of: AdamW 91; Muon 91;" in text
    assert "Not within the budget of 200 epochs, by the median: AdamW, 0.01 × 4." in text
    ranked = "Muon 7; Exact polar 9.1; Spectral alone 9.1; AdamW"
    assert f"Fastest in seconds of training: {ranked}" in text
    assert "1 training lost it again: 1 of AdamW." in text
    curves, reached = section(report(folder), "figures")
    assert "a cross the epoch at which a training had lost" in reached.caption
    assert len(curves.draw().axes) == 8 and not section(report(folder), "published")
    (axes,) = reached.draw().axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 8 and labels[-1] == "AdamW, 0.01 × 4"
    assert axes.yaxis_inverted()


def test_settings_too_many_for_boxes_have_rows_by_optimizer(tmp_path):
    rates = [f"{0.001 * 2**k:g}" for k in range(9)]
    rows = along("adamw.learning-rate", {rate: [40, 50, 60] for rate in rates}, "adamw")
    folder = make_run(tmp_path / "run", rows)
    (axes,) = epochs_figure(load_run(folder)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == rates
    assert axes.get_title("left") == "AdamW, by learning rate"
    # The paper's pooled means are no measure of a grid of rates.
    assert not section(report(folder), "published")


def test_every_row_has_its_n_and_an_optimizer_that_is_not_swept_a_panel_of_its_own(tmp_path):
    one = {"task": "div", "softmax": "softmax"}
    rows = [row | one for row in ADAMW + MUON + three_seeds("polar", [16, 18, 20])]
    rows += along("variants.rank", {1: [180, None], 8: [60, 70, 80]}, "low_rank")
    folder = make_run(tmp_path / "run", rows)
    found = {axes.get_title("left"): axes for axes in epochs_figure(load_run(folder)).axes}
    assert [*found] == ["AdamW", "Muon", "Exact polar", "Rank k, SVD, by rank"]

    def marked(axes, marker):
        lines = [line for line in axes.lines if line.get_marker() == marker]
        return sorted((round(y), x) for line in lines for x, y in line.get_xydata().tolist())

    assert marked(found["Muon"], "o") == [(0, 15), (0, 17), (0, 21)]
    ranked = found["Rank k, SVD, by rank"]
    assert marked(ranked, "o") == [(0, 180), (1, 60), (1, 70), (1, 80)]
    assert marked(ranked, "^") == [(0, 200)]
    assert [label.get_text() for label in ranked.get_yticklabels()] == ["1", "8"]


def test_output_functions_lie_side_by_side(tmp_path):
    kinds = ("softmax", "stablemax", "sparsemax")
    rows = [
        cell(task, kind, name, s, 5, 30 + s)
        for task in ("add", "mul")
        for kind in kinds
        for name in ("adamw", "muon")
        for s in range(3)
    ]
    axes = epochs_figure(load_run(make_run(tmp_path / "run", rows))).axes
    titles = [of.get_title("left") for of in axes]
    assert titles == [f"{task} · {kind}" for task in ("add", "mul") for kind in kinds]
    assert [len({round(of.get_position().x0, 3) for of in axes})] == [3]
    labels = [[label.get_text() for label in of.get_yticklabels()] for of in axes[:2]]
    assert labels == [["AdamW", "Muon"], ["", ""]]


def test_what_is_lost_after_grokking_is_told_where_cells_train_on(tmp_path):
    later = [{"evaluations_after_grok": n, "below_after_grok": k} for n, k in ((185, 2), (183, 0))]
    rows = [*ADAMW, *(row | counts for row, counts in zip(MUON, [*later, {}], strict=True))]
    folder = make_run(tmp_path / "run", rows)
    (arms,) = section(report(folder), "arms")
    assert "below 95 % after that" not in arms.headings
    (arms,) = section(report(make_run(tmp_path / "run", rows, full_length=True)), "arms")
    place = arms.headings.index("below 95 % after that")
    assert [line[place] for line in arms.lines] == ["–", "0.5 %"]


def test_stored_results_have_a_report_without_their_log(tmp_path):
    folder = make_run(tmp_path / "run", ADAMW + MUON)
    (folder / "metrics.jsonl").unlink()
    page = write_report(folder).read_text()
    assert "6 trainings" in page and "Figure 1." in page and not (folder / "curves.png").exists()


def test_censored_medians():
    assert censored_median([3, None, 1], [9, 9, 9]) == (3, False)
    assert censored_median([3, None, None], [9, 9, 9]) == (9, True)
    # One of the two middle values is known: the median exceeds their mean, not the budget.
    assert censored_median([1, 3, None, None], [9, 9, 9, 9]) == (6, True)
    assert math.isnan(censored_median([], []).value)
    # A low bound must not lower the rank of what is missing.
    assert censored_median([10, 12, None], [9, 9, 1]) == (12, False)


def test_aggregate():
    adamw, muon = aggregate(three_seeds("adamw", [90, None, None]) + MUON, 200)
    assert (adamw.n, adamw.censored, muon.censored) == (3, 2, 0)
    assert adamw.median() == (200, True) and adamw.median("delay") == (190, True)
    assert muon.median() == (17, False) and muon.median("delay") == (7, False)
    assert muon.median("seconds").value == pytest.approx(170 / 130)
    assert adamw.median("seconds") == (pytest.approx(2000 / 210), True)
    assert adamw.median("memorized_epoch") == (10, False)


def test_the_terminal_shows_the_page_s_table(tmp_path):
    rows = three_seeds("adamw", [90, None, None]) + three_seeds("[red]x", [15, 17, 21])
    folder = make_run(tmp_path / "run", rows)
    text = printed(load_run(folder), 200)
    assert "> 200" in text and "2 of 3" in text and "[red]x" in text
    page = write_report(folder).read_text()
    assert "<td>&gt; 200</td>" in page and "<td>2 of 3</td>" in page


def printed(run, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(run))
    return console.file.getvalue()


def test_the_terminal_table_tells_settings_in_80_columns(tmp_path):
    point = "adamw.learning-rate=0.016 adamw.b1=0.9"
    rows = [cell("div", "softmax", "adamw", s, 5, 50, point=point) for s in range(3)]
    text = printed(load_run(make_run(tmp_path / "run", rows)), 80)
    assert "Medians by optimizer · div · softmax" in text and "…" not in text
    assert "lr 0.016" in text and "b1 0.9 " in text


RESULTS = Path(__file__).parent.parent / "experiments/grok/results"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("default", "None is censored at the budget of 200 epochs."),
        ("critics", "The 7 censored ones are open triangles at the budget of 300 epochs."),
    ],
)
def test_a_caption_counts_what_is_censored(name, words):
    first, *_ = pictures(load_run(RESULTS / name))
    assert words in first.caption


def test_tests_are_three_sentences_and_columns_that_say_something():
    text, table, *_ = report_tests.items(load_run(RESULTS / "default"))
    assert len(re.findall(r"\.( |$)", text)) == 3
    assert all(any(line[i] != "–" for line in table.lines) for i in range(len(table.headings)))
    assert "Mann–Whitney p, Holm" in table.headings and "log-rank p" not in table.headings


def test_report_stands_alone_and_holds_every_row(tmp_path):
    rows = ADAMW + MUON + three_seeds("muon", [31, None, 33], task="gcd")
    folder = make_run(tmp_path / "run", rows, total=12)
    path = write_report(folder)
    assert path == folder / "report.html"
    page = path.read_text()
    names = {"published.png", "curves.png", "grok_epochs.png", "survival.png"}
    assert {path.name for path in folder.glob("*.png")} == names
    assert page.count("data:image/png") == page.count("alt=") == 4
    body = page.split('id="cells"')[1].split("</section>")[0]
    found = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>.*?</td>\s*<td>(.*?)</td>\s*<td>(.*?)<", body)
    labels = {"adamw": "AdamW", "muon": "Muon"}
    wanted = [(row["task"], labels[row["optimizer"]], str(row["seed"])) for row in rows]
    assert found == wanted
    assert "The one censored one is an open triangle at the budget" in re.sub(r"\s+", " ", page)
    assert "width" in page and "TFRT_CPU_0" in page and "9 of 12 trainings finished" in page


def test_names_are_escaped(tmp_path):
    rows = [*ADAMW, *three_seeds("<b>$x_", [15, 17, 21], task="<i>")]
    page = write_report(make_run(tmp_path / "run", rows)).read_text()
    assert "<b>" not in page and "<i>" not in page
    assert "&lt;b&gt;$x_" in page


def test_faults_name_the_file(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        load_run(tmp_path / "missing")
    folder = make_run(tmp_path / "run", MUON)
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text().replace('"epoch": 5', '"epoch": 6', 1))
    assert len(load_run(folder).rows) == 2
    assert f"{log.name} is damaged" in " ".join(capsys.readouterr().err.split())
    config = json.loads((folder / "config.json").read_text())
    runs.write_json(folder / "config.json", {k: v for k, v in config.items() if k != "grid"})
    with pytest.raises(SystemExit, match=r"no readable run of this study.*'grid'"):
        main(str(folder))
    (folder / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        load_run(folder)


def test_median_curve_stops_where_the_first_seed_stops():
    found = middle([([1, 2], [0.1, 0.2]), ([1], [0.3])], statistics.median)
    assert [of.tolist() for of in found] == [[1], [pytest.approx(0.2)]]


def test_colors_are_stable():
    assert len({optimizer_color(name).upper() for name in ARMS}) == len(ARMS)
    assert optimizer_color("anything at all") == "#882255"
