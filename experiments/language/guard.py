"""Steps that are to change nothing: without a finite loss and gradient, or with a spike of it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The recent mean of the gradient's norm: its memory, and steps before it is trusted.
_MEMORY, _SETTLED = 0.95, 20


class Guard(NamedTuple):
    """What is known of bad steps.

    Attributes:
        skipped: steps so far that changed nothing.
        in_a_row: the last of them without a finite loss and gradient.
        norm: recent mean of the gradient's norm, to which a skipped spike counts as the largest
            norm that would have been taken: so a norm that stays large is taken after a while.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    norm: jax.Array


def begin() -> Guard:
    """Before the first step."""
    zero = jnp.zeros([], jnp.int32)
    return Guard(zero, zero, jnp.zeros([]))


def judge(
    guard: Guard, updates: jax.Array, loss: jax.Array, norm: jax.Array, spike: float | None = None
) -> tuple[jax.Array, Guard]:
    """Whether a step is to be taken, and what is known after it.

    Args:
        guard: before the step.
        updates: steps that were taken before it.
        loss: of the step.
        norm: of its gradient.
        spike: a norm that is so many times its recent mean, more than 1, is skipped, too; None for
            none.
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
    """The new tree if the step is taken, else the old one."""
    return jax.tree.map(functools.partial(jnp.where, taken), new, old)
