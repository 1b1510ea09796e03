"""What takes each param in each arm, what each quirk of the published code does, and QK-clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetuning import NORMED, batch, initial, start, trainer_of, training
from flax.traverse_util import flatten_dict

from experiments.finetune import arms
from experiments.finetune.arms import ARMS, AS_PUBLISHED, QUIRKS
from experiments.finetune.config import Optimizer

RATE = 1e-2
SHALLOW = dataclasses.replace(NORMED, layers=1)
UNTIED = dataclasses.replace(SHALLOW, tied=False)
BIASED = dataclasses.replace(SHALLOW, family="qwen2")
PLAIN = dataclasses.replace(SHALLOW, family="llama")


def labels(arm, *quirks, architecture=SHALLOW):
    """What takes the params of each group; a group is one optimizer's."""
    made = arms.make(arm, training(quirks), architecture)
    of = arms.by_group(made.labels, set)
    assert all(len(found) == 1 for found in of.values())
    return {group: next(iter(found)) for group, found in of.items()}


def gradient_of(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), params)


def updated(arm, *quirks, architecture=SHALLOW, largest=None, **with_):
    """The updates of a first step; the gradient is the same each time."""
    with_ = {"learning_rate": RATE, "weight_decay": 0.0} | with_
    made = arms.make(arm, training(quirks, warmup=0, with_=with_), architecture)
    params = initial(architecture)
    tx = made.build(RATE)
    logits = None if largest is None else {"layers/attention": np.full((1, 4), largest, "float32")}
    state = jax.jit(tx.init)(params)
    return jax.device_get(
        jax.jit(tx.update)(gradient_of(params), state, params, max_logits=logits)[0]
    )


def sizes(updates):
    """Root mean square, by group."""
    return {k: float(v) for k, v in arms.by_group(updates, arms.rms).items()}


def test_every_arm_routes_what_it_says():
    groups = {*arms.GROUPS} - {"biases"}
    assert labels("adamw", architecture=UNTIED) == dict.fromkeys(groups, "adamw")
    rest = {"embedding": "adamw", "head": "adamw"}
    hybrid = rest | {"matrices": "muon", "gains": "adamw"}
    assert labels("muon_adamw", architecture=UNTIED) == hybrid
    assert labels("muonclip", architecture=UNTIED) == hybrid
    assert labels("muon_frozen1d", architecture=UNTIED) == hybrid | {"gains": "frozen"}
    assert labels("muon_frozen1d").keys() == {"embedding", "matrices", "gains"}
    hybrid = {"embedding": "adamw", "matrices": "muon", "gains": "adamw", "biases": "adamw"}
    assert labels("muon_adamw", architecture=BIASED) == hybrid
    assert labels("muonclip", "sgd_of_gains", architecture=BIASED)["biases"] == "sgd"
    frozen = {"gains": "frozen", "biases": "frozen"}
    assert labels("muon_frozen1d", architecture=BIASED) == hybrid | frozen
    assert ARMS.keys() == set(arms.ArmName.__args__)


@pytest.mark.parametrize("arm", ARMS)
def test_all_that_is_not_frozen_moves_by_the_rate(arm):
    """So that one rate means the same to all: the RMS is Muon's 0.2, or AdamW's first, 1."""
    found = sizes(updated(arm, architecture=BIASED))
    assert found["matrices"] == pytest.approx(RATE if arm == "adamw" else 0.2 * RATE, rel=0.15)
    assert found["embedding"] == pytest.approx(RATE, rel=0.01)
    for vectors in ("gains", "biases"):
        assert found[vectors] == pytest.approx(0 if arm == "muon_frozen1d" else RATE, rel=0.01)


# --- Quirks ----------------------------------------------------------------------------------


def test_every_quirk_is_told_and_the_published_form_has_all():
    assert set(AS_PUBLISHED.quirks) == set(QUIRKS) == set(arms.QuirkName.__args__)
    assert AS_PUBLISHED.learning_rate == 5e-5
    with pytest.raises(ValueError, match="must be different values; got no_clip no_clip"):
        Optimizer(quirks=("no_clip", "no_clip"))


