"""Fine-tuning steps against plain ones, runs that stop and go on, cells, memory, the command."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from finetuning import NORMED, batch, initial, prepared, start, trainer_of, training, written
from pretraining import mesh_of
from trajectories import apart
from waiting import wait_for

import muon_jax
from experiments import commands
from experiments.finetune import __main__ as command
from experiments.finetune import loop, model, plan, weights
from experiments.finetune.architecture import PRESETS
from experiments.finetune.config import Running
from experiments.finetune.model import LanguageModel
from experiments.finetune.step import Trainer
from experiments.language import compile_only, log, planning
from experiments.language.checkpoints import Checkpoints
from experiments.language.training_loop import TrainingError
from experiments.parallel import run_in_parallel
from experiments.roofline import CHIPS, Chip
from experiments.topology import MEMORY

ROOT = Path(__file__).parent.parent
OFTEN = Running(save_every=4, evaluate_every=6, evaluation_tokens=100, max_checkpoints=9)


def assert_same_bits(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.max(np.abs(x - y)) < tolerance * max(np.max(np.abs(y)), 1e-3)


def stepped(trainer, steps=1):
    """Params on the host after steps on the same windows, and the last metrics."""
    state = start(trainer)
    for seed in range(steps):
        state, metrics = trainer.advance(state, trainer.place(batch(seed=seed)))
        jax.block_until_ready(state)
    return jax.device_get((state.params, metrics))


# --- A step ----------------------------------------------------------------------------------


def by_hand(tx, trainer):
    """The loss, gradient and params of one step, from all logits at once."""
    lm, given = LanguageModel(NORMED, "float32", remat=False), batch()

    def objective(params):
        logits = lm.logits(params, lm.hidden(params, given.tokens, given.segments)[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, given.targets)
        hit = (jnp.argmax(logits, axis=-1) == given.targets) * given.mask
        return jnp.sum(losses * given.mask) / given.mask.sum(), hit.sum() / given.mask.sum()

    params = jax.device_put(initial(), trainer.places)
    with jax.set_mesh(trainer.mesh):

        @jax.jit
        def step(params):
            (loss, hits), gradient = jax.value_and_grad(objective, has_aux=True)(params)
            updates, _ = tx.update(gradient, tx.init(params), params)
            return loss, hits, optax.tree.norm(gradient), optax.apply_updates(params, updates)

        return jax.device_get(step(params))


@pytest.mark.parametrize("arm", ["adamw", "muon_adamw"])
def test_a_step_is_the_one_by_hand(arm):
    trainer = trainer_of(training(clip=0.5, warmup=0), arm)
    adam = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1}
    if arm == "adamw":
        tx = optax.adamw(1e-2, **adam)
    else:
        tx = muon_jax.muon(1e-2, scale="match_rms_adamw", weight_decay=0.1, adam_b2=0.95)
    loss, hits, norm, params = by_hand(optax.chain(optax.clip_by_global_norm(0.5), tx), trainer)
    ours, metrics = stepped(trainer)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(hits)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.5
    assert metrics["learnt"] == batch().mask.sum()
    assert apart(ours, params, initial()) < 5e-4


def test_microbatches_and_devices_change_no_update():
    """Masks are uneven: a mean of means would be another loss."""
    config = training()
    params, whole = stepped(trainer_of(config, "muonclip"), steps=2)
    parts = dataclasses.replace(config, accumulate=4)
    split, metrics = stepped(trainer_of(parts, "muonclip"), steps=2)
    assert apart(split, params, initial()) < 5e-4
    for name in ("loss", "gradient_norm", "accuracy", "max_logit"):
        assert metrics[name] == pytest.approx(whole[name], rel=1e-4)
    assert metrics["learnt"] == whole["learnt"]
    spread = dataclasses.replace(config, accumulate=2)
    mesh = mesh_of(1, 4, 1, 2)
    everywhere, metrics = stepped(trainer_of(spread, "muonclip", NORMED, mesh), steps=2)
    assert apart(everywhere, params, initial()) < 5e-4
    assert metrics["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_one_gradient_of_uneven_microbatches_is_that_of_the_whole_batch():
    config = training(clip=1e9, warmup=0)
    found = []
    for accumulate in (1, 4):
        trainer = trainer_of(dataclasses.replace(config, accumulate=accumulate))
        with jax.set_mesh(trainer.mesh):
            run = jax.jit(trainer._gradient)
            found.append(
                jax.device_get(
                    run(jax.device_put(initial(), trainer.places), {}, trainer.place(batch()))
                )
            )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert_close(found[1][1], found[0][1], 1e-5)


def test_mean_token_accuracy_is_a_mean_of_microbatches():
    config = training(accumulate=4)
    trainer = trainer_of(config)
    state = start(trainer)
    params = jax.device_get(state.params)
    _, metrics = trainer.advance(state, trainer.place(batch()))
    given, lm = batch(), LanguageModel(NORMED, "float32", remat=False)
    with jax.set_mesh(trainer.mesh):
        run = jax.jit(lambda *x: lm.logits(x[0], lm.hidden(*x)[0]))
        logits = run(jax.device_put(params, trainer.places), given.tokens, given.segments)
    hits = (np.argmax(np.asarray(logits), -1) == given.targets) * given.mask
    parts = hits.reshape(4, -1).sum(1) / given.mask.reshape(4, -1).sum(1)
    assert float(metrics["mean_token_accuracy"]) == pytest.approx(parts.mean(), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(hits.sum() / given.mask.sum(), rel=1e-6)


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of a window that begins with token 63 is NaN."""
    plain = LanguageModel.loss

    def loss(self, params, tokens, *rest, **how):
        mean, found = plain(self, params, tokens, *rest, **how)
        return mean * jnp.where(jnp.any(tokens[:, 0] == 63), jnp.nan, 1.0), found

    monkeypatch.setattr(LanguageModel, "loss", loss)


