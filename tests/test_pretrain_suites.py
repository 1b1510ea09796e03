"""The suites: cells that are chosen, trained, kept and reported, and curves that are fitted."""

import dataclasses
import json
import math
import shutil
import threading

import numpy as np
import pytest
import scipy.stats
from pretraining import DENSE, SMALL, summary_of, text_of, training
from rich.console import Console

from experiments import timing
from experiments.commands import INTERRUPTED
from experiments.differences import holm, p_value
from experiments.language import data, windows
from experiments.pretrain import __main__
from experiments.pretrain.__main__ import Command
from experiments.pretrain.config import Training
from experiments.pretrain.presets import PRESETS
from experiments.pretrain.suites import cells, fit, optimizers_report
from experiments.pretrain.suites.config import (
    Cell,
    Suite,
    active_params,
    defaults,
    model_flops,
    sized,
)
from experiments.pretrain.suites.fit import Points, PowerLaw
from experiments.report.__main__ import main
from experiments.runs import RunError, read_json, write_json
from experiments.study import Study
from experiments.sweep import Sweep, missing_cells

MODEL = dataclasses.replace(DENSE, layers=1, dense_layers=1, width=16, heads=2, hidden=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_of(tmp_path_factory.mktemp("text"), words=2000)


@pytest.fixture(scope="module")
def tokens(text):
    return data.prepare(text)


def configured(text, **changes):
    training_ = training(MODEL, data=text, batch=4, steps=6, warmup=1)
    settings = {f.name: getattr(training_, f.name) for f in dataclasses.fields(Training)}
    settings |= {"seeds": 2, "sweep": Sweep(limit=0), "evaluate_every": 3}
    return Command(**settings | {"evaluation_tokens": 64} | changes)


def run(config, which="optimizers", stop=None):
    command = dataclasses.replace(config, suite=which)
    return __main__.run(command, stop or threading.Event(), Console(quiet=True))


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clocked = ("seconds", "milliseconds_per_step")
    found = [json.loads(line).get("cell") for line in lines]
    return [{k: v for k, v in row.items() if k not in clocked} for row in found if row]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The folder of a suite that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(timing, "ROUNDS", 1)
        context.setattr(cells, "STEPS", 2)
        assert run(configured(text, out=str(folder))) == 0
    return folder


def test_a_suite_sweeps_with_one_seed_and_confirms_with_all(whole):
    found = rows(whole)
    assert len(found) == 2 * (3 + 1)
    assert not any(row["diverged"] for row in found)
    for name in ("adamw", "muon"):
        own = [row for row in found if row["optimizer"] == name]
        tried = [row for row in own if row["seed"] == 0]
        (confirmed,) = [row for row in own if row["seed"] == 1]
        top = min(tried, key=lambda row: row["validation_loss"])
        assert len(tried) == 3 and confirmed["rate"] == top["rate"]
        assert confirmed["validation_loss"] != top["validation_loss"]


def test_its_files_have_losses_differences_and_costs(whole, monkeypatch, capsys):
    summary = summary_of(whole)
    arms = {arm["optimizer"]: arm for arm in summary["arms"]}
    for arm in arms.values():
        finals = [row["validation_loss"] for row in rows(whole) if row["rate"] == arm["best_rate"]
                  and row["optimizer"] == arm["optimizer"]]  # fmt: skip
        assert arm["validation_loss"] == pytest.approx(np.mean(finals)) and len(finals) == 2
        assert arm["spread"] == pytest.approx(np.std(finals, ddof=1))
        curves = [arm["curves"][seed] for seed in ("0", "1")]
        assert [curve[-1] for curve in curves] == [arm["losses_by_seed"][s] for s in ("0", "1")]
        means = [loss for _, loss in arm["curve"]]
        np.testing.assert_allclose(np.mean(curves, axis=0), means, rtol=1e-6)
        assert arm["cost"]["model_flops"] > 0 and arm["cost"]["milliseconds"] > 0
    adamw, muon = arms["adamw"], arms["muon"]
    assert adamw["cost"]["optimizer_flops"] == 0 < muon["cost"]["optimizer_flops"]
    assert adamw["cost"]["times_baseline"] == 1
    gap = muon["validation_loss"] - adamw["validation_loss"]
    assert muon["difference_to_adamw"]["mean"] == pytest.approx(gap)
    assert adamw["difference_to_adamw"] is None
    # The report is made again without training.
    files = ("report.html", "final.png", "curves.png", "rates.png")
    for name in files:
        (whole / name).unlink()
    monkeypatch.setattr(cells, "trainer", None)
    main(str(whole))
    assert summary_of(whole) == summary and all((whole / name).exists() for name in files)
    assert (whole / "report.html").stat().st_size > 50_000
    assert "Optimizers, lowest loss first" in capsys.readouterr().out


def test_a_stopped_suite_goes_on_bit_for_bit(whole, text, tmp_path, monkeypatch):
    stop, train_cell, trained = threading.Event(), cells.train_cell, []

    def stopped(*arguments):
        trained.append(arguments)
        if len(trained) == 4:
            stop.set()
        return train_cell(*arguments)

    monkeypatch.setattr(cells, "train_cell", stopped)
    monkeypatch.setattr(Study, "_measure_costs", lambda self: None)
    config = configured(text, out=str(tmp_path))
    assert run(config, stop=stop) == INTERRUPTED
    assert len(rows(tmp_path)) == 3 and (tmp_path / "report.html").exists()
    assert run(config) == 0
    assert rows(tmp_path) == rows(whole) and len(trained) == 4 + 8 - 3


def test_other_settings_are_refused_and_missing_ones_have_their_defaults(
    whole, text, tmp_path, monkeypatch
):
    folder = shutil.copytree(whole, tmp_path / "of an earlier version")
    settings = read_json(folder / "config.json")
    del settings["schedules"]
    write_json(folder / "config.json", settings)
    monkeypatch.setattr("experiments.study.show", lambda *given: None)
    assert run(configured(text, out=str(folder))) == 0 and rows(folder) == rows(whole)
    config = configured(text, out=str(whole))
    with pytest.raises(RunError, match="context: there 16, here 8"):
        run(dataclasses.replace(config, context=8))
    with pytest.raises(ValueError, match="local folder"):
        run(dataclasses.replace(config, out="gs://bucket/suite"))


def test_more_optimizers_and_seeds_are_added_to_a_folder(text, tmp_path, monkeypatch):
    law = PowerLaw(20.0, 0.08)
    monkeypatch.setattr(cells, "train_cell", losses_by({"adamw": law, "muon": law}))
    monkeypatch.setattr(Study, "_measure_costs", lambda self: None)
    monkeypatch.setattr("experiments.study.show", lambda *given: None)
    assert run(configured(text, out=str(tmp_path), seeds=1, optimizers=("adamw",))) == 0
    assert {row["optimizer"] for row in rows(tmp_path)} == {"adamw"}
    assert run(configured(text, out=str(tmp_path))) == 0
    assert {(row["optimizer"], row["seed"]) for row in rows(tmp_path)} >= {("muon", 1)}


def test_a_cell_is_a_function_of_rate_and_seed_and_may_diverge(text, tokens, monkeypatch):
    config = configured(text).training()
    held_out = windows.held_out(tokens, config.context, 64)
    given = config, tokens, held_out, 4
    width = config.model.width

    def losses(rate, seed):
        history, outcome = cells.train_cell(*given, Cell("muon", width, rate, seed))
        assert [evaluation["step"] for evaluation in history] == [4, 6]
        assert history[-1]["tokens"] == 6 * 4 * 16
        assert history[-1]["validation_loss"] == outcome["validation_loss"]
        return [evaluation["validation_loss"] for evaluation in history]

    batches, orders = windows.batches, []
    monkeypatch.setattr(
        windows, "batches", lambda *a, seed, **b: orders.append(seed) or batches(*a, seed=seed, **b)
    )
    before = cells.trainer.cache_info().misses
    assert losses(0.01, 0) == losses(0.01, 0)
    assert len({losses(0.01, 0)[1], losses(0.02, 0)[1], losses(0.01, 1)[1]}) == 3
    assert cells.trainer.cache_info().misses <= before + 1 and set(orders) == {0, 1}
    history, outcome = cells.train_cell(*given, Cell("muon", width, 1e30, 0))
    assert history == [] and outcome["diverged"] and outcome["validation_loss"] is None


def losses_by(law, rate=8e-3):
    """A `train_cell` whose losses lie on a law of compute, and have a best rate."""

    def train_cell(config, tokens, held_out, evaluate_every, cell, show):
        compute = config.steps * model_flops(config)
        loss = law[cell.optimizer].loss(compute)
        loss *= 1 + 0.02 * math.log2(cell.rate / rate) ** 2
        last = {
            "step": config.steps,
            "tokens": config.steps * config.tokens_per_step,
            "seconds": 1.0,
            "train_loss": loss,
        }
        last |= {"validation_loss": loss, "bits_per_byte": loss / 2}
        show(last)
        outcome = last | {"diverged": False, "skipped": 0, "milliseconds_per_step": 1.0}
        return [last], outcome

    return train_cell


def test_the_suite_of_sizes_finds_the_curves_that_are_there(text, tmp_path, monkeypatch):
    laws = {"adamw": PowerLaw(20.0, 0.08), "muon": PowerLaw(19.0, 0.081)}

    def measure(arms, on_turn):
        flops = {name: float(model_flops(config)) for name, config in arms}
        return {
            name: {"model_flops": own, "optimizer_flops": own / 4 if name == "muon" else 0.0,
                   "milliseconds": 1.0, "times_baseline": 1.0}
            for name, own in flops.items()
        }  # fmt: skip

    monkeypatch.setattr(cells, "train_cell", losses_by(laws))
    monkeypatch.setattr(cells, "measure", measure)
    config = configured(
        text, out=str(tmp_path), widths=(8, 16, 24, 32), tokens_per_param=2.0, sweep=Sweep()
    )
    assert run(config, "scaling") == 0
    summary = summary_of(tmp_path)
    found = summary["fits"]["model"]
    for name, law in laws.items():
        assert found["laws"][name]["b"] == pytest.approx(law.b, rel=1e-4)
        assert found["laws"][name]["e"] == 0
    (share,) = found["ratios"]
    expected = laws["muon"].compute(share["loss"]) / laws["adamw"].compute(share["loss"])
    assert share["value"] == pytest.approx(expected, rel=1e-3)
    assert share["interval"] == pytest.approx([expected] * 2, rel=1e-3)
    (with_update,) = summary["fits"]["model_and_update"]["ratios"]
    assert with_update["value"] == pytest.approx(1.25 * expected, rel=1e-3)
    assert {arm["best_rate"] for arm in summary["arms"]} == {8e-3}
    (tmp_path / "fit.png").unlink()
    main(str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert (tmp_path / "fit.png").exists() and f"{share['value']:.2f}" in page


def test_one_size_has_no_curve_but_a_report(text, tmp_path, monkeypatch):
    law = PowerLaw(20.0, 0.08)
    monkeypatch.setattr(cells, "train_cell", losses_by({"adamw": law, "muon": law}))
    monkeypatch.setattr(Study, "_measure_costs", lambda self: None)
    config = configured(text, out=str(tmp_path), widths=(16,))
    assert run(config, "scaling") == 0
    assert "no curve yet" in (tmp_path / "report.html").read_text()


def test_the_ladder_keeps_heads_and_shares_and_counts_the_experts_of_a_token():
    config = training(SMALL, batch=8, steps=20, warmup=5, cooldown=2)
    wide = sized(config, 2 * SMALL.width, tokens_per_param=3.0)
    model = wide.model
    assert (model.heads, model.nope, model.layers) == (2 * SMALL.heads, SMALL.nope, SMALL.layers)
    assert (model.latent, model.hidden, model.expert_hidden) == (32, 128, 32)
    assert wide.steps == math.ceil(3 * active_params(wide) / (8 * 16))
    assert wide.warmup == round(wide.steps / 4) and wide.cooldown == 0
    with pytest.raises(ValueError, match=r"--widths must be .*; got 20"):
        sized(config, 20, 3.0)

    def more(**changes):
        changed = active_params(training(dataclasses.replace(SMALL, **changes)))
        return changed - active_params(training(SMALL))

    assert more(experts=4) == -2 * SMALL.width * 4  # half as many rows of two routers
    assert more(active=3) == 2 * 3 * SMALL.width * SMALL.expert_hidden


def row(cell, loss):
    return cell._asdict() | {"diverged": False, "validation_loss": loss}


def test_other_seeds_wait_for_the_best_rate():
    arms, sweep, finished = {("adamw", 8): 0.1}, Sweep(limit=1), []
    while wanted := missing_cells(finished, Cell, arms, 3, sweep, swept=1):
        if wanted[0].seed > 0:
            assert {row["rate"] for row in finished} == {0.05, 0.1, 0.2, 0.4}
            assert {cell.rate for cell in wanted} == {0.2}
        finished.append(row(wanted[0], abs(math.log(wanted[0].rate / 0.2))))
    assert len(finished) == 4 + 2
    # More seeds that choose are added to what there is.
    more = missing_cells(finished, Cell, arms, 3, sweep, swept=2)
    assert {(cell.rate, cell.seed) for cell in more} == {(0.05, 1), (0.1, 1)}


LAWS = {"adamw": PowerLaw(900.0, 0.25, 1.5), "muon": PowerLaw(850.0, 0.252, 1.5)}
COMPUTE = np.geomspace(1e11, 1e14, 6)


def points(laws, noise=0.0):
    rng = np.random.default_rng(1)
    return {
        name: Points(COMPUTE, law.loss(COMPUTE) * np.exp(noise * rng.normal(size=len(COMPUTE))))
        for name, law in laws.items()
    }


def test_an_irreducible_loss_is_fitted_only_where_the_data_ask_for_it():
    bent = fit.fit(points(LAWS, 1e-4))
    assert bent.gain > 10
    assert bent.laws["muon"].e == bent.laws["adamw"].e == pytest.approx(1.5, abs=0.05)
    plain = fit.fit(points({name: law._replace(e=0.0) for name, law in LAWS.items()}, 1e-2))
    assert plain.gain < 2 and plain.laws["muon"].e == 0
    assert (
        fit.fit({name: Points(*(x[:2] for x in of)) for name, of in points(LAWS).items()}).gain
        is None
    )


def test_the_interval_holds_the_true_ratio_and_grows_with_the_noise():
    laws = {
        name: law._replace(a=20.0 + i, b=0.08, e=0.0) for i, (name, law) in enumerate(LAWS.items())
    }
    widths = []
    for noise in (1e-3, 1e-2):
        data_ = points(laws, noise)
        found = fit.fit(data_)
        loss = fit.overlap(data_)[0]
        drawn = fit.ratio(fit.bootstrap(data_, found), loss, "muon", "adamw")
        value = fit.ratio(found.laws, loss, "muon", "adamw")
        low, high = fit.interval(value, drawn, len(COMPUTE))
        assert low < fit.ratio(laws, loss, "muon", "adamw") < high
        # Fewer sizes promise less.
        assert fit.interval(value, drawn, 3)[0] < low < value
        widths.append(high - low)
    assert widths[1] > 5 * widths[0]
    few = {name: Points(*(x[:2] for x in of)) for name, of in points(laws).items()}
    assert fit.bootstrap(few, fit.fit(few)) is None


def test_laws_are_their_own_inverses_and_the_paper_s_ratio_depends_on_compute():
    law = LAWS["muon"]
    assert law.compute(float(law.loss(3e12))) == pytest.approx(3e12)
    assert law.compute(1.5) == math.inf
    muon, adamw = PowerLaw(2.506, 0.052), PowerLaw(2.608, 0.054)  # of the paper
    for compute, ratio in ((12.0, fit.PAPER_RATIO), (1.0, 0.464), (100.0, 0.55)):
        found = muon.compute(float(adamw.loss(compute))) / compute
        assert found == pytest.approx(ratio, abs=0.01)


def test_p_values_are_the_t_test_s_and_holm_s():
    ours, theirs = {0: 1.0, 1: 1.2, 2: 0.9, 3: 5.0}, {0: 1.4, 1: 1.3, 2: 1.5}
    expected = scipy.stats.ttest_rel([1.0, 1.2, 0.9], [1.4, 1.3, 1.5]).pvalue
    assert p_value(ours, theirs) == pytest.approx(expected, rel=1e-4)
    assert p_value(ours, {0: 1.0}) is None
    corrected = holm({"a": 0.02, "b": 0.01, "c": 0.9})
    assert corrected == pytest.approx({"b": 0.03, "a": 0.04, "c": 0.9})


def test_tokens_to_a_loss_lie_between_evaluations():
    curve = [(10, 3.0), (20, 2.0), (30, 1.9)]
    assert optimizers_report.tokens_to(curve, 2.5) == 15
    assert optimizers_report.tokens_to(curve, 3.5) == 10
    assert optimizers_report.tokens_to(curve, 1.0) == math.inf


@pytest.mark.parametrize("which", ["optimizers", "scaling"])
def test_defaults_are_settings_of_the_command(which):
    config = Command(**defaults(which))
    assert "adamw" in config.optimizers
    assert all(sized(config.training(), width, 10.0) for width in config.widths)
    # Those that have Muon's updates begin where it does.
    preset = Command(**defaults(which, PRESETS["small"]))
    assert preset.model == PRESETS["small"].model and preset.suite == which
    assert preset.rate("normuon") == preset.rate("muon") == 2e-3


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"sweep_seeds": 4}, "--sweep-seeds must be at most --seeds 3; got 4"),
        ({"widths": (8, 8)}, "requires one or more different values; got 8 8"),
        ({"tokens_per_param": 0.0}, "must be greater than 0"),
    ],
    ids=["seeds", "widths", "tokens"],
)
def test_wrong_settings_are_refused(changes, hint):
    with pytest.raises(ValueError, match=hint):
        Suite(**changes)
