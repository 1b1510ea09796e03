"""What changes on the way of a training, and the average that is evaluated, in both trainers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from finetuning import NORMED, initial
from finetuning import training as finetuning
from pretraining import DENSE, VOCABULARY, mesh_of, training

import muon_jax
from experiments import optimizers
from experiments.finetune import __main__ as finetune_command
from experiments.finetune.packing import Batch
from experiments.finetune.step import Trainer as FineTuner
from experiments.pretrain import __main__ as command
from experiments.pretrain import plan
from experiments.pretrain.config import as_json
from experiments.pretrain.step import Trainer
from experiments.schedules import Schedules, warmup_then_decay

STEPS = (1, 2, 9, 10, 14, 17)  # of 20, of which 2 warm up


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 1, 0.65, 0.6, 0.4, 0.25]),
        ("cosine", [1, 1, 0.704, 0.628, 0.325, 0.160]),
        ("wsd", [1, 1, 1, 1, 1, 0.55]),
    ],
)
def test_a_schedule_is_the_one_of_its_name(name, wanted):
    schedule = warmup_then_decay(2, 20, name, 0.1, wsd_share=1 / 3)
    np.testing.assert_allclose([schedule(step) for step in STEPS], wanted, atol=1e-3)
    assert schedule(0) == 0.5
    cooled = warmup_then_decay(2, 30, name, 0.1, cooldown=10, wsd_share=1 / 3)
    np.testing.assert_allclose([cooled(step) for step in STEPS], wanted, atol=1e-3)
    assert cooled(25) == pytest.approx(0.5 if name == "constant" else 0.05)


def test_both_commands_take_the_names_and_files_of_before_stay():
    for parse in (command.parse, finetune_command.parse):
        words = "--schedule wsd --schedules.wsd-share 0.5 --schedules.beta 0.85 0.95"
        found = parse([*words.split(), "--schedules.average", "0.99"])
        assert (found.decay, found.schedules.beta) == ("wsd", (0.85, 0.95))
        assert parse(["--decay", "constant"]).decay == "constant"
        assert found.schedules == dataclasses.replace(found.schedules, wsd_share=0.5, average=0.99)
    assert not {"schedules", "rollback"} & as_json(training()).keys()


COURSE = Schedules(beta=(0.5, 0.9), beta_steps=4, weight_decay=(1.0, 0.0))


@pytest.mark.parametrize("arm", ["adamw", "muon"])
def test_momentum_and_decay_take_their_courses(arm):
    """As an optimizer whose numbers somebody changes by hand before each step."""
    settings = training(DENSE, steps=8)
    params = {"layer": {"kernel": np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)}}
    rate = settings.rate(arm)
    gradients = np.random.default_rng(0).normal(size=(8, 4, 8)).astype(np.float32)
    on_course = optimizers.build(arm, settings, lambda step: 1.0, course=COURSE, steps=8)

    def by_hand(step):
        beta, left = min(0.5 + 0.1 * step, 0.9), 1 - step / 8
        adamw, muon = settings.adamw, settings.muon
        if arm == "adamw":
            own = {"b1": adamw.b1, "b2": adamw.b2, "eps": adamw.eps}
            return optax.adamw(rate, weight_decay=left * adamw.weight_decay, **own)
        own = {"ns_coeffs": muon.ns_coeffs, "ns_dtype": muon.ns_dtype, "scale": muon.scale}
        return muon_jax.muon(rate, beta=beta, weight_decay=left * muon.weight_decay, **own)

    states = [on_course.init(params), by_hand(0).init(params)]
    trees = [params, params]
    for step, gradient in enumerate(gradients):
        for i, tx in enumerate((on_course, by_hand(step))):
            gradient = {"layer": {"kernel": jnp.asarray(gradient)}} if i == 0 else gradient
            updates, states[i] = tx.update(gradient, states[i], trees[i])
            trees[i] = optax.apply_updates(trees[i], updates)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), *trees)
    assert not np.allclose(trees[0]["layer"]["kernel"], params["layer"]["kernel"], atol=rate)


LOGITS = {"dense_layers/attention": jnp.ones((2, 4))}


@pytest.mark.parametrize("name", optimizers.ARMS)
def test_an_arm_takes_a_course_or_refuses_it(name):
    settings = training(DENSE)
    params = jax.eval_shape(
        Trainer(settings, "adamw", mesh_of(1, 1, 1, 1), VOCABULARY).model.init, jax.random.key(0)
    )
    for course in (
        Schedules(beta=(0.5, 0.9)), Schedules(weight_decay=(1, 0)), Schedules(average=0.9)
    ):  # fmt: skip
        try:
            tx = optimizers.build(name, settings, lambda step: 1.0, course=course, steps=8)
        except ValueError as error:
            assert f"got {name}. Remove" in str(error)
            continue
        jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p), p, max_logits=LOGITS), params)


@pytest.mark.parametrize("study", ["pretrain", "finetune"])
def test_the_average_is_what_is_evaluated(study):
    """It lies on a mesh as the params do, and the plan counts it."""
    mesh, course = mesh_of(1, 2, 1, 2), Schedules(average=0.5)
    rng = np.random.default_rng(0)
    if study == "pretrain":
        config = training(DENSE, schedules=course)
        trainer = Trainer(config, "muon", mesh, VOCABULARY)
        state = trainer.start(0)
        windows = jax.device_put(rng.integers(0, 64, (1, 8, 17), np.int32), trainer.windows)
        evaluate = lambda state: trainer.evaluate(state, windows)  # noqa: E731
    else:
        config = finetuning(schedules=course, steps=8, warmup=1)
        trainer = FineTuner(config, "muon_adamw", NORMED, mesh)
        params = jax.device_put(initial(NORMED), trainer.places)
        state = trainer.start(params)
        shape = trainer.abstract_windows.tokens.shape
        tokens = rng.integers(0, NORMED.vocabulary, shape, np.int32)
        windows = jax.device_put(Batch(tokens, tokens, np.ones_like(tokens)), trainer.windows)
        evaluate = lambda state: trainer.evaluate(trainer.evaluated(state), windows)["loss"]  # noqa: E731
    seen = []
    for _ in range(3):
        state, _ = trainer.advance(state, windows)
        seen.append(jax.device_get(state.params))
    weights = [0.125, 0.25, 0.5]
    mean = jax.tree.map(
        lambda *x: sum(w * np.asarray(y, float) for w, y in zip(weights, x, strict=True)) / 0.875,
        *seen,
    )
    with jax.set_mesh(mesh):
        found = trainer.evaluated(state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, mean)
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), found, seen[-1])
    assert max(jax.tree.leaves(apart)) > 1e-3
    with jax.set_mesh(mesh):
        at = [evaluate(its) for its in (state, _at(state, mean), _at(state, seen[-1]))]
    assert np.allclose(at[0], at[1], rtol=1e-5) and not np.allclose(at[0], at[2], rtol=1e-5)
    if study == "pretrain":
        without = plan.case(training(DENSE), "muon", mesh)
        more = [
            sum(leaf.size * 4 for leaf in jax.tree.leaves(case.trainer.abstract))
            for case in (plan.case(config, "muon", mesh), without)
        ]
        size = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
        assert more[0] - more[1] == size + 4


def _at(state, params):
    """With these params as the average."""
    *others, average = state.opt_state
    mean = jax.tree.map(
        lambda x, p: jax.device_put(np.float32(x), p.sharding), params, state.params
    )
    average = average._replace(weight=jnp.ones_like(average.weight), mean=mean)
    return state._replace(opt_state=(*others, average))