def poison(given):
    given.tokens[0, 0] = 63
    return given


def test_a_step_that_is_not_finite_changes_nothing(poisoned):
    trainer = Trainer(training(), "adamw", NORMED, mesh_of(1, 1, 1, 1))
    state, _ = trainer.advance(start(trainer), trainer.place(batch()))
    before = jax.device_get(state)
    state, metrics = trainer.advance(state, trainer.place(poison(batch())))
    assert not metrics["taken"] and metrics["nonfinite_in_a_row"] == 1 and metrics["skipped"] == 1
    assert_same_bits(state.params, before.params)
    assert_same_bits(state.opt_state, before.opt_state)
    state, metrics = trainer.advance(state, trainer.place(batch(seed=1)))
    assert metrics["taken"] and metrics["nonfinite_in_a_row"] == 0
    assert metrics["learning_rate"] == pytest.approx(1e-2)  # of the second update


def test_a_run_without_finite_steps_stops_and_says_so(poisoned, tmp_path):
    trainer = Trainer(training(max_nonfinite_steps=3), "adamw", NORMED, mesh_of(1, 1, 1, 1))
    rows = prepared()
    rows.train.tokens[:] = 63
    with pytest.raises(TrainingError, match="3 consecutive steps had NaN or Inf in their loss"):
        run(trainer, tmp_path, rows=rows)


def test_params_that_an_update_breaks_are_not_saved(tmp_path):
    config = training(warmup=0, with_={"learning_rate": 3e38})
    with pytest.raises(TrainingError, match=r"update contains NaN or Inf.*learning-rate 3e\+38"):
        run(trainer_of(config), tmp_path / "run")
    assert not [*(tmp_path / "run" / "checkpoints").glob("[0-9]*")]


def test_a_batch_that_devices_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"= 8 sequences, which must be a multiple .* = 16"):
        Trainer(training(), "adamw", NORMED, mesh_of(1, 16, 1, 1))
    with pytest.raises(ValueError, match=r"divide the model's kv_heads, 2; got 4"):
        Trainer(training(), "adamw", NORMED, mesh_of(1, 1, 1, 4))
    with pytest.raises(ValueError, match="less than the steps of --epochs 1, 1; got 2"):
        training(steps=0).with_steps(8)


# --- Runs ------------------------------------------------------------------------------------


def run(trainer, folder, stop_after=None, rows=None, **calls):
    """Trains in this process; whether it finished."""
    stop = threading.Event()

    def on_step(progress):
        if stop_after is not None and progress.step >= stop_after:
            stop.set()

    def load(mesh):
        places = model.shardings(NORMED, mesh)
        return jax.device_put(initial(), places, may_alias=False)

    folder.mkdir(exist_ok=True)
    begin = loop.Start("counting", NORMED, load)
    rows = rows or prepared()
    given = trainer, OFTEN, rows, begin, epath.Path(folder), stop
    return loop.FineTuning(*given, on_step=on_step, **calls).to_the_end()


