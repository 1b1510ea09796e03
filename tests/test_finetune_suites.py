"""Suites of fine-tunings: cells that are kept and go on, what they ask, and what they answer."""

import dataclasses
import functools
import json
import re
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from finetuning import NORMED, batch, initial, prepared, training
from rich.console import Console

from experiments.commands import INTERRUPTED
from experiments.finetune import arms, loop
from experiments.finetune.arms import ARMS, AS_PUBLISHED, QUIRKS
from experiments.finetune.claims import MEASURES
from experiments.finetune.command import Command
from experiments.finetune.config import Training
from experiments.finetune.suites import clip, report, study
from experiments.finetune.suites.config import Cell, defaults, variants
from experiments.finetune.suites.results import contrasts, groups
from experiments.report.figures import optimizer_label
from experiments.report.page import write
from experiments.runs import Run, RunError
from experiments.sweep import Sweep, cell_of, load_run

SMALL = {
    qk_norm: dataclasses.replace(NORMED, layers=1, family="qwen3" if qk_norm else "llama")
    for qk_norm in (True, False)
}
MUON = "muon_adamw"


def command(which, **changes):
    small = training(steps=6)
    settings = {f.name: getattr(small, f.name) for f in dataclasses.fields(Training)}
    settings |= {"evaluate_every": 3, "evaluation_tokens": 60, "seeds": 2, "sweep": Sweep(limit=1)}
    return Command(**settings | defaults(which) | changes)


def models(command, planned, console, stop):
    """In place of pretrained ones."""
    text = prepared(seed=7).held_out
    found = {}
    for base in (of.base for of in planned.values()):
        a = SMALL[base.qk_norm]
        found[base] = study.Model(f"base {base.optimizer}", a, initial(a), prepared(), text)
    return found


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setattr(study, "_models", models)


def run(config, stop=None):
    return study.suite(config, Console(quiet=True), stop or threading.Event())


def rows(folder):
    """The finished cells, without what the clock says."""
    clocked = ("seconds", "milliseconds_per_step")
    return {
        cell_of(Cell, row): {key: value for key, value in row.items() if key not in clocked}
        for row in load_run(Path(folder)).rows
    }


# --- Cells -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a suite that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "_models", models)
        assert run(command("controlled", optimizers=("adamw", MUON), out=str(folder))) == 0
    return folder


def test_every_arm_is_swept_past_the_edge_and_confirmed(whole):
    for arm in ("adamw", MUON):
        own = {cell: row["validation_loss"] for cell, row in rows(whole).items() if cell.arm == arm}
        losses = {cell.rate: loss for cell, loss in own.items() if cell.seed == 0}
        best = min(losses, key=losses.get)
        assert len(losses) >= 3
        assert min(losses) < best < max(losses) or len(losses) == 4  # --sweep.limit 1
        assert [cell.rate for cell in own if cell.seed == 1] == [best]


def test_a_suite_that_was_stopped_and_killed_goes_on_as_if_nothing_was(
    whole, tmp_path, monkeypatch
):
    stop, extend = threading.Event(), Run.extend

    def then_stop(self, pieces):
        extend(self, pieces)
        if len(self.finished) == 3:
            stop.set()

    config = command("controlled", optimizers=("adamw", MUON), out=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "extend", then_stop)
        assert run(config, stop) == INTERRUPTED
    done = rows(tmp_path)
    assert 3 <= len(done) < len(rows(whole))
    # As a kill -9 leaves it: a cell without its seal.
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + lines[-1][:20])
    trained = []
    train_cell = loop.train_cell

    def count(config_, model, arm, rate, seed, running, *args):
        if running.evaluate_every == config.evaluate_every:  # those that only tell the time have 2
            trained.append(Cell("controlled", arm, rate, seed))
        return train_cell(config_, model, arm, rate, seed, running, *args)

    monkeypatch.setattr(study, "_TIMED", 2)
    monkeypatch.setattr(loop, "train_cell", count)
    assert run(config) == 0
    assert rows(tmp_path) == rows(whole)
    assert sorted(map(str, trained)) == sorted(map(str, rows(whole).keys() - [*done][:-1]))
    trained.clear()
    assert run(config) == 0
    assert not trained


