"""The one report command: every stored result is drawn by it, and its page needs no second file."""

import re
from pathlib import Path

import pytest

from experiments.report.__main__ import main
from experiments.report.page import Code, Picture, Table, together
from experiments.report.studies import report_of, study_of
from experiments.report.text import told
from experiments.runs import RunError

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
    normuon = table.lines[0]
    assert normuon[:4] == ["NorMuon", "0.04", "1.655 ± 0.010", "−0.238 [−0.263, −0.214]"]
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


def test_a_text_without_its_facts_is_left_out():
    assert told("{config[steps]:,} steps", {"config": {"steps": 1000}}) == "1,000 steps"
    assert told("{config[steps]:,} steps", {"config": {}}) == ""


def test_settings_are_told_once_where_all_agree():
    found = together({"A": {"steps": 3, "rate": 1}, "B": {"steps": 3, "rate": 2}})
    assert found == {"steps": 3, "rate": "A: 1; B: 2"}
