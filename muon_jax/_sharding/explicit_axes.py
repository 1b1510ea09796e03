"""Lets XLA distribute the products of an update, even on meshes with Explicit axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType


def over_auto_axes(update: Callable, updates: Any, state: Any, *read: Any) -> Any:
    """Calls `update(updates, state, *read)`; the results have the shardings of the first two."""
    mesh = next(
        (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(updates) if _is_explicit(x)), None
    )
    if mesh is None:
        return update(updates, state, *read)
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
    return jax.sharding.auto_axes(update, out_sharding=shardings)(updates, state, *read)


def _is_explicit(x: jax.Array) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