def test_what_is_forgotten_is_kept_by_seed(whole):
    for of in groups(load_run(whole)):
        told = of.as_json()["pretraining_rise_by_seed"]
        assert told == of.rises and told.keys() == {"0", "1"}
        for trained in of.trained:
            _, losses = trained.series["pretraining_loss"]
            assert of.rises[str(trained.seed)] == losses[-1] - losses[0] != 0
        assert of.as_json()["spikes_by_seed"] == {"0": 0, "1": 0}  # in fewer than 50 steps
    norms = np.r_[np.ones(60), np.nan, 4.0, 1.0]
    assert trained._replace(series={"gradient_norm": (1 + np.arange(63), norms)}).spikes() == 1
    page = (whole / "report.html").read_text()
    assert "loss on the pretraining text, rise" in page and "spikes of the gradient norm" in page
    stored = dataclasses.replace(of, trained=(), rises={"0": 0.25, "1": 0.75})
    (column,) = (column for column in report.COLUMNS if column[1] == "forgot")
    assert column[2](stored) == "+0.500 ± 0.354"


def test_what_is_forgotten_is_drawn_against_what_is_learnt(whole):
    found = groups(load_run(whole))
    _, forgetting = report.rates(found)
    (axes,) = forgetting.draw().axes
    for of, line in zip(found, [line for line in axes.lines if line.get_lw() == 1.4], strict=True):
        assert of.rises_by_rate.keys() == of.losses.keys() and len(of.losses) > 2
        points = [(of.losses[rate], rise) for rate, rise in of.rises_by_rate.items()]
        assert line.get_xydata().tolist() == list(map(list, points))
        assert of.rises_by_rate[of.best.rate] == of.rises["0"]
        told = of.as_json()["pretraining_rise_by_rate"]
        assert {float(rate): rise for rate, rise in told.items()} == of.rises_by_rate
    assert len(report.rates([dataclasses.replace(of, rises_by_rate={}) for of in found])) == 1


def test_another_training_needs_another_folder_and_an_earlier_version_none(whole, tmp_path):
    config = command("controlled", optimizers=("adamw", MUON), out=str(tmp_path / "run"))
    shutil.copytree(whole, config.out)
    with pytest.raises(RunError, match="context"):
        run(dataclasses.replace(config, context=32))
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    for name in ("lora", "rollback", "schedules"):  # which earlier versions left out
        del settings[name]
    path.write_text(json.dumps(settings))
    assert run(config) == 0 and rows(config.out) == rows(whole)


