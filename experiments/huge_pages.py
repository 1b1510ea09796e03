"""Makes programs on a CPU use memory in huge pages."""

import os
import sys


def restart_with_huge_pages() -> None:
    """Restarts this command with huge pages, unless the variable GLIBC_TUNABLES is set already.

    XLA allocates a program's temporaries in each run, and Linux clears all their pages. With pages
    of 4 KiB that takes a third of the time of a step of `pretrain` on one core, and more for larger
    models. glibc reads the setting only when a program starts. The restart keeps the process ID and
    open files.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
