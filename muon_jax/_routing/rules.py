"""Which optimizer takes which leaf: rules by path and shape, and the table that explains them."""

import numbers
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from muon_jax._matrices.parts import split_into_parts
from muon_jax._matrix_axes import MatrixAxes, as_matrix_axes, axes_by_path, is_matrix_axes
from muon_jax._routing.axes import CONV_KERNEL, read_hidden
from muon_jax._routing.ends import read_tree, reason_for_other
from muon_jax._routing.names import EMBEDDING as TABLE
from muon_jax._routing.names import VECTORS, LeafName, Reading
from muon_jax._routing.survey import Survey
from muon_jax._sharding.layout import find_placing
from muon_jax._trees import (
    KeyPath,
    broadcast_prefix,
    called,
    is_masked,
    naming,
    path_strings,
    positions,
    some,
)

MUON, OTHER, FROZEN = LABELS = ("muon", "other", "frozen")
ALIASES = {"adamw": OTHER}  # as the label was called before; still accepted in rules
EMBEDDING, VECTOR, CONV, MATRIX = "embedding", "vector", "conv", "matrix"

Choice = str | MatrixAxes
Routing = (
    None
    | Mapping[str, Choice]
    | Sequence[tuple[str, Choice]]
    | Callable[[str, Any], Choice | None]
    | Any
)


class Route(NamedTuple):
    """Where one leaf goes.

    Attributes:
        path: as in `layers/0/attn/kernel`.
        shape: of the leaf.
        label: `"muon"`, `"other"` or `"frozen"`.
        axes: its matrix axes if it goes to Muon.
        why: the rule that decided.
        doubt: what another reading of the shape would be; empty where there is none.
        kind: `"embedding"`, `"vector"`, `"conv"`, or `"matrix"` for all others.
    """

    path: str
    shape: tuple[int, ...]
    label: str
    axes: MatrixAxes | None
    why: str
    doubt: str = ""
    kind: str = MATRIX


class Decision(NamedTuple):
    """What the user's rules say of a leaf.

    Attributes:
        choice: as in `label_params`; `None` leaves it to the built-in rules.
        why: what decided, or what is said before the built-in rules' reason.
        doubt: as in `Route`.
        kind: as in `Route`; `None` leaves it to the leaf's name.
    """

    choice: Choice | None
    why: str = ""
    doubt: str = ""
    kind: str | None = None


def label_params(params: Any, rules: Routing = None) -> Any:
    """A tree like `params` of `"muon"`, `"other"` or `"frozen"`, for `optax.multi_transform`.

    The built-in rules read names first and shapes second: embeddings, heads, norms, gains and
    biases (scan-stacked ones too) are `"other"`, the matrices between them `"muon"`, complex ones
    too. They know the names of Flax NNX and Linen, Equinox, Haiku, Hugging Face, MaxText and
    Levanter. Where they guess, such as at the ends of an MLP, `routing_table` says so and the
    optimizer's `init` warns. Leaves of integers or bools have no built-in rule: filter them out,
    or send them to `"frozen"`.

    Args:
        params: arrays or `jax.ShapeDtypeStruct`s.
        rules: what decides in place of the built-in rules; its type decides how it is read. A
            choice is one of the three labels (`"adamw"` is an old name of `"other"`), or
            `MatrixAxes`: Muon along these axes.

            - A list or tuple of `(regex, choice)` pairs: of those found in a leaf's path
              (`re.search`), the first decides, and a leaf in which none is found is left to the
              built-in rules. Each pair must decide some leaf: one that is found nowhere, or only
              where earlier ones have decided, is an error. Put the narrow rules first.
            - A callable `(path, leaf) -> choice`; `None` leaves the leaf to the built-in rules.
            - What `trace_routing` returns: choices read from how a function uses each leaf.
            - A dict, or any other tree of choices: a choice for each leaf, or for each subtree,
              which must decide every leaf. It is matched by name, so a tree of NNX variables or of
              Linen's partitioned params fits a tree of plain arrays, and the reverse. Where
              `params` are a list, a list that holds only choices is such a tree.

    Raises:
        ValueError: rules of any other kind, a bad regex, a rule that decides no leaf, a leaf that
            the tree has no choice for, an unknown choice, Muon for a leaf that is no matrix, axes
            or parts that do not fit it, or a leaf that is no array. The message has the path.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> params = {"wte": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 8))}}
        >>> muon_jax.label_params(params, [("mlp/.*", "frozen")])
        {'mlp': {'kernel': 'frozen'}, 'wte': 'other'}
    """
    routes = route(params, rules)
    return jax.tree_util.tree_map_with_path(lambda path, _: routes[path].label, params)