def records(folder):
    timeless = ("seconds", "tokens_per_second")
    found, damage = log.read(epath.Path(folder))
    assert not damage
    return [{k: v for k, v in record.items() if k not in timeless} for record in found]


def test_stopping_and_going_on_gives_the_same_bits(tmp_path):
    trainer = trainer_of(training(), "muon_adamw")
    exported = []
    assert run(trainer, tmp_path / "whole", on_finish=lambda p: exported.append(jax.device_get(p)))
    for stop in (3, 4, 9, None):
        assert run(trainer, tmp_path / "parts", stop_after=stop) == (stop is None)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    seen = records(tmp_path / "whole")
    losses = [r["loss"] for r in seen if "loss" in r]
    held_out = [r["validation_loss"] for r in seen if "validation_loss" in r]
    assert len(losses) == 12 and len(held_out) == 3
    assert losses[-1] < losses[0] and held_out[-1] < held_out[0]
    ours, theirs = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("parts", "whole")
    )
    assert ours["params_sha256"] == theirs["params_sha256"]
    assert ours["gradient_norm_spread"] > 0 and ours["arm"] == "muon_adamw"
    checkpoints = Checkpoints(tmp_path / "parts" / "checkpoints")
    assert_same_bits(checkpoints.restore(trainer.abstract).state.params, exported[0])
    checkpoints.close()
    with pytest.raises(ValueError, match="trained on other data"):
        run(trainer, tmp_path / "whole", rows=prepared(seed=5))


def test_cells_are_pure_functions_on_any_device():
    config, rows = training(accumulate=2), prepared()
    found = {}

    def work(job, device):
        rate, name = job
        given = config, rows, "adamw", NORMED, initial(), rate, 1, OFTEN, device
        found[name] = loop.train_cell(*given)

    jobs = [(1e-2, "a"), (1e-2, "b"), (3e-2, "c")]
    run_in_parallel(jobs, lambda job: job[1], work, threading.Event())
    (a, outcome), (b, _), (c, _) = (found[name] for name in "abc")
    assert [e["validation_loss"] for e in a] == [e["validation_loss"] for e in b]
    assert a[-1]["losses"] == b[-1]["losses"] and a[-1]["losses"] != c[-1]["losses"]
    assert [e["step"] for e in a] == [0, 6, 12] and a[0]["train_loss"] is None
    assert len(a[1]["gradient_norms"]) == len(a[1]["group_norms"]["gains"]) == 6
    assert outcome["validation_loss"] == a[-1]["validation_loss"] < a[0]["validation_loss"]
    assert not outcome["diverged"] and outcome["steps_run"] == 12
    json.dumps([a, outcome], allow_nan=False)


def test_a_cell_that_diverges_says_so():
    rows = prepared()
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), initial())
    given = training(accumulate=2), rows, "adamw", NORMED, broken, 1e-2, 0, OFTEN, jax.devices()[0]
    history, outcome = loop.train_cell(*given)
    assert outcome["diverged"] and outcome["validation_loss"] is None and not history


# --- Memory ----------------------------------------------------------------------------------


def case_of(size, arm, mesh=None, **changes):
    settings = {"dtype": "bfloat16", "remat": True, "context": 2048, "batch": 1} | changes
    return plan.case_of(training(**settings), arm, mesh or mesh_of(1, 1, 1, 1), PRESETS[size])


def test_a_plan_of_4b_is_what_is_known():
    muon, adamw = (case_of("4b", arm).memory for arm in ("muon_adamw", "adamw"))
    # The tied embedding has both moments of AdamW: 0.39 B params.
    assert sum(muon.held.values()) == pytest.approx(48e9 + 4 * 0.39e9, rel=0.02)
    assert sum(adamw.held.values()) == pytest.approx(64e9, rel=0.01)
    assert muon.held["params, float32"] == 4 * PRESETS["4b"].parameters
    quarter = case_of("4b", "adamw", mesh_of(1, 4, 1, 1), batch=4).memory
    assert sum(quarter.held.values()) == pytest.approx(sum(adamw.held.values()) / 4, rel=0.001)


