"""The names of leaves, and the assignment of values to leaves and subtrees by name.

A tree may hold its arrays in boxes: NNX's variables, Linen's Partitioned, the named arrays of
Haliax and penzai. A model has the same names with and without boxes. An attribute and a key of the
same name are equal, and so are the keys 0 and "0".
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import optax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

KeyPath = tuple[Any, ...]
Names = tuple[str, ...]

# The attributes of boxes that hold the array: `value` in NNX, Linen and penzai, `data_array` in
# penzai's inner box. In Haliax the attribute has no name.
_BOX_ATTRIBUTES = ("value", "raw_value", "array", "data_array")


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def positions(tree: Any, is_value: Callable[[Any], bool] = is_masked) -> list[tuple[KeyPath, Any]]:
    """Returns the leaves with their key paths; `None` and `MaskedNode` count as leaves."""
    return jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or is_masked(x) or is_value(x)
    )[0]


def leaf_names(tree: Any, is_value: Callable[[Any], bool] = is_masked) -> dict[KeyPath, Names]:
    """Returns the keys that lead to each position, as strings without the keys of boxes.

    A box is a node with a single child whose attribute has one of the known names. An array that a
    module stores as `value` beside other arrays, as attention does, keeps its name.
    """
    paths = [path for path, _ in positions(tree, is_value)]
    children = defaultdict(set)
    for path in paths:
        for depth, key in enumerate(path):
            children[path[:depth]].add(key)
    return {path: _names(path, children) for path in paths}


def _names(path: KeyPath, children: dict[KeyPath, set] | None = None) -> Names:
    """Returns the names; `children` has the keys below each path, and without it one is assumed."""
    kept: list[str] = []
    for depth in reversed(range(len(path))):
        key = path[depth]
        alone = children is None or len(children[path[:depth]]) == 1
        # A pure tree inside a box begins with a key; an attribute there belongs to a module.
        inside = kept and isinstance(path[depth + 1], GetAttrKey)
        named = isinstance(key, GetAttrKey) and key.name in _BOX_ATTRIBUTES and not inside
        nameless = isinstance(key, FlattenedIndexKey) and children is not None and not kept
        if not (alone and (named or nameless)):
            kept.append(_key_string(key))
    return tuple(reversed(kept))


def path_strings(tree: Any) -> dict[KeyPath, str]:
    """Returns the name of each position, such as `layers/0/attn/kernel`, by key path."""
    return {path: "/".join(names) for path, names in leaf_names(tree).items()}


def path_string(path: KeyPath) -> str:
    """Formats one JAX key path as `layers/0/attn/kernel`, without the rest of the tree."""
    return "/".join(_names(path))


def _key_string(key: Any) -> str:
    match key:
        case DictKey():
            return str(key.key)
        case GetAttrKey():
            return key.name
        case SequenceKey():
            return str(key.idx)
    return str(getattr(key, "key", key))


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Prefixes the message of a ValueError with a leaf's path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def some(paths: Iterable[str], limit: int = 12) -> str:
    """Joins the first paths of many for a message."""
    listed = [path or "(root)" for path in paths]
    return ", ".join(listed[:limit]) + f" and {len(listed) - limit} more" * (len(listed) > limit)


def values_by_path(
    given: Any, tree: Any, *, what: str, is_value: Callable[[Any], bool], **options: Any
) -> dict[KeyPath, Any]:
    """Calls `broadcast_prefix` with a tree of values, or with the result of a callable."""
    if callable(given) and not any(is_value(x) for _, x in positions(given, is_value)):
        given = called(f"the callable {what}", given, tree)
        what = f"The result of the callable {what}"
    return broadcast_prefix(given, tree, what=what, is_value=is_value, **options)


def called(what: str, function: Callable, *args: Any) -> Any:
    """Calls a user's function, and adds a note with its name to any error."""
    try:
        return function(*args)
    except Exception as error:
        error.add_note(f"This comes from {what}.")
        raise


def broadcast_prefix(
    prefix: Any,
    tree: Any,
    *,
    what: str,
    kind: str,
    is_value: Callable[[Any], bool],
    partial: bool = False,
    remedy: str = "",
) -> dict[KeyPath, Any]:
    """Returns the value that `prefix` has for each leaf of `tree`, by key path.

    Values and leaves are matched by name, whatever the trees' classes and boxes. `None` and
    `MaskedNode` in `tree` do not need a value. Errors name the path.

    Args:
        prefix: A tree of values, each for one leaf or for a whole subtree.
        tree: The tree to cover.
        what, kind: The name of `prefix` and a description of its values, for messages.
        is_value: Whether a node of `prefix` is a value rather than a subtree.
        partial: Whether leaves without a value are omitted from the result instead of an error.
        remedy: A sentence to add to messages.
    """
    also = f" {remedy}" * bool(remedy)
    names = leaf_names(prefix, is_value)
    values = {names[path]: value for path, value in positions(prefix, is_value)}
    for name, value in values.items():
        if not (value is None or is_masked(value) or is_value(value)):
            at = f" at {'/'.join(name)!r}" if name else ""
            raise ValueError(
                f"{what} must have {kind} for each leaf or subtree; got {value!r}{at}.{also}"
            )
    leaves = positions(tree)
    if not leaves:  # optax.tree_map_params calls `init` with a placeholder instead of params
        return {}
    leaf_name = leaf_names(tree)
    covering = {
        path: next((name[:n] for n in range(len(name), -1, -1) if name[:n] in values), None)
        for path, name in leaf_name.items()
    }
    covers = set(covering.values())
    for name, value in values.items():
        if name not in covers and value is not None:
            raise ValueError(
                f"{what} has {value!r} at {'/'.join(name)!r}, where the tree has no leaf. Its "
                f"leaves are: {some(map('/'.join, leaf_name.values()))}.{also}"
            )
    values_of = {}
    for path, leaf in leaves:
        if leaf is None or is_masked(leaf):
            continue
        key = covering[path]
        if key is not None and is_value(values[key]):
            values_of[path] = values[key]
        elif not partial:
            raise ValueError(f"{what} has no entry for leaf {'/'.join(leaf_name[path])!r}.{also}")
    return values_of


def map_paths(values: dict[KeyPath, Any], tree: Any) -> Any:
    """Returns a tree like `tree` with the value of each leaf's path; masked leaves stay masked."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path], tree)


def only_updated(params: Any, updates: Any) -> Any:
    """Returns `params` with `None` wherever `updates` have `None`, as those of filtered models do.

    Leaves without an update may then be anything, such as the functions of an Equinox module.
    """
    if params is None:
        return None
    return jax.tree.map(
        lambda u, p: None if u is None else p, updates, params, is_leaf=lambda x: x is None
    )


def only_state(state: Any, kind: type, remedy: str) -> Any:
    """Returns the only state of class `kind` in a chain's state; an error ends with the remedy."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    own = [node for node in nodes if isinstance(node, kind)]
    if len(own) != 1:
        raise ValueError(f"The state has {len(own)} {remedy}")
    return own[0]
