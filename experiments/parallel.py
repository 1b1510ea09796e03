"""Independent pieces of work on all devices at once: a thread for each place, a job at a time.

A place is a device, and on a CPU, whose cores small programs do not fill, a core of its first
device: XLA runs programs of several threads on one device at once, and one compiled program then
serves all cores. Jobs of one key stay in one place as long as it can be, since their program is
compiled for its device.
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
    """Of a CPU as many devices as it has cores, if JAX was not told; for before it begins."""
    if jax.config.jax_num_cpu_devices == -1:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def devices_for(jobs: int) -> list[jax.Device]:
    """Those that so many jobs keep busy; on a CPU its first, once for each core."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        devices = devices[:1] * len(os.sched_getaffinity(0))
    return devices[:jobs]


def once(keep: int) -> Callable[[Callable], Any]:
    """As `functools.lru_cache(keep)`, where threads that ask for one thing together share it."""

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
    """Does all jobs, one at a time in each place, in their order as far as keys allow.

    Args:
        jobs: what to do.
        key: what jobs share that share a program.
        work: does a job; it should look at `stop` often, and raise KeyboardInterrupt once set.
        stop: set here, too, where a job fails, so that the others end.

    Raises:
        KeyboardInterrupt: `stop` was set.
        Exception: what a job raised first.
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
