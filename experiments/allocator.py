"""Memory of XLA's programs on a CPU, between their runs."""

import contextlib
import ctypes
import importlib.util
import os

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # of malloc.h


def keep_temporaries() -> None:
    """Keeps freed memory in the process, if its programs run on a CPU and its C library is glibc.

    XLA asks for a program's temporaries anew in each run, and glibc maps them and gives them back,
    so that Linux clears every page of them each time: on one core a third of the time of a step of
    `pretrain`, and more of a larger model's. To be called before JAX starts its threads, which
    begin with memory of their own.
    """
    accelerator = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if accelerator and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_ARENA_MAX, 1)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)  # never
