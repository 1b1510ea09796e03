"""The modules of `jax.experimental` that the studies use.

Any release of JAX may change or remove these modules. Code that uses one imports it from here and
has a fallback if it is None.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def optional_module(name: str) -> Any:
    """Returns the module `jax.experimental.<name>`, or None if this version of JAX lacks it."""
    try:
        return importlib.import_module(f"jax.experimental.{name}")
    except ImportError:
        return None


# Grouped matrix products on TPUs. The fallback is `jax.lax.ragged_dot`.
megablox = optional_module("pallas.ops.tpu.megablox")
# Attention on TPUs. The fallback computes blocks of queries, one after another.
splash_attention = optional_module("pallas.ops.tpu.splash_attention")
# Kernels for GPUs. The fallback computes grouped products in blocks of rows, each with a copy of
# its weights, and attention of packed rows by cuDNN with a mask in memory.
pallas, triton = optional_module("pallas"), optional_module("pallas.triton")
# Ahead-of-time compilation for absent devices. Without it the command ends with an error.
topologies = optional_module("topologies")
_mesh_utils = optional_module("mesh_utils")


def arrange_devices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges devices for a mesh of these sizes: along the torus of TPUs, otherwise in order."""
    if _mesh_utils is None:
        return np.asarray(devices, dtype=object).reshape(sizes)
    return _mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
