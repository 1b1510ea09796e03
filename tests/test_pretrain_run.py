"""Runs that stop, go on, meet bad steps and other devices: the files they leave, bit for bit."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from pretraining import (
    DENSE,
    SMALL,
    VOCABULARY,
    mesh_of,
    one_device,
    records,
    summary_of,
    text_file,
    text_of,
    training,
)
from same_bits import assert_same_bits
from trajectories import apart
from waiting import wait_for

from experiments.language import data
from experiments.language.checkpoints import Checkpoints
from experiments.language.mesh import Mesh
from experiments.language.training_loop import TrainingError
from experiments.optimizers import AdamW, Muon
from experiments.pretrain import loop
from experiments.pretrain.__main__ import main, parse
from experiments.pretrain.config import Running, from_json
from experiments.pretrain.config import as_json as config_as_json
from experiments.pretrain.model import LanguageModel
from experiments.pretrain.report import report
from experiments.pretrain.step import Trainer
from experiments.report import page

OFTEN = Running(
    save_every=4, evaluate_every=6, evaluation_tokens=256, log_every=1, samples=0, max_checkpoints=9
)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_of(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tokens(text):
    return data.prepare(text)


def run(config, tokens, folder, stop_after=None, optimizer="muon", running=OFTEN, **calls):
    """Trains in this process; whether it finished."""
    stop = threading.Event()

    def on_step(progress):
        if stop_after is not None and progress.step >= stop_after:
            stop.set()

    folder.mkdir(exist_ok=True)
    folder = epath.Path(folder)
    given = config, optimizer, running, tokens, folder, stop
    return loop.Pretraining(*given, on_step=on_step, **calls).to_the_end()


def state_in(config, folder, optimizer="muon", step=None, sizes=(1, 1, 1, 1)):
    trainer = trainer_of(config, optimizer, mesh_of(*sizes), config.data.vocabulary)
    checkpoints = Checkpoints(folder / "checkpoints")
    restored = checkpoints.restore(trainer.abstract, step=step)
    checkpoints.close()
    return restored.state


@functools.cache
def trainer_of(*arguments):
    """Compiled once for all runs with the same settings."""
    return Trainer(*arguments)


@pytest.fixture(scope="module", autouse=True)
def few_devices():
    """Runs take all devices; here those of the mesh that the config asks for."""
    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "make_mesh", lambda sizes: mesh_of(*sizes))
    patch.setattr(loop, "Trainer", trainer_of)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def whole(text, tokens, tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    config = training(data=text)
    assert run(config, tokens, folder)
    return config, folder


def test_a_run_learns_and_leaves_its_files(whole):
    _, folder = whole
    summary = summary_of(folder)
    assert summary["tokens"] == 12 * 8 * 16
    speed = summary["tokens"] / summary["seconds"]
    assert summary["tokens_per_second"] == pytest.approx(speed, rel=0.05)
    assert len(summary["params_sha256"]) == 64
    seen = records(folder)
    losses = [r["loss"] for r in seen if "loss" in r]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    evaluated = {r["step"]: r["bits_per_byte"] for r in seen if "bits_per_byte" in r}
    assert list(evaluated) == [0, 6, 12] and evaluated[12] < evaluated[0]
    assert {"learning_rate", "gradient_norm", "max_logit", "router_entropy"} <= seen[1].keys()
    assert set(seen[1]["update_rms"]) == {"matrices", "others"}
    assert (folder / "tensorboard").exists()


@pytest.mark.parametrize("stops", [(5,), (1, 2, 9)])
def test_stopping_and_going_on_gives_the_same_bits(whole, text, tokens, tmp_path, stops):
    config, folder = whole
    for stop in stops:
        assert not run(config, tokens, tmp_path, stop_after=stop)
    assert run(config, tokens, tmp_path)
    assert_same_bits(state_in(config, tmp_path), state_in(config, folder))
    assert records(tmp_path) == records(folder)
    assert summary_of(tmp_path)["params_sha256"] == summary_of(folder)["params_sha256"]


def test_damage_costs_the_steps_since_the_save_before(whole, tokens, tmp_path):
    config, folder = whole
    assert not run(config, tokens, tmp_path, stop_after=9)
    newest = max((tmp_path / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    said = []
    assert run(config, tokens, tmp_path, on_message=said.append)
    assert "damaged" in said[0] and "continuing from step 8" in said[1]
    assert_same_bits(state_in(config, tmp_path), state_in(config, folder))
    assert records(tmp_path) == records(folder)


def test_a_log_that_is_lost_is_told_and_a_finished_run_stays(whole, tokens, tmp_path):
    config, folder = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    summary = (tmp_path / "summary.json").read_text()
    (tmp_path / "metrics.jsonl").unlink()
    said = []
    assert run(config, tokens, tmp_path, on_message=said.append)
    assert "the records of steps 0 to 12 are missing" in said[-1]
    assert (tmp_path / "summary.json").read_text() == summary
    page.write(report(epath.Path(tmp_path), ("muon",)), epath.Path(tmp_path))
    (tmp_path / "summary.json").unlink()
    with pytest.raises(TrainingError, match="has no records of loss"):
        run(config, tokens, tmp_path)


def test_another_text_and_more_tokens_than_the_model_knows_are_refused(
    whole, text, tokens, tmp_path
):
    config, folder = whole
    other = dataclasses.replace(text, files=(text_file(tmp_path, seed=1),))
    with pytest.raises(ValueError, match="trained on other data"):
        run(dataclasses.replace(config, data=other), data.prepare(other), folder)
    with pytest.raises(ValueError, match=r"vocabulary must be at least \d+, the voc.*; got"):
        run(training(), tokens, tmp_path)
    again = from_json(type(config), json.loads(json.dumps(config_as_json(config))))
    assert config_as_json(again) == config_as_json(config)


# --- Bad steps -------------------------------------------------------------------------------

BAD = VOCABULARY - 1


def scale_loss(monkeypatch, factor):
    plain = LanguageModel.loss

    def loss(self, params, bias, windows, **how):
        found, observed = plain(self, params, bias, windows, **how)
        return found * factor(windows[:, 0]), observed

    monkeypatch.setattr(LanguageModel, "loss", loss)


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of a window that begins with this token is NaN; another's gradient is huge."""
    spikes = {BAD: jnp.nan, BAD - 1: 1e4}
    scale_loss(
        monkeypatch,
        lambda first: math.prod(jnp.where(jnp.any(first == t), x, 1) for t, x in spikes.items()),
    )


