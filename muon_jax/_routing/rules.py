"""Which optimizer takes which leaf: the user's rules, then rules by path and shape."""

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
from muon_jax._routing.survey import Survey, find_scans
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
ALIASES = {"adamw": OTHER}  # the old name of the label, still accepted in rules
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
    """The label of one leaf, with the reason for it.

    Attributes:
        path: The path of the leaf, such as `layers/0/attn/kernel`.
        shape: The shape of the leaf.
        label: `"muon"`, `"other"` or `"frozen"`.
        axes: The matrix axes of the leaf if its label is `"muon"`.
        why: The rule that decided.
        doubt: Another possible interpretation of the leaf; empty if there is none.
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
    """The choice of the user's rules for one leaf.

    Attributes:
        choice: The choice, as in `label_params`. `None` leaves it to the built-in rules.
        why: The rule that decided, or a text to put before the reason of the built-in rules.
        doubt: As in `Route`.
        kind: As in `Route`. `None` leaves it to the leaf's name.
    """

    choice: Choice | None
    why: str = ""
    doubt: str = ""
    kind: str | None = None


def label_params(params: Any, rules: Routing = None) -> Any:
    """Labels each leaf `"muon"`, `"other"` or `"frozen"`, for `optax.multi_transform`.

    The built-in rules use names first and shapes second: embeddings, heads, norms, gains and
    biases are `"other"`, and the matrices between them are `"muon"`. Scan-stacked and complex
    leaves are recognised as well. The rules know the names of Flax NNX and Linen, Equinox, Haiku,
    Hugging Face, MaxText and Levanter. If they have to guess, for example for the first and last
    matrix of an MLP, `routing_table` says so and the optimizer's `init` warns. There is no
    built-in rule for leaves of integers or bools: filter them out, or label them `"frozen"`.

    Args:
        params: Arrays or `jax.ShapeDtypeStruct`s.
        rules: Rules that override the built-in ones, in one of the forms below. A choice is one of
            the three labels (`"adamw"` is an old name of `"other"`) or `MatrixAxes`, which means
            Muon along these axes.

            - A list or tuple of `(regex, choice)` pairs. The first regex that is found in a leaf's
              path (`re.search`) decides. Leaves without a match are left to the built-in rules. A
              pair that decides no leaf, because it has no match or earlier pairs have decided all
              its matches, is an error. Put specific rules first.
            - A callable `(path, leaf) -> choice`; `None` leaves the leaf to the built-in rules.
            - The result of `trace_routing`, which takes choices from how a function uses each leaf.
            - A dict, or any other tree, with a choice for each leaf or subtree. It must decide
              every leaf. It is matched by name, so a tree of plain arrays fits a tree of NNX
              variables or of Linen's partitioned params, and vice versa. If `params` is a list, a
              list that holds only choices is such a tree.

    Returns:
        A tree like `params` with the label of each leaf.

    Raises:
        ValueError: The rules have another form, a regex is invalid, a rule decides no leaf, a tree
            has no choice for a leaf, a choice is unknown, a leaf for Muon is not a matrix, axes or
            parts do not fit a leaf, or a leaf is not an array. The message names the path.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> params = {"wte": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 8))}}
        >>> muon_jax.label_params(params, [("mlp/.*", "frozen")])
        {'mlp': {'kernel': 'frozen'}, 'wte': 'other'}
    """
    routes = route(params, rules)
    return jax.tree_util.tree_map_with_path(lambda path, _: routes[path].label, params)


def warn_of_guesses(routes: Mapping[KeyPath, Route]) -> None:
    """Warns about leaves whose label is a guess, since users may not look at `routing_table`."""
    guesses = [
        f"{leaf.path or '(root)'} ({leaf.label}: {leaf.doubt})"
        for leaf in routes.values()
        if leaf.doubt
    ]
    if guesses:
        warnings.warn(
            f"The routes of these leaves are guesses from their names and shapes: {some(guesses)}. "
            "See muon_jax.routing_table, and pass routing= with rules for these leaves, or with "
            "the result of muon_jax.trace_routing, which examines the model itself.",
            stacklevel=4,
        )


def route(params: Any, rules: Routing = None, matrix_axes: Any = None) -> dict[KeyPath, Route]:
    """Returns the route of every leaf, by key path; see `label_params`.

    The Muon leaves for which `matrix_axes` has a value (see `hybrid`) get these axes.
    """
    strings = path_strings(params)
    leaves = {
        path: leaf for path, leaf in positions(params) if leaf is not None and not is_masked(leaf)
    }
    for path, leaf in leaves.items():
        _check_array(strings[path], leaf)
    names = find_scans([LeafName.of(strings[path], jnp.shape(x)) for path, x in leaves.items()])
    tree = read_tree(names)
    chosen = _overrides(params, leaves, rules)
    routes = {
        path: _route_leaf(name, leaf, tree, chosen.get(path, Decision(None)))
        for name, (path, leaf) in zip(names, leaves.items(), strict=True)
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
    is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    if not is_array and not isinstance(leaf, numbers.Number):
        raise ValueError(
            f"Leaf {path!r} must be an array; got {leaf!r}. Pass only the arrays to train, for an "
            "Equinox module eqx.filter(model, eqx.is_inexact_array)."
        )


def _check_axes(axes: MatrixAxes, shape: tuple[int, ...]) -> None:
    """Checks that axes fit a leaf; parts only outside `shard_map`, where the leaf is complete."""
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
            f"{why} sends {name.path!r} to {choice!r}. A choice must be one of "
            f"{', '.join(LABELS)}, or MatrixAxes for Muon along these axes."
        )
    if choice == FROZEN:
        return Route(name.path, name.whole, FROZEN, None, why, doubt)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        sent = "" if choice is None else f"{why} sends {name.path!r} to {choice!r}. "
        raise ValueError(
            f"{sent}Leaf {name.path!r} has dtype {dtype}, but only real or complex floating point "
            "can be optimised. Filter it out of the params, or send it to 'frozen' by a rule."
        )
    against = reason_for_other(name, tree)
    kind = kind or _kind(name, tree, against)
    if choice is not None and is_matrix_axes(choice):
        return Route(name.path, name.whole, MUON, as_matrix_axes(choice), why, doubt, kind)
    if choice == OTHER:
        return Route(name.path, name.whole, OTHER, None, why, doubt, kind)
    if choice is None and against is not None:
        return Route(name.path, name.whole, OTHER, None, against.why, against.doubt, kind)
    if len(name.whole) < 2:
        raise ValueError(
            f"{why} sends {name.path!r} to 'muon', but its shape {name.whole} is not that of a "
            "matrix. Send it to 'other' or 'frozen'."
        )
    axes, reading = read_hidden(name, tree)
    # A user's rule says that the leaf is a matrix, but its axes are still inferred here.
    guess = reading.doubt if choice is None or len(name.whole) > 2 else ""
    return Route(name.path, name.whole, MUON, axes, why or reading.why, doubt or guess, kind)


def _kind(name: LeafName, tree: Survey, against: Reading | None) -> str:
    """Returns the kind of a leaf; `against` is the reason why it is not a hidden matrix, if any."""
    if against is None:
        return CONV if read_hidden(name, tree)[1].why.startswith(CONV_KERNEL) else MATRIX
    if len(name.whole) < 2 or against.why.startswith(VECTORS):
        return VECTOR
    return EMBEDDING if against.why == TABLE else MATRIX


def _overrides(params: Any, leaves: dict[KeyPath, Any], rules: Routing) -> dict[KeyPath, Decision]:
    """Returns the decisions of the user's rules, by key path."""
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
            remedy="A tree must have a choice for every leaf or subtree. To give rules by regex, "
            "pass a list of pairs, such as [('head', 'other')]."
            if isinstance(rules, Mapping)
            else "",
        )
        return {path: Decision(choice, "the label tree") for path, choice in given.items()}
    if callable(rules):
        decisions, strings = {}, path_strings(params)
        for path, leaf in leaves.items():
            what = f"the routing callable, for leaf {strings[path]!r}"
            answer = called(what, rules, strings[path], leaf)
            if not isinstance(answer, Decision):
                answer = Decision(answer, "" if answer is None else "the routing callable")
            decisions[path] = answer
        return decisions
    raise ValueError(
        "routing must be (regex, label) pairs, a callable (path, leaf) -> label, or a tree of "
        f"labels; got {rules!r}."
    )


