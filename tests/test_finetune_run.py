"""Fine-tuning steps against plain ones, runs that stop and go on, cells, and memory."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from finetuning import (
    NORMED,
    OFTEN,
    batch,
    initial,
    prepared,
    run,
    start,
    stepped,
    trainer_of,
    training,
)
from pretraining import mesh_of
from trajectories import apart

import muon_jax
from experiments import log
from experiments.finetune import loop, plan
from experiments.finetune.architecture import PRESETS
from experiments.finetune.model import LanguageModel
from experiments.finetune.step import Trainer
from experiments.language import planning
from experiments.language.checkpoints import Checkpoints
from experiments.language.training_loop import TrainingError
from experiments.parallel import run_in_parallel


def assert_same_bits(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


# --- A step ----------------------------------------------------------------------------------


def by_hand(tx, trainer):
    """The loss, which targets are hit, the gradient's norm and the params of one step."""
    lm, given = LanguageModel(NORMED, "float32", remat=False), batch()

    def objective(params):
        logits = lm.logits(params, lm.hidden(params, given.tokens, given.segments)[0])
        mask, targets = given.targets >= 0, np.maximum(given.targets, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = (jnp.argmax(logits, axis=-1) == targets) * mask
        return jnp.sum(losses * mask) / mask.sum(), hits

    params = jax.device_put(initial(), trainer.places)
    with jax.set_mesh(trainer.mesh):

        @jax.jit
        def step(params):
            (loss, hits), gradient = jax.value_and_grad(objective, has_aux=True)(params)
            updates, _ = tx.update(gradient, tx.init(params), params)
            return loss, hits, optax.tree.norm(gradient), optax.apply_updates(params, updates)

        return jax.device_get(step(params))


@pytest.mark.parametrize(("arm", "accumulate"), [("adamw", 1), ("muon_adamw", 4)])
def test_a_step_is_the_one_by_hand(arm, accumulate):
    trainer = trainer_of(training(clip=0.5, warmup=0, accumulate=accumulate), arm)
    if arm == "adamw":
        tx = optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.1)
    else:
        tx = muon_jax.muon(1e-2, scale="match_rms_adamw", weight_decay=0.1, adam_b2=0.95)
    loss, hits, norm, params = by_hand(optax.chain(optax.clip_by_global_norm(0.5), tx), trainer)
    state, metrics = jax.device_get(stepped(trainer))
    mask = batch().targets >= 0
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(hits.sum() / mask.sum(), rel=1e-6)
    each = [part.reshape(accumulate, -1).sum(1) for part in (hits, mask)]
    mean = np.mean(np.divide(*each))  # of microbatches, whatever their numbers of targets
    assert metrics["mean_token_accuracy"] == pytest.approx(mean, rel=1e-6)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.5
    assert metrics["learnt"] == mask.sum()
    assert apart(state.params, params, initial()) < 5e-4