def batch_of(trainer, first, seed=0):
    rows = np.random.default_rng(seed).integers(0, BAD - 1, (1, 8, 17)).astype(np.int32)
    rows[0, 0, 0] = first
    return jax.device_put(rows, trainer.windows)


def test_a_step_that_is_not_finite_changes_nothing(poisoned):
    trainer = Trainer(training(), "muon", one_device(), VOCABULARY)
    state, _ = trainer.advance(trainer.start(0), batch_of(trainer, 0))
    before = jax.device_get(state)
    state, metrics = trainer.advance(state, batch_of(trainer, BAD))
    assert not metrics["taken"] and metrics["nonfinite_in_a_row"] == 1
    for name in ("params", "opt_state", "bias"):
        assert_same_bits(getattr(state, name), getattr(before, name))
    assert state.guard.norm == before.guard.norm and state.step == 2
    state, metrics = trainer.advance(state, batch_of(trainer, 0, seed=1))
    assert metrics["taken"] and metrics["nonfinite_in_a_row"] == 0 and metrics["skipped"] == 1
    # The schedule counts updates: this one has the rate of the second.
    np.testing.assert_allclose(metrics["learning_rate"], trainer.schedule(1) * 8e-3, rtol=1e-6)


def test_spikes_are_skipped_where_asked_for(poisoned):
    config = training(spike=10.0, steps=60, warmup=40, model=DENSE)
    trainer = Trainer(config, "adamw", one_device(), VOCABULARY)
    state = trainer.start(0)
    for step in range(22):
        state, metrics = trainer.advance(state, batch_of(trainer, 0, seed=step))
    before = jax.device_get(state)
    state, metrics = trainer.advance(state, batch_of(trainer, BAD - 1))
    assert metrics["gradient_norm"] > 10 * before.guard.norm
    assert not metrics["taken"] and metrics["nonfinite_in_a_row"] == 0
    assert_same_bits(state.params, before.params)


def test_a_run_without_finite_steps_stops_and_says_so(text, tokens, tmp_path, monkeypatch):
    scale_loss(monkeypatch, lambda first: jnp.nan)
    config = training(data=text, model=DENSE, max_nonfinite_steps=3)
    with pytest.raises(TrainingError, match="3 consecutive steps had NaN or Inf in their loss"):
        run(config, tokens, tmp_path, optimizer="adamw")
    assert all(r.get("loss") is None for r in records(tmp_path) if "loss" in r)


@pytest.mark.parametrize(
    ("optimizer", "settings", "remedy"),
    [
        ("muon", Muon(learning_rate=3e38), r"lower --muon.learning-rate 3e\+38 or "),
        ("adamw", AdamW(learning_rate=3e38), r"raise --adamw.eps 1e-08\. No checkpoint was saved"),
    ],
)
def test_params_that_an_update_breaks_are_not_saved(
    text, tokens, tmp_path, optimizer, settings, remedy
):
    config = training(data=text, model=DENSE, warmup=0, **{optimizer: settings})
    often = dataclasses.replace(OFTEN, save_every=1)
    with pytest.raises(TrainingError, match=f"update contains NaN or Inf.*{remedy}"):
        run(config, tokens, tmp_path, optimizer=optimizer, running=often)
    assert not [*(tmp_path / "checkpoints").glob("step_*")]


# --- Microbatches and devices ----------------------------------------------------------------


