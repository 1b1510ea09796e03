"""The studies. Run `python -m experiments.grok`, `.family`, `.pretrain`, `.finetune`, `.bench`."""

import os

# The threads of LAPACK and of XLA compete for cores: on two cores an SVD of 128² took 700 ms with
# both, and 2 ms with one. The variable is read when numpy and scipy are loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
