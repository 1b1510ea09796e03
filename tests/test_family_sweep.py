"""The sweep: which rates it wants next, what it calls best, and what a difference is worth."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optimizers, schedules
from experiments.differences import difference
from experiments.family import train
from experiments.family.config import Cell, Training
from experiments.family.report import aggregate
from experiments.sweep import (
    Best,
    Files,
    Sweep,
    best,
    losses_by_rate,
    missing_cells,
    rate_at,
    wanted_rates,
)

SWEEP = Sweep(factor=2.0, reach=1, limit=2)


def row(optimizer, rate, seed, loss, **changes):
    """A cell's row; a loss of None is a diverged one."""
    return {
        "optimizer": optimizer,
        "rate": rate,
        "seed": seed,
        "diverged": loss is None,
        "validation_loss": loss,
        "milliseconds_per_step": 10.0,
    } | changes


def explore(loss, default=0.1, sweep=SWEEP):
    """All rates that a sweep over `loss(rate)` ends with."""
    done = {}
    while new := [rate for rate in wanted_rates(default, done, sweep) if rate not in done]:
        done |= {rate: loss(rate) for rate in new}
    return sorted(done)


@pytest.mark.parametrize(
    "loss, sweep, rates",
    [
        (lambda rate: abs(math.log(rate / 0.1)), SWEEP, [0.05, 0.1, 0.2]),
        (lambda rate: abs(math.log(rate / 0.4)), SWEEP, [0.05, 0.1, 0.2, 0.4, 0.8]),
        (lambda rate: abs(math.log(rate / 0.025)), SWEEP, [0.0125, 0.025, 0.05, 0.1, 0.2]),
        (lambda rate: -rate, SWEEP, [0.05, 0.1, 0.2, 0.4, 0.8]),
        (lambda rate: rate, SWEEP, [0.0125, 0.025, 0.05, 0.1, 0.2]),
        (lambda rate: math.inf, SWEEP, [0.0125, 0.025, 0.05, 0.1, 0.2]),
        (lambda rate: rate, Sweep(reach=0, limit=0), [0.1]),
        (lambda rate: -rate, Sweep(reach=0, limit=1), [0.05, 0.1, 0.2]),
    ],
)
def test_a_sweep_goes_on_beyond_its_edge_up_to_the_limit(loss, sweep, rates):
    """To lower rates where all diverge."""
    assert explore(loss, sweep=sweep) == rates
    assert wanted_rates(0.1, {}, sweep)[0] == 0.1


def test_rates_are_the_same_numbers_wherever_they_are_written():
    rates = [rate_at(0.0123456, 10**0.5, notch) for notch in range(-3, 4)]
    assert rates[3] == 0.01235
    assert all(float(f"{rate:g}") == rate for rate in rates)


def test_every_arm_has_a_first_result_early_and_finished_cells_are_left_out():
    arms = {("adamw",): 0.1, ("muon",): 1.0}
    cells = missing_cells([], Cell, arms, 2, SWEEP)
    assert cells[:3] == [Cell("adamw", 0.1, 0), Cell("muon", 1.0, 0), Cell("adamw", 0.05, 0)]
    assert len(cells) == 12 and [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    rows = [row(*cell, 1.0) for cell in cells[:5]]
    assert missing_cells(rows, Cell, arms, 2, SWEEP) == cells[5:]


def test_the_edge_waits_for_all_seeds():
    arms = {("adamw",): 0.1}
    rows = [row("adamw", rate, 0, rate) for rate in (0.05, 0.1, 0.2)]
    assert {cell.seed for cell in missing_cells(rows, Cell, arms, 2, SWEEP)} == {1}
    rows += [row("adamw", rate, 1, rate) for rate in (0.05, 0.1, 0.2)]
    wanted = missing_cells(rows, Cell, arms, 2, SWEEP)
    assert wanted == [Cell("adamw", 0.025, 0), Cell("adamw", 0.025, 1)]


def test_best_is_by_mean_and_a_diverged_seed_is_the_worst():
    rows = [row("x", 0.1, 0, 2.0), row("x", 0.1, 1, 2.0), row("x", 0.2, 0, 1.0)]
    rows += [row("x", 0.2, 1, None), row("x", 0.4, 0, 2.1), row("x", 0.4, 1, 2.1)]
    assert best(rows) == Best(0.1, {0: 2.0, 1: 2.0}, at_edge=True)
    # A rate that has fewer seeds than another is not compared yet.
    rows += [row("x", 0.05, 0, 0.5)]
    assert 0.05 not in losses_by_rate(rows) and best(rows).rate == 0.1
    assert best([]) is None


def test_differences_are_paired_by_seed():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0}, {2: 3.5, 1: 2.4, 0: 1.3}
    found = difference(ours, theirs)
    assert found.mean == pytest.approx(-0.4)
    half = 4.3027 * np.std([0.3, 0.4, 0.5], ddof=1) / 3**0.5
    assert found.high - found.mean == pytest.approx(half, rel=1e-3)
    assert difference(ours, {0: 1.0}) is None
    assert difference(ours, {0: math.inf, 1: 1.0}) is None


