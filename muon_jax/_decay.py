"""The last two links of a chain: decoupled weight decay and the learning rate."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muon_jax._precision import coefficient, widen
from muon_jax._routing.rules import MUON, Route, as_rules, is_rules, match_rules
from muon_jax._trees import KeyPath, map_paths, values_by_path


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any = None, cautious: bool = False
) -> optax.GradientTransformation:
    """Returns `u + weight_decay * w`, if `cautious` only where `u` shrinks `w` too: `u * w >= 0`.

    The sum is computed in float32 or wider, and is not rounded to the dtype of `u`.

    References:
        Chen et al., 2025, Cautious Weight Decay, arXiv 2510.12402, algorithm 1.
    """

    def add(decay, u, w):
        u, w = widen(u), widen(w)
        decayed = coefficient(decay, w) * w
        if cautious:
            # Signs are compared because the product of two small numbers may underflow.
            along = jnp.real(jnp.sign(u) * jnp.conj(jnp.sign(w)))
            decayed = jnp.where(along >= 0, decayed, jnp.zeros_like(decayed))
        return u + decayed

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("Weight decay needs the params: call update(updates, state, params).")
        decay, state = _at(weight_decay, state)
        if isinstance(decay, (int, float)) and decay == 0:
            return updates, state
        return jax.tree.map(functools.partial(add, decay), updates, params), state

    tx = optax.GradientTransformation(functools.partial(_init, weight_decay), update)
    return tx if mask is None else optax.masked(tx, mask)


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """Returns `-learning_rate * u` in float32 or wider, without rounding to the dtype of `u`."""

    def update(updates, state, params=None):
        del params
        rate, state = _at(learning_rate, state)
        return jax.tree.map(lambda u: -coefficient(rate, widen(u)) * widen(u), updates), state

    return optax.GradientTransformation(functools.partial(_init, learning_rate), update)


def _init(value: optax.ScalarOrSchedule, params: Any) -> Any:
    """Returns Optax's initial state: a step counter if the value is a schedule, else empty."""
    del params
    if callable(value):
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
    return optax.EmptyState()


def _at(value: optax.ScalarOrSchedule, state: Any) -> tuple[Any, Any]:
    """Returns the value at this step and the next state."""
    if callable(value):
        return value(state.count), state._replace(count=optax.safe_increment(state.count))
    return value, state


def as_decay_mask(
    mask: Any, tree: Any, routes: dict[KeyPath, Route]
) -> Callable[[Any], Any] | None:
    """Returns the mask as a callable that also accepts trees whose other leaves are masked.

    Args:
        mask: A bool, a tree of bools or a prefix of one, a callable from `tree` to either,
            `(regex, bool)` pairs, or `"matrices"` for the leaves of the matrix optimizer. Of the
            pairs the first whose regex is found in a leaf's path decides; leaves without a match
            are decayed. `None` decays everything.
        tree: The params or updates.
        routes: The routes of the leaves of `tree`.
    """
    if mask is None:
        return None
    if isinstance(mask, str):
        if mask != "matrices":
            raise ValueError(
                'weight_decay_mask must be "matrices", True or False for each leaf or subtree, '
                f"(regex, bool) pairs, or a callable from the params to a tree; got {mask!r}."
            )
        decayed = {path: leaf.label == MUON for path, leaf in routes.items()}
    elif is_rules(mask, tree, _is_bool):
        rules = as_rules(mask, "weight_decay_mask", "bool", _is_bool)
        chosen = match_rules(rules, tree, routes)
        decayed = {path: bool(chosen[path][0]) if path in chosen else True for path in routes}
    else:
        given = values_by_path(
            mask,
            tree,
            what="weight_decay_mask",
            kind="True or False",
            is_value=_is_bool,
            remedy="Rules for some leaves are (regex, bool) pairs, such as [('bias', False)].",
        )
        decayed = {path: bool(value) for path, value in given.items()}
    return functools.partial(map_paths, decayed)


def _is_bool(x: Any) -> bool:
    """Whether `x` is a bool of Python or NumPy, or a boolean array without axes and not traced."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, bool) or (
        isinstance(x, (np.bool_, np.ndarray, jax.Array)) and x.shape == () and x.dtype == bool
    )