def test_what_fits_is_trained_and_what_does_not_is_refused():
    for size in ("0.6b", "1.7b"):
        planning.check(case_of(size, "adamw"), 80 * 10**9)
    planning.check(case_of("4b", "muonclip"), 80 * 10**9)
    with pytest.raises(planning.TooLarge, match=r"alone take 64.36 GB.*--mesh.fsdp"):
        planning.check(case_of("4b", "adamw"), 24 * 10**9)
    with pytest.raises(planning.TooLarge, match="use --accumulate 4; shorten --context"):
        planning.check(case_of("1.7b", "adamw", batch=256), 80 * 10**9)
    small = trainer_of(training(), "muon_adamw")
    with pytest.raises(planning.TooLarge, match="The compiled step of muon_adamw requires"):
        planning.check(plan.case(small), 10**5, planning.compiled_bytes(small.program))


@pytest.mark.parametrize(("gigabytes", "fsdp"), [(24, 8), (32, 4), (0.1, None)])
def test_a_mesh_that_is_advised_fits(gigabytes, fsdp):
    """Of 2, 4 and 8 devices, which divide the batch."""
    with pytest.raises(planning.TooLarge) as refused:
        planning.check(case_of("4b", "adamw", batch=8), round(gigabytes * 1e9))
    if fsdp is None:
        assert "no --mesh.fsdp that divides" in str(refused.value)
        return
    assert f"shard it over {fsdp} devices with --mesh.fsdp {fsdp};" in str(refused.value)
    planning.check(case_of("4b", "adamw", mesh_of(1, fsdp, 1, 1), batch=8), gigabytes * 10**9)


def test_arms_that_fit_are_advised_in_place_of_one_that_does_not():
    with pytest.raises(
        planning.TooLarge, match="use --optimizers muon_frozen1d muon_adamw muonclip, wh"
    ):
        planning.check(case_of("4b", "adamw", batch=8), 80 * 10**9)
    with pytest.raises(planning.TooLarge) as refused:
        planning.check(case_of("4b", "adamw", batch=8), 60 * 10**9)
    assert "--optimizers" not in str(refused.value)


# --- The command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--accumulate 3", "--accumulate must divide --batch"),
        ("--optimizers adamw adamw", "requires one or more different values; got adamw adamw"),
        ("--preset 4b", "--preset requires --dry-run or --compile-only"),
        ("--warmup 500", "less than --steps 100; got 500"),
        ("--context 1", "--context must be at least 2; got 1"),
        ("--optimizer.b1 1", "--optimizer.b1 must be at least 0 and less than 1"),
        ("--optimizer.b2 1", "--optimizer.b2 must be at least 0 and less than 1"),
        ("--optimizer.beta -0.1", "as the decay rate of an average; got -0.1"),
        ("--optimizer.weight-decay -1", "--optimizer.weight-decay must be at least 0; got -1"),
        (
            "--optimizer.learning-rate inf",
            "a finite number of at most 3.4e+38; got inf",
        ),
        ("--final-lr-fraction 1.5", "--final-lr-fraction must be from 0 to 1; got 1.5"),
        ("--seed -1", "--seed must be at least 0; got -1"),
        ("--epochs inf", "--epochs must be a finite number"),
        ("--warmup 3 --steps 3", "less than --steps 3; got 3. Use fewer"),
        ("--base.hidden 0", "--base.hidden must be at least 1; got 0"),
        ("--base.heads 3", "--base.heads must be even and at least 2"),
        ("--base.head-dim 3", "--base.head-dim must be even and at least 2, since RoPE"),
        ("--base.vocabulary 258", "--base.vocabulary must be at least 259"),
        (
            "--base.learning-rate 0",
            "--base.learning-rate must be greater than 0",
        ),
        ("--model x --out gs://a/b", "Give --export False"),
        ("--suite qk --preset 4b --dry-run", "remove --preset 4b"),
        ("--topology h100:8", "--compile-only and --topology require each other"),
        ("--dry-run --topology h100:8", "require each other and exclude --dry-run"),
        ("--compile-only --topology h100:8 --suite qk", "--compile-only excludes --suite qk"),
        ("--suite bogus", "For full helptext, run python -m experiments.finetune"),
        ("--suite", "Missing value for argument '--suite'"),
        ("--model", "Missing value for argument '--model'"),
    ],
)
def test_wrong_options_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(words.split())
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_defaults_of_a_real_model_are_its_own():
    assert command.parse([]).dtype == "float32" and command.parse([]).model is None
    real = command.parse(["--model", "somewhere", "--context", "128"])
    assert (real.dtype, real.remat, real.context) == ("bfloat16", True, 128)
    assert real.optimizer.learning_rate < command.parse([]).optimizer.learning_rate


