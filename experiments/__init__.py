"""The studies: `python -m experiments.grok`, `.family`, `.pretrain`, `.finetune`, `.bench`."""

import os

# LAPACK's own threads and XLA's spin against each other: on two cores an SVD of 128² took 700 ms
# with both and 2 ms with one. Read when numpy and scipy are loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
