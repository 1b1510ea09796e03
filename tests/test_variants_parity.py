"""Ten steps of pytorch_optimizer, where it says what the papers' authors say."""

import functools

import pytest
from trajectories import KERNELS, ROUNDING, distance, of_torch, run

from muon_jax import Ball, adamuon, evaluation_params, normuon, scion, splus

REASON = "parity with pytorch_optimizer needs it, and torch: pip install -e '.[parity]'"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture
def theirs(torch, monkeypatch):
    """The package, whose Newton-Schulz shall run in float32 as ours does."""
    package = pytest.importorskip("pytorch_optimizer", reason=REASON)
    from pytorch_optimizer.optimizer.utils import matrix

    iteration = matrix.zero_power_via_newton_schulz_5
    *others, dtype = iteration.__defaults__
    assert dtype == torch.bfloat16
    monkeypatch.setattr(iteration, "__defaults__", (*others, torch.float32))
    return package


def as_muon(make):
    return lambda tensor: make([{"params": [tensor], "use_muon": True}], lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize(
    ("ours", "settings"),
    [
        ({}, {}),
        ({"nesterov": False, "beta": 0.8, "beta2": 0.9}, "the same"),
        ({"scale": "match_rms_adamw"}, {"use_adjusted_lr": True}),
    ],
)
def test_ten_steps_of_normuon(theirs, ours, settings):
    if settings == "the same":
        settings = {"nesterov": False, "momentum": ours["beta"], "beta2": ours["beta2"]}
    expected = of_torch(as_muon(functools.partial(theirs.NorMuon, **settings)))
    assert distance(run(normuon(0.02, weight_decay=0.1, **ours))[0], expected) < ROUNDING


def test_ten_steps_of_adamuon(torch, theirs, monkeypatch):
    """Theirs has the rescaling of AdaMuon; the sign of its authors' code is put in here."""
    from pytorch_optimizer.optimizer.muon import adamuon as module

    iteration = module.zero_power_via_newton_schulz_5
    monkeypatch.setattr(
        module,
        "zero_power_via_newton_schulz_5",
        lambda u, **settings: iteration(torch.sign(u), **settings),
    )
    settings = {"betas": (0.9, 0.8), "eps": 1e-8}
    expected = of_torch(as_muon(functools.partial(theirs.AdaMuon, **settings)))
    ours = adamuon(0.02, weight_decay=0.1, beta=0.9, beta2=0.8, nesterov=False)
    assert distance(run(ours)[0], expected) < ROUNDING


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(
    ("oracle", "name"),
    [
        ("spectral", "SPECTRAL"),
        ("sign", "SIGN"),
        ("row_norm", "ROW"),
        ("col_norm", "COL"),
        ("bias_rms", "BIAS"),
    ],
)
def test_ten_steps_of_scion(theirs, oracle, name, constrained):
    from pytorch_optimizer.optimizer.scion import LMONorm

    names = ("bias",) if name == "BIAS" else KERNELS
    settings = {"lr": 0.02, "momentum": 0.3, "scale": 5.0, "norm_type": LMONorm[name]}
    expected = of_torch(lambda p: theirs.SCION([p], constraint=constrained, **settings), names)
    balls = [("|".join(names), Ball(oracle, 5.0))]
    trajectory, _ = run(scion(0.02, alpha=0.3, constrained=constrained, balls=balls))
    assert distance(trajectory, expected) < ROUNDING


@pytest.mark.parametrize("every", [1, 3, 100])
def test_ten_steps_of_splus(theirs, every):
    """On a square leaf: the longer side of another has no eigenbasis of its own at first."""
    settings = {"lr": 1.0, "betas": (0.8, 0.9), "ema_rate": 0.9, "weight_decay": 0.0}

    def make(p):
        return theirs.SPlus([p], inverse_steps=every, **settings)

    ours = splus(1.0, b1=0.8, b2=0.9, every=every, average=0.9)
    trajectory, state = run(ours, jit=True)
    assert distance(trajectory, of_torch(make, ["square"])) < ROUNDING
    average = evaluation_params(state, trajectory[-1])
    assert distance([average], of_torch(make, ["square"], evaluate=True)) < ROUNDING