def test_only_the_command_without_arguments_is_cut_short():
    assert command.parse([]).steps == 100
    for words in (["--suite", "controlled"], ["--suite", "as_published"]):
        suite = command.parse(words)
        assert (suite.steps, suite.evaluation_tokens) == (200, 32_768)
    real = command.parse(["--model", "somewhere"])
    assert (real.steps, real.evaluation_tokens) == (0, 32_768)


def test_a_warm_up_that_nobody_asked_for_gives_way_to_a_short_training():
    def warmup(words, windows, usual=10):
        return command.parse(words.split()).training().with_steps(windows, usual).warmup

    assert warmup("", 999) == 10
    assert warmup("--suite controlled", 999) == 10
    assert warmup("--model x --steps 400", 999, 20) == 20
    assert warmup("--model x --steps 3", 999, 20) == 0
    assert warmup("--model x", 8 * 50, 20) == 5
    assert warmup("--model x --steps 3 --warmup 2", 999, 20) == 2


def test_a_model_that_is_no_folder_is_refused_with_a_way_to_get_it(monkeypatch, capsys, tmp_path):
    for name in ("Qwen/Qwen3-0.6B", "/nope"):
        monkeypatch.setattr(sys, "argv", ["finetune", "--model", name])
        assert command.main() == 2
        said = capsys.readouterr().err
        assert f"{name} is not a folder here" in said
        assert "`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B`" in said
    monkeypatch.setattr(
        sys, "argv", ["finetune", "--suite", "controlled", "--model", str(tmp_path)]
    )
    assert command.main() == 2
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        (["--data", "{}/none.jsonl"], None, "does not exist"),
        (["--data", "{}/rows.csv"], "{}", "must end in one of .jsonl"),
        (["--data", "{}/rows.jsonl"], "[", "rows.jsonl:1: invalid JSON"),
        (["--data", "{}/rows.jsonl"], "5", "an example must be an object; got int"),
        (["--mesh.tensor", "3"], None, "does not fit 16 devices"),
        (
            ["--mesh.data", "16", "--mesh.fsdp", "1", "--batch", "6"],
            None,
            "a multiple of the mesh axes",
        ),
    ],
)
def test_a_base_is_not_pretrained_for_what_will_be_refused(
    words, rows, said, monkeypatch, capsys, tmp_path
):
    if rows:
        (tmp_path / words[1].removeprefix("{}/")).write_text(rows)
    words = [word.format(tmp_path) for word in words]
    monkeypatch.setattr(sys, "argv", ["command", *words, "--out", str(tmp_path / "out")])
    monkeypatch.setattr(command.base, "prepare", lambda *_: pytest.fail("it was"))
    assert command.main() == 2
    assert said in capsys.readouterr().err


def test_a_context_beyond_the_models_positions_is_told(monkeypatch, capsys):
    for context, told in (("40960", False), ("40961", True)):
        words = f"finetune --dry-run --preset 0.6b --batch 1 --context {context}"
        monkeypatch.setattr(sys, "argv", [*words.split(), "--device-memory", "999"])
        assert command.main() == 0
        assert (
            "exceeds the model's max_position_embeddings 40,960" in capsys.readouterr().out
        ) == told


def test_a_suite_is_planned_before_its_models_are_read(monkeypatch, capsys):
    def fail(*given):
        raise AssertionError("a suite that does not fit, or is only planned, has begun")

    monkeypatch.setattr(command, "suite", fail)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["finetune", "--suite", "as_published", "--dry-run"])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "without muon_of_tables\n" in said and "without decay_apart," in said
    words = "finetune --suite controlled --device-memory"
    monkeypatch.setattr(sys, "argv", [*words.split(), "0.129"])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert (
        "planned step of adamw requires" in said
        and "--optimizers muon_frozen1d muon_adamw muonclip" in said
    )
    assert "--mesh" not in said  # each training is one device's
    monkeypatch.setattr(sys, "argv", [*words.split(), "80", "--preset", "4b", "--dry-run"])
    assert command.main() == 2
    assert "84.70 GB" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_refuses(monkeypatch, capsys):
    words = "finetune --dry-run --preset 4b --device-memory 80 --optimizers muon_adamw"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setenv("COLUMNS", "200")
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "16.09 GB" in said
    assert "one device for each optimizer" in said and "--mesh" not in said
    monkeypatch.setattr(sys, "argv", f"{words} adamw --device-memory 60".split())
    assert command.main() == 2
    assert "requires" in capsys.readouterr().err


