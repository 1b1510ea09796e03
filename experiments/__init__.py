"""The studies: `python -m experiments.grok`, `.family`, `.pretrain`, `.bench`."""

import os
import sys

from experiments.huge_pages import restart_with_huge_pages

# LAPACK's own threads and XLA's spin against each other: on two cores an SVD of 128² took 700 ms
# with both and 2 ms with one. Read when numpy and scipy are loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if sys.argv[:1] == ["-m"]:  # Python looks for the command to run, and has loaded nothing else
    restart_with_huge_pages()
