"""Applies decompositions to stacks of matrices without stalling on a CPU."""

from collections.abc import Callable
from typing import Any

import jax


def each_matrix(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """Applies `function` to a stack `(..., m, n)`, on a CPU to one matrix after another.

    XLA:CPU distributes the matrices of a stack over its threads and waits for them in one of these
    threads, so several stacks at once can deadlock. This was observed with `eigh` on two cores.
    """

    def one_by_one(x: jax.Array) -> Any:
        results = jax.lax.map(function, x.reshape(-1, *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), results)

    if x.ndim == 2:
        return function(x)
    return jax.lax.platform_dependent(x, cpu=one_by_one, default=function)