def is_rules(given: Any, params: Any, is_value: Callable[[Any], bool]) -> TypeGuard[Sequence]:
    """Whether `given` is a list or tuple of rules, rather than a tree of values for a list."""
    if not isinstance(given, (list, tuple)) or hasattr(given, "_fields"):
        return False
    like = isinstance(params, (list, tuple))
    return not (like and all(x is None or is_value(x) for _, x in positions(given, is_value)))


def as_rules(
    rules: Sequence, what: str, kind: str, is_value: Callable[[Any], bool]
) -> list[tuple[str, Any]]:
    """Returns the rules as pairs.

    Raises:
        ValueError: A rule is not a pair of a regex and a value.
    """
    for i, rule in enumerate(rules):
        pair = isinstance(rule, (tuple, list)) and len(rule) == 2
        if not (pair and isinstance(rule[0], (str, re.Pattern)) and is_value(rule[1])):
            raise ValueError(f"{what}[{i}] must be a pair (regex, {kind}); got {rule!r}.")
    return [tuple(rule) for rule in rules]


def match_rules(
    pairs: Sequence[tuple[str, Any]], params: Any, leaves: Iterable[KeyPath]
) -> dict[KeyPath, tuple[Any, str]]:
    """Returns the value of the first rule whose regex is found in each path, and the rule's name.

    Raises:
        ValueError: A regex is invalid, or it decides no leaf because it has no match or earlier
            rules have decided all its matches.
    """
    strings = path_strings(params)
    decided: dict[KeyPath, tuple[Any, str]] = {}
    for regex, choice in pairs:
        matched = [path for path, string in strings.items() if _matches(regex, string)]
        free = [path for path in matched if path not in decided]
        if strings and not matched:
            raise ValueError(
                f"The rule {regex!r} matches no leaf. The paths are: {some(strings.values())}."
            )
        if strings and not free:
            before = dict.fromkeys(decided[path][1] for path in matched)
            raise ValueError(
                f"The rule {regex!r} decides no leaf, because all leaves that it matches are "
                f"already decided by {' and '.join(before)}. Put it first, or remove it."
            )
        decided |= dict.fromkeys(free, (choice, f"rule {regex!r}"))
    return {path: decided[path] for path in leaves if path in decided}


def _matches(regex: str, string: str) -> bool:
    try:
        return re.search(regex, string) is not None
    except re.error as error:
        raise ValueError(f"The rule {regex!r} is not a regular expression: {error}.") from None


def _is_label(x: Any) -> bool:
    return isinstance(x, str) and (x in LABELS or x in ALIASES)


def is_choice(x: Any) -> bool:
    return isinstance(x, str) or is_matrix_axes(x)
