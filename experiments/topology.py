"""TPUs that are not there, for the compiler alone."""

import os
from typing import Any

import jax

from experiments.experimental import topologies


class TopologyError(ValueError):
    """No such TPU can be compiled for here; the message says why and what to do."""


def topology_devices(name: str) -> list[Any]:
    """The chips of a topology as v5e:16x16, v5p:8x8x8, v6e:16x16 or tpu7x:4x4x4, for `Mesh`.

    Programs compile for them and do not run.

    Raises:
        TopologyError: libtpu is missing, or knows no such topology.
    """
    try:
        import libtpu  # noqa: F401 - JAX looks for it and otherwise says only "no TPU"
    except ImportError:
        raise TopologyError(
            "Compiling for a TPU needs libtpu, which is not installed. "
            'Run: pip install -e ".[experiments,tpu]"'
        ) from None
    if topologies is None:
        raise TopologyError(
            f"JAX {jax.__version__} has no jax.experimental.topologies, which compiling for a TPU "
            "that is not here needs. Install another version of JAX."
        )

    # libtpu asks the cloud which machine this is, unless it is told; and it lets one process at a
    # time have a machine's chips, which nobody wants here.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu's own kinds differ from version to version
        raise TopologyError(
            f"libtpu makes no topology {name!r}: {str(error).splitlines()[0]}. Known are, for "
            "example, v5e:4x4, v5e:16x16, v5p:8x8x8, v6e:16x16 and tpu7x:4x4x4."
        ) from error
