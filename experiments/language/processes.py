"""Many processes as one run: finding each other, agreeing, an array on every host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Processes:
    """A run of many processes, one a host."""

    enabled: bool = False
    """Find the others: Slurm, GKE, Open MPI and TPU VMs tell who they are; elsewhere say it."""
    coordinator: str | None = None
    """HOST:PORT of the first process, where nothing tells."""
    count: int | None = None
    """How many there are, where nothing tells."""
    index: int | None = None
    """Which one this is, from 0, where nothing tells."""

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
                "--processes.coordinator, --processes.count and --processes.index go together; "
                "give all of them, or --processes.enabled alone where Slurm, GKE or a TPU VM tells."
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
        flags = np.full(jax.local_device_count(), mine)
        self._asked = self._any(jax.make_array_from_process_local_data(self._flags, flags))
        if jax.default_backend() == "cpu":
            self._asked.block_until_ready()
        return answer


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
