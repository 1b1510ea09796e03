"""A grokking run as a user sees it: it groks, survives, resumes to the same bits, refuses well."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import optax
import pytest
from commands import run_command
from waiting import wait_for

from experiments.commands import INTERRUPTED
from experiments.grok import __main__ as command
from experiments.grok import train
from experiments.grok.config import Cell, Config
from experiments.grok.train import Epoch, milestones
from experiments.spikes import spikes

ROOT = Path(__file__).parent.parent
# Seconds a run: four cells of three epochs of a narrow model.
TINY = ["--tasks", "gcd", "--seeds", "2", "--epochs", "3", "--width", "16", "--batch", "1024"]


def run(*options, out):
    return run_command(command.main, *options, "--out", out / "run")


def start(*options, out):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.grok", *options, "--out", str(out / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As many devices as the tests have: XLA splits its sums by them.
        env={**os.environ, "COLUMNS": "200", "JAX_NUM_CPU_DEVICES": str(jax.device_count())},
    )


def results(out):
    """Every cell's row and every epoch's line, without what a clock measured."""
    folder = out / "run"
    rows = json.loads((folder / "summary.json").read_text())["cells"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocked = {"seconds", "steps_per_second", "seconds_to_grok"}

    def timeless(record):
        return {key: value for key, value in record.items() if key not in clocked}

    # Cells that train side by side end in any order.
    lines = sorted((line for line in lines if "cell" not in line), key=Cell.of)
    return [timeless(row) for row in rows], [timeless(line) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert run(*TINY, out=out) == 0
    return results(out)


def test_the_files_of_a_run(whole, tmp_path):
    assert run(*TINY, "--seeds", 1, out=tmp_path) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html"} <= names
    assert (folder / "curves.png").stat().st_size > 10_000
    rows = json.loads((folder / "summary.json").read_text())["cells"]
    assert [(row["optimizer"], row["seed"]) for row in rows] == [("adamw", 0), ("muon", 0)]
    wanted = (
        "task softmax optimizer seed memorized_epoch grok_epoch grok_epoch_sustained censored "
        "epochs_run seconds steps_per_second"
    )
    assert set(wanted.split()) <= rows[0].keys()
    assert rows[0]["params_sha256"] != rows[1]["params_sha256"]
    # A cell is a pure function of its settings: more seeds around it change nothing.
    assert results(tmp_path)[0] == whole[0][:2]


def test_gradient_norms_are_recorded_for_every_step(whole, tmp_path):
    """Recording them does not change the trained parameters."""
    more = ("--gradient-norms", "--seeds", 1, "--probe-every", 0)
    assert run(*TINY, *more, out=tmp_path) == 0
    rows, lines = results(tmp_path)
    assert [row["params_sha256"] for row in rows] == [r["params_sha256"] for r in whole[0][:2]]
    steps = rows[0]["steps_per_epoch"]
    assert all(len(line["gradient_norms"]) == steps for line in lines) and steps > 1
    for row in rows:
        own = [line["gradient_norms"] for line in lines if line["optimizer"] == row["optimizer"]]
        found = spikes([norm for epoch in own for norm in epoch])
        assert found == {key: row[key] for key in ("spikes", "largest_spike")}
    first = {line["gradient_norms"][0] for line in lines if line["epoch"] == 1}
    assert len(first) == 1 and first.pop() > 0.01  # of the same parameters and batch
    page = re.sub(r"\s+", " ", (tmp_path / "run" / "report.html").read_text())
    told = "; ".join(f"{o} {row['spikes']}" for o, row in zip(("AdamW", "Muon"), rows, strict=True))
    assert f"the median of the 50 before, by training: {told}." in page


def test_ctrl_c_keeps_finished_cells_and_the_rest_follows_bit_for_bit(whole, tmp_path, monkeypatch):
    train_cells, calls, interrupt = command.train_cells, [], threading.Event()

    def interrupted(config, cells, show, device):
        calls.append(cells[0])
        if len(calls) == 3:
            interrupt.set()
        if interrupt.is_set():
            raise KeyboardInterrupt
        return train_cells(config, cells, show, device)

    monkeypatch.setattr(command, "train_cells", interrupted)
    assert run(*TINY, out=tmp_path) == INTERRUPTED
    done = [(row["optimizer"], row["seed"]) for row in results(tmp_path)[0]]
    assert 1 <= len(done) <= 2 and (tmp_path / "run" / "report.html").exists()
    monkeypatch.setattr(command, "train_cells", train_cells)
    assert run(*TINY, out=tmp_path) == 0
    assert results(tmp_path) == whole


def test_kill_9_in_the_middle_of_a_write_costs_one_cell(whole, tmp_path):
    assert run(*TINY, "--seeds", 1, out=tmp_path) == 0
    log = tmp_path / "run" / "metrics.jsonl"
    text = log.read_text()
    log.write_text(text[: text.index("\n", len(text) - 200) - 60])
    assert run(*TINY, out=tmp_path) == 0
    assert sorted(map(str, results(tmp_path)[0])) == sorted(map(str, whole[0]))


@pytest.mark.slow
def test_kill_9_of_the_process_leaves_a_folder_that_goes_on(whole, tmp_path):
    process = start(*TINY, out=tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"cell"' in log.read_text(), process)
    process.kill()
    process.communicate()
    assert run(*TINY, out=tmp_path) == 0
    assert results(tmp_path) == whole


def test_a_flipped_byte_is_noticed_and_its_cell_trained_again(whole, tmp_path, capsys):
    assert run(*TINY, out=tmp_path) == 0
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(
        log.read_text().replace('"validation_accuracy": 0.', '"validation_accuracy": 1.', 1)
    )
    assert run(*TINY, out=tmp_path) == 0
    assert "damaged training were removed" in capsys.readouterr().out
    assert sorted(map(str, results(tmp_path)[0])) == sorted(map(str, whole[0]))


def test_a_full_disk_stops_with_the_finished_cells_whole(whole, tmp_path, monkeypatch, capsys):
    extend, calls = command.Run.extend, []

    def full(self, pieces):
        calls.append(pieces)
        if len(calls) == 2:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write('{"task": "gcd", "soft')
            raise OSError(28, "No space left on device")
        extend(self, pieces)

    monkeypatch.setattr(command.Run, "extend", full)
    assert run(*TINY, out=tmp_path) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert run(*TINY, out=tmp_path) == 0
    assert results(tmp_path) == whole


@pytest.mark.slow
def test_sigterm_ends_like_ctrl_c(tmp_path):
    process = start(*TINY, "--epochs", "2000", "--full-length", out=tmp_path)
    wait_for((tmp_path / "run" / "config.json").exists, process)
    time.sleep(2)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, output
    # It may still be compiling, which ends in the commands' own sentence.
    assert "run the same command to continue" in re.sub(r"\s+", " ", output).lower()


def test_a_second_process_on_the_same_folder_is_refused(tmp_path, capsys):
    held = command.Run(tmp_path / "run", {}, ())
    assert run(*TINY, out=tmp_path) == 2
    assert "Another process is writing" in capsys.readouterr().err
    held.close()


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path, capsys):
    assert run(*TINY, "--seeds", 1, "--epochs", 1, out=tmp_path) == 0
    assert run(*TINY, "--epochs", 1, "--width", 32, out=tmp_path) == 2
    assert "width: there 16, here 32" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_a_run_from_before_an_optimizer_was_added_goes_on(tmp_path):
    assert run(*TINY, "--seeds", 1, "--epochs", 1, out=tmp_path) == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["rates"]["polar"]
    path.write_text(json.dumps(config))
    assert run(*TINY, "--seeds", 1, "--epochs", 1, out=tmp_path) == 0
    config["rates"]["adamw_tuned"] *= 2
    path.write_text(json.dumps(config))
    assert run(*TINY, "--seeds", 1, "--epochs", 1, out=tmp_path) == 2


def test_wrong_options_are_refused_and_leave_no_folder(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run("--taks", "mul", out=tmp_path)
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()


def test_equal_settings_share_a_folder_and_others_do_not():
    assert Config().folder() == Config().folder()
    assert Config(seeds=5).folder() == Config().folder()
    assert Config(layers=2).folder() != Config().folder()
    assert Config(dropout=0.1).folder() != Config().folder()


def history(train, validation):
    pairs = enumerate(zip(train, validation, strict=True), start=1)
    return [Epoch(i, i, 0.0, 0.0, t, 0.0, v) for i, (t, v) in pairs]


def test_milestones_tell_the_three_epochs_apart():
    train = [0.5, 0.98, 0.995] + [1.0] * 9
    validation = [0.96, 0.1, 0.2, 0.95, 0.5] + [0.96] * 7
    assert milestones(history(train, validation)) == {
        "memorized_epoch": 3,
        "first_crossing_epoch": 1,
        "grok_epoch": 4,
        "grok_epoch_sustained": 6,
        "grok_epoch_near_best": 4,
        "collapse_epoch": None,
    }
    # Four evaluations are no sustained generalisation, and none counts before memorisation.
    assert milestones(history(train[:9], validation[:9]))["grok_epoch_sustained"] is None
    never = milestones(history([0.9] * 9, [1.0] * 9))
    assert never["first_crossing_epoch"] == 1 and never["grok_epoch"] is None


def test_a_loss_that_is_no_longer_finite_ends_the_cell_and_says_so(tmp_path):
    options = [*TINY, "--seeds", 1, "--optimizers", "adamw", "--adamw.learning-rate", "1e30"]
    assert run(*options, out=tmp_path) == 0
    (row,) = results(tmp_path)[0]
    assert row["diverged"] and row["censored"] and row["grok_epoch"] is None


def test_dropout_and_the_other_losses_train(tmp_path):
    options = "--softmax stablemax sparsemax --dropout 0.2 --seeds 1 --optimizers muon"
    assert run(*TINY, *options.split(), out=tmp_path) == 0
    rows, epochs = results(tmp_path)
    assert [row["softmax"] for row in rows] == ["stablemax", "sparsemax"]
    for softmax in ("stablemax", "sparsemax"):
        losses = [line["train_loss"] for line in epochs if line["softmax"] == softmax]
        assert losses[-1] < losses[0]


def test_it_really_groks_and_muon_first(tmp_path):
    """Addition, one layer, one seed: about 13 epochs with Muon; AdamW has 30 and is not there."""
    assert run("--tasks", "add", "--seeds", 1, "--epochs", 30, out=tmp_path) == 0
    found, epochs = results(tmp_path)
    rows = {row["optimizer"]: row for row in found}
    assert rows["muon"]["grok_epoch_sustained"] <= 25
    assert rows["muon"]["memorized_epoch"] <= rows["muon"]["grok_epoch"]
    assert rows["adamw"]["censored"]
    probed = [e["epoch"] for e in epochs if e["optimizer"] == "muon" and "probe" in e]
    last = rows["muon"]["epochs_run"]
    assert probed == sorted({1, *range(10, last, 10), last})


def test_the_optimizer_knows_whose_program_it_is(monkeypatch):
    """Its form depends on the platform, which need not be JAX's default one."""
    build, seen = train.optimizers.build, []

    def observed(*args, **options):
        tx = build(*args, **options)

        def update(*args, **extra):
            seen.append(jax.sharding.get_abstract_mesh().abstract_device)
            return tx.update(*args, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    monkeypatch.setattr(train.optimizers, "build", observed)
    config = Config(width=8, heads=1, probe_every=0)
    train.compile_arm(config, Cell("mul", "softmax", "adamw", 0, ""), 1, jax.devices()[0])
    assert seen[0].platform == "cpu"
