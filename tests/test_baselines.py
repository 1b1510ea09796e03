"""The critics' baselines do what their papers write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import baselines, optimizers, schedules
from experiments.grok.config import Config
from experiments.pretrain.config import Model, Training


def test_an_orthogonal_gradient_leaves_the_norm_of_the_params_to_first_order():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(4, 6)), "gain": rng.normal(size=5), "zero": np.zeros(3)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    grads = jax.tree.map(lambda x: jnp.cos(7 * x) + 0.3, params)
    found, _ = baselines.orthogonal_gradient().update(grads, optax.EmptyState(), params)
    for name in ("kernel", "gain"):
        assert abs(float(jnp.vdot(found[name], params[name]))) < 1e-5
        norms = jnp.linalg.norm(found[name]), jnp.linalg.norm(grads[name])
        np.testing.assert_allclose(*norms, rtol=1e-5)
    np.testing.assert_array_equal(found["zero"], grads["zero"])
    with pytest.raises(ValueError, match="needs the params"):
        baselines.orthogonal_gradient().update(grads, optax.EmptyState())


def test_what_differs_from_muon_in_one_thing_is_compared_at_its_rate():
    config = Config(muon=optimizers.Muon(learning_rate=0.123))
    like_muon = {name for name in optimizers.ARMS if config.rate(name) == 0.123}
    assert {"muon", "polar", "low_rank", "normuon", "muon_bf16", "muonclip", "dion"} <= like_muon
    assert {"adamw", "scion", "gluon", "splus", "adamw_tuned", "grokfast"}.isdisjoint(like_muon)
    own = dataclasses.replace(config, rates=optimizers.Rates(polar=0.5))
    assert own.rate("polar") == 0.5 and own.rate("normuon") == 0.123
    # A folder tells what its cells were trained at, whatever a default becomes.
    assert own.as_json()["rates"]["polar"] == 0.5
    assert own.as_json()["rates"]["normuon"] == 0.123


def steps(name, params, grads=None, schedule=lambda step: 1.0, rate=None, **settings):
    """Yields the updates of an arm, step by step. By default gradients are zero."""
    tx = optimizers.build(name, Config(**settings), schedule, rate)
    state, grads = tx.init(params), grads or jax.tree.map(jnp.zeros_like, params)
    while True:
        updates, state = tx.update(grads, state, params)
        yield updates


def _update(name):
    """The first update, of leaves named as the grokking model's are."""
    normal = np.random.default_rng(0).normal
    params = {
        "embedding": {"embedding": normal(size=(9, 16))},
        "up": {"kernel": normal(size=(16, 64))},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    own = {"muon": optimizers.Muon(weight_decay=0.0), "variants": optimizers.Variants(rank=2)}
    return next(steps(name, params, jax.tree.map(jnp.cos, params), **own))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_fixed_table_stays_and_the_rest_moves_as_ever(name):
    fixed, learnt = _update(f"{name}_fixed_table"), _update(name)
    assert not fixed["embedding"]["embedding"].any() and learnt["embedding"]["embedding"].any()
    np.testing.assert_array_equal(fixed["up"]["kernel"], learnt["up"]["kernel"])


def test_an_update_of_two_directions_has_the_norm_of_a_whole_one():
    whole, own, polar = (
        np.asarray(_update(name)["up"]["kernel"])
        for name in ("low_rank_whole", "low_rank", "polar")
    )
    norms = [np.linalg.norm(update) for update in (whole, polar)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    np.testing.assert_allclose(whole, own * 8**0.5, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "names", "widths"),
    [
        (Config(width=16, heads=2), "query key value", [8, 8]),
        (Config(width=16, heads=2), "value query key", [8, 8]),
        (Training(model=Model(heads=2, nope=4, rope=2, value=2)), "query key_value", [6, 6]),
        (Training(model=Model(heads=2, nope=4, rope=2, value=2)), "key_value query", [4, 2, 4, 2]),
    ],
)
def test_heads_that_are_split_do_not_change_each_other(config, names, widths):
    gradient = np.random.default_rng(0).normal(size=(16, sum(widths))).astype(np.float32)
    other = gradient.copy()
    other[:, : widths[0]] *= -np.linspace(1, 3, widths[0])

    def update(arm, gradient):
        params = {"attention": {n: {"kernel": jnp.asarray(gradient)} for n in names.split()}}
        tx = optimizers.build(arm, config, optax.constant_schedule(1.0))
        found, _ = tx.update(params, tx.init(params), jax.tree.map(jnp.zeros_like, params))
        parts = np.split(
            found["attention"][names.split()[0]]["kernel"], np.cumsum(widths)[:-1], axis=1
        )
        return [np.asarray(part) for part in parts]

    for arm, apart in (("muon_split", True), ("muon", False)):
        first, *rest = zip(update(arm, gradient), update(arm, other), strict=True)
        assert not np.allclose(*first)
        assert all(np.allclose(*pair, rtol=1e-5, atol=1e-8) == apart for pair in rest)


def test_an_orthogonal_gradient_along_the_param_vanishes():
    params = jnp.array([3.0, 4.0])
    found, _ = baselines.orthogonal_gradient().update(2 * params, optax.EmptyState(), params)
    assert jnp.isfinite(found).all() and jnp.abs(jnp.vdot(found, params)) < 1e-4 * 50


def test_grokfast_is_the_recurrence():
    grads = np.random.default_rng(0).normal(size=(20, 3))
    tx = baselines.grokfast(decay=0.9, factor=2.0)
    state, mean = tx.init(jnp.zeros(3)), None
    for grad in grads:
        mean = grad if mean is None else 0.9 * mean + 0.1 * grad
        found, state = tx.update(jnp.asarray(grad, jnp.float32), state)
        np.testing.assert_allclose(found, grad + 2 * mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 16, 16), (128, 128)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_unit_spectral_norm_is_within_its_bound(shape, size):
    x = size * np.random.default_rng(0).normal(size=shape)
    found = baselines.unit_spectral_norm(jnp.asarray(x, jnp.float32))
    norms = np.linalg.norm(np.asarray(found, np.float64), ord=2, axis=(-2, -1))
    assert (norms < 1 + 1e-4).all() and (norms > min(shape[-2:]) ** (-1 / 128) - 1e-4).all()
    ratio = np.asarray(found) / x
    np.testing.assert_allclose(ratio / ratio[..., :1, :1], np.ones(shape), rtol=1e-4)
    assert (baselines.unit_spectral_norm(jnp.zeros(shape)) == 0).all()


def first_update(name: str) -> tuple[jax.Array, jax.Array]:
    """Of a hidden matrix, without decay: the update, and its singular values."""
    params = {"blocks": {"up": {"kernel": jnp.zeros((16, 64))}}}
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    muon, adamw = optimizers.Muon(weight_decay=0.0), optimizers.AdamW(weight_decay=0.0)
    kernel = next(steps(name, params, grads, muon=muon, adamw=adamw))["blocks"]["up"]["kernel"]
    return kernel, jnp.linalg.svd(kernel, compute_uv=False)


def test_the_parts_of_muon_make_the_whole():
    """Muon is the orthogonal part times the scale by shape, 2 from 16 to 64."""
    muon, values = first_update("muon")
    orthogonal, _ = first_update("orthogonal")
    np.testing.assert_allclose(muon, 2 * orthogonal, rtol=1e-5)
    _, spectral = first_update("spectral")
    assert 0.9 < spectral[0] / (2 * 0.02) <= 1.0001
    assert spectral[-1] / spectral[0] < 0.5 < values[-1] / values[0]
    _, one = first_update("muon_one_step")
    assert spectral[-1] / spectral[0] < one[-1] / one[0] < values[-1] / values[0]


@pytest.mark.parametrize("name, decay", [("adamw_tuned", 4.0), ("orthogonal_gradient", 0.0)])
def test_baselines_have_decays_of_their_own(name, decay):
    """Prieto et al. use none."""
    variants = optimizers.Variants(tuned_weight_decay=4.0)
    updates = next(steps(name, {"w": jnp.ones(3)}, variants=variants))
    np.testing.assert_allclose(updates["w"], -0.01 * decay, rtol=1e-6)


@pytest.mark.parametrize("name", ["muon", "muon_sgd", "muon_lion"])
def test_whatever_trains_the_rest_a_step_shrinks_it_as_adamw_would(name):
    """At SGD's rate of 0.1 AdamW's decay of 1 would shrink the embedding by a tenth a step."""
    params = {"embedding": {"embedding": jnp.ones((4, 8))}}
    adamw = optimizers.AdamW(learning_rate=2e-3, weight_decay=0.5)
    updates = steps(name, params, schedule=schedules.warmup(2), adamw=adamw)
    for factor in (0.5, 1.0):
        wanted = -factor * 1e-3
        np.testing.assert_allclose(next(updates)["embedding"]["embedding"], wanted, rtol=1e-5)


@pytest.mark.parametrize("name, decay", [("muon_equal_decay", 1.0), ("muon_equal_shrink", 0.05)])
def test_both_readings_of_equal_weight_decay(name, decay):
    """AdamW's default is 1e-3 × 1.0; Muon's rate is 0.02."""
    params = {"blocks": {"up": {"kernel": jnp.ones((4, 8))}}}
    for rate, swept in ((None, decay), (0.04, decay if name == "muon_equal_decay" else decay / 2)):
        updates = steps(name, params, schedule=schedules.warmup(2), rate=rate)
        for factor in (0.5, 1.0):
            wanted = -factor * (rate or 0.02) * swept
            kernel = next(updates)["blocks"]["up"]["kernel"]
            np.testing.assert_allclose(kernel, wanted, rtol=1e-5)
