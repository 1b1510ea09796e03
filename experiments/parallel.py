"""Runs independent jobs on all devices at once, in one thread for each worker.

There is one worker for each device. On a CPU there is one for each core instead, since a small
program does not use all cores: XLA runs programs of several threads on the first CPU device at
once, and all cores share one compiled program. Jobs with the same key go to the same worker where
possible, since their program is compiled for its device.
"""

import functools
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

Job = TypeVar("Job")


def one_cpu_device_per_core() -> None:
    """Gives JAX one CPU device per core, unless their number is configured. Call it before JAX."""
    if jax.config.jax_num_cpu_devices == -1:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def devices_for(jobs: int) -> list[jax.Device]:
    """Returns the devices for this many jobs; on a CPU, the first device once for each core."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        devices = devices[:1] * len(os.sched_getaffinity(0))
    return devices[:jobs]


def once(keep: int | None) -> Callable[[Callable], Any]:
    """Returns a `functools.lru_cache(keep)` in which threads wait for one that computes a value."""

    def decorate(f: Callable) -> Any:
        kept = functools.lru_cache(keep)(f)
        locks: dict[Hashable, threading.Lock] = {}

        @functools.wraps(f)
        def one_at_a_time(*key: Hashable) -> Any:
            with locks.setdefault(key, threading.Lock()):
                return kept(*key)

        one_at_a_time.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
        one_at_a_time.cache_info = kept.cache_info  # type: ignore[attr-defined]
        return one_at_a_time

    return decorate


def run_in_parallel(
    jobs: Sequence[Job],
    key: Callable[[Job], Hashable],
    work: Callable[[Job, jax.Device], None],
    stop: threading.Event,
) -> None:
    """Runs all jobs, one at a time in each worker, in their order as far as keys allow.

    Args:
        jobs: The jobs.
        key: Returns a key that is equal for jobs with the same compiled program.
        work: Runs a job. It should check `stop` often and raise KeyboardInterrupt once it is set.
        stop: An event that ends the work. It is also set if a job fails, so that the others end.

    Raises:
        KeyboardInterrupt: `stop` was set.
        Exception: The first exception that a job raised.
    """
    waiting, owners, lock = list(jobs), {}, threading.Lock()

    def take(place: int) -> Job | None:
        with lock:
            free = [job for job in waiting if owners.get(key(job), place) == place]
            if not waiting or stop.is_set():
                return None
            job = (free or waiting)[0]
            owners.setdefault(key(job), place)
            waiting.remove(job)
            return job

    def worker(place: int, device: jax.Device) -> None:
        try:
            with jax.default_device(device):
                while (job := take(place)) is not None:
                    work(job, device)
        except BaseException:
            stop.set()
            raise

    devices = devices_for(len(jobs))
    with ThreadPoolExecutor(max(len(devices), 1)) as pool:
        futures = [pool.submit(worker, *place) for place in enumerate(devices)]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda e: isinstance(e, KeyboardInterrupt)):
        raise error
    if stop.is_set():
        raise KeyboardInterrupt
