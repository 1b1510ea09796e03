"""Decompositions of stacks of matrices that do not stall on a CPU."""

from collections.abc import Callable
from typing import Any

import jax


def each_matrix(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`function` of a stack `(..., m, n)`, on a CPU of one matrix after another.

    XLA hands the matrices of a stack to its threads and waits for them in one of these, so that a
    few stacks at once wait for each other for ever: seen with `eigh` on two cores.

    Args:
        function: takes `(..., m, n)`, as `jnp.linalg.eigh` does.
        x: the stack.

    Returns:
        What `function` returns.
    """

    def one_by_one(x: jax.Array) -> Any:
        results = jax.lax.map(function, x.reshape(-1, *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), results)

    if x.ndim == 2:
        return function(x)
    return jax.lax.platform_dependent(x, cpu=one_by_one, default=function)
