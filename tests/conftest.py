"""Settings that must stand before JAX starts: sixteen CPU devices, no silent rank promotion.

One thread for LAPACK, whose own spin against XLA's: an SVD of 128² takes 300 times as long. And
quick code generation: the tests compile far longer than they run. What the studies compile stays
out of the user's cache of programs.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Drops a file's programs: each takes memory maps, and a process that has 65530 crashes."""
    yield
    jax.clear_caches()


def pytest_configure(config):
    """The toy trees of most tests have leaves such as `square`, of which no name tells what it is.

    `test_names.py` tests when the optimizers warn of such leaves, and when not.
    """
    config.addinivalue_line("filterwarnings", "ignore:The routes of these leaves are guesses")
