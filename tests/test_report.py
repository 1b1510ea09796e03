"""The one report command: every stored result is drawn by it, and its page needs no second file."""

import re
from pathlib import Path

import pytest

from experiments.report import arms
from experiments.report.__main__ import main
from experiments.report.page import Code, Picture, Table, together
from experiments.report.studies import report_of, study_of
from experiments.report.text import told
from experiments.runs import RunError
from experiments.sweep import Best

ROOT = Path(__file__).parent.parent / "experiments"
STORED = sorted(path.parent for path in ROOT.glob("*/results/**/summary.json"))
# Figures that READMEs show and whose data are not stored: curves, which need a log.
NEEDS_A_LOG = {"curves", "held_out", "held_out_controlled", "widths", "inside_measures"}
NEEDS_A_LOG |= {"inside_power", "spectra"}


def name_of(folder):
    return str(folder.relative_to(ROOT))


def items_of(report, kind):
    return [x for section in report.sections for x in section.items if isinstance(x, kind)]


@pytest.mark.parametrize("folder", STORED, ids=name_of)
def test_a_stored_result_has_a_report(folder):
    report = report_of(folder)
    assert report.abstract and all(report.abstract)
    tables = items_of(report, Table)
    texts = [code.text for code in items_of(report, Code)]  # those of accelerators print as text
    assert any(texts if folder.name == "accelerators" else (table.lines for table in tables))
    assert all(len(line) == len(of.headings) for of in tables for line in of.lines)
    drawn = {picture.name: picture for picture in items_of(report, Picture)}
    assert {path.stem for path in folder.glob("*.png")} - NEEDS_A_LOG <= drawn.keys()
    for picture in drawn.values():
        assert picture.draw().axes and picture.caption and picture.alt
    assert report.summary is None  # it stays as it is


def test_numbers_are_those_that_are_stored():
    (table,) = items_of(report_of(ROOT / "family/results/default"), Table)
    (normuon,) = (line for line in table.lines if line[0] == "NorMuon")
    assert normuon[1:4] == ["0.04", "1.727 ± 0.010", "−0.013 [−0.019, −0.008]"]
    fits, _ = items_of(report_of(ROOT / "pretrain/results/scaling"), Table)
    assert [line[3] for line in fits.lines] == ["0.63 [0.51, 0.78]", "–", "0.72 [0.55, 0.94]", "–"]


def test_the_command_writes_a_page_that_stands_alone(tmp_path, capsys):
    folder = ROOT / "finetune/results/controlled"
    for name in ("config.json", "summary.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    main(str(tmp_path))
    assert (tmp_path / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == len([*tmp_path.glob("*.png")]) == 2
    titles = re.findall(r'<h2 id="(\w+)">', page)
    assert len(titles) == len(set(titles)) and titles[-3:] == ["settings", "machine", "again"]
    assert "4.0456 ± 0.0157" in page and "4.0456 ± 0.0157" in capsys.readouterr().out


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        study_of(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"error: .*summary.json is damaged"):
        main(str(tmp_path))


def arm(name, losses, by_rate=None):
    best = Best(0.1, dict(enumerate(losses)), at_edge=False)
    return arms.Arm(optimizer=name, losses=by_rate or {}, best=best, cells=3, diverged=0)


def points(axes, marker):
    return [line.get_xdata()[0] for line in axes.lines if line.get_marker() == marker]


def test_one_bad_arm_does_not_squeeze_the_others_and_is_counted():
    found = [arm("muon", (1.0, 1.1, 1.2)), arm("scion", (1.1, 1.1, 1.2)), arm("adamw", (1.5, 1.6))]
    figure = arms.finals([*found, arm("splus", (9.0, 9.5, 10.0))], "nats").draw()
    (axes,) = figure.axes
    assert max(points(axes, "o")) == 1.6 and len(points(axes, "^")) == 3
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "SPlus (9.50)"
    assert "3 beyond the axis" in [text.get_text() for text in figure.legends[0].texts]
    # Where AdamW is the lowest, what lies above it is not beyond the axis.
    (axes,) = (
        arms.finals([found[2], arm("muon", (1.6, 1.7)), arm("dion", (1.7, 1.8))], "").draw().axes
    )
    assert len(points(axes, "o")) == 6 and not points(axes, "^")


def test_a_rate_that_was_not_swept_is_at_no_edge():
    best = Best(0.1, {0: 1.0}, at_edge=True)
    one, several = (
        arms.Arm(optimizer="muon", losses=losses, best=best, cells=3, diverged=0)
        for losses in ({0.1: 1.0}, {0.1: 1.0, 0.2: 2.0})
    )
    assert arms.caveats([one]) == ["Each optimizer was trained at one learning rate."]
    (edge,) = arms.caveats([one, several])
    assert edge.endswith("may be better: Muon.")


def test_a_figure_of_rates_says_over_how_many_seeds_its_points_are():
    one = arm("muon", (1.0, 1.2, 1.4), {0.05: 1.3, 0.1: 1.0, 0.2: 1.4})
    all_three = arm("muon", (1.0, 1.2, 1.4), {0.05: 1.3, 0.1: 1.2, 0.2: 1.4})
    assert (one.choosing, all_three.choosing) == (1, 3)
    for of, words in ((one, "one seed"), (all_three, "mean over 3 seeds")):
        legend = [text.get_text() for text in arms.rates([of], "").draw().legends[0].texts]
        assert legend == [words, "best rate"]  # and no mark that is not drawn


def test_a_text_without_its_facts_is_left_out():
    assert told("{config[steps]:,} steps", {"config": {"steps": 1000}}) == "1,000 steps"
    assert told("{config[steps]:,} steps", {"config": {}}) == ""


def test_settings_are_told_once_where_all_agree():
    found = together({"A": {"steps": 3, "rate": 1}, "B": {"steps": 3, "rate": 2}})
    assert found == {"steps": 3, "rate": "A: 1; B: 2"}
