"""Decoupled weight decay: scheduled, masked, cautious."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muon_jax._paths import broadcast_prefix, is_tree_of, map_paths


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


def as_decay_mask(mask: Any, tree: Any) -> Callable[[Any], Any] | None:
    """The mask as a callable that also fits a tree whose other leaves are masked."""
    if mask is None:
        return None
    if not is_tree_of(mask, _is_bool):
        mask = mask(tree)
    decayed = broadcast_prefix(mask, tree, what="weight_decay_mask", is_value=_is_bool)
    return functools.partial(map_paths, decayed)


def _is_bool(x: Any) -> bool:
    return isinstance(x, (bool, np.bool_))
