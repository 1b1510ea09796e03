"""Compiled programs are kept for the next run."""

import os

import jax

from experiments.language.cache import home


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, if it was not told of another.

    `JAX_COMPILATION_CACHE_DIR` names another folder, and `JAX_ENABLE_COMPILATION_CACHE=false` has
    nothing kept. JAX compiles anew, with a warning, what it cannot read there.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(home("programs")))
    # By default what takes less than a second is not kept: a run has many of these.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
