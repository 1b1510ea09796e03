"""Names of leaves, and values given for whole subtrees."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

KeyPath = tuple[Any, ...]

# What a box around an array calls it: NNX variables and Linen's Partitioned, Haliax NamedArray.
_BOX_ATTRIBUTES = ("value", "raw_value", "array")


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def path_string(path: KeyPath) -> str:
    """A JAX key path as `layers/0/attn/kernel`; the box around an array is not named.

    Example:
        >>> import jax
        >>> paths = [path for path, _ in jax.tree.leaves_with_path({"mlp": [{"kernel": 1.0}]})]
        >>> path_string(paths[0])
        'mlp/0/kernel'
    """
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name in _BOX_ATTRIBUTES:
        path = path[:-1]
    return "/".join(_key_string(key) for key in path)


def _key_string(key: Any) -> str:
    match key:
        case DictKey():
            return str(key.key)
        case GetAttrKey():
            return key.name
        case SequenceKey():
            return str(key.idx)
    return str(getattr(key, "key", key))


def broadcast_prefix(
    prefix: Any, tree: Any, *, what: str, is_value: Callable[[Any], bool], partial: bool = False
) -> dict[KeyPath, Any]:
    """The value that `prefix`, a tree or a part of one, gives each leaf of `tree`, by key path.

    Args:
        prefix: a tree of values, each for one leaf or for a whole subtree.
        tree: the tree to cover; `None` and `MaskedNode` in it need no value.
        what: the name of `prefix` in errors.
        is_value: what ends the descent into `prefix`.
        partial: leave leaves without a value out, in place of an error.

    Raises:
        ValueError: a leaf without a value, or a value without a leaf; both name the path.
    """
    values = dict(
        jax.tree_util.tree_flatten_with_path(prefix, is_leaf=lambda x: x is None or is_value(x))[0]
    )
    used = set()

    def covering(path):
        for length in range(len(path), -1, -1):
            if path[:length] in values:
                return path[:length]
        return None

    found = {}
    positions = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or is_masked(x)
    )[0]
    if not positions:  # the stand-in for params with which optax.tree_map_params calls `init`
        return {}
    for path, leaf in positions:
        key = covering(path)
        used.add(key)
        if leaf is None or is_masked(leaf):
            continue
        if key is not None and values[key] is not None:
            found[path] = values[key]
        elif not partial:
            raise ValueError(f"{what} says nothing of the leaf {path_string(path)!r}.")
    for path, value in values.items():
        if path not in used and value is not None:
            raise ValueError(
                f"{what} has {value!r} at {path_string(path)!r}, where the tree has no leaf."
            )
    return found


def map_paths(values: dict[KeyPath, Any], tree: Any) -> Any:
    """A tree like `tree` with the value of each leaf's path; masked leaves stay masked."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path], tree)


def is_tree_of(x: Any, is_value: Callable[[Any], bool]) -> bool:
    """Whether `x` is a tree of such values, even where its class defines `__call__`."""
    return all(map(is_value, jax.tree.leaves(x, is_leaf=is_value)))
