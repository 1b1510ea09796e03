"""The transformations of the family by a word each, with settings for matrices of a few entries."""

import functools

import jax.numpy as jnp

from muon_jax import (
    Ball,
    TruncatedPolar,
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
}
