"""The smoothness that Gluon's steps are made of: norms, the fit, and the command's settings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muon_jax
from experiments import optimizers
from experiments.grok import smoothness
from experiments.grok.config import Config

ORACLES = {"hidden matrices": "spectral", "embedding and head": "sign", "gains": "bias_rms"}


@pytest.mark.parametrize("kind", smoothness.KINDS)
def test_norms_are_those_of_scions_oracle(kind):
    """Its point has norm 1, and no point of the ball lies further along the gradient."""
    shape = (12,) if kind == "gains" else (12, 8)
    g = jax.random.normal(jax.random.key(0), shape)
    ball = muon_jax.Ball(ORACLES[kind], 1.0)
    tx = muon_jax.scale_by_lmo(ball, alpha=1.0, orthogonalizer=exact_polar)
    point, _ = tx.update({"x": g}, tx.init({"x": g}))
    assert float(smoothness.primal_norm(kind, point["x"])) == pytest.approx(1, rel=1e-5)
    inner = float(jnp.vdot(g, point["x"]))
    assert float(smoothness.dual_norm(kind, g)) == pytest.approx(inner, rel=1e-5)
    other = jax.random.normal(jax.random.key(1), shape)
    other = other / smoothness.primal_norm(kind, other)
    assert float(jnp.abs(jnp.vdot(g, other))) < inner


def exact_polar(x):
    u, _, vt = jnp.linalg.svd(x, full_matrices=False)
    return u @ vt


def test_the_fit_is_a_line_that_95_percent_lie_below():
    rng = np.random.default_rng(0)
    norms = rng.uniform(0.5, 2, 400)
    ratios = 2 + 3 * norms + rng.uniform(-1, 0, 400)
    l0, l1 = smoothness.fit(norms, ratios)
    assert np.mean(ratios <= l0 + l1 * norms + 1e-9) == pytest.approx(0.95, abs=0.01)
    assert l0 == pytest.approx(1.9, abs=0.3) and l1 == pytest.approx(3, abs=0.2)
    # Neither is negative, whatever the measurements fall with.
    assert smoothness.fit(norms, 5 - norms)[1] == pytest.approx(0, abs=1e-6)


def test_the_command_prints_the_option_that_takes_its_measurements(capsys):
    assert smoothness.main(["--seeds", "1", "--epochs", "2", "--every", "3"]) == 0
    printed = capsys.readouterr().out
    numbers = re.search(r"--variants.gluon-smoothness ([\d. e+-]+)", printed)[1].split()
    assert len(numbers) == 6
    measured = tuple(map(float, numbers))
    assert max(measured) > 0
    settings = Config(
        variants=optimizers.Variants(gluon_smoothness=measured),
        rates=optimizers.Rates(gluon=1.0),
        muon=optimizers.Muon(ns_coeffs="polar_express"),
    )
    tx = optimizers.build("gluon", settings, lambda count: 1.0)
    params = {"up": {"kernel": jnp.eye(4, 8)}, "norm": {"scale": jnp.ones(4)}}
    params |= {"head": {"kernel": jnp.ones((4, 9))}}
    moved, _ = tx.update(params, tx.init(params), params)
    # Of each kind, the step t = |d| / (L0 + L1 |d|) by its own constants.
    for kind, path, at in (
        ("hidden matrices", ("up", "kernel"), 0),
        ("embedding and head", ("head", "kernel"), 2),
        ("gains", ("norm", "scale"), 4),
    ):
        g, update = (tree[path[0]][path[1]] for tree in (params, moved))
        dual = float(smoothness.dual_norm(kind, 0.1 * g))
        wanted = dual / (measured[at] + measured[at + 1] * dual)
        got = float(smoothness.primal_norm(kind, update))
        # Newton-Schulz makes singular values of 0.885 here, in the step and in its length.
        assert got == pytest.approx(wanted, rel=0.25 if kind == "hidden matrices" else 1e-4)