def test_warmup_reaches_muonclip_alone():
    def first(arm, *quirks):
        return float(arms.make(arm, training(quirks, warmup=4), SHALLOW).schedule(0))

    for arm in ARMS:
        alone = first(arm, "warmup_of_muonclip_alone")
        assert alone == pytest.approx(0.25 if arm == "muonclip" else 1.0)
        assert first(arm) == pytest.approx(0.25)


@pytest.mark.parametrize(("arm", "of_matrices"), [("adamw", 0.01), ("muon_adamw", 0.1)])
def test_decays_apart(arm, of_matrices):
    none = updated(arm)

    def decays(updates):
        """What decay adds, as a share of rate × param."""
        shares = jax.tree.map(lambda a, b, w: (b - a) / w / RATE, updates, none, initial(SHALLOW))
        return arms.by_group(shares, lambda x: np.median(np.concatenate([y.ravel() for y in x])))

    apart = decays(updated(arm, "decay_apart", weight_decay=0.5))
    assert apart["matrices"] == pytest.approx(of_matrices, rel=0.02)
    assert apart["embedding"] == pytest.approx(0.01, rel=0.02)
    same = decays(updated(arm, weight_decay=0.5))
    assert same["matrices"] == pytest.approx(0.5, rel=0.02)
    assert same["gains"] == pytest.approx(0.5, rel=0.02)


def test_scales_are_not_those_of_adamw():
    matched = updated("muon_adamw")
    in_root = sizes(updated("muonclip", "scale_in_root"))["matrices"]
    assert in_root / sizes(matched)["matrices"] == pytest.approx(0.2**-0.5, rel=0.01)
    spectral = updated("muon_adamw", "spectral_scale")
    feed_forward = (tree["layers"]["feed_forward"] for tree in (matched, spectral))
    ratios = jax.tree.map(lambda a, b: float(arms.rms([a]) / arms.rms([b])), *feed_forward)
    # 0.2 √64 over √(64/32), and over 1.
    assert ratios["up"]["kernel"] == pytest.approx(0.2 * 8 / 2**0.5, rel=0.01)
    assert ratios["down"]["kernel"] == pytest.approx(0.2 * 8, rel=0.01)
    # The one leaves muonclip alone, and the other the other arms.
    alone = sizes(updated("muonclip", "spectral_scale"))["matrices"]
    assert alone == pytest.approx(sizes(matched)["matrices"], rel=1e-3)
    assert sizes(updated("muon_adamw", "scale_in_root")) == pytest.approx(sizes(matched), rel=1e-3)


def test_gains_of_muonclip_learn_by_sgd():
    assert labels("muonclip", "sgd_of_gains")["gains"] == "sgd"
    assert labels("muon_adamw", "sgd_of_gains")["gains"] == "adamw"
    updates = updated("muonclip", "sgd_of_gains", weight_decay=0.3)
    gradient = gradient_of(initial(SHALLOW))
    # Neither scaled nor decayed.
    np.testing.assert_allclose(
        updates["norm"]["scale"], -RATE * gradient["norm"]["scale"], rtol=1e-5
    )


def test_what_is_frozen_is_in_the_norm_only_as_published():
    found = []
    for quirks in ((), ("frozen_in_norm",)):
        trainer = trainer_of(training(quirks), "muon_frozen1d", SHALLOW)
        state, metrics = trainer.advance(start(trainer), trainer.place(batch()))
        assert_gains_are(state.params, initial(SHALLOW))
        found.append(jax.device_get(metrics))
    ours, theirs = found
    squares = {k: float(v) ** 2 for k, v in ours["gradient_norms"].items()}
    assert theirs["gradient_norm"] ** 2 == pytest.approx(sum(squares.values()), rel=1e-5)
    assert squares.pop("gains") > 1e-4 * sum(squares.values())
    assert ours["gradient_norm"] ** 2 == pytest.approx(sum(squares.values()), rel=1e-5)


def assert_gains_are(params, others):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(others), strict=True
    ):
        assert np.array_equal(x, y) == (path[-1].key == "scale"), path


