"""Muon for JAX: momentum orthogonalised by Newton-Schulz, as an Optax transformation."""

from muon_jax._coefficients import Schedule
from muon_jax._hybrid import hybrid
from muon_jax._matrix_axes import MatrixAxes
from muon_jax._muon import MuonState, muon, scale_by_muon
from muon_jax._newton_schulz import newton_schulz
from muon_jax._plan import Plan, plan
from muon_jax._routing import label_params, routing_table

__all__ = [
    "MatrixAxes",
    "MuonState",
    "Plan",
    "Schedule",
    "hybrid",
    "label_params",
    "muon",
    "newton_schulz",
    "plan",
    "routing_table",
    "scale_by_muon",
]
