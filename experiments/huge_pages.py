"""Memory in huge pages for programs that run on a CPU."""

import os
import sys


def restart_with_huge_pages() -> None:
    """Starts this command anew with glibc's huge pages, where a variable does not rule it yet.

    XLA asks for a program's temporaries anew in each run, and Linux clears every page of them: in
    pages of 4 KiB that takes a third of the time of a step of `pretrain` on one core, and more of a
    larger model's. glibc reads how to ask for memory at a program's start only. The process, its
    number and its files stay the same.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