def updated(config, mesh, optimizer="muon"):
    trainer = Trainer(config, optimizer, mesh, VOCABULARY)
    state = trainer.start(0)
    for seed in range(2):
        rows = np.random.default_rng(seed).integers(0, VOCABULARY, (8, 17)).astype(np.int32)
        rows = rows.reshape(config.accumulate, -1, 17)
        state, metrics = trainer.advance(state, jax.device_put(rows, trainer.windows))
        jax.block_until_ready(state)
    return jax.device_get(state), jax.device_get(metrics)


def test_microbatches_and_meshes_change_no_update():
    config = training(dataclasses.replace(SMALL, layers=2))
    state, metrics = updated(config, one_device())
    start = jax.device_get(Trainer(config, "muon", one_device(), VOCABULARY).start(0).params)
    split, halves = updated(dataclasses.replace(config, accumulate=2), one_device())
    assert apart(split.params, state.params, start) < 1e-4
    np.testing.assert_array_equal(halves["load"], metrics["load"])
    assert halves["max_logit"] == pytest.approx(metrics["max_logit"], rel=1e-5)
    spread = dataclasses.replace(config, mesh=Mesh(2, 2, 2, 1))
    everywhere, _ = updated(spread, mesh_of(2, 2, 2, 1))
    assert apart(everywhere.params, state.params, start) < 1e-4


def test_a_run_goes_on_with_fewer_devices(text, tokens, tmp_path):
    for sizes in ((1, 4, 1, 2), (1, 2, 1, 1), (1, 1, 1, 1)):
        config = training(data=text, model=DENSE, mesh=Mesh(*sizes))
        finished = run(config, tokens, tmp_path, stop_after=None if sizes == (1,) * 4 else 1)
        state = state_in(config, tmp_path, sizes=sizes)
        assert_same_bits(state.params, state_in(config, tmp_path, sizes=(1, 1, 1, 1)).params)
    assert finished


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 16, 1, 1), r"= 8 sequences, which must be a multiple .* = 16"),
        ((1, 1, 1, 8), r"divide the model's heads, 4; got 8\. Use --mesh\.tensor 1, 2, 4"),
    ],
)
def test_sizes_that_devices_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(training(), "adamw", mesh_of(*sizes), VOCABULARY)


# --- The command -----------------------------------------------------------------------------


def test_the_command_line_takes_the_form_of_the_readme(capsys):
    line = "--preset tiny --optimizers muon --steps 400 --save-every 100 --seed 0 --model.layers 5"
    command = parse([*line.split(), "--out", "somewhere"])
    assert command.optimizers == ("muon",) and command.model.layers == 5
    assert command.model.experts == parse([]).model.experts
    assert str(command.folder("muon")) == "somewhere"
    assert parse(["--preset", "moonlight-16b"]).model.experts == 64
    with pytest.raises(SystemExit):
        parse(["--save-evry", "3"])
    assert "--save-every" in capsys.readouterr().err


def options(text, folder):
    model = " ".join(
        f"--model.{name.replace('_', '-')} {value}"
        for name, value in dataclasses.asdict(DENSE).items()
        if value != getattr(parse([]).model, name) and value is not True
    )
    words = f"{model} --context 16 --batch 8 --warmup 2 --save-every 3 --evaluate-every 50"
    words += f" --data.vocabulary {text.vocabulary} --data.cache {text.cache} --log-every 1"
    return [*words.split(), "--data.files", *text.files, "--samples", "0", "--out", str(folder)]


def start(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.pretrain", *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["SIGTERM", "--hours"])
def test_a_stop_saves_and_loses_no_step(text, tmp_path, ends):
    command = [*options(text, tmp_path), "--optimizers", "adamw", "--steps", "100000"]
    command += ["--hours", "0.003"] * (ends == "--hours")
    process = start(*command)
    if ends == "SIGTERM":
        log = tmp_path / "metrics.jsonl"
        wait_for(lambda: log.exists() and '"step": 4' in log.read_text(), process)
        process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=240)
    assert process.returncode == (130 if ends == "SIGTERM" else 75), error
    last = records(tmp_path)[-1]["step"]
    assert max(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step_*")) == last > 0
    if ends == "--hours":
        assert "since --hours 0.003 have passed; the same command continues" in said
        again = start(*command)
        said, _ = again.communicate(timeout=240)
        assert again.returncode == 75 and f"continuing from step {last}" in said


@pytest.mark.parametrize("optimizers", [["muon"], ["adamw", "muon"]])
def test_an_out_with_other_files_is_refused_before_text_is_read(
    monkeypatch, capsys, tmp_path, optimizers
):
    monkeypatch.setattr(data, "prepare", None)
    (tmp_path / "thesis.tex").write_text("x")
    arguments = ["pretrain", "--out", str(tmp_path), "--optimizers", *optimizers]
    for more in ([], ["--suite", "optimizers"]):
        monkeypatch.setattr(sys, "argv", arguments + more)
        assert main() == 2
        said = capsys.readouterr().err
        assert "error:" in said and "holds thesis.tex but no run of this study" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
