"""Runs that stop, go on, meet bad steps and other devices: the files they leave, bit for bit."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from pretraining import DENSE, SMALL, VOCABULARY, mesh_of, one_device, text_file, training
from trajectories import apart
from waiting import wait_for

from experiments.language import data, log
from experiments.language.checkpoints import Checkpoints
from experiments.language.mesh import Mesh
from experiments.language.training_loop import TrainingError
from experiments.optimizers import AdamW, Muon
from experiments.pretrain import costs, loop
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
    """Tokens of a text, and the options that name it."""
    folder = tmp_path_factory.mktemp("text")
    settings = {"files": (text_file(folder),), "cache": folder / "cache"}
    return data.Data(vocabulary=VOCABULARY + 256, **settings)


@pytest.fixture(scope="module")
def tokens(text):
    return data.prepare(text)


def configured(text, **changes):
    return training(data=text, **changes)


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


def records(folder):
    timeless = ("seconds", "tokens_per_second", "flops_per_second", "mfu")
    found, damage = log.read(epath.Path(folder))
    assert not damage
    return [{k: v for k, v in record.items() if k not in timeless} for record in found]


def assert_same_bits(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


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
    config = configured(text)
    assert run(config, tokens, folder)
    return config, folder


def test_a_run_learns_and_leaves_its_files(whole):
    _, folder = whole
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens"] == 12 * 8 * 16
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
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (tmp_path, folder))
    assert ours["params_sha256"] == theirs["params_sha256"]


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


def test_another_text_is_refused(whole, text, tmp_path):
    config, folder = whole
    other = dataclasses.replace(text, files=(text_file(tmp_path, seed=1),))
    with pytest.raises(ValueError, match="trained on other data"):
        run(dataclasses.replace(config, data=other), data.prepare(other), folder)


def test_more_tokens_than_the_model_knows_are_refused(tokens, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary must be at least \d+, the voc.*; got"):
        run(training(), tokens, tmp_path)


def test_a_config_comes_back_from_its_json(text):
    config = configured(text)
    back = from_json(type(config), json.loads(json.dumps(config_as_json(config))))
    assert config_as_json(back) == config_as_json(config)


# --- Bad steps -------------------------------------------------------------------------------

BAD = VOCABULARY - 1


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of a window that begins with this token is NaN; another's gradient is huge."""
    plain = LanguageModel.loss

    def loss(self, params, bias, windows, **how):
        found, observed = plain(self, params, bias, windows, **how)
        factor = jnp.where(jnp.any(windows[:, 0] == BAD), jnp.nan, 1.0)
        factor *= jnp.where(jnp.any(windows[:, 0] == BAD - 1), 1e4, 1.0)
        return found * factor, observed

    monkeypatch.setattr(LanguageModel, "loss", loss)


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
    plain = LanguageModel.loss

    def loss(self, params, bias, windows, **how):
        found, observed = plain(self, params, bias, windows, **how)
        return found * jnp.nan, observed

    monkeypatch.setattr(LanguageModel, "loss", loss)
    config = configured(text, model=DENSE, max_nonfinite_steps=3)
    with pytest.raises(TrainingError, match="3 consecutive steps had NaN or Inf in their loss"):
        run(config, tokens, tmp_path, optimizer="adamw")
    assert all(r.get("loss") is None for r in records(tmp_path) if "loss" in r)


@pytest.mark.parametrize(
    "optimizer, changes, remedy",
    [
        ("muon", {"muon": Muon(learning_rate=3e38)}, r"lower --muon.learning-rate 3e\+38 or "),
        (
            "adamw",
            {"adamw": AdamW(learning_rate=3e38)},
            "raise --adamw.eps 1e-08. No checkpoint was saved",
        ),
    ],
)
def test_params_that_an_update_breaks_are_not_saved(
    text, tokens, tmp_path, optimizer, changes, remedy
):
    config = configured(text, model=DENSE, warmup=0, **changes)
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
    config = training()
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
    for sizes in ((1, 4, 1, 2), (1, 2, 1, 2), (1, 2, 1, 1), (1, 1, 1, 1)):
        config = configured(text, model=DENSE, mesh=Mesh(*sizes))
        finished = run(config, tokens, tmp_path, stop_after=None if sizes == (1,) * 4 else 1)
        state = state_in(config, tmp_path, sizes=sizes)
        assert_same_bits(state.params, state_in(config, tmp_path, sizes=(1, 1, 1, 1)).params)
    assert finished


def test_a_batch_that_devices_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"= 8 sequences, which must be a multiple .* = 16"):
        Trainer(training(), "adamw", mesh_of(1, 16, 1, 1), VOCABULARY)


