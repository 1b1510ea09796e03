"""Muon for JAX: an Optax optimizer that orthogonalises the momentum by Newton-Schulz."""

from muon_jax._constraint import Constraint
from muon_jax._inject import inject_hyperparams
from muon_jax._matrices.hooks import Hook
from muon_jax._matrix_axes import Interleaved, MatrixAxes
from muon_jax._muon import HookedState, MuonState, muon, scale_by_muon
from muon_jax._optax_muon import optax_muon
from muon_jax._orthogonalize.coefficients import Schedule
from muon_jax._orthogonalize.newton_schulz import newton_schulz
from muon_jax._partition import hybrid
from muon_jax._plan import Plan, plan
from muon_jax._routing.rules import label_params
from muon_jax._routing.table import routing_table
from muon_jax._routing.use import trace_routing
from muon_jax._state_shardings import state_shardings
from muon_jax.variants.adamuon import AdaMuonState, adamuon, entry_norm, scale_by_adamuon
from muon_jax.variants.attention_specs import GroupedQuery, MultiHeadLatent
from muon_jax.variants.dion import DionState, dion, scale_by_dion
from muon_jax.variants.dion2 import Dion2State, dion2, dion3, scale_by_dion2
from muon_jax.variants.equilibrate import equilibrate, muon_eq
from muon_jax.variants.evaluation_average import (
    EvaluationAverageState,
    evaluation_average,
    evaluation_params,
)
from muon_jax.variants.gluon import gluon
from muon_jax.variants.hyperball import hyperball, muonh
from muon_jax.variants.lmo import LmoState, scale_by_lmo
from muon_jax.variants.lookahead import LookaheadState, lookahead, lookahead_params
from muon_jax.variants.low_rank import TruncatedPolar, low_rank, polar_factor
from muon_jax.variants.max_logits import max_attention_logits
from muon_jax.variants.muloco import MulocoState, muloco
from muon_jax.variants.muonbp import muonbp, scale_by_muonbp
from muon_jax.variants.muonclip import muonclip
from muon_jax.variants.muown import MuownState, muown
from muon_jax.variants.noise_scale import namo, noise_scale
from muon_jax.variants.normuon import NorMuonState, neuron_norm, normuon, scale_by_normuon
from muon_jax.variants.nuclear_scale import nuclear_scale, polargrad
from muon_jax.variants.oracles import Ball
from muon_jax.variants.qk_clip import clip_qk, qk_clip
from muon_jax.variants.radial_brake import radial_brake
from muon_jax.variants.scion import scion
from muon_jax.variants.second_moment import muon_squared, second_moment
from muon_jax.variants.snap_norm import muon_plus, snap_norm
from muon_jax.variants.soap import eigenbasis, soap, soap_muon
from muon_jax.variants.spectral_norm import muon_sphere, spectral_cap, spectral_sphere
from muon_jax.variants.splus import SPlusState, scale_by_splus, splus
from muon_jax.variants.stiefel import spel, stiefel
from muon_jax.variants.uniform_polar import UniformPolar, aurora
from muon_jax.variants.update_floor import update_floor

__all__ = [
    "AdaMuonState",
    "Ball",
    "Constraint",
    "Dion2State",
    "DionState",
    "EvaluationAverageState",
    "GroupedQuery",
    "Hook",
    "HookedState",
    "Interleaved",
    "LmoState",
    "LookaheadState",
    "MatrixAxes",
    "MulocoState",
    "MultiHeadLatent",
    "MuonState",
    "MuownState",
    "NorMuonState",
    "Plan",
    "SPlusState",
    "Schedule",
    "TruncatedPolar",
    "UniformPolar",
    "adamuon",
    "aurora",
    "clip_qk",
    "dion",
    "dion2",
    "dion3",
    "eigenbasis",
    "entry_norm",
    "equilibrate",
    "evaluation_average",
    "evaluation_params",
    "gluon",
    "hybrid",
    "hyperball",
    "inject_hyperparams",
    "label_params",
    "lookahead",
    "lookahead_params",
    "low_rank",
    "max_attention_logits",
    "muloco",
    "muon",
    "muon_eq",
    "muon_plus",
    "muon_sphere",
    "muon_squared",
    "muonbp",
    "muonclip",
    "muonh",
    "muown",
    "namo",
    "neuron_norm",
    "newton_schulz",
    "noise_scale",
    "normuon",
    "nuclear_scale",
    "optax_muon",
    "plan",
    "polar_factor",
    "polargrad",
    "qk_clip",
    "radial_brake",
    "routing_table",
    "scale_by_adamuon",
    "scale_by_dion",
    "scale_by_dion2",
    "scale_by_lmo",
    "scale_by_muon",
    "scale_by_muonbp",
    "scale_by_normuon",
    "scale_by_splus",
    "scion",
    "second_moment",
    "snap_norm",
    "soap",
    "soap_muon",
    "spectral_cap",
    "spectral_sphere",
    "spel",
    "splus",
    "state_shardings",
    "stiefel",
    "trace_routing",
    "update_floor",
]
