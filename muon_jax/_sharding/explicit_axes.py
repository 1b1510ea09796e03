"""Lets XLA distribute the products of an update, even on meshes with Explicit axes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType


def over_auto_axes(update: Callable) -> Callable:
    """Runs `update(updates, state, params)` over Auto axes, and keeps the shardings of its input.

    The new updates and the new state have the shardings of the updates and the state before.
    """

    @functools.wraps(update)
    def over_mesh(updates: Any, state: Any, params: Any = None) -> Any:
        meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(updates))
        if not any(AxisType.Explicit in mesh.axis_types for mesh in meshes):
            return update(updates, state, params)
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        return jax.sharding.auto_axes(update, out_sharding=shardings)(updates, state, params)

    return over_mesh
