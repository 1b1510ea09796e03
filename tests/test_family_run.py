"""A family run as a user sees it: it compares, survives, goes on, and reports again."""

import html
import json
import math
import re
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import run_command
from flax import nnx

from experiments import optimizers, timing
from experiments.commands import INTERRUPTED
from experiments.family import __main__ as command
from experiments.family import cost, data, train
from experiments.family.config import Cell, Config
from experiments.family.model import LanguageModel
from experiments.report.__main__ import main
from experiments.runs import Run

# Seconds a run: two optimizers, three rates, two seeds of a narrow model on a little text.
TINY = {
    "width": 16, "layers": 1, "head_size": 8, "context": 8, "batch": 4, "steps": 8, "warmup": 2,
    "evaluations": 2, "validation": 8, "corpus_bytes": 20_000, "seeds": 2,
}  # fmt: skip


def run(*options, out):
    words = [word for key, value in TINY.items() for word in (f"--{key}", value)]
    words += ["--optimizers", "adamw", "muon", "--sweep.limit", "0", *options]
    with mock.patch.object(timing, "ROUNDS", 1), mock.patch.object(cost, "STEPS", 2):
        return run_command(command.main, *words, "--out", out / "run")


def results(out):
    """Every record and row of the log by cell, which end in any order, without times."""
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    clocked = {"seconds", "milliseconds_per_step", "sha256", "before"}

    def timeless(record):
        return {key: value for key, value in record.items() if key not in clocked}

    found = [json.loads(line, object_hook=timeless) for line in lines]
    return sorted(
        found,
        key=lambda record: str(Cell(**{of: record.get("cell", record)[of] for of in Cell._fields})),
    )


def rows(out):
    return [record["cell"] for record in results(out) if "cell" in record]


