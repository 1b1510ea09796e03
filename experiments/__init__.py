"""The studies: `python -m experiments.grok`, `.family`, `.pretrain`, `.bench`."""

import contextlib
import ctypes
import os

# LAPACK's own threads and XLA's spin against each other: on two cores an SVD of 128² took 700 ms
# with both and 2 ms with one. Read when numpy and scipy are loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# XLA asks for a step's temporaries anew each time. glibc would map them and give them back each
# time, and Linux clear them page by page: a third of the time of `pretrain`'s steps on a CPU.
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1
with contextlib.suppress(AttributeError, OSError):  # another C library
    _libc = ctypes.CDLL(None)
    _libc.mallopt(_ARENA_MAX, 1)
    _libc.mallopt(_MMAP_MAX, 0)
    _libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