def test_a_step_is_compiled_for_a_topology(monkeypatch, capsys):
    chip = Chip("made up", bandwidth=1e9, flops=1e10, launch=1e-6)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    monkeypatch.setitem(MEMORY, "cpu", 1.0)
    monkeypatch.setattr(compile_only, "topology_devices", lambda name: jax.devices()[:2])
    monkeypatch.setenv("COLUMNS", "200")
    small = "--base.layers 1 --base.hidden 16 --base.ffn 16 --base.heads 2 --base.head-dim 8"
    words = (
        f"finetune --compile-only --topology made:2 --optimizers muon_adamw --context 16 {small}"
    )
    monkeypatch.setattr(sys, "argv", words.split())
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "on 2 devices of made:2 (cpu), data 1 × fsdp 2" in said
    for text in ("kernels", "HBM traffic", "roofline", "all-reduce", "temporaries"):
        assert re.search(rf"^{text} .*\d", said, re.MULTILINE), text
    assert "Roofline of made up" in said and "Most expensive kernels of" in said
    monkeypatch.setattr(sys, "argv", [*words.split(), "--device-memory", "0.001"])
    assert command.main() == 2
    assert "The planned step of muon_adamw requires" in capsys.readouterr().err


def begin(words, out, devices=None):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    if devices:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    line = [sys.executable, "-m", "experiments.finetune", *words.split(), "--out", str(out)]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_killed_command_goes_on_and_writes_the_model(tmp_path):
    folder, rows = written(tmp_path, dataclasses.replace(NORMED, vocabulary=320))
    words = f"--model {folder} --data {rows} --context 32 --batch 4 --accumulate 2 --steps 40"
    words += " --warmup 2 --save-every 5 --evaluate-every 20 --dtype float32 --optimizers muonclip"
    process = begin(words, tmp_path / "killed")
    log = tmp_path / "killed" / "muonclip" / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 7' in log.read_text(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (log.parent / "summary.json").exists()
    for out in ("killed", "whole"):
        said, error = begin(words, tmp_path / out).communicate(timeout=240)
        assert "MuonClip" in said, error[-3000:]
    ours, theirs = (
        json.loads((tmp_path / out / "muonclip" / "summary.json").read_text())
        for out in ("killed", "whole")
    )
    assert ours["params_sha256"] == theirs["params_sha256"]
    assert records(log.parent) == records(tmp_path / "whole" / "muonclip")
    _, params = weights.read(log.parent / "model")
    assert params["norm"]["scale"].shape == (32,)
    assert (log.parent / "model" / "tokenizer.json").exists()


@pytest.mark.slow
def test_two_processes_train_and_write_one_model(tmp_path):
    folder, rows = written(tmp_path, dataclasses.replace(NORMED, vocabulary=320))
    words = f"--model {folder} --data {rows} --context 32 --batch 8 --accumulate 2 --steps 6"
    words += " --warmup 1 --dtype float32 --optimizers muonclip --mesh.data 1 --mesh.fsdp 4"
    # jordan's steep steps make rounding of the least singular values a hundredth of the update.
    words += " --optimizer.ns-coeffs exact"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = f"{words} --processes.coordinator localhost:{port} --processes.count 2"
    each = [begin(f"{shared} --processes.index {i}", tmp_path / "two", 2) for i in range(2)]
    said = [process.communicate(timeout=240) for process in each]
    assert [process.returncode for process in each] == [0, 0], said[0][1][-3000:]
    assert "MuonClip" in said[0][0] and "MuonClip" not in said[1][0]
    alone = begin(words, tmp_path / "one", 4)
    _, error = alone.communicate(timeout=240)
    assert alone.returncode == 0, error[-3000:]
    ours, theirs = (tmp_path / out / "muonclip" for out in ("two", "one"))
    assert [r["step"] for r in records(ours)] == [r["step"] for r in records(theirs)]
    two, one = (weights.read(folder / "model")[1] for folder in (ours, theirs))
    start = weights.read(folder)[1]
    assert apart(*jax.device_get((two, one, start))) < 1e-3
    assert (ours / "model" / "tokenizer.json").exists()
    assert not list(ours.glob(".model*")) and (tmp_path / "two" / "report.html").exists()


