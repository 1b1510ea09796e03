"""Reports of fine-tunings: every number from the files, and verdicts that follow the numbers."""

import json
import re

import numpy as np
import pytest
from etils import epath

from experiments.finetune import claims, report
from experiments.finetune.arms import ARMS
from experiments.finetune.report_data import found_arms, load_run, of_cell
from experiments.report.__main__ import main
from experiments.report.figures import optimizer_label
from experiments.report.page import write
from experiments.report.studies import study_of
from experiments.runs import RunError

STEPS, WARMUP = 40, 4
# Held-out loss, token accuracy early and late, and amplitude of the gradient norm: as claimed.
POST = {
    "adamw": (1.50, 0.40, 0.60, 0.4),
    "muon_frozen1d": (1.45, 0.45, 0.62, 0.3),
    "muon_adamw": (1.40, 0.42, 0.65, 0.1),
    "muonclip": (1.60, 0.41, 0.55, 0.5),
}


def plant(folder, arms=POST, steps=STEPS, logit=3.0, threshold=100.0):
    """Folders of runs that came to these values."""
    for arm, (loss, early, late, amplitude) in arms.items():
        of = folder / arm
        of.mkdir(parents=True)
        optimizer = {"learning_rate": 1e-3, "quirks": [], "clip_threshold": threshold}
        settings = {"arm": arm, "seed": 0, "steps": STEPS, "warmup": WARMUP, "optimizer": optimizer}
        (of / "config.json").write_text(json.dumps(settings))
        records = [{"step": 0, "validation_loss": 3.25, "validation_accuracy": 0.3}]
        for step in range(1, steps + 1):
            norm = 2 + amplitude * (-1) ** step
            records.append(
                {
                    "step": step,
                    "loss": 3 - step / 40,
                    "mean_token_accuracy": early if step <= STEPS / 2 else late,
                    "gradient_norm": None if step == 9 else norm,
                    "gradient_norms": {"matrices": norm, "gains": 0.1},
                    "update_rms": {"matrices": 1e-3 / step, "gains": 0.0},
                    "max_logit": logit,
                    "skipped": int(step >= 9),
                    "tokens_per_second": 500.0,
                }
            )
        if steps == STEPS:
            last = {"step": steps, "validation_loss": loss, "validation_accuracy": late}
            records.append(last)
            summary = {"gradient_norm_median": 2.0, "max_logit": logit, "machine": {"cores": "2"}}
            (of / "summary.json").write_text(json.dumps(summary))
        lines = (json.dumps(record) + "\n" for record in records)
        (of / "metrics.jsonl").write_text("".join(lines))
    return epath.Path(folder)


def read(folder):
    return [load_run(folder / arm) for arm in found_arms(folder)]


def write_report(folder):
    return write(report.report(folder), folder)


def test_runs_as_the_post_has_them_agree_with_all_of_it(tmp_path):
    runs = read(plant(tmp_path))
    assert [of.verdict for of in report.judged(runs)] == ["agrees"] * 5
    text = " ".join(report.abstract(runs))
    hybrid = optimizer_label("muon_adamw")
    assert f"{hybrid} ends with the lowest held-out loss, 1.4000 nats per token" in text
    assert "3.2500 before training" in text
    assert "agrees with 5" in text
    assert f"{hybrid} skipped 1 step" in text


@pytest.mark.parametrize(
    ("place", "hybrid", "verdict", "measured"),
    [
        (0, (1.40, 0.46, 0.65, 0.1), "disagrees", "46.00 %"),  # faster early
        (1, (1.40, 0.42, 0.61, 0.1), "disagrees", "61.00 %"),  # never overtakes
        (2, (1.40, 0.42, 0.65, 0.9), "disagrees", "[+]36.0 points"),  # unsteady
        (3, (1.40, 0.42, 0.65, 0.1), "agrees", "1.4000 nats, .*−0.1000 nats"),
        (3, (1.62, 0.42, 0.65, 0.1), "disagrees", "1.6200 nats, .*[+]0.1200 nats"),
        (3, (1.50, 0.42, 0.65, 0.1), "cannot tell", "1.5000 nats, .* 0.0000 nats"),
        (4, (1.40, 0.42, 0.50, 0.1), "disagrees", "50.00 %"),  # lower than MuonClip
    ],
)
def test_each_claim_follows_what_it_is_about(tmp_path, place, hybrid, verdict, measured):
    of = report.judged(read(plant(tmp_path, POST | {"muon_adamw": hybrid})))[place]
    assert (of.verdict, of.seeds) == (verdict, 1)
    assert re.search(measured, of.measured), of.measured


def test_nothing_is_told_of_arms_that_are_missing_or_unfinished(tmp_path):
    plant(tmp_path, {arm: POST[arm] for arm in ("adamw", "muon_frozen1d")})
    plant(tmp_path, {"muon_adamw": POST["muon_adamw"]}, steps=20)
    runs = read(epath.Path(tmp_path))
    assert [of.verdict for of in report.judged(runs)[1:]] == ["cannot tell"] * 4
    text = " ".join(report.abstract(runs))
    assert f"{optimizer_label('muon_adamw')} has done 20 of 40 steps." in text
    assert write_report(epath.Path(tmp_path)).exists()


def test_a_setting_that_an_earlier_version_left_out_had_its_default(tmp_path):
    folder = plant(tmp_path)
    path = folder / "adamw" / "config.json"
    for rank, differs in ((0, False), (4, True)):
        settings = json.loads(path.read_text()) | {"lora": {"rank": rank}}
        path.write_text(json.dumps(settings))
        assert ("differ in lora.rank" in " ".join(report.abstract(read(folder)))) == differs


