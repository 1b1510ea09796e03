"""Many processes as one run: finding each other, agreeing, sharing a batch, arrays on hosts."""

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
    """A run of many processes, one a host."""

    enabled: bool = False
    """Run as one of several processes. Slurm, GKE, Open MPI and TPU VMs tell which; elsewhere, give
    the next three options."""
    coordinator: str | None = None
    """HOST:PORT of the first process."""
    count: Count | None = None
    """Number of processes."""
    index: Whole | None = None
    """Index of this process, from 0."""

    def join(self) -> None:
        """To be called before anything else of JAX.

        Raises:
            ValueError: nothing tells who the processes are.
        """
        told = (self.coordinator, self.count, self.index)
        if not (self.enabled or any(value is not None for value in told)):
            return
        if None in told and any(value is not None for value in told):
            raise ValueError(
                "--processes.coordinator, --processes.count and --processes.index require each "
                "other. Give all three, or only --processes.enabled under Slurm, on GKE or on a "
                "TPU VM."
            )
        jax.distributed.initialize(*told)


class Agreement:
    """Whether any process wants to stop: the same answer to all of them, a step later."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self._flags = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=jax.NamedSharding(mesh, jax.P()))
        self._asked = jnp.zeros([], bool)

    def any(self, mine: bool) -> bool:
        """To be called once a step by every process."""
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
    """The rows of a step's batch that this process loads, and how they become its array.

    They are those that its devices read, which follows from where the batch lies. Devices of
    several processes read the same rows where an axis of the mesh that does not split the batch
    spans these processes. So a step's batch is the same, whatever the processes and the mesh.

    Args:
        sharding: of `(microbatches, rows, ...)`, split along the rows at most.
        microbatches: of a step.
        rows: of a microbatch.
        devices: that read; by default those of this process.

    Attributes:
        rows: places in the batch, ascending: `microbatch * rows + row`.
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
        """This process's rows `(len(rows), ...)` as a part of `(microbatches, rows, ...)`."""
        shape = (*self._places.shape, *local.shape[1:])
        return jax.make_array_from_callback(
            shape,
            self._sharding,
            lambda at: local[np.searchsorted(self.rows, self._places[at[:2]])],
        )


def place_whole(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, of which each places what its devices read."""
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def check_same(facts: dict[str, Any]) -> None:
    """To be called by every process with JSON-able facts, under the same names.

    Raises:
        ValueError: processes have different ones; those names.
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
    """The whole array; of one that lies over several processes they all must call."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return _replicated(x)
    return np.asarray(x)


def from_every_process(x: np.ndarray) -> np.ndarray:
    """What each process gives, all of one shape and dtype: `(processes, *x.shape)` in each."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.reshape(np.asarray(devices, dtype=object), (jax.process_count(), -1))
    rows = jax.NamedSharding(jax.sharding.Mesh(grid, ("process", "device")), jax.P("process"))
    return _replicated(jax.make_array_from_process_local_data(rows, x[None]))


def _replicated(x: jax.Array) -> np.ndarray:
    whole = jax.NamedSharding(x.sharding.mesh, jax.P())
    return np.asarray(jax.jit(lambda x: x, out_shardings=whole)(x))