def one_arm(tmp_path, monkeypatch, *more):
    folder, rows = written(tmp_path, dataclasses.replace(NORMED, vocabulary=320))
    words = f"finetune --model {folder} --data {rows} --context 32 --batch 4 --steps 6"
    words += f" --dtype float32 --optimizers adamw --out {tmp_path / 'runs'}"
    monkeypatch.setattr(sys, "argv", [*words.split(), *more])
    monkeypatch.setattr(commands, "stop_on_signals", threading.Event)
    return folder


def test_tensors_are_checked_before_rows_are_read(tmp_path, monkeypatch, capsys):
    folder = one_arm(tmp_path, monkeypatch)
    architecture, params = weights.read(folder)
    (folder / "model.safetensors").unlink()
    weights.write(tmp_path / "shards", architecture, params, shard=20_000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors*"))
    for path in shards:
        path.rename(folder / path.name)
    (folder / shards[1].name).unlink()

    def fail(*given, **more):
        raise AssertionError("rows are read")

    monkeypatch.setattr(command.data, "prepare", fail)
    assert command.main() != 0
    assert shards[1].name in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_cannot_be_is_refused_before_rows_are_read(tmp_path, monkeypatch, capsys):
    one_arm(tmp_path, monkeypatch, "--lora.rank", "17")
    monkeypatch.setattr(command.data, "prepare", None)
    assert command.main() == 2
    assert "Use at most 16, or remove key from --lora.targets" in capsys.readouterr().err


def test_an_out_with_other_files_is_refused_before_rows_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_prepare", None)
    (tmp_path / "thesis.tex").write_text("x")
    for more in ([], ["--suite", "controlled"]):
        monkeypatch.setattr(sys, "argv", ["finetune", "--out", str(tmp_path), *more])
        monkeypatch.setattr(plan, "plan_suite", lambda *given: None)
        assert command.main() == 2
        assert "holds thesis.tex but no run of this study" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_failed_leaves_the_folder_free(tmp_path, monkeypatch, capsys):
    def fail(*given, **callbacks):
        raise ValueError("the weights are broken")

    monkeypatch.setattr(command.loop, "FineTuning", fail)
    monkeypatch.setattr(planning, "compiled_bytes", lambda program: 0)
    for seed in "01":
        one_arm(tmp_path / seed, monkeypatch, "--seed", seed, "--out", str(tmp_path / "runs"))
        assert command.main() == 2
        assert "the weights are broken" in capsys.readouterr().err


def test_side_by_side_and_again(tmp_path, monkeypatch):
    folder, rows = written(tmp_path, dataclasses.replace(NORMED, vocabulary=320))
    words = f"finetune --model {folder} --data {rows} --context 32 --batch 4 --accumulate 1"
    words += " --steps 6 --warmup 1 --dtype float32 --optimizers adamw muon_adamw --out"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "runs")])
    monkeypatch.setattr(commands, "stop_on_signals", threading.Event)
    assert command.main() == 0
    summaries = [tmp_path / "runs" / arm / "summary.json" for arm in ("adamw", "muon_adamw")]
    first = [path.read_text() for path in summaries]
    assert command.main() == 0  # what is finished is not trained again
    assert [path.read_text() for path in summaries] == first
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "runs"), "--seed", "1"])
    assert command.main() == 2
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "runs")])
    tensors = next(folder.glob("*.safetensors"))
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # other weights of equal size
    assert command.main() == 2


def test_an_interrupted_command_reports_on_what_there_is(tmp_path, monkeypatch, capsys):
    folder, rows = written(tmp_path, dataclasses.replace(NORMED, vocabulary=320))
    words = f"finetune --model {folder} --data {rows} --context 32 --batch 4 --accumulate 1"
    words += f" --steps 6 --warmup 1 --dtype float32 --optimizers adamw --out {tmp_path / 'runs'}"
    stop = threading.Event()
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(commands, "stop_on_signals", lambda: stop)
    stop_at_3 = lambda progress: progress.step < 3 or stop.set()  # noqa: E731
    monkeypatch.setattr(command, "showing", lambda *line: stop_at_3)
    assert command.main() == 130
    assert "of 6" in capsys.readouterr().out
    assert "of 6 steps" in (tmp_path / "runs" / "report.html").read_text()
    stop.clear()
    monkeypatch.setattr(command, "showing", lambda *line: lambda progress: None)
    assert command.main() == 0
    assert "of 6 steps" not in (tmp_path / "runs" / "report.html").read_text()
