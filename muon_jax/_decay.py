"""Decoupled weight decay: scheduled, masked, cautious."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muon_jax._paths import KeyPath, map_paths, values_by_path
from muon_jax._routing import MUON, Route, as_rules, is_rules, match_rules


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any = None, cautious: bool = False
) -> optax.GradientTransformation:
    """`u + weight_decay * w`; cautious, only where `u` shrinks `w` by itself: `u * w >= 0`.

    References:
        Chen et al., 2025, Cautious Weight Decay, arXiv 2510.12402, algorithm 1.
    """
    plain = optax.add_decayed_weights(weight_decay, mask)
    if not cautious:
        return plain

    def update(updates, state, params=None):
        decay, state = plain.update(optax.tree.zeros_like(updates), state, params)
        updates = jax.tree.map(
            # By signs: the product of two small numbers may vanish.
            lambda u, d, w: u + jnp.where(jnp.sign(u) * jnp.sign(w) >= 0, d, jnp.zeros_like(d)),
            updates,
            decay,
            params,
        )
        return updates, state

    return optax.GradientTransformation(plain.init, update)


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
        decayed = {path: found.label == MUON for path, found in routes.items()}
    elif is_rules(mask, tree, _is_bool):
        rules = as_rules(mask, "weight_decay_mask", "bool", _is_bool)
        chosen = match_rules(rules, tree, routes)
        decayed = {path: bool(chosen[path][0]) if path in chosen else True for path in routes}
    else:
        found = values_by_path(
            mask,
            tree,
            what="weight_decay_mask",
            kind="True or False",
            is_value=_is_bool,
            remedy="Rules for some leaves are (regex, bool) pairs, such as [('bias', False)].",
        )
        decayed = {path: bool(value) for path, value in found.items()}
    return functools.partial(map_paths, decayed)


def _is_bool(x: Any) -> bool:
    """Of Python, of NumPy, or an array without axes whose value is known."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, bool) or (
        isinstance(x, (np.bool_, np.ndarray, jax.Array)) and x.shape == () and x.dtype == bool
    )
