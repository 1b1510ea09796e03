"""Settings that must stand before JAX starts: sixteen CPU devices, no silent rank promotion.

One thread for LAPACK, whose own spin against XLA's: an SVD of 128² takes 300 times as long.

The tests compile far longer than they run. So code is generated quickly, in one piece and without
optimisation, and what is compiled is kept in pytest's cache folder for the next run and for the
processes that tests start: `pytest --cache-clear` forgets it.
"""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
    # Later ones do not know this one.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""),
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # starts JAX, after which no command that a test runs changes their number


# The files that take longest. A worker of xdist that began one of them last would end alone.
LONGEST = (
    "test_variants_placement",
    "test_placement",
    "test_grok_run",
    "test_finetune_run",
    "test_grok_grid",
    "test_grok_model",
    "test_family_run",
    "test_pretrain_run",
    "test_precision",
    "test_family_widths",
    "test_finetune_arms",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first, instead of those with most tests as xdist does."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Drops a file's programs: each takes memory maps, and a process that has 65530 crashes."""
    yield
    jax.clear_caches()


def pytest_configure(config):
    """Keeps what is compiled, and lets warnings of two kinds pass.

    The toy trees of most tests have leaves such as `square`, of which no name tells what it is;
    `test_names.py` tests when the optimizers warn of these, and when not. And a program whose file
    another process is still writing is compiled anew.
    """
    config.option.loadscopereorder = False  # of xdist; see `LONGEST`
    if hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("programs")))
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    config.addinivalue_line("filterwarnings", "ignore:The routes of these leaves are guesses")
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")