def test_the_page_is_whole_and_has_the_numbers(whole):
    page = (whole / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    for row in rows(whole).values():
        assert f"<td>{row['validation_loss']:.4f}</td>" in page
    for of in groups(load_run(whole)):
        assert of.loss_text() in page
        assert np.mean([*of.best.losses.values()]) == pytest.approx(of.loss)
    for name in ("differences", "rates", "post_controlled", "held_out_controlled"):
        assert (whole / f"{name}.png").exists()


def test_what_needs_one_machine_refuses_others():
    with pytest.raises(ValueError, match="local folder"):
        run(command("controlled", out="gs://bucket/run"))
    with pytest.raises(ValueError, match="pretrains the models"):
        command("qk", model="a folder")


def test_a_folder_knows_the_warm_up_that_nobody_asked_for():
    config = command("controlled", warmup=None, steps=40)
    planned = variants(config)
    found = models(config, planned, None, None)
    trainings = {name: study._training(of, found[of.base]) for name, of in planned.items()}
    assert study._settings(config, found, trainings)["warmup"] == 4


# --- What is asked -----------------------------------------------------------------------------


def test_as_published_has_all_quirks_and_each_removed_alone():
    planned = variants(command("as_published"))
    published = planned.pop("as published")
    assert published.training.optimizer == AS_PUBLISHED
    assert published.arms == tuple(ARMS)
    for name, of in planned.items():
        quirk = name.removeprefix("without ")
        assert set(QUIRKS) - set(of.training.optimizer.quirks) == {quirk}
    assert len(planned) == len(QUIRKS)


@pytest.mark.parametrize("quirk", QUIRKS)
def test_a_quirk_is_removed_from_the_arms_that_it_changes(quirk, monkeypatch):
    planned = variants(command("as_published"))
    built = {}

    def told(rate, scale=None, **settings):
        """What an optimizer is made with, functions by what they give."""
        scale = scale(4, 8) if callable(scale) else scale
        return settings | {"rate": rate(0), "scale": scale}

    monkeypatch.setattr(arms.muon_jax, "muon", told)
    monkeypatch.setattr(arms.optax, "adamw", told)
    monkeypatch.setattr(arms.optax, "with_extra_args_support", lambda tx: tx)
    monkeypatch.setattr(arms.optax, "chain", lambda *parts: {"chain": len(parts)} | parts[0])
    published, without = "as published", f"without {quirk}"
    for arm in ARMS:
        for name in (published, without):
            config = dataclasses.replace(planned[name].training, steps=9, warmup=3)
            made = arms.make(arm, config, NORMED)
            labels = jax.tree.leaves((made.labels, made.counted))
            built[name] = labels, made.build(1.0)
        assert (str(built[published]) != str(built[without])) == (arm in planned[without].arms), arm


def test_mismatch_crosses_bases_and_arms_and_qk_norms_and_clips():
    planned = variants(command("mismatch"))
    assert [of.base.optimizer for of in planned.values()] == ["adamw", "muon"]
    assert all(of.arms == tuple(ARMS) for of in planned.values())
    planned = variants(command("qk"))
    assert {
        name: (of.base.qk_norm, of.arms, of.training.optimizer.clip_projections)
        for name, of in planned.items()
    } == {
        "QK-norm, no clip": (True, ("muon_adamw",), False),
        "QK-norm, W_q and W_k clipped": (True, ("muonclip",), True),
        "QK-norm, gains clipped": (True, ("muonclip",), False),
        "no QK-norm, no clip": (False, ("muon_adamw",), False),
        "no QK-norm, W_q and W_k clipped": (False, ("muonclip",), True),
    }


# --- What is answered --------------------------------------------------------------------------


def planted(folder, which, losses, clips=None, seeds=3):
    """A suite whose cells came to these losses, by variant and arm, a seed each."""
    config = command(which, seeds=seeds, out=str(folder))
    settings = {"suite": which} | config.as_json() | {"optimizers": list(ARMS), "seeds": seeds}
    settings |= {"sweep": dataclasses.asdict(config.sweep), "sweep_seeds": 1, "models": ["a base"]}
    settings |= {"clips": clips or {}, "clip_share": config.clip_share}
    sealed = Run(folder, settings)
    for (variant, arm), values in losses.items():
        for seed, loss in enumerate(values):
            cell = Cell(variant, arm, 1e-3, seed)._asdict()
            diverged = loss is None
            evaluations = [
                {
                    "step": step,
                    "seconds": 1.0,
                    "train_loss": 2.0,
                    "mean_token_accuracy": 0.5,
                    "validation_loss": loss if step else 3.125,
                    "validation_accuracy": 0.5,
                    "losses": [2.0] * step,
                    "gradient_norms": [1.0 + 0.1 * i for i in range(step)],
                    "group_norms": {"matrices": [1.0] * step},
                    "update_rms": {"matrices": 1e-3},
                    "max_logit": 2.0,
                }
                for step in ((0,) if diverged else (0, 6))
            ]
            outcome = {"diverged": diverged, "validation_loss": loss, "train_loss": 2.0}
            outcome |= {"skipped": 0, "steps_run": 6, "seconds": 1.0, "milliseconds_per_step": 9.0}
            sealed.extend([([cell | e for e in evaluations], cell | outcome)])
    corpus = {"name": "rows", "rows": 9, "held_out_rows": 1, "sha256": "0" * 64}
    summary = {"version": "0", "machine": {"cores": "2"}, "corpus": corpus}
    summary |= {"cells_total": len(sealed.finished)}
    (folder / "summary.json").write_text(json.dumps(summary))
    sealed.close()
    return report.load(folder)


WINS, LOSES, TIES = (1.40, 1.51, 1.59), (1.60, 1.71, 1.79), (1.51, 1.58, 1.71)
BASELINE = (1.50, 1.60, 1.70)


@pytest.mark.parametrize(
    ("hybrid", "verdict", "first", "told"),
    [
        (WINS, "agrees", "{} has", "1 end lower and 0 higher"),
        (LOSES, "disagrees", "AdamW has", "0 end lower and 1 higher"),
        (TIES, "cannot tell", "AdamW and {} have", "0 end lower and 0 higher"),
        ((None,) * 3, "cannot tell", "AdamW has", "3 trainings diverged."),
    ],
    ids=["wins", "loses", "ties", "diverged"],
)
def test_controlled_says_who_won(tmp_path, hybrid, verdict, first, told):
    losses = {("controlled", "adamw"): BASELINE, ("controlled", MUON): hybrid}
    results = planted(tmp_path, "controlled", losses)
    text = " ".join(report.abstract(results))
    assert told in text and "3.1250 before training" in text
    assert f"{first.format(optimizer_label(MUON))} the lowest mean held-out loss" in text
    assert results.verdicts[3].verdict == verdict
    if None in hybrid:
        assert {of.verdict for of in results.verdicts} == {"cannot tell"}
    else:
        gap = MEASURES["validation_loss"].signed(np.mean(hybrid) - np.mean(BASELINE))
        assert f"AdamW: {gap} nats [" in text


@pytest.mark.parametrize(
    ("from_adamw", "from_muon", "found", "counts"),
    [
        (LOSES, WINS, ["agrees", "agrees"], "1 are worse"),
        (WINS, LOSES, ["disagrees", "disagrees"], "0 are worse"),
        (LOSES, LOSES, ["agrees", "cannot tell"], "0 are worse"),
        (TIES, TIES, ["cannot tell", "cannot tell"], "0 are worse"),
    ],
)
def test_mismatch_answers_by_both_bases(tmp_path, from_adamw, from_muon, found, counts):
    losses = {("AdamW base", "adamw"): BASELINE, ("AdamW base", MUON): from_adamw}
    for arm, values in (("adamw", BASELINE), (MUON, from_muon)):
        losses["Muon base", arm] = tuple(x - 1 for x in values)  # a better base
    results = planted(tmp_path, "mismatch", losses)
    assert [of.verdict for of in results.verdicts] == found
    assert counts in " ".join(report.abstract(results))
    columns, lines = report.matrix(results)
    assert all(len(line) == len(columns) for line in lines)
    crossed = np.mean(from_adamw) - np.mean(from_muon)
    assert lines[1][-1].startswith(MEASURES["validation_loss"].signed(crossed))


def test_a_removed_quirk_is_beside_the_published_arm(tmp_path):
    losses = {"as published": BASELINE, "without no_clip": WINS, "without decay_apart": TIES}
    losses = {(variant, "muonclip"): values for variant, values in losses.items()}
    text = " ".join(report.abstract(planted(tmp_path, "as_published", losses)))
    assert "Of 2 removals of one quirk, 1 change the final loss" in text
    assert "MuonClip without a clip that never runs (−0.1000 nats" in text


def test_the_largest_effects_of_quirks_are_told_and_the_others_bounded(tmp_path):
    sizes = (0.01, -0.07, 0.03, 0.02, -0.06, 0.05, 0.04)
    losses = {("as published", "adamw"): BASELINE} | {
        (f"without quirk{place}", "adamw"): tuple(x + size for x in BASELINE)
        for place, size in enumerate(sizes)
    }
    told = report.abstract(planted(tmp_path, "as_published", losses))
    (text,) = (sentence for sentence in told if "removals" in sentence)
    places = [text.find(f"without quirk{place} (") for place in (1, 4, 5, 6, 2, 3)]
    assert -1 not in places and places == sorted(places)
    assert text.endswith("; the other 1 by at most 0.0100 nats.")


def test_each_base_has_an_axis_of_its_losses(tmp_path):
    losses = {("AdamW base", "adamw"): (4.0, 4.1, 4.2), ("Muon base", "adamw"): (3.0, 3.1, 3.2)}
    figure = report.rates(planted(tmp_path, "mismatch", losses).groups)[0].draw()
    assert write(report.report(tmp_path), tmp_path).exists()
    for axes, loss in zip(figure.axes, (4.0, 3.0), strict=True):
        low, high = axes.get_ylim()
        assert {low < y < high for line in axes.lines for y in line.get_ydata()} == {True}
        assert low < loss < high


# --- QK-clip -----------------------------------------------------------------------------------


@functools.cache
def clipped(qk_norm, projections):
    a = SMALL[qk_norm]
    return clip.measure(a, initial(a), batch(), 0.5, projections)


def test_a_clip_halves_the_logits_but_for_projections_under_qk_norm():
    of = clipped(qk_norm=True, projections=True)
    assert of.after == pytest.approx(of.before, rel=1e-4)
    assert of.change < 1e-4 * of.logits
    for acts in (clipped(qk_norm=True, projections=False), clipped(False, projections=True)):
        assert acts.after < 0.55 * acts.before
        assert acts.change > 0.01 * acts.logits


def test_the_verdict_on_the_clip_is_of_what_was_measured(tmp_path):
    inert = clipped(qk_norm=True, projections=True)._asdict()
    acts = clipped(qk_norm=False, projections=True)._asdict()
    names = [f"QK-norm, {clipped}" for clipped in ("W_q and W_k clipped", "gains clipped")]
    names += [f"no {names[0]}"]
    losses = {("QK-norm, no clip", MUON): BASELINE, (names[0], "muonclip"): LOSES}
    losses |= {("no QK-norm, no clip", MUON): LOSES, (names[2], "muonclip"): WINS}
    cases = {"disagrees": (acts, inert, inert), "agrees": (inert, acts, acts)}
    for verdict, measured in cases.items():
        clips = dict(zip(names, measured, strict=True))
        results = planted(tmp_path / verdict, "qk", losses, clips)
        assert [of.verdict for of in results.verdicts] == [verdict] * 3
    assert [of.mean for of in contrasts(results.groups)] == pytest.approx([0.1, -0.2])
    told = " ".join(report.abstract(results))
    assert write(report.report(tmp_path / verdict), tmp_path / verdict).exists()
    assert "of the last steps 2 with no clip, 2 with W_q and W_k clipped;" in told
    assert "median gradient norm 1.35 with no clip, 1.35 with" in told
