"""The last links of a chain: decoupled weight decay (scheduled, masked, cautious) and the rate."""

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
    """`u + weight_decay * w`; cautious, only where `u` shrinks `w` by itself: `u * w >= 0`.

    The sum is in float32 or wider, and left so.

    References:
        Chen et al., 2025, Cautious Weight Decay, arXiv 2510.12402, algorithm 1.
    """

    def add(decay, u, w):
        u, w = widen(u), widen(w)
        decayed = coefficient(decay, w) * w
        if cautious:
            # By signs: the product of two small numbers may vanish.
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
    """`-learning_rate * u`, in float32 or wider, and left so."""

    def update(updates, state, params=None):
        del params
        rate, state = _at(learning_rate, state)
        return jax.tree.map(lambda u: -coefficient(rate, widen(u)) * widen(u), updates), state

    return optax.GradientTransformation(functools.partial(_init, learning_rate), update)


def _init(value: optax.ScalarOrSchedule, params: Any) -> Any:
    """Optax's states: a count where there is a schedule."""
    del params
    if callable(value):
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
    return optax.EmptyState()


def _at(value: optax.ScalarOrSchedule, state: Any) -> tuple[Any, Any]:
    """The value at this step, and the next state."""
    if callable(value):
        return value(state.count), state._replace(count=optax.safe_increment(state.count))
    return value, state


def as_decay_mask(
    mask: Any, tree: Any, routes: dict[KeyPath, Route]
) -> Callable[[Any], Any] | None:
    """The mask as a callable that also fits a tree whose other leaves are masked.

    Args:
        mask: a bool, a tree of bools or a prefix of one, a callable from `tree` to either,
            `(regex, bool)` pairs of which the first that is found in a leaf's path decides, and
            leaves that none decides are decayed, or `"matrices"`: what the matrix optimizer takes.
            `None` decays everything.
        tree: the params or updates.
        routes: of `tree`.

    Raises:
        ValueError: any other mask, a rule that decides nothing, or a tree that does not fit; the
            message has the path.
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
    """Of Python, of NumPy, or an array without axes whose value is known."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, bool) or (
        isinstance(x, (np.bool_, np.ndarray, jax.Array)) and x.shape == () and x.dtype == bool
    )
