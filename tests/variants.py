"""The transformations of the family by a word each, with settings for matrices of a few entries."""

import functools

import jax.numpy as jnp
import optax

import muon_jax
from muon_jax import (
    Ball,
    TruncatedPolar,
    UniformPolar,
    newton_schulz,
    scale_by_adamuon,
    scale_by_dion,
    scale_by_lmo,
    scale_by_muon,
    scale_by_muonbp,
    scale_by_normuon,
    scale_by_splus,
)

# Whole matrices at even steps, halves of fan_out at odd ones.
BLOCKS = {"period": 2, "blocks": (1, 2)}

# One Newton-Schulz step, which compiles faster than five.
ONE_STEP = {"orthogonalizer": functools.partial(newton_schulz, steps=1)}
QUICK = {"scale": "mup"} | ONE_STEP

# The longer side of a rectangle has no eigenbasis of its own after one gradient: it has none from
# this length on.
SHORT = 18


def constrained(constraint, **options):
    """Muon with a constraint on weights that the state carries: what is first seen, and its way."""
    options |= {"routing": lambda path, x: "muon", "mu_dtype": options.pop("mu_dtype", None)}
    tx = muon_jax.muon(0.1, ns_steps=1, scale="mup", constraint=constraint, **options)

    def init(params):
        return params, tx.init(params)

    def update(updates, state, params=None):
        weights, state = state
        updates, state = tx.update(updates, state, weights)
        return updates, (optax.apply_updates(weights, updates), state)

    return optax.GradientTransformation(init, update)


SCALE_BY = {
    "muon": functools.partial(scale_by_muon, **QUICK),
    "int8": functools.partial(scale_by_muon, mu_dtype=jnp.int8, **QUICK),
    "normuon": functools.partial(scale_by_normuon, **QUICK),
    "adamuon": functools.partial(scale_by_adamuon, **QUICK),
    "low_rank": functools.partial(scale_by_muon, orthogonalizer=TruncatedPolar(3)),
    "muonbp": functools.partial(scale_by_muonbp, **BLOCKS, **QUICK),
    "dion": functools.partial(scale_by_dion, rank=3),
    "splus": functools.partial(scale_by_splus, every=2, max_dim=SHORT),
    "scion": functools.partial(scale_by_lmo, **ONE_STEP),
    "row_norm": functools.partial(scale_by_lmo, Ball("row_norm")),
    "col_norm": functools.partial(scale_by_lmo, Ball("col_norm")),
    "gluon": functools.partial(scale_by_lmo, smoothness=(0.5, 2.0), **ONE_STEP),
    "equilibrate": functools.partial(scale_by_muon, before=muon_jax.equilibrate(), **QUICK),
    "second_moment": functools.partial(
        scale_by_muon, before=muon_jax.second_moment(eps=0.0), after=muon_jax.snap_norm(), **QUICK
    ),
    "noise_scale": functools.partial(scale_by_muon, after=muon_jax.noise_scale(eps=0.0), **QUICK),
    "nuclear_scale": functools.partial(scale_by_muon, after=muon_jax.nuclear_scale(), **QUICK),
    "uniform_polar": functools.partial(
        scale_by_muon, orthogonalizer=UniformPolar(orthogonalizer=ONE_STEP["orthogonalizer"])
    ),
    "eigenbasis": functools.partial(
        scale_by_muon, before=muon_jax.eigenbasis(every=2, max_dim=SHORT, eps=0.0), **QUICK
    ),
    "dion2": functools.partial(muon_jax.scale_by_dion2, fraction=0.5, scale="mup", **ONE_STEP),
    "dion3": functools.partial(
        muon_jax.scale_by_dion2, fraction=0.5, beta2=0.9, scale="mup", **ONE_STEP
    ),
}
