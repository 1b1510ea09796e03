"""The implementations of Muon that are compared, built for a case."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import muon_jax
from experiments.bench.all_to_all import all_to_all_muon
from experiments.bench.cases import EXCHANGED, FLOOR, OPTAX, OURS, PLAIN, TOLD, Case, make_mesh
from experiments.report.figures import optimizer_color

RATE = 0.02

Arm = Callable[[Case, Any], optax.GradientTransformation]


def ours(case: Case, dtype: jax.typing.DTypeLike) -> optax.GradientTransformation:
    """Returns muon_jax's Muon with `mesh=` only."""
    return muon_jax.muon(RATE, ns_dtype=dtype, mesh=case.mesh)


def ours_told(case: Case, dtype: jax.typing.DTypeLike) -> optax.GradientTransformation:
    """Returns muon_jax's Muon with `shardings=` too, which it cannot read under Auto axes."""
    return muon_jax.muon(RATE, ns_dtype=dtype, mesh=case.mesh, shardings=case.shardings)


def propagated(case: Case, dtype: jax.typing.DTypeLike) -> optax.GradientTransformation:
    """Returns muon_jax's Muon as on one device, so that XLA chooses the communication."""
    # Without a mesh, Muon would use the one of the arrays. With several leaves, it would stack them
    # on a GPU or TPU, which joins sharded arrays. Hence each leaf has its own optimizer.
    alone = make_mesh(case.mesh.devices.ravel(), {"alone": 1})
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path), case.params
    )
    each = {
        label: muon_jax.muon(RATE, ns_dtype=dtype, mesh=alone) for label in jax.tree.leaves(labels)
    }
    return optax.multi_transform(each, labels)


def exchanged(case: Case, dtype: jax.typing.DTypeLike) -> optax.GradientTransformation:
    """Returns Muon with an all-to-all for each stack. It multiplies in the leaves' dtype."""
    return all_to_all_muon(RATE, case.shardings)


def optax_muon(case: Case, dtype: jax.typing.DTypeLike) -> optax.GradientTransformation:
    """Returns optax.contrib.muon for the same matrices. It multiplies in the leaves' dtype."""
    return optax.contrib.muon(RATE, muon_weight_dimension_numbers=matrix_dimensions(case.params))


def matrix_dimensions(params: Any) -> Any:
    """Returns the last two axes of every leaf as optax's dimension numbers."""
    return jax.tree.map(
        lambda leaf: optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,)), params
    )


ARMS: dict[str, Arm] = {
    OURS: ours,
    TOLD: ours_told,
    PLAIN: propagated,
    OPTAX: optax_muon,
    EXCHANGED: exchanged,
}

COLORS = {
    OURS: optimizer_color("muon"),
    TOLD: "#F2A56B",
    PLAIN: optimizer_color("plain"),
    OPTAX: optimizer_color("optax"),
    EXCHANGED: "#8C6BB1",
    FLOOR: "#999999",
}


def update_step(tx: optax.GradientTransformation) -> Callable:
    """Returns a function `(grads, state, params) -> (params, state)` that applies an update."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def random_like(params: Any, seed: int) -> Any:
    """Returns a tree of Gaussian arrays with the shapes and dtypes of `params`."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        [
            jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
    )