def test_heads_that_devices_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"divide the model's heads, 4; got 8\. Use --mesh\.tensor 1, 2, 4"
    ):
        Trainer(training(), "adamw", mesh_of(1, 1, 1, 8), VOCABULARY)


def test_a_peak_is_of_one_kind_of_device_exactly(monkeypatch):
    def costs_on(kind):
        device = types.SimpleNamespace(device_kind=kind, platform="gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        return costs.step_costs(training(model=DENSE), "adamw", params)

    params = LanguageModel(DENSE, VOCABULARY).init(jax.random.key(0))
    count = jax.device_count()
    for kind, peak in [("80GB HBM3", 989e12), ("NVL", 835e12), ("PCIe", 756e12)]:
        assert costs_on(f"NVIDIA H100 {kind}").peak_flops_per_second == peak * count
        assert costs.unknown_peak() is None
    unknown = costs_on("NVIDIA H200 MIG 1g.18gb")
    assert unknown.peak_flops_per_second is None and "mfu" not in unknown.rates(1.0)
    assert "NVIDIA H200 MIG 1g.18gb" in costs.unknown_peak()


# --- MuonClip --------------------------------------------------------------------------------


def test_muonclip_bounds_the_logits_of_latent_attention():
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (1, 8, 17)).astype(np.int32)

    def largest(optimizer, threshold):
        model = dataclasses.replace(SMALL, layers=2, dense_layers=2, init_std=0.5)
        config = training(model=model, warmup=0)
        variants = dataclasses.replace(config.variants, clip_threshold=threshold)
        config = dataclasses.replace(config, variants=variants)
        trainer = Trainer(config, optimizer, one_device(), VOCABULARY)
        state, found = trainer.start(0), []
        for _ in range(4):
            state, metrics = trainer.advance(
                state, jax.device_put(rows, trainer.windows), rate=1e-4
            )
            found.append(float(metrics["max_logit"]))
        return found

    free, clipped = largest("muonclip", 1e9), largest("muonclip", 2.0)
    assert min(free) > 4
    # What later layers see has changed too, so that theirs come near the threshold, not to it.
    assert clipped[0] == free[0] and max(clipped[1:]) < 3.5 and max(clipped[2:]) < 2.3


# --- The command -----------------------------------------------------------------------------


def test_the_command_line_takes_the_form_of_the_readme():
    line = "--preset tiny --optimizers muon --steps 400 --save-every 100 --seed 0 --model.layers 5"
    command = parse([*line.split(), "--out", "somewhere"])
    assert command.optimizers == ("muon",) and command.model.layers == 5
    assert command.model.experts == parse([]).model.experts
    assert str(command.folder("muon")) == "somewhere"
    assert parse(["--preset", "moonlight-16b"]).model.experts == 64


def test_an_unknown_option_is_refused_with_a_suggestion(capsys):
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
def test_sigterm_saves_and_loses_no_step(text, tmp_path):
    command = [*options(text, tmp_path), "--optimizers", "adamw", "--steps", "100000"]
    process = start(*command)
    log = tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 4' in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    last = records(tmp_path)[-1]["step"]
    steps = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step_*"))
    assert steps[-1] == last >= 4


@pytest.mark.slow
def test_hours_save_and_exit_with_a_status_of_their_own(text, tmp_path):
    command = [*options(text, tmp_path), "--optimizers", "adamw", "--steps", "100000"]
    process = start(*command, "--hours", "0.003")
    said, error = process.communicate(timeout=240)
    assert process.returncode == 75, error
    assert "since --hours 0.003 have passed; the same command continues" in said
    last = records(tmp_path)[-1]["step"]
    steps = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step_*"))
    assert steps[-1] == last > 0
    again = start(*command, "--hours", "0.003")
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 75 and f"continuing from step {last}" in said


@pytest.mark.slow
def test_two_processes_train_and_save_together(text, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = [*options(text, tmp_path / "two"), "--optimizers", "muon", "--steps", "7"]
    shared += ["--processes.coordinator", f"localhost:{port}", "--processes.count", "2"]
    both = [start(*shared, "--processes.index", str(i)) for i in range(2)]
    for process in both:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error[-3000:]
    alone = start(*options(text, tmp_path / "one"), "--optimizers", "muon", "--steps", "7")
    _, error = alone.communicate(timeout=240)
    assert alone.returncode == 0, error[-3000:]
    two, one = (records(tmp_path / name) for name in ("two", "one"))
    assert [r["step"] for r in two] == [r["step"] for r in one]
    assert two[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-3)


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
        assert "holds thesis.tex but no run of this study" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_errors_of_the_command_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--data.files", str(tmp_path / "*.txt")])
    assert main() == 2
    assert "error:" in capsys.readouterr().err
