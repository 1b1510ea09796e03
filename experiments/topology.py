"""Ahead-of-time compilation for GPUs and TPUs that need not be present."""

import importlib.util
import os
import re
from typing import Any

import jax

from experiments.experimental import topologies

# The device memory that a program may use, in GiB, by `device_kind`. Devices of a v4 topology and
# TPU7x are half a chip. On GPUs it is 95 %, as with XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
MEMORY = {
    "NVIDIA H100 80GB HBM3": 75.1,
    "NVIDIA H200": 133.9,
    "NVIDIA B200": 169.4,
    "TPU v4": 15.25,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.74,
    "TPU v6 lite": 31.25,
    "TPU7x": 94.75,
}

# The values of `--topology`, for its help and its error messages.
NAMES = (
    "GPUs as h100:8, h200:8, b200:8 or h100:8x8 (hosts × devices), with the extra `gpu-compile`, "
    "or TPUs as v5e:4x4, v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4, with the extra `tpu`"
)

# The modules of XLA's CUDA plugin. Their names depend on CUDA's version.
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# The properties of GPUs that XLA needs to compile for them, from openxla/xla's descriptions.
_H100 = {
    "device_description_str": '"NVIDIA H100 80GB HBM3"',
    "core_count": 132,
    "memory_bandwidth": 3_352_320_000_000,
    "l2_cache_size": 52_428_800,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 84_942_979_072,
    "cuda_compute_capability": "{ major: 9 }",
}
_GPUS = {
    "h100": _H100,
    "h200": _H100
    | {
        "device_description_str": '"NVIDIA H200"',
        "memory_bandwidth": 4_800_000_000_000,
        "device_memory_size": 151_397_597_184,
    },
    "b200": {
        "device_description_str": '"NVIDIA B200"',
        "core_count": 148,
        "memory_bandwidth": 7_672_320_000_000,
        "l2_cache_size": 132_644_864,
        "clock_rate_ghz": 1.965,
        "device_memory_size": 191_514_411_008,
        "cuda_compute_capability": "{ major: 10 }",
    },
}
_ALL_GPUS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
    "threads_per_core_limit": 2048,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2_147_483_647,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
}


class TopologyError(ValueError):
    """The error if a topology cannot be compiled for. Its message says why and what to do."""


def leave_accelerators_alone() -> None:
    """Restricts JAX to the CPU. Call this before JAX has looked for devices.

    On machines without a driver, the plugins that compile for accelerators would otherwise print
    long warnings.
    """
    jax.config.update("jax_platforms", "cpu")


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a topology, for a `Mesh`. Programs can be compiled for them, not run.

    All arguments of such a program, including scalars, must have a sharding on the mesh.

    Args:
        name: The kind of device and the size: the number of GPUs, or hosts × devices, as h100:8,
            h200:8, b200:8 or h100:8x8; the torus of TPUs, as v5e:16x16, v5p:8x8x8, v6e:16x16 or
            tpu7x:4x4x4.

    Raises:
        TopologyError: The compiler is missing or does not support this topology.
    """
    if topologies is None:
        raise TopologyError(
            f"JAX {jax.__version__} has no jax.experimental.topologies, which ahead-of-time "
            "compilation for absent devices requires. Install another version of JAX."
        )
    if name.partition(":")[0] in _GPUS:
        return _gpus(name)
    if re.fullmatch(r"(v\d+\w*|tpu\w+):\d+(x\d+)*", name):
        return _tpus(name)
    raise TopologyError(f"Unknown topology {name!r}. Give {NAMES}.")


def _gpus(name: str) -> list[Any]:
    kind, _, size = name.partition(":")
    shape = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", size)
    if shape is None:
        raise TopologyError(
            f"{name!r} is not a topology of GPUs. Write the number of devices, as {kind}:8, or "
            f"hosts × devices, as {kind}:8x8."
        )
    if not any(importlib.util.find_spec(plugin) for plugin in _PLUGINS):
        raise TopologyError(
            "Ahead-of-time compilation for GPUs requires XLA's CUDA plugin, which is not "
            'installed. Run: pip install -e ".[experiments,gpu-compile]"'
        )
    # Without a device, XLA cannot time kernels to choose the fastest.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    info = _ALL_GPUS | _GPUS[kind]
    description = info.pop("device_description_str")
    fields = " ".join(
        f"{field} {value}" if str(value).startswith("{") else f"{field}: {value}"
        for field, value in info.items()
    )
    target = (
        f'gpu_device_info {{ {fields} }} platform_name: "CUDA" '
        "dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 } "
        f"device_description_str: {description}"
    )
    try:
        return list(
            topologies.get_topology_desc(
                platform="cuda",
                target_config=target,
                topology=f"1x{shape[1] or 1}x{shape[2]}",
            ).devices
        )
    except Exception as error:  # the plugin's exception types differ between versions
        raise TopologyError(
            f"XLA's CUDA plugin cannot build the topology {name!r}: "
            f"{str(error).splitlines()[0]}. Install it with its dependencies: pip install -e "
            '".[experiments,gpu-compile]"'
        ) from error


def _tpus(name: str) -> list[Any]:
    try:
        import libtpu  # noqa: F401 - if it is missing, JAX's own error does not say so
    except ImportError:
        raise TopologyError(
            "Ahead-of-time compilation for TPUs requires libtpu, which is not installed. Run: "
            'pip install -e ".[experiments,tpu]"'
        ) from None

    # Without the first two variables libtpu asks the cloud about this machine. Without the third,
    # only one process at a time could use libtpu, although nobody uses TPUs here.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu's exception types differ between versions
        raise TopologyError(
            f"libtpu cannot build the topology {name!r}: {str(error).splitlines()[0]}. Give "
            f"{NAMES}."
        ) from error
