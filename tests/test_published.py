"""Ten steps of NVIDIA's Emerging-Optimizers, where they and we say the same.

It is in no package index: these run where a checkout of it is on the path (Python 3.12 or later),
with `pip install torch absl-py`.
"""

import functools

import pytest
from trajectories import GRADS, KERNELS, PARAMS, distance, of_torch, run

import muon_jax

pytest.importorskip("torch", reason="parity needs torch: pip install -e '.[parity]'")
pytest.importorskip("emerging_optimizers", reason="needs a checkout of NVIDIA Emerging-Optimizers")

# Theirs, and torch's compiler under them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# Of theirs in float32, which round as ours do: 2e-6 to 2e-5 measured.
BOTH_ROUND = 5e-5
OURS = {"learning_rate": 0.02, "weight_decay": 0.1}
PLAIN = {"fp32_matmul_prec": "highest", "coefficient_type": "simple"}
THEIRS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "nesterov": True} | PLAIN
SCALED = THEIRS | {"scale_mode": "shape_scaling"}


def agree(ours, make):
    kernels = [{name: tree[name] for name in KERNELS} for tree in (PARAMS, *GRADS)]
    trajectory, _ = run(ours, kernels[0], kernels[1:], jit=True)
    assert distance(trajectory, of_torch(make)) < BOTH_ROUND


def test_muon():
    from emerging_optimizers.orthogonalized_optimizers import Muon

    agree(muon_jax.muon(**OURS), lambda t: Muon([t], **SCALED))


def test_namo():
    from emerging_optimizers.orthogonalized_optimizers import AdaptiveMuon

    make = functools.partial(AdaptiveMuon, moment2_method="namo", beta2=0.9, **SCALED)
    agree(muon_jax.namo(beta2=0.9, **OURS), lambda t: make([t]))


def test_polargrad():
    from emerging_optimizers.orthogonalized_optimizers import PolarGrad

    agree(muon_jax.polargrad(scale="none", **OURS), lambda t: PolarGrad([t], **THEIRS))


def test_spel():
    from emerging_optimizers.orthogonalized_optimizers import Spel

    rough = muon_jax.stiefel(orthogonalizer=muon_jax.newton_schulz)
    ours = muon_jax.muon(scale="none", constraint=rough, **OURS)
    agree(ours, lambda t: Spel([t], **THEIRS))


def test_muown():
    """Theirs decays the norms after their step, ours those before it."""
    from emerging_optimizers.contrib.muown import Muown

    make = functools.partial(Muown, lr=0.02, scale_mode="shape_scaling", **PLAIN)
    agree(muon_jax.muown(0.02), lambda t: make([t]))


@pytest.mark.parametrize("name", ["hyperball", "radial brake"])
def test_constraints(name):
    from emerging_optimizers.orthogonalized_optimizers import Muon
    from emerging_optimizers.weight_update_hooks import HyperballHook, RadialBrakeHook

    ours, hook = {
        "hyperball": (
            muon_jax.hyperball(),
            lambda t: HyperballHook(radius=float(t.detach().norm())),
        ),
        "radial brake": (muon_jax.radial_brake(0.5, 0.8), lambda t: RadialBrakeHook(0.5, 0.8)),
    }[name]
    settings = SCALED | {"weight_decay": 0.0}
    agree(
        muon_jax.muon(0.02, constraint=ours),
        lambda t: Muon([t], weight_update_hook=hook(t), **settings),
    )
