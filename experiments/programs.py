"""Caches compiled programs for later runs."""

import os

import jax

from experiments.language.cache import home


def keep_compiled_programs() -> None:
    """Enables JAX's compilation cache, in the user's cache folder unless another is configured.

    `JAX_COMPILATION_CACHE_DIR` names another folder, and `JAX_ENABLE_COMPILATION_CACHE=false` turns
    the cache off. A program that JAX cannot read there is compiled again, with a warning.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(home("programs")))
    # By default JAX does not cache programs that compile in less than a second. A run has many.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