def test_aggregate_orders_by_loss_and_sends_what_diverged_to_the_end():
    rows = [row("adamw", 0.1, seed, 2.0 + seed / 10) for seed in (0, 1)]
    rows += [row("muon", 0.1, seed, 1.0, milliseconds_per_step=15.0) for seed in (0, 1)]
    rows += [row("sgd", 0.1, seed, None) for seed in (0, 1)]
    muon, adamw, sgd = aggregate(Files({}, {}, rows, [], {"muon": {"times_baseline": 9.0}}))
    assert (muon.optimizer, adamw.optimizer, sgd.optimizer) == ("muon", "adamw", "sgd")
    assert muon.difference.mean == pytest.approx(-1.05) and muon.step_ratio == 1.5
    assert muon.cost == {"times_baseline": 9.0} and adamw.cost is None
    assert adamw.difference is None and sgd.difference is None
    assert sgd.diverged == 2 and sgd.as_json()["validation_loss"] is None


def test_the_schedule_rises_to_one_and_falls_towards_zero():
    for decay in ("linear", "cosine"):
        schedule = schedules.warmup_then_decay(4, 12, decay)
        factors = np.array([schedule(step) for step in range(12)])
        np.testing.assert_allclose(factors[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
        assert (np.diff(factors[4:]) < 0).all() and 0 < factors[-1] < 0.2
        assert schedule(12) == pytest.approx(0, abs=1e-7)
    assert schedules.warmup_then_decay(0, 10, "linear")(0) == 1


# On a sphere half of the rate is not half of the way, but nearly, of a small one. The first step of
# others goes to their manifold, however small the rate.
CURVED, MANIFOLD = ("muonh", "normuonh", "muown"), ("muon_sphere", "spel")

# One rate for all leaves; in the other arms AdamW has the rest, at a rate of its own.
WHOLE_TREE = (
    "adamw", "adamw_tuned", "adamw_fixed_table", "orthogonal_gradient", "grokfast", "splus",
    "scion", "gluon",
)  # fmt: skip
REST = ("muon_rest", "adamw_rest")  # the rate is that of the others


@pytest.mark.parametrize("name", [name for name in optimizers.ARMS if name not in MANIFOLD])
def test_a_traced_rate_takes_the_place_of_the_arm_s_own(name):
    config = Training(width=16, head_size=8, layers=1)
    if name == "muon_equal_shrink":  # its decay alone keeps to AdamW's rate; test_baselines has it
        config = dataclasses.replace(config, adamw=optimizers.AdamW(weight_decay=0.0))
    params = train.language_model(config).start(0)
    gradient = jax.tree.map(lambda p: jnp.cos(1e3 * p), params)
    observed = {"max_logits": {"blocks/0/attention": jnp.zeros(2)}}

    @jax.jit
    def update(rate):
        tx = optimizers.build(name, config, optax.constant_schedule(1.0), rate)
        return tx.update(gradient, tx.init(params), params, **observed)[0]

    own = config.rate(name) * (1e-2 if name in CURVED else 1)
    whole, half = update(own), update(own / 2)
    head, blocks = 0.5 if name in WHOLE_TREE + REST else 1.0, 1.0 if name in REST else 0.5
    for path, fraction in (("head", head), ("blocks", blocks)):
        for ours, theirs in zip(*map(jax.tree.leaves, (whole[path], half[path])), strict=True):
            if path == "blocks" and ours.ndim < 2:
                continue  # gains
            scale = float(jnp.abs(ours).max())
            assert scale > 0 or name == "muon_only"
            np.testing.assert_allclose(
                theirs, fraction * ours, atol=(1e-2 if name in CURVED else 1e-4) * scale
            )
