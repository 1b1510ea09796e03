"""LoRA: what is trained and what is not, merged models, runs that go on, meshes and memory."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from etils import epath
from finetuning import NORMED, batch, initial, run, start, stepped, trainer_of, training
from pretraining import mesh_of
from trajectories import apart

import muon_jax
from experiments import log
from experiments.finetune import arms, lora, model, plan
from experiments.finetune.architecture import PRESETS
from experiments.finetune.config import Lora
from experiments.finetune.packing import Rows
from experiments.finetune.step import Trainer
from experiments.language import planning
from experiments.language.checkpoints import Checkpoints
from experiments.language.planning import compiled_bytes

ROOT = Path(__file__).parent.parent
OF = Lora(rank=4, targets=("query", "out", "down"))
PLAIN = dataclasses.replace(NORMED, family="llama")


@functools.cache
def trained(arm):
    trainer = trainer_of(training(lora=OF, with_={"clip_threshold": 1.0}), arm)
    return trainer, *stepped(trainer, steps=3)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("arm", arms.ARMS)
def test_an_arm_trains_the_factors_of_the_targets_alone(arm):
    trainer, state, metrics = trained(arm)
    factors = [f"{m}/adapter/lora_{f}" for m in ("query", "out", "down") for f in "ab"]
    found = paths(state.params)
    adapters = {path for path in found if "lora" in path}
    assert {"/".join(path.split("/")[2:]) for path in adapters} == set(factors)
    clipped = {"layers/attention/query_norm/scale", "layers/attention/key_norm/scale"}
    assert found.keys() - adapters == (clipped if arm == "muonclip" else set())
    assert all(np.any(np.asarray(found[path]) != 0) for path in adapters)
    labels = paths(trainer.arm.labels)
    assert {labels[path] for path in adapters} == {"adamw" if arm == "adamw" else "muon"}
    # No moment is of anything else.
    most = sum(leaf.size for leaf in found.values())
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert 0 < moments <= (2 if arm == "adamw" else 1) * most
    base = paths(initial())
    for path, leaf in paths(state.frozen).items():
        np.testing.assert_array_equal(leaf, base[path])
    for path in clipped & found.keys():
        assert np.all(found[path] < base[path])  # the clip acts, and nothing else
    assert np.isfinite(metrics["loss"]) and metrics["taken"]


@pytest.mark.parametrize("arm", arms.ARMS)
def test_a_merged_model_is_the_adapted_one(arm):
    trainer, state, _ = trained(arm)
    merged = trainer.exported(state)
    assert jax.tree.structure(merged) == jax.tree.structure(model.shapes(NORMED))
    tokens = batch().tokens
    with jax.set_mesh(trainer.mesh):

        def logits(lm, params):
            return lm.logits(params, lm.hidden(params, tokens)[0])

        adapted = jax.jit(functools.partial(logits, trainer.model))(trainer.evaluated(state))
        plain = model.LanguageModel(NORMED, "float32", remat=False)
        run = jax.jit(functools.partial(logits, plain))
        ours, before = run(merged), run(jax.device_put(initial(), trainer.places))
    scale = np.abs(adapted).max()
    assert np.abs(ours - adapted).max() < 1e-5 * scale
    assert np.abs(before - adapted).max() > 1e-2 * scale


def test_the_first_loss_is_the_models_own():
    """The product of new factors is zero; alpha / rank scales it."""
    trainer = trainer_of(training(lora=OF))
    windows = trainer.place_whole(batch())
    own = trainer_of(training())
    before = own.evaluate(jax.device_put(initial(), own.places), windows)["loss"]
    whole = trainer.evaluated(start(trainer))
    np.testing.assert_allclose(trainer.evaluate(whole, windows)["loss"], before, rtol=1e-6)
    ones = jax.tree.map(np.ones_like, whole["layers"]["attention"]["query"])
    kernel = lora.merge({"query": ones}, OF)["query"]["kernel"]
    np.testing.assert_allclose(kernel, 1 + 16 / 4 * 4, rtol=1e-6)


def test_a_mesh_and_microbatches_change_no_factor():
    config = training(lora=OF)
    one, _ = stepped(trainer_of(config, "muon_adamw"), steps=2)
    begun = start(trainer_of(config, "muon_adamw"))
    split = dataclasses.replace(config, accumulate=2)
    spread, _ = stepped(trainer_of(split, "muon_adamw", NORMED, mesh_of(1, 2, 1, 2)), steps=2)
    assert apart(jax.device_get(spread.params), one.params, begun.params) < 5e-4


def test_a_run_goes_on_with_the_same_bits_and_its_checkpoints_have_no_model(tmp_path):
    trainer, parts, merged = trained("muonclip")[0], tmp_path / "parts", []
    row = np.arange(12, dtype=np.int32) % 5
    told = {"text": Rows.of([(row, np.arange(12) > 0)] * 9), "on_finish": merged.append}
    assert run(trainer, tmp_path / "whole", **told)
    for stop in (3, 9, None):
        assert run(trainer, parts, stop, **told) == (stop is None)
    jax.tree.map(np.testing.assert_array_equal, *merged)
    # What is forgotten of other text is measured whenever held-out rows are.
    ours, whole = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("parts", "whole")
    )
    found, _ = log.read(epath.Path(parts))
    told = {r["step"]: r["pretraining_loss"] for r in found if "validation_loss" in r}
    assert sorted(told) == [0, 6, 12] and told[12] == ours["pretraining_loss"] != told[0]
    lm = model.LanguageModel(NORMED, "float32", remat=False)
    with jax.set_mesh(trainer.mesh):
        params = jax.device_put(initial(), trainer.places)
        logits = lm.logits(params, lm.hidden(params, row[None])[0])[0]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:-1], row[1:])
    assert told[0] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert ours["params_sha256"] == whole["params_sha256"]
    checkpoints = Checkpoints(parts / "checkpoints")
    kept = checkpoints.restore(trainer.abstract._replace(frozen={})).state
    assert not kept.frozen and paths(kept.params).keys() == paths(trainer.abstract.params).keys()
    checkpoints.close()


def test_memory_has_no_gradient_and_no_state_of_what_is_frozen():
    large = dataclasses.replace(NORMED, hidden=128, ffn=512, vocabulary=2048)
    settings = {"context": 64, "batch": 1, "remat": True}
    full, small = (
        Trainer(training(lora=of, **settings), "muon_adamw", large, mesh_of(1, 1, 1, 1))
        for of in (Lora(), OF)
    )
    case, entries = plan.case(small), sum(x.size for x in jax.tree.leaves(model.shapes(large)))
    held = case.memory.held
    assert held["frozen params, float32"] == 4 * entries
    assert held["params, float32"] == held["gradient, float32"] < 0.1 * 4 * entries
    assert case.flops < plan.case(full).flops
    # The compiler finds no use for gradients of kernels and tables: three copies are gone.
    saved = compiled_bytes(full.program) - compiled_bytes(small.program)
    assert saved > 1.8 * 4 * entries
    narrow = Trainer(
        training(lora=OF, dtype="bfloat16", **settings), "muon_adamw", large, mesh_of(1, 1, 1, 1)
    )
    assert plan.case(narrow).memory.held["frozen params, bfloat16"] == 2 * entries


def test_lora_is_advised_where_it_would_fit():
    config = training(context=2048, batch=1, dtype="bfloat16", remat=True, steps=100)
    case = plan.case_of(config, "adamw", mesh_of(1, 1, 1, 1), PRESETS["4b"])
    assert "use --lora.rank 16, which trains" in planning.remedies(case, 20 * 10**9)
    assert "--lora" not in planning.remedies(case, 5 * 10**9)


def test_what_lora_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"key is 32 × 16; got 17. Use at most 16, or remove key"):
        trainer_of(training(lora=Lora(rank=17)))
    with pytest.raises(ValueError, match=r"muonclip scales W_q and W_k of this llama"):
        trainer_of(training(lora=OF), "muonclip", PLAIN)
    assert muon_jax.routing_table(trained("adamw")[0].abstract.params).count("a LoRA factor") == 6


def test_the_plan_is_the_one_of_the_readme():
    config = training(
        lora=Lora(rank=16), context=2048, batch=8, dtype="bfloat16", remat=True, steps=100
    )
    case = plan.case_of(config, "muon_adamw", mesh_of(1, 1, 1, 1), PRESETS["0.6b"])
    count, whole = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (case.params, case.frozen)
    )
    held = case.memory.held
    own = sum(size for name, size in held.items() if "frozen" not in name)
    text = " ".join((ROOT / "experiments/finetune/README.md").read_text().split())
    assert f"{count / 1e6:.1f} M of {(count + whole) / 1e6:.0f} M parameters are trained" in text
    assert f"the plan has {own / 1e9:.2f} GB for them, their gradients and momentum" in text
    assert f"and {held['frozen params, bfloat16'] / 1e9:.2f} GB for the frozen ones" in text