def test_an_arm_that_has_no_record_yet_is_told_of(tmp_path):
    folder = plant(tmp_path, {arm: POST[arm] for arm in ("adamw", "muonclip")})
    for name in ("metrics.jsonl", "summary.json"):
        (folder / "muonclip" / name).unlink()
    page = write_report(folder).read_text()
    assert "MuonClip has done 0 of 40 steps." in page


def test_a_clip_that_never_acts_is_told(tmp_path):
    idle = "MuonClip never clips here"
    assert idle in " ".join(report.abstract(read(plant(tmp_path / "a"))))
    acting = plant(tmp_path / "b", threshold=2.0)
    assert idle not in " ".join(report.abstract(read(acting)))


def test_the_page_is_whole_and_has_the_numbers(tmp_path, capsys):
    folder = plant(tmp_path)
    main(str(folder))
    assert "1.4000" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 3
    for loss, early, late, _ in POST.values():
        assert f"<td>{loss:.4f}</td>" in page
        assert f"<td>{100 * early:.1f} %</td>" in page
        assert f"<td>{100 * late:.1f} %</td>" in page
    summary = json.loads((folder / "summary.json").read_text())
    assert [of["verdict"] for of in summary["claims"]] == ["agrees"] * 5


def test_a_suite_is_known_by_its_settings(tmp_path):
    (tmp_path / "config.json").write_text('{"suite": "qk"}')
    assert study_of(tmp_path) == "experiments.finetune.suites.report"
    with pytest.raises(SystemExit, match=rf"{tmp_path} has no summary.json"):
        main(str(tmp_path))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no optimizer's folder"):
        found_arms(epath.Path(tmp_path))
    folder = plant(tmp_path)
    (folder / "adamw" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adamw/config.json is damaged"):
        load_run(folder / "adamw")
    (folder / "adamw" / "config.json").write_text('{"arm": "sgd", "seed": 0}')
    with pytest.raises(ValueError, match="not of a run of this study"):
        load_run(folder / "adamw")


# --- Several seeds -----------------------------------------------------------------------------


def seeded(hybrid, adamw, seeds=3):
    """Values of all arms by seed; the measures of these two are given, those of others are not."""
    nothing = dict.fromkeys(claims.MEASURES, np.nan)
    return {
        arm: {s: nothing | {"validation_loss": losses[s]} for s in range(seeds)}
        for arm, losses in (("muon_adamw", hybrid), ("adamw", adamw))
    }


@pytest.mark.parametrize(
    ("hybrid", "verdict"),
    [
        ((1.40, 1.51, 1.59), "agrees"),
        ((1.61, 1.70, 1.81), "disagrees"),
        ((1.40, 1.70, 1.65), "cannot tell"),
        ((1.50, 1.60, 1.70), "cannot tell"),
    ],
    ids=["wins", "loses", "is not told apart", "ties"],
)
def test_with_seeds_a_verdict_needs_its_interval(hybrid, verdict):
    adamw = (1.50, 1.60, 1.70)
    of = claims.judge(seeded(hybrid, adamw))[3]
    assert (of.verdict, of.seeds) == (verdict, 3)
    mean = np.mean(np.subtract(hybrid, adamw))
    assert f"{claims.MEASURES['validation_loss'].signed(mean)} nats [" in of.measured


@pytest.mark.parametrize(
    ("adamw", "verdict"),
    # p of the paired t test: 0.035, which three comparisons make 0.10; and 0.0005.
    [((0.010, 0.015, 0.020), "cannot tell"), ((0.0100, 0.0104, 0.0108), "disagrees")],
)
def test_against_a_claim_of_many_arms_p_is_corrected(adamw, verdict):
    """Others are not told apart; AdamW is above by so much."""
    nothing = dict.fromkeys(claims.MEASURES, np.nan)
    above = dict.fromkeys(ARMS, (-0.1, 0.1, 0.02)) | {"muon_frozen1d": (0, 0, 0), "adamw": adamw}
    values = {
        arm: {s: nothing | {"early_accuracy": 0.5 + 0.03 * s + gaps[s]} for s in range(3)}
        for arm, gaps in above.items()
    }
    assert claims.judge(values)[0].verdict == verdict


def test_a_cell_reads_as_a_run_does():
    def evaluation(step, count):
        norms = [2.0 + i for i in range(count)]
        return {
            "step": step,
            "validation_loss": 3.0 - step / 10,
            "validation_accuracy": step / 10,
            "mean_token_accuracy": 0.1 * step if step else None,
            "losses": norms,
            "gradient_norms": norms,
            "group_norms": {"matrices": norms} if count else {},
            "update_rms": {"matrices": 1e-3} if count else {},
            "max_logit": None if step == 4 else 2.0,
        }

    of = of_cell("adamw", 1, [evaluation(0, 0), evaluation(4, 4), evaluation(6, 2)], 6, 1)
    assert of.finished
    assert of.series["gradient_norm"][0].tolist() == [1, 2, 3, 4, 5, 6]
    assert of.series["gradient_norm"][1].tolist() == [2, 3, 4, 5, 2, 3]
    assert of.series["mean_token_accuracy"][0].tolist() == [4, 6]
    assert of.values()["late_accuracy"] == pytest.approx(0.6)
    assert np.isnan(of.series["max_logit"][1][0])
    assert not of_cell("adamw", 1, [evaluation(0, 0), evaluation(4, 4)], 6, 1).finished