def summary(out):
    return json.loads((out / "run" / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert run(out=out) == 0
    return out


def test_the_files_of_a_run(whole):
    names = {path.name for path in (whole / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "costs.json", "report.html"} <= names
    assert {"rates.png", "curves.png", "final.png"} <= names
    assert len(rows(whole)) == 2 * 3 * 2 == summary(whole)["cells_total"]
    assert len(results(whole)) == 12 * (1 + TINY["evaluations"])
    config = json.loads((whole / "run" / "config.json").read_text())
    assert len(config["corpus"]["sha256"]) == 64
    assert not re.search(r'"/', json.dumps([config, summary(whole)["corpus"]]))


def test_the_table_has_losses_differences_and_costs(whole):
    arms = {arm["optimizer"]: arm for arm in summary(whole)["arms"]}
    assert arms.keys() == {"adamw", "muon"}
    for name, arm in arms.items():
        losses = [
            record["train_loss"] for record in results(whole) if record.get("optimizer") == name
        ]
        assert losses[1] < losses[0]
        assert 0 < arm["validation_loss"] < 10 and len(arm["losses_by_rate"]) == 3
        assert arm["step_ratio"] > 0 and arm["update"]["times_baseline"] > 0
    assert arms["adamw"]["update"]["temp_bytes"] < arms["muon"]["update"]["temp_bytes"]
    # One layer of kernels: q, k, v, o of 8 × 8, gate, up, down of 8 × 24, five steps each.
    assert arms["muon"]["update"]["flops"] > arms["adamw"]["update"]["flops"] == 0
    difference = arms["muon"]["difference_to_adamw"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    means = [arms[name]["validation_loss"] for name in ("muon", "adamw")]
    assert difference["mean"] == pytest.approx(means[0] - means[1])
    assert arms["adamw"]["difference_to_adamw"] is None
    # Two moments and a few counts; Muon has one moment for the hidden matrices.
    assert 8 <= arms["adamw"]["update"]["state_bytes_per_parameter"] < 8.01
    assert 4 < arms["muon"]["update"]["state_bytes_per_parameter"] < 8
    page = (whole / "run" / "report.html").read_text()
    assert re.search(r"Muon's loss minus AdamW's: [+−]\d\.\d{3} \[", html.unescape(page))
    assert "difference is paired by seed" in re.sub(r"\s+", " ", page) and "AdamW" in page


def test_ctrl_c_keeps_finished_cells_and_the_rest_follows_bit_for_bit(whole, tmp_path, monkeypatch):
    train_cell, calls = command.train_cell, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_cell(*arguments)

    monkeypatch.setattr(command, "train_cell", interrupted)
    assert run(out=tmp_path) == INTERRUPTED
    done = len(rows(tmp_path))  # 3, or fewer if another core's was interrupted
    assert 0 < done < 4 and not len(calls) < 4
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{done} of 12 trainings finished so far" in page
    assert not (tmp_path / "run" / "costs.json").exists()
    assert run(out=tmp_path) == 0
    assert len(calls) <= 5 + 12 - done
    assert results(tmp_path) == results(whole)


def test_more_seeds_rates_and_optimizers_are_added_to_a_folder(whole, tmp_path, capsys):
    assert run("--seeds", 1, "--sweep.reach", 0, "--optimizers", "adamw", out=tmp_path) == 0
    assert len(rows(tmp_path)) == 1
    assert run(out=tmp_path) == 0
    assert sorted(map(str, rows(tmp_path))) == sorted(map(str, rows(whole)))
    assert "trainings left: 11" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert summary(tmp_path)["arms"][0]["update"]
    capsys.readouterr()
    assert run("--batch", 8, out=tmp_path) == 2
    assert "batch: there 4, here 8" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_a_diverged_cell_is_recorded_and_counts_as_the_worst(tmp_path):
    options = ["--seeds", 1, "--optimizers", "adamw", "--sweep.reach", 0]
    assert run(*options, "--sweep.limit", 1, "--sweep.factor", "1e30", out=tmp_path) == 0
    low, default, high = sorted(rows(tmp_path), key=lambda row: row["rate"])
    assert low["rate"] < 1e-30 and not low["diverged"]
    assert high["diverged"] and high["validation_loss"] is None and high["steps_run"] == 4
    (arm,) = summary(tmp_path)["arms"]
    assert arm["best_rate"] == default["rate"] and arm["diverged"] == 1 and not arm["at_edge"]
    assert list(arm["losses_by_rate"].values())[-1] is None
    assert "1 training diverged" in (tmp_path / "run" / "report.html").read_text()


def test_where_everything_diverged_there_is_a_report_too(whole, tmp_path):
    for name in ("config.json", "summary.json"):
        (tmp_path / name).write_bytes((whole / "run" / name).read_bytes())
    log = Run(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    for row in rows(whole):
        clocked = {"milliseconds_per_step": 1.0, "seconds": 1.0}
        log.extend([([], row | clocked | {"diverged": True, "validation_loss": None})])
    log.close()
    main(str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "<td>diverged</td>" in page and "12 trainings diverged" in page
    table = json.loads((tmp_path / "summary.json").read_text())["arms"]
    assert [arm["validation_loss"] for arm in table] == [None, None]


def test_a_best_rate_at_the_edge_makes_the_sweep_go_on(tmp_path):
    assert run("--seeds", 1, "--optimizers", "adamw", "--sweep.limit", 1, out=tmp_path) == 0
    # Eight steps are so few that a high rate is the best one.
    assert sorted(row["rate"] for row in rows(tmp_path)) == [0.003, 0.006, 0.012, 0.024]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Best at the highest or lowest learning rate tried" in page and "0.024 (edge)" in page


def test_the_report_is_made_again_without_training(whole, tmp_path, monkeypatch, capsys):
    folder = whole / "run"
    before = summary(whole)
    for name in ("report.html", "rates.png", "curves.png", "final.png"):
        (folder / name).unlink()
    monkeypatch.setattr(train, "compile_steps", None)
    main(str(folder))
    assert summary(whole) == before
    assert (folder / "report.html").stat().st_size > 50_000
    assert "The family, lowest loss first" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is not a folder"):
        main(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"neither it nor a folder in it has a config\.json"):
        main(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "options, hint",
    [("--corpus-bytes 40", "fewer than the 9 of one sequence"), ("--seeds 0", "at least 1")],
)
def test_wrong_options_are_refused_and_leave_no_folder(options, hint, tmp_path, capsys):
    try:
        code = run(*options.split(), out=tmp_path)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and not (tmp_path / "run").exists()
    captured = capsys.readouterr()
    assert hint in re.sub(r"[\s│]+", " ", captured.err + captured.out)


def test_equal_settings_share_a_folder_and_others_do_not():
    assert Config().folder() == Config(seeds=5).folder() == Config(optimizers=("muon",)).folder()
    assert Config().folder() != Config(steps=600).folder()
    assert Config().folder() != Config(text=Path("verse.txt")).folder()


@pytest.fixture(scope="module")
def tiny():
    """The config and data of the tiny runs."""
    config = Config(**TINY).training()
    return config, data.load(config)


def test_an_optimizer_sees_the_forward_pass_and_may_have_others_evaluated(tiny, monkeypatch):
    """An arm is one entry: it gets extra arguments by name, and says what is to be evaluated."""
    seen = {}

    def build(given):
        def update(updates, state, params=None, *, max_logits, **extra):
            seen.update(jax.tree.map(jnp.shape, max_logits))
            return jax.tree.map(lambda u: -given.rate(0) * u, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    def zeros(state, params):
        return jax.tree.map(jnp.zeros_like, params)

    monkeypatch.setitem(optimizers.ARMS, "test", optimizers.Arm("a test", build, 0.1, zeros))
    monkeypatch.setattr(optimizers.Settings, "rate", lambda settings, name: 0.1)
    config, text = tiny
    history, outcome = train.train_cell(config, text, "test", 0.1, seed=0)
    assert seen == {"blocks/0/attention": (2,)}
    # All weights at zero predict every byte alike.
    assert outcome["validation_loss"] == pytest.approx(math.log(256), abs=1e-5)
    still, _ = train.train_cell(config, text, "test", 1e-9, seed=0)  # the same batches
    assert history[-1]["train_loss"] < still[-1]["train_loss"]
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(cost, "STEPS", 1)
    costs = cost.measure(config, ["adamw", "test"], text)
    assert costs["test"]["state_bytes_per_parameter"] == 0
    assert costs["adamw"]["times_baseline"] == 1 and costs["adamw"]["flops"] == 0


def test_rates_and_seeds_share_a_program_and_make_a_difference(tiny):
    config, text = tiny
    before = train.compile_steps.cache_info().misses
    losses = {
        (rate, seed): train.train_cell(config, text, "muon", rate, seed)[1]["validation_loss"]
        for rate in (0.01, 0.1)
        for seed in (0, 1)
    }
    assert train.compile_steps.cache_info().misses <= before + 1
    assert len(set(losses.values())) == 4
    again = train.train_cell(config, text, "muon", 0.1, 1)[1]["validation_loss"]
    assert again == losses[0.1, 1]


def test_another_device_has_a_program_of_its_own_and_the_same_numbers(tiny):
    config, text = tiny
    found = []
    for device in jax.local_devices()[:2]:
        with jax.default_device(device):
            assert train.start(config, "muon", 0).params["head"][
                "kernel"
            ].get_value().devices() == {device}
            history, _ = train.train_cell(config, text, "muon", 0.1, 0, device=device)
            found.append([record | {"seconds": None} for record in history])
    assert len(found) == 2 and found[0] == found[1]


def test_the_model_begins_at_chance_and_looks_only_back(tiny):
    config, text = tiny
    model = train.language_model(config)
    params = model.start(0)
    assert model.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    loss, observed = jax.jit(model.loss)(params, text.validation)
    assert math.log(256) - 0.5 < loss < math.log(256) + 2
    assert observed["max_logits"]["blocks/0/attention"].shape == (2,)
    network = LanguageModel(width=16, layers=2, head_size=8, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(network)
    forward = jax.jit(lambda tokens: nnx.merge(graph, weights)(tokens)[0])
    tokens = jnp.arange(12)[None] % 7
    changed = tokens.at[0, 5:].add(1)
    np.testing.assert_allclose(forward(changed)[:, :5], forward(tokens)[:, :5], atol=1e-6)
    assert not np.allclose(forward(changed)[:, 5], forward(tokens)[:, 5])


def test_batches_are_windows_of_the_text():
    text = jnp.arange(200, dtype=jnp.uint8)
    windows = data.batch(text, jax.random.key(0), size=64, context=9)
    assert windows.shape == (64, 10) and (jnp.diff(windows.astype(int)) == 1).all()
    assert data.batch(text[:10], jax.random.key(0), 3, 9).tolist() == [list(range(10))] * 3


def test_cells_name_themselves():
    assert str(Cell("muon", 0.02, 1)) == "muon · rate 0.02 · seed 1"
