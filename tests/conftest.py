"""Settings that must stand before JAX starts: sixteen CPU devices, no silent rank promotion.

One thread for LAPACK, whose own spin against XLA's: an SVD of 128² takes 300 times as long. And
quick code generation: the tests compile far longer than they run.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_rank_promotion", "raise")