@pytest.mark.parametrize("architecture", [SHALLOW, UNTIED], ids=["tied", "untied"])
def test_tables_go_to_muon_as_published(architecture):
    found = labels("muon_adamw", "muon_of_tables", architecture=architecture)
    assert found == dict.fromkeys(found, "muon") | {"gains": "adamw"}
    # As torch reads an embedding: its fan_out is the vocabulary, 64, and its fan_in 32.
    quirks = ("muon_of_tables", "spectral_scale")
    updates = updated("muon_adamw", *quirks, architecture=architecture)
    norm = np.linalg.norm(updates["embedding"]["embedding"], 2) / RATE
    assert norm / (64 / 32) ** 0.5 == pytest.approx(1, abs=0.25)


# --- QK-clip ---------------------------------------------------------------------------------

THRESHOLD = 1.0


@pytest.mark.parametrize(
    "architecture", [SHALLOW, PLAIN, BIASED], ids=["QK-norm", "without", "biases"]
)
def test_muonclip_bounds_the_logits(architecture):
    """A tiny rate, so that what moves the logits is the clip."""
    with_ = {"clip_threshold": THRESHOLD, "learning_rate": 1e-6, "weight_decay": 0.0}
    trainer = trainer_of(training(with_=with_), "muonclip", architecture)

    def largest(factor):
        """Logits before and after a step, where queries are so many times as large; and params."""
        params = initial(architecture)
        own = params["layers"]["attention"]
        name = "query_norm" if architecture.qk_norm else "query"
        queries = {name: jax.tree.map(lambda x: x * np.float32(factor), own[name])}
        params = params | {"layers": params["layers"] | {"attention": own | queries}}
        state = trainer.start(jax.device_put(params, trainer.places, may_alias=False))
        found = []
        for _ in range(2):
            state, metrics = trainer.advance(state, trainer.place(batch()))
            found.append(float(metrics["max_logit"]))
        change = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, params)
        return found, change["layers"]["attention"]

    (unit, _), _ = largest(1.0)
    (before, after), moved = largest(3 * THRESHOLD / unit)
    assert before == pytest.approx(3 * THRESHOLD, rel=1e-3)
    assert after == pytest.approx(THRESHOLD, rel=0.01)
    projections, gains = (
        [change for module in parts for change in moved.get(module, {}).values()]
        for parts in (("query", "key"), ("query_norm", "key_norm"))
    )
    clipped, kept = (gains, projections) if architecture.qk_norm else (projections, gains)
    assert min(clipped) > 0.1 and max(kept, default=0) < 1e-4
    (before, after), moved = largest(0.9 * THRESHOLD / unit)
    assert after == pytest.approx(before, rel=1e-3)
    assert max(jax.tree.leaves(moved)) < 1e-4


def test_the_published_muonclip_clips_nothing():
    plain, clipped = (updated("muonclip", largest=x) for x in (1.0, 400.0))
    published = updated("muonclip", "no_clip", largest=400.0)
    gains = [x["layers"]["attention"]["key_norm"]["scale"] for x in (plain, clipped, published)]
    np.testing.assert_array_equal(gains[0], gains[2])
    assert np.abs(gains[1] - gains[0]).max() > 0.3


@pytest.mark.parametrize("projections", [False, True])
def test_muonclip_clips_the_gains_or_by_request_the_projections(projections):
    config = training(with_={"clip_threshold": 1.0, "clip_projections": projections})
    params = initial(SHALLOW)

    def update(name):
        tx = arms.make(name, config, SHALLOW).build(1e-2)
        zeros = jax.tree.map(jnp.zeros_like, params)
        logits = {"layers/attention": jnp.full((1, SHALLOW.heads), 4.0)}
        return tx.update(zeros, tx.init(params), params, max_logits=logits)[0]

    plain, clipped_ = (flatten_dict(update(name)) for name in ("muon_adamw", "muonclip"))
    changed = {path[-2:] for path, x in plain.items() if not np.array_equal(x, clipped_[path])}
    leaf = "kernel" if projections else "scale"
    assert changed == {
        (f"{name}{'' if projections else '_norm'}", leaf) for name in ("query", "key")
    }
