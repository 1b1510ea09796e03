"""Grids and suites: what a point sets, whose it is, and which cells a study has."""

import dataclasses
import re
import threading

import pytest

from experiments.grok import suites
from experiments.grok.__main__ import groups
from experiments.grok.config import Cell, Config, Panel
from experiments.grok.estimate import estimate
from experiments.grok.train import after_grokking, compile_arm, milestones, train_cells
from experiments.parallel import devices_for
from experiments.runs import write_json
from tests.test_grok_run import history

TINY = Config(tasks=("gcd",), width=16, batch=1024, epochs=3, seeds=1, probe_every=0)


def test_a_point_sets_what_its_cell_is_trained_with():
    axes = ("width=32,64", "muon.learning-rate=0.01,1", "variants.rank=4,0.5")
    config, names = Config(grid=axes, optimizers=("muon", "low_rank")), ("muon", "low_rank")
    points = {name: [c.point for c in config.cells() if c[2:4] == (name, 0)] for name in names}
    assert points == {
        "muon": [f"width={w} muon.learning-rate={r}" for w in (32, 64) for r in ("0.01", "1")],
        "low_rank": [f"width={w} variants.rank={k}" for w in (32, 64) for k in ("4", "0.5")],
    }
    at = config.at(Cell("mul", "softmax", "muon", 0, "width=32 muon.learning-rate=1"))
    assert (at.width, at.muon.learning_rate, at.grid) == (32, 1.0, ())
    assert type(at.muon.learning_rate) is float
    ranks = [config.at(Cell("mul", "softmax", "low_rank", 0, f"variants.rank={k}")) for k in "48"]
    assert [type(found.variants.rank) for found in ranks] == [int, int]
    words = Config(grid=("muon.scale=none,mup", "muon.ns-dtype=bfloat16")).cells()[1:3]
    assert [config.at(cell).muon.scale for cell in words] == ["none", "mup"]
    assert [config.at(cell).muon.ns_dtype for cell in words] == ["bfloat16"] * 2
    # What a point does not name is the run's.
    assert dataclasses.replace(at, width=128, muon=Config().muon) == dataclasses.replace(
        config, grid=()
    )