def warn_of_guesses(routes: Mapping[KeyPath, Route]) -> None:
    """One warning that names the leaves whose route is a guess, since who trains reads no table."""
    guesses = [
        f"{leaf.path or '(root)'} ({leaf.label}: {leaf.doubt})"
        for leaf in routes.values()
        if leaf.doubt
    ]
    if guesses:
        warnings.warn(
            f"The routes of these leaves are guesses from their names and shapes: {some(guesses)}. "
            "See muon_jax.routing_table, and give routing=: rules for these leaves, or what "
            "muon_jax.trace_routing reads from the model itself.",
            stacklevel=4,
        )


def route(params: Any, rules: Routing = None, matrix_axes: Any = None) -> dict[KeyPath, Route]:
    """The route of every leaf, by key path; see `label_params`.

    `matrix_axes`, as in `hybrid`, are the axes of those Muon leaves that it has a value for.
    """
    strings = path_strings(params)
    leaves = {
        path: leaf for path, leaf in positions(params) if leaf is not None and not is_masked(leaf)
    }
    for path, leaf in leaves.items():
        _check_array(strings[path], leaf)
    names = {path: LeafName.of(strings[path], jnp.shape(x)) for path, x in leaves.items()}
    tree = read_tree(list(names.values()))
    chosen = _overrides(params, leaves, rules)
    routes = {
        path: _route_leaf(name, leaves[path], tree, chosen.get(path, Decision(None)))
        for path, name in names.items()
    }
    if matrix_axes is not None:
        for path, axes in axes_by_path(matrix_axes, params, partial=True).items():
            if routes[path].label == MUON:
                routes[path] = routes[path]._replace(axes=axes, doubt="")
    for leaf in routes.values():
        if leaf.axes is not None:
            with naming(leaf.path):
                _check_axes(leaf.axes, leaf.shape)
    return routes


def _check_array(path: str, leaf: Any) -> None:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(
        leaf, numbers.Number
    ):
        raise ValueError(
            f"Leaf {path!r} is no array but {leaf!r}. Give only the arrays that are trained: of an "
            "Equinox module, eqx.filter(model, eqx.is_inexact_array)."
        )


def _check_axes(axes: MatrixAxes, shape: tuple[int, ...]) -> None:
    """Inside `shard_map` a leaf may be a part of one, so its parts are checked elsewhere."""
    axes.split(shape)
    if not find_placing(None, ()).manual_axes:
        split_into_parts(shape, axes)


def _route_leaf(name: LeafName, leaf: Any, tree: Survey, decision: Decision) -> Route:
    choice, why, doubt, kind = decision
    choice = ALIASES.get(choice, choice) if isinstance(choice, str) else choice
    if choice is None and why:
        named = _route_leaf(name, leaf, tree, Decision(None))
        return named._replace(why=f"{why}; by name {named.why}", doubt=doubt or named.doubt)
    if choice is not None and not is_matrix_axes(choice) and not _is_label(choice):
        raise ValueError(
            f"{why} sends {name.path!r} to {choice!r}; known are {', '.join(LABELS)}, or "
            "MatrixAxes for Muon along these axes."
        )
    if choice == FROZEN:
        return Route(name.path, name.shape, FROZEN, None, why, doubt)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        sent = "No rule takes" if choice is None else f"{why} sends to {choice!r} the leaf"
        raise ValueError(
            f"{sent} {name.path!r}, whose dtype is {dtype}: only real or complex floating point is "
            "optimised. Filter it out of the params, or send it to 'frozen' by a rule."
        )
    against = reason_for_other(name, tree)
    kind = kind or _kind(name, tree, against)
    if choice is not None and is_matrix_axes(choice):
        return Route(name.path, name.shape, MUON, as_matrix_axes(choice), why, doubt, kind)
    if choice == OTHER:
        return Route(name.path, name.shape, OTHER, None, why, doubt, kind)
    if choice is None and against is not None:
        return Route(name.path, name.shape, OTHER, None, against.why, against.doubt, kind)
    if len(name.shape) < 2:
        raise ValueError(
            f"{why} sends {name.path!r} to 'muon', but its shape {name.shape} is no matrix. Send "
            "it to 'other' or 'frozen'."
        )
    axes, reading = read_hidden(name, tree)
    # Whoever sends a leaf to Muon knows that it is a matrix, but of which axes is read here.
    guess = reading.doubt if choice is None or len(name.shape) > 2 else ""
    return Route(name.path, name.shape, MUON, axes, why or reading.why, doubt or guess, kind)


