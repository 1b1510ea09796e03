"""All that the studies use of `jax.experimental`, and what serves where a version of JAX lacks it.

These modules may change or go with any release. Whoever uses one imports it from here and looks
whether it is None.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def optional_module(name: str) -> Any:
    """The module `jax.experimental.<name>`, or None where this version of JAX lacks it."""
    try:
        return importlib.import_module(f"jax.experimental.{name}")
    except ImportError:
        return None


# Grouped products on a TPU; without them `jax.lax.ragged_dot`.
megablox = optional_module("pallas.ops.tpu.megablox")
# Attention on a TPU; without it blocks of queries, one after another.
splash_attention = optional_module("pallas.ops.tpu.splash_attention")
# Kernels for GPUs. Without them grouped products are blocks of rows, each with a copy of its
# kernel, and attention to packed rows is cuDNN's, with a mask in memory.
pallas, triton = optional_module("pallas"), optional_module("pallas.triton")
# Ahead-of-time compilation for chips that are not here; without it an error that says so.
topologies = optional_module("topologies")
_mesh_utils = optional_module("mesh_utils")


def arrange_devices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices for a mesh of these sizes: on a TPU along its torus, elsewhere in their order."""
    if _mesh_utils is None:
        return np.asarray(devices, dtype=object).reshape(sizes)
    return _mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
