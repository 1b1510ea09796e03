"""Constraints on the norms of the weights, which work with every optimizer that `hybrid` makes."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from muon_jax._matrices.hooks import Hook, HookState, Step, as_several, init_hooks, run_hooks
from muon_jax._matrices.stages import Stages
from muon_jax._precision import widen


class Constraint(NamedTuple):
    """A pair of hooks, one for a matrix optimizer's update and one for the resulting weights.

    Attributes:
        on_update: A hook that receives the update before decay and rate. The arrays that it
            returns are multiplied by the learning rate.
        on_weights: A hook that receives the new weights, last in the chain, and returns the
            weights to use instead.
    """

    on_update: Hook | None = None
    on_weights: Hook | None = None


Constraints = Constraint | Sequence[Constraint] | None


def as_constraints(given: Any) -> tuple[Constraint, ...]:
    """Converts None, one constraint or several constraints to a tuple."""
    rule = "a constraint, such as muon_jax.hyperball(), or a list of them"
    return as_several(given, Constraint, "constraint", rule)


def constrained(
    constraints: Sequence[Constraint], links: Sequence[Any], placing: dict[str, Any]
) -> tuple[Any, Any]:
    """Returns decay and rate, the last links of a chain, with constraints before and after them."""
    link = functools.partial(_link, Stages(**placing))
    before = [link(c.on_update) for c in constraints if c.on_update]
    last = [link(c.on_weights, of_weights=True) for c in constraints if c.on_weights]
    add_decay, scale_by_rate = links
    return optax.chain(*before, add_decay), optax.chain(scale_by_rate, *last)


def _link(stages: Stages, hook: Hook, of_weights: bool = False) -> optax.GradientTransformation:
    def init(params):
        states = init_hooks([hook], stages.matrices(params), params)
        return HookState(*states) if states else optax.EmptyState()

    def update(updates, state, params=None):
        matrices = stages.matrices(updates)
        step = Step(matrices, updates, params)
        x = [widen(u) for u in matrices.split(updates)]
        weights = step.weights("A constraint") if of_weights else [0.0] * len(x)
        x = [w + u for w, u in zip(weights, x, strict=True)]
        x, states = run_hooks([hook], x, tuple(state), step)
        x = [y - w for y, w in zip(x, weights, strict=True)]
        return matrices.merge(x, updates), HookState(*states) if states else state

    return optax.GradientTransformation(init, update)