def test_microbatches_and_devices_change_no_update():
    """Masks are uneven: a mean of means would be another loss."""
    config = training()
    whole, expected = jax.device_get(stepped(trainer_of(config, "muonclip"), steps=2))
    for accumulate, mesh in ((4, None), (2, mesh_of(1, 4, 1, 2))):
        parts = dataclasses.replace(config, accumulate=accumulate)
        state, metrics = stepped(trainer_of(parts, "muonclip", NORMED, mesh), steps=2)
        assert apart(jax.device_get(state.params), whole.params, initial()) < 5e-4
        for name in ("loss", "gradient_norm", "accuracy", "max_logit"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
        assert metrics["learnt"] == expected["learnt"]


def test_one_gradient_of_uneven_microbatches_is_that_of_the_whole_batch():
    found = []
    for accumulate in (1, 4):
        trainer = trainer_of(training(clip=1e9, warmup=0, accumulate=accumulate))
        given = jax.device_put(initial(), trainer.places), {}, trainer.place(batch())
        with jax.set_mesh(trainer.mesh):
            found.append(jax.device_get(jax.jit(trainer._gradient)(*given)[:2]))
    (whole, expected), (loss, gradient) = found
    assert loss == pytest.approx(whole, rel=1e-6)
    for x, y in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        assert np.max(np.abs(x - y)) < 1e-5 * max(np.max(np.abs(y)), 1e-3)


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of a window that begins with token 63 is NaN."""
    plain = LanguageModel.loss

    def loss(self, params, tokens, *rest, **how):
        mean, found = plain(self, params, tokens, *rest, **how)
        return mean * jnp.where(jnp.any(tokens[:, 0] == 63), jnp.nan, 1.0), found

    monkeypatch.setattr(LanguageModel, "loss", loss)


def test_a_step_that_is_not_finite_changes_nothing(poisoned):
    trainer = Trainer(training(), "adamw", NORMED, mesh_of(1, 1, 1, 1))
    state, _ = trainer.advance(start(trainer), trainer.place(batch()))
    before, poison = jax.device_get(state), batch()
    poison.tokens[0, 0] = 63
    state, metrics = trainer.advance(state, trainer.place(poison))
    assert not metrics["taken"] and metrics["nonfinite_in_a_row"] == 1 and metrics["skipped"] == 1
    assert_same_bits((state.params, state.opt_state), (before.params, before.opt_state))
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


def records(folder):
    timeless = ("seconds", "tokens_per_second")
    found, damage = log.read(epath.Path(folder))
    assert not damage
    return [{k: v for k, v in record.items() if k not in timeless} for record in found]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_stopping_and_going_on_gives_the_same_bits(tmp_path):
    trainer, whole, parts = trainer_of(training(), "muon_adamw"), tmp_path / "a", tmp_path / "b"
    exported = []
    assert run(trainer, whole, on_finish=lambda p: exported.append(jax.device_get(p)))
    for stop in (3, 4, 9, None):
        assert run(trainer, parts, stop_after=stop) == (stop is None)
    seen = records(whole)
    assert records(parts) == seen
    losses = [r["loss"] for r in seen if "loss" in r]
    held_out = [r["validation_loss"] for r in seen if "validation_loss" in r]
    assert len(losses) == 12 and len(held_out) == 3
    assert losses[-1] < losses[0] and held_out[-1] < held_out[0]
    assert summary(parts)["params_sha256"] == summary(whole)["params_sha256"]
    assert summary(parts)["gradient_norm_spread"] > 0 and summary(parts)["arm"] == "muon_adamw"
    checkpoints = Checkpoints(parts / "checkpoints")
    assert_same_bits(checkpoints.restore(trainer.abstract).state.params, exported[0])
    checkpoints.close()
    with pytest.raises(ValueError, match="trained on other data"):
        run(trainer, whole, rows=prepared(seed=5))


def test_cells_are_pure_functions_on_any_device():
    model, found = loop.Model("counting", NORMED, initial(), prepared()), {}

    def work(job, device):
        rate, name = job
        found[name] = loop.train_cell(
            training(accumulate=2), model, "adamw", rate, 1, OFTEN, device
        )

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
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), initial())
    given = training(accumulate=2), model._replace(params=broken), "adamw", 1e-2, 0, OFTEN
    history, outcome = loop.train_cell(*given, jax.devices()[0])
    assert outcome["diverged"] and outcome["validation_loss"] is None and not history


# --- Memory ----------------------------------------------------------------------------------


def case_of(size, arm, mesh=None, **changes):
    settings = {"dtype": "bfloat16", "remat": True, "context": 2048, "batch": 1} | changes
    return plan.case_of(training(**settings), arm, mesh or mesh_of(1, 1, 1, 1), PRESETS[size])


def refused(case, gigabytes, *more):
    with pytest.raises(planning.TooLarge) as error:
        planning.check(case, round(gigabytes * 1e9), *more)
    return str(error.value)


def test_a_plan_of_4b_is_what_is_known():
    muon, adamw = (case_of("4b", arm).memory for arm in ("muon_adamw", "adamw"))
    # The tied embedding has both moments of AdamW: 0.39 B params.
    assert sum(muon.held.values()) == pytest.approx(48e9 + 4 * 0.39e9, rel=0.02)
    assert sum(adamw.held.values()) == pytest.approx(64e9, rel=0.01)
    assert muon.held["params, float32"] == 4 * 4_022_468_096
    quarter = case_of("4b", "adamw", mesh_of(1, 4, 1, 1), batch=4).memory
    assert sum(quarter.held.values()) == pytest.approx(sum(adamw.held.values()) / 4, rel=0.001)


def test_what_fits_is_trained_and_what_does_not_is_refused():
    for size, arm in (("0.6b", "adamw"), ("1.7b", "adamw"), ("4b", "muonclip")):
        planning.check(case_of(size, arm), 80 * 10**9)
    said = refused(case_of("4b", "adamw"), 24)
    assert "alone take 64.36 GB" in said and "--mesh.fsdp" in said.partition("64.36 GB")[2]
    assert "use --accumulate 4; shorten --context" in refused(
        case_of("1.7b", "adamw", batch=256), 80
    )
    small = trainer_of(training(), "muon_adamw")
    size = planning.compiled_bytes(small.program)
    assert "The compiled step of muon_adamw requires" in refused(plan.case(small), 1e-4, size)


@pytest.mark.parametrize(("gigabytes", "fsdp"), [(24, 8), (32, 4), (0.1, None)])
def test_a_mesh_that_is_advised_fits(gigabytes, fsdp):
    """Of 2, 4 and 8 devices, which divide the batch."""
    said = refused(case_of("4b", "adamw", batch=8), gigabytes)
    if fsdp is None:
        assert "no --mesh.fsdp that divides" in said
        return
    assert f"shard it over {fsdp} devices with --mesh.fsdp {fsdp};" in said
    planning.check(case_of("4b", "adamw", mesh_of(1, fsdp, 1, 1), batch=8), gigabytes * 10**9)


def test_arms_that_fit_are_advised_in_place_of_one_that_does_not():
    advice = "use --optimizers muon_frozen1d muon_adamw muonclip, wh"
    case = case_of("4b", "adamw", batch=8)
    assert advice in refused(case, 80)
    assert "--optimizers" not in refused(case, 60)