def _kind(name: LeafName, tree: Survey, against: Reading | None) -> str:
    """What its name and shape tell of a leaf; `against` is why it is no hidden matrix."""
    if against is None:
        return CONV if read_hidden(name, tree)[1].why.startswith(CONV_KERNEL) else MATRIX
    if len(name.shape) < 2 or against.why.startswith(VECTORS):
        return VECTOR
    return EMBEDDING if against.why == TABLE else MATRIX


def _overrides(params: Any, leaves: dict[KeyPath, Any], rules: Routing) -> dict[KeyPath, Decision]:
    """What the user's rules say, by key path."""
    if rules is None or (isinstance(rules, (list, tuple, dict)) and not rules):
        return {}
    if is_rules(rules, params, lambda x: _is_label(x) or is_matrix_axes(x)):
        pairs = as_rules(rules, "routing", "choice", is_choice)
        decided = match_rules(pairs, params, leaves)
        return {path: Decision(choice, why) for path, (choice, why) in decided.items()}
    if any(is_choice(x) for _, x in positions(rules, is_choice)):
        given = broadcast_prefix(
            rules,
            params,
            what="The label tree",
            kind=f"one of {', '.join(LABELS)} or MatrixAxes",
            is_value=is_choice,
            remedy="A tree has a choice for every leaf or subtree, by its keys. Rules by regex are "
            "a list of pairs, such as [('head', 'other')]."
            if isinstance(rules, Mapping)
            else "",
        )
        return {path: Decision(choice, "the label tree") for path, choice in given.items()}
    if callable(rules):
        strings = path_strings(params)
        answers = {
            path: called(f"the routing callable, for leaf {strings[path]!r}", rules, *args)
            for path, args in ((path, (strings[path], leaf)) for path, leaf in leaves.items())
        }
        return {
            path: answer
            if isinstance(answer, Decision)
            else Decision(answer, "" if answer is None else "the routing callable")
            for path, answer in answers.items()
        }
    raise ValueError(
        "Routing rules must be (regex, label) pairs, a callable (path, leaf) -> label, or a tree "
        f"of labels; got {rules!r}."
    )


def is_rules(given: Any, params: Any, is_value: Callable[[Any], bool]) -> TypeGuard[Sequence]:
    """Whether it is a list or tuple to be read as rules, and no tree of values for a list."""
    if not isinstance(given, (list, tuple)) or hasattr(given, "_fields"):
        return False
    like = isinstance(params, (list, tuple))
    return not (like and all(x is None or is_value(x) for _, x in positions(given, is_value)))


def as_rules(
    rules: Sequence, what: str, kind: str, is_value: Callable[[Any], bool]
) -> list[tuple[str, Any]]:
    """The rules as pairs.

    Raises:
        ValueError: one that is no pair of a regex and a value.
    """
    for i, rule in enumerate(rules):
        pair = isinstance(rule, (tuple, list)) and len(rule) == 2
        if not (pair and isinstance(rule[0], (str, re.Pattern)) and is_value(rule[1])):
            raise ValueError(f"{what}[{i}] must be a pair (regex, {kind}); got {rule!r}.")
    return [tuple(rule) for rule in rules]


def match_rules(
    pairs: Sequence[tuple[str, Any]], params: Any, leaves: Iterable[KeyPath]
) -> dict[KeyPath, tuple[Any, str]]:
    """What the first regex found in a leaf's path gives it, and the name of that rule.

    Raises:
        ValueError: a bad regex, or one that decides no leaf: it is found in none, or only where
            earlier ones are.
    """
    strings = path_strings(params)
    decided: dict[KeyPath, tuple[Any, str]] = {}
    for regex, choice in pairs:
        matched = [path for path, string in strings.items() if _found(regex, string)]
        free = [path for path in matched if path not in decided]
        if strings and not matched:
            raise ValueError(
                f"The rule {regex!r} matches no leaf. The paths are: {some(strings.values())}."
            )
        if strings and not free:
            before = dict.fromkeys(decided[path][1] for path in matched)
            raise ValueError(
                f"The rule {regex!r} decides no leaf: all that it matches are decided before, by "
                f"{' and '.join(before)}. Put it in front of that, or leave it out."
            )
        decided |= dict.fromkeys(free, (choice, f"rule {regex!r}"))
    return {path: decided[path] for path in leaves if path in decided}


def _found(regex: str, string: str) -> bool:
    try:
        return re.search(regex, string) is not None
    except re.error as error:
        raise ValueError(f"The rule {regex!r} is no regular expression: {error}.") from None


def _is_label(x: Any) -> bool:
    return isinstance(x, str) and (x in LABELS or x in ALIASES)


def is_choice(x: Any) -> bool:
    return isinstance(x, str) or is_matrix_axes(x)