def test_an_axis_of_one_optimizer_leaves_the_others_one_cell():
    config = Config(grid=("adamw.learning-rate=0.001,0.01",), seeds=1)
    assert [cell.point for cell in config.cells()] == [
        "adamw.learning-rate=0.001",
        "adamw.learning-rate=0.01",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("width", "as width=32,64"),
        ("width=", "as width=32,64"),
        ("width=32,32", "different values"),
        ("widht=32", "'widht' is not a setting that can be swept"),
        ("seeds=1,2", "not a setting that can be swept"),
        ("width=33", "try --width 32"),
        ("width=wide", "width=wide is not valid"),
        ("width=32.5", "is not valid"),
        ("muon.rate=1", "'muon.rate' is not a setting"),
        ("adamw.b1.x=1", "is not valid"),
        ("muon.scale=spectral,foo", "muon.scale=foo is not a valid value. Choose from spec"),
        ("muon.ns-coeffs=jordon", "polar_express_1.02, cans"),
        ("muon.ns-dtype=float16", "Choose from bfloat16, float32."),
        ("muon.scale=2", "muon.scale=2 is not a valid value"),
        ("variants.rank=4", "affects none of --optimizers adamw muon"),
        ("dropout=1", "must be at least 0 and less than 1"),
    ],
)
def test_axes_that_are_none_are_refused_by_name(text, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        Config(grid=(text,))


@pytest.mark.parametrize("name", suites.SUITES)
def test_suites_are_defaults_that_options_go_before(name):
    suite = suites.defaults(["--seeds", "1", f"--suite={name}"])
    assert suite.suite == name and len(set(suite.cells())) == len(suite.cells())
    assert suite.folder().name.startswith(name)
    assert suites.defaults(["--suite", name, "--help"]) == suite
    assert suites.defaults([]) == Config()
    for cell in suite.cells():
        suite.at(cell)


def test_suites_reach_what_was_published():
    paper = suites.SUITES["paper"]
    assert len(paper.cells()) == 7 * 3 * 4 * 3  # tasks, output functions, optimizers, seeds
    assert (paper.layers, paper.heads, paper.width, paper.dropout) == (2, 1, 128, 0.0)
    points = {name: {cell.point for cell in suites.SUITES[name].cells()} for name in suites.SUITES}
    assert {"width=32", "width=512"} <= points["width"]
    # 4656 are all training rows of half of the table of division.
    assert {"batch=64", "batch=4656"} <= points["batch"]
    assert {"", *(f"variants.rank={rank}" for rank in (1, 2, 4, 8, 16, 32))} == points["rank"]
    assert {"polar", "muon"} <= {*suites.SUITES["rank"].optimizers}
    assert {cell.optimizer for cell in suites.SUITES["rates"].cells()} == {"adamw", "muon"}


def test_seeds_that_train_together_get_what_they_get_alone():
    config = dataclasses.replace(TINY, seeds=3, full_length=True)
    cells = [cell for cell in config.cells() if cell.optimizer == "muon"]
    together = train_cells(config, cells)
    for cell, (epochs, row) in zip(cells, together, strict=True):
        ((alone, own),) = train_cells(config, [cell])
        assert [e.train_loss for e in epochs] == pytest.approx([e.train_loss for e in alone], 1e-4)
        assert [e.validation_accuracy for e in epochs] == pytest.approx(
            [e.validation_accuracy for e in alone], abs=5e-3
        )
        assert (row["seed"], row["together"], own["together"]) == (cell.seed, 3, 1)
    losses = [outcome.history[0].train_loss for outcome in together]
    assert len(set(losses)) == 3


def test_a_cell_that_ends_first_keeps_its_own_result(monkeypatch):
    """Its row is of its last epoch, though its neighbours go on."""
    monkeypatch.setattr("experiments.grok.train.GROKKED_ACCURACY", 0.45)
    monkeypatch.setattr("experiments.grok.train.MEMORIZED_ACCURACY", 0.45)
    config = dataclasses.replace(TINY, epochs=40, width=32)
    cells = [Cell("gcd", "softmax", "muon", seed) for seed in range(3)]
    outcomes = train_cells(config, cells)
    lengths = [len(outcome.history) for outcome in outcomes]
    assert len(set(lengths)) > 1, lengths
    for outcome in outcomes:
        assert outcome.row["epochs_run"] == len(outcome.history)
        assert outcome.row["grok_epoch_sustained"] == len(outcome.history) - 4


CELL = ("gcd", "softmax", "adamw", 2)


def test_a_program_is_compiled_once_for_its_seeds_and_settings():
    compile_arm.cache_clear()
    train_cells(TINY, [Cell("gcd", "softmax", "adamw", 0)])
    train_cells(TINY, [Cell("gcd", "softmax", "adamw", 1)])
    train_cells(dataclasses.replace(TINY, grid=("warmup=3,10",)), [Cell(*CELL, "warmup=10")])
    assert compile_arm.cache_info().misses == 1


def test_groups_are_seeds_of_one_arm():
    config = dataclasses.replace(TINY, seeds=5, together=2)
    found = groups(config, config.cells())
    assert [len(group) for group in found] == [2, 2, 2, 2, 1, 1]
    assert all(len({cell._replace(seed=0) for cell in group}) == 1 for group in found)
    assert sorted(cell for group in found for cell in group) == sorted(config.cells())


def estimated(config):
    return estimate(config, config.cells(), threading.Event())


def timed_as(seconds, monkeypatch):
    """The cells that an estimate times, where `seconds(cell)` is the time of a step."""
    timed = []
    monkeypatch.setattr(
        "experiments.grok.estimate._seconds_per_step",
        lambda config, cell, device: timed.append(cell) or seconds(cell),
    )
    return timed


def test_an_estimate_is_a_bound_where_nothing_is_known_and_says_so():
    bound = estimated(TINY)
    assert bound.known == 0 and min(bound.seconds.values()) > 0 and "at most" in str(bound)
    twice = estimated(dataclasses.replace(TINY, epochs=3000))
    assert sum(twice.seconds.values()) > 3 * sum(bound.seconds.values())
    whole = str(estimated(dataclasses.replace(TINY, full_length=True)))
    assert not whole.startswith("at most") and "runs for all epochs" in whole


def test_an_estimate_of_the_default_run_is_made_from_its_stored_result(monkeypatch):
    timed_as(lambda cell: 1e-3, monkeypatch)
    found = estimated(Config())
    assert found.known == len(found.seconds) == 6 and "from an earlier run" in str(found)


def test_an_estimate_times_an_arm_of_each_optimizer(monkeypatch):
    timed = timed_as(lambda cell: {"adamw": 1.0, "muon": 100.0}[cell.optimizer], monkeypatch)
    of = {cell.optimizer: x for cell, x in estimated(TINY).seconds.items()}
    assert sorted(cell.optimizer for cell in timed) == ["adamw", "muon"]
    assert of["muon"] > 20 * of["adamw"]


def test_an_estimate_times_the_smallest_and_the_largest_step(monkeypatch):
    timed = timed_as(lambda cell: {"width=16": 1.0, "width=64": 16.0}[cell.point], monkeypatch)
    monkeypatch.setattr("experiments.grok.estimate._COMPILING", 0.0)
    swept = dataclasses.replace(TINY, optimizers=("muon",), seeds=2, grid=("width=64,16,32",))
    of = {cell.point: x for cell, x in estimated(swept).seconds.items()}
    assert sorted(cell.point for cell in timed) == ["width=16", "width=64"]
    assert of["width=16"] * len(devices_for(6)) == 3 * 4  # epochs and their steps
    # The width of 32 has a fifth of the way from 16² to 64².
    assert of["width=32"] / of["width=16"] == pytest.approx(4)


def test_an_estimate_follows_an_earlier_run_of_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.grok.estimate.RESULTS", tmp_path)
    cells = TINY.cells()
    rows = [
        cell._asdict() | {"seconds": 1000.0 * (1 + i), "steps_per_second": 1.0}
        for i, cell in enumerate(cells)
    ]
    elsewhere = [row | {"seed": 99} for row in rows]
    # Equal settings, of which two runs have none of these cells.
    for name, own in (("another grid", elsewhere), ("default", rows), ("z", elsewhere)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", TINY.as_json())
        write_json(tmp_path / name / "summary.json", {"cells": own})
    found = estimated(TINY)
    assert found.known == 2 and "from an earlier run" in str(found)
    first, second = (found.seconds[cell] for cell in cells)
    assert second > first
    assert estimated(dataclasses.replace(TINY, epochs=4)).known == 0


def test_collapse_is_five_evaluations_below_after_grokking():
    grokked = [0.1, 0.96, 0.96, 0.97, 0.96, 1.0]
    spike = [*grokked, 0.5, 0.6, 0.9, 0.5, 0.99]
    assert milestones(history([1.0] * 11, spike))["collapse_epoch"] is None
    lost = [*spike, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert milestones(history([1.0] * 16, lost))["collapse_epoch"] == 12
    assert after_grokking(history([1.0] * 16, lost), 2) == {
        "evaluations_after_grok": 14,
        "below_after_grok": 9,
    }
    assert after_grokking(history([1.0] * 9, [0.5] * 9), None)["evaluations_after_grok"] == 0
    # Never grokked, never lost.
    assert milestones(history([1.0] * 9, [0.5] * 9))["collapse_epoch"] is None


def test_near_best_is_within_a_point_of_the_highest():
    found = milestones(history([1.0] * 4, [0.955, 0.97, 0.985, 0.99]))
    assert (found["grok_epoch"], found["grok_epoch_near_best"]) == (1, 3)
    assert str(Panel("mul", "softmax", "width=32")) == "mul · softmax · width=32"
