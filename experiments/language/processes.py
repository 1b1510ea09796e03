"""Runs with several processes: how they connect, agree, share a batch and gather arrays."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.settings import Count, Whole


@dataclasses.dataclass(frozen=True)
class Processes:
    """Settings of a run with several processes, one per host."""

    enabled: bool = False
    """Run as one of several processes. Under Slurm, GKE, Open MPI and on TPU VMs the processes find
    each other; elsewhere, give the next three options."""
    coordinator: str | None = None
    """HOST:PORT of the first process."""
    count: Count | None = None
    """Number of processes."""
    index: Whole | None = None
    """Index of this process, from 0."""

    def join(self) -> None:
        """Connects the processes; must be called before any other use of JAX.

        Raises:
            ValueError: If only some of the three options are given.
        """
        options = (self.coordinator, self.count, self.index)
        if not (self.enabled or any(value is not None for value in options)):
            return
        if None in options and any(value is not None for value in options):
            raise ValueError(
                "--processes.coordinator, --processes.count and --processes.index require each "
                "other. Give all three, or only --processes.enabled under Slurm, on GKE or on a "
                "TPU VM."
            )
        jax.distributed.initialize(*options)


class Agreement:
    """Tells all processes whether any of them wants to stop, with a delay of one step."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self._flags = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=jax.NamedSharding(mesh, jax.P()))
        self._asked = jnp.zeros([], bool)

    def any(self, mine: bool) -> bool:
        """Returns whether any process passed True a step ago. All must call it once a step."""
        if jax.process_count() == 1:
            return mine
        answer = bool(self._asked)
        flags = jax.make_array_from_callback(
            (self._flags.mesh.size,), self._flags, lambda at: np.full(1, mine)
        )
        self._asked = self._any(flags)
        if jax.default_backend() == "cpu":
            self._asked.block_until_ready()
        return answer


class Share:
    """The rows of a step's batch that this process loads.

    They are the rows that its devices read, which follow from the batch's sharding. Several
    processes load the same rows if a mesh axis that does not split the batch spans these processes.
    So a step's batch does not depend on the number of processes or on the mesh.

    Args:
        sharding: The sharding of the batch `(microbatches, rows, ...)`; only rows may be split.
        microbatches: The number of microbatches in a step.
        rows: The number of rows in a microbatch.
        devices: The devices that read. By default, the devices of this process.

    Attributes:
        rows: The rows' indices in the batch, `microbatch * rows + row`, ascending.
    """

    def __init__(
        self,
        sharding: jax.sharding.Sharding,
        microbatches: int,
        rows: int,
        devices: Iterable[jax.Device] | None = None,
    ) -> None:
        self._sharding = sharding
        self._places = np.arange(microbatches * rows).reshape(microbatches, rows)
        read = sharding.devices_indices_map((microbatches, rows, 1))
        here = sharding.addressable_devices if devices is None else devices
        self.rows = np.unique(np.concatenate([self._places[read[d][:2]].ravel() for d in here]))

    def place(self, local: np.ndarray) -> jax.Array:
        """Returns the global array `(microbatches, rows, ...)` from this process's rows."""
        shape = (*self._places.shape, *local.shape[1:])
        return jax.make_array_from_callback(
            shape,
            self._sharding,
            lambda at: local[np.searchsorted(self.rows, self._places[at[:2]])],
        )


def place_whole(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns a sharded array from an array of which every process has all entries."""
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def check_same(facts: dict[str, Any]) -> None:
    """Checks that JSON-able facts are equal in all processes, all of which must call it.

    Raises:
        ValueError: If facts differ between processes. The message has their names.
    """
    if jax.process_count() == 1:
        return
    texts = (json.dumps(value, sort_keys=True).encode() for value in facts.values())
    digests = b"".join(hashlib.sha256(text).digest() for text in texts)
    seen = from_every_process(np.frombuffer(digests, np.uint8).reshape(len(facts), -1))
    differs = np.any(seen != seen[:1], axis=(0, 2))
    if names := [name for name, is_other in zip(facts, differs, strict=True) if is_other]:
        raise ValueError(
            f"The processes of this run differ in {', '.join(names)}. Give all processes the "
            "same options and the same text."
        )


def on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole array. If it is sharded over several processes, all of them must call."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return _replicated(x)
    return np.asarray(x)


def from_every_process(x: np.ndarray) -> np.ndarray:
    """Stacks the processes' arrays, of one shape and dtype, to `(processes, *x.shape)`."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.reshape(np.asarray(devices, dtype=object), (jax.process_count(), -1))
    rows = jax.NamedSharding(jax.sharding.Mesh(grid, ("process", "device")), jax.P("process"))
    return _replicated(jax.make_array_from_process_local_data(rows, x[None]))


def _replicated(x: jax.Array) -> np.ndarray:
    whole = jax.NamedSharding(x.sharding.mesh, jax.P())
    return np.asarray(jax.jit(lambda x: x, out_shardings=whole)(x))
