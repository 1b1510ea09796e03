"""Skipping of steps whose loss or gradient is not finite, or whose gradient norm spikes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Decay rate of the mean gradient norm, and the number of steps before it is used.
_MEMORY, _SETTLED = 0.95, 20


class Guard(NamedTuple):
    """The state of the skipping rule.

    Attributes:
        skipped: The number of steps skipped so far.
        in_a_row: The number of latest consecutive steps without a finite loss and gradient.
        norm: The running mean of the gradient norm. A skipped spike enters it with the largest norm
            that is not skipped, so that a norm that stays large is accepted after a while.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    norm: jax.Array


def begin() -> Guard:
    """Returns the state before the first step."""
    zero = jnp.zeros([], jnp.int32)
    return Guard(zero, zero, jnp.zeros([]))


def judge(
    guard: Guard, updates: jax.Array, loss: jax.Array, norm: jax.Array, spike: float | None = None
) -> tuple[jax.Array, Guard]:
    """Returns whether to take a step, and the new state.

    Args:
        guard: The state before the step.
        updates: The number of steps taken before it.
        loss: The loss of the step.
        norm: The norm of its gradient.
        spike: Skip a step whose norm exceeds this multiple (above 1) of the running mean. None
            never does.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    taken, counted = finite, norm
    if spike is not None:
        known = (updates >= _SETTLED) & (guard.norm > 0)
        largest = jnp.where(known, spike * guard.norm, jnp.inf)
        taken, counted = finite & (norm <= largest), jnp.minimum(norm, largest)
    mean = jnp.where(updates == 0, counted, _MEMORY * guard.norm + (1 - _MEMORY) * counted)
    return taken, Guard(
        skipped=guard.skipped + ~taken,
        in_a_row=jnp.where(finite, 0, guard.in_a_row + 1),
        norm=jnp.where(finite, mean, guard.norm),
    )


def choose(taken: jax.Array, new: Any, old: Any) -> Any:
    """Returns the new tree if the step is taken, else the old one."""
    return jax.tree.map(functools.partial(jnp.where, taken), new, old)
