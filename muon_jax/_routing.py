"""Which optimizer takes which leaf: rules by path and shape, and the table that explains them."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muon_jax._matrix_axes import MatrixAxes, as_matrix_axes, is_matrix_axes
from muon_jax._names import LeafName, Survey, read_hidden, reason_for_adamw, survey
from muon_jax._paths import KeyPath, broadcast_prefix, is_masked, is_tree_of, path_string

MUON, ADAMW, FROZEN = LABELS = ("muon", "adamw", "frozen")

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
        label: `"muon"`, `"adamw"` or `"frozen"`.
        axes: its matrix axes if it goes to Muon.
        why: the rule that decided.
        doubt: what another reading of the shape would be; empty where there is none.
    """

    path: str
    shape: tuple[int, ...]
    label: str
    axes: MatrixAxes | None
    why: str
    doubt: str = ""


def label_params(params: Any, rules: Routing = None) -> Any:
    """A tree like `params` of `"muon"`, `"adamw"` or `"frozen"`, for `optax.multi_transform`.

    The built-in rules read names first and shapes second: embeddings, heads, norms, gains and
    biases (scan-stacked ones too) go to AdamW, the matrices between them to Muon. They know the
    names of Flax NNX and Linen, Equinox, Haiku, Hugging Face, MaxText and Levanter.

    Args:
        params: arrays or `jax.ShapeDtypeStruct`s.
        rules: overrides. `(regex, choice)` pairs or a flat dict of them: the first regex found in
            the path decides, and each must match some leaf. A callable `(path, leaf) -> choice`.
            Both leave to the built-in rules what they do not decide (the callable with `None`). Or
            a tree of choices, whole or a prefix, which must decide everything. A choice is one of
            the three labels, or `MatrixAxes`: Muon along these axes.

    Raises:
        ValueError: a rule that matches no leaf, a leaf that no rule takes, an unknown label, or
            Muon for a leaf that is no matrix. The message has the path.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> params = {"wte": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 8))}}
        >>> muon_jax.label_params(params, [("mlp/.*", "frozen")])
        {'mlp': {'kernel': 'frozen'}, 'wte': 'adamw'}
    """
    routes = route(params, rules)
    return jax.tree_util.tree_map_with_path(lambda path, _: routes[path].label, params)


def routing_table(params: Any, rules: Routing = None) -> str:
    """`label_params` as text: path, shape, batch × (fan_in × fan_out), label, and why.

    Ends with the number of parameters per label, and with one line for each shape that could be
    read in another way.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> print(muon_jax.routing_table({"mlp": {"kernel": jnp.ones((8, 32))}}))
        path        shape    matrices  label  why
        mlp/kernel  (8, 32)  8 × 32    muon   a kernel (fan_in, fan_out)
        <BLANKLINE>
        muon: 1 leaf, 256 parameters (100.0 %)
    """
    routes = list(route(params, rules).values())
    rows = [("path", "shape", "matrices", "label", "why")]
    for leaf in routes:
        rows.append((leaf.path or "(root)", str(leaf.shape), _matrices(leaf), leaf.label, leaf.why))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = sum(math.prod(leaf.shape) for leaf in routes)
    lines.append("")
    for label in LABELS:
        sizes = [math.prod(leaf.shape) for leaf in routes if leaf.label == label]
        if sizes:
            share = 100 * sum(sizes) / max(total, 1)
            leaves = "leaf" if len(sizes) == 1 else "leaves"
            lines.append(
                f"{label}: {len(sizes)} {leaves}, {sum(sizes):,} parameters ({share:.1f} %)"
            )
    lines += [
        f"ambiguous: {leaf.path or '(root)'} {leaf.shape}: {leaf.doubt}"
        for leaf in routes
        if leaf.doubt
    ]
    return "\n".join(lines)


def route(params: Any, rules: Routing = None) -> dict[KeyPath, Route]:
    """The route of every leaf, by key path; see `label_params`."""
    leaves = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    names = {path: LeafName.of(path_string(path), jnp.shape(x)) for path, x in leaves.items()}
    tree = survey(list(names.values()))
    chosen = _overrides(params, leaves, rules)
    return {
        path: _route_leaf(name, leaves[path], tree, *chosen.get(path, (None, "")))
        for path, name in names.items()
    }


def _route_leaf(name: LeafName, leaf: Any, tree: Survey, choice: Choice | None, why: str) -> Route:
    if choice is not None and not is_matrix_axes(choice) and choice not in LABELS:
        raise ValueError(
            f"{why} sends {name.path!r} to {choice!r}; known are {', '.join(LABELS)}, or "
            "MatrixAxes for Muon along these axes."
        )
    if choice == FROZEN:
        return Route(name.path, name.shape, FROZEN, None, why)
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise ValueError(
            f"No rule takes {name.path!r}: its dtype is {jnp.result_type(leaf)}, and only real "
            "floating point is optimised. Filter it out, or send it to 'frozen'."
        )
    if choice is not None and is_matrix_axes(choice):
        axes = as_matrix_axes(choice)
        axes.split(name.shape)
        return Route(name.path, name.shape, MUON, axes, why)
    against = reason_for_adamw(name, tree)
    if choice == ADAMW:
        return Route(name.path, name.shape, ADAMW, None, why)
    if choice is None and against is not None:
        return Route(name.path, name.shape, ADAMW, None, against.why, against.doubt)
    if len(name.shape) < 2:
        raise ValueError(
            f"{why} sends {name.path!r} to 'muon', but its shape {name.shape} is no matrix. Send "
            "it to 'adamw' or 'frozen'."
        )
    axes, reading = read_hidden(name, tree)
    return Route(name.path, name.shape, MUON, axes, why or reading.why, reading.doubt)


def _overrides(
    params: Any, leaves: dict[KeyPath, Any], rules: Routing
) -> dict[KeyPath, tuple[Choice | None, str]]:
    """What the user's rules say, by key path, each with the name of the rule that says it."""
    if rules is None or (isinstance(rules, (list, tuple, dict)) and not rules):
        return {}
    pairs = _regex_pairs(rules, params)
    if pairs is not None:
        return match_rules(pairs, params, leaves)
    if is_tree_of(rules, _is_choice):
        found = broadcast_prefix(rules, params, what="The label tree", is_value=_is_choice)
        return {path: (choice, "the label tree") for path, choice in found.items()}
    if callable(rules):
        answers = {path: rules(path_string(path), leaf) for path, leaf in leaves.items()}
        return {
            path: (choice, "" if choice is None else "the routing callable")
            for path, choice in answers.items()
        }
    raise ValueError(
        "Routing rules must be (regex, label) pairs, a callable (path, leaf) -> label, or a tree "
        f"of labels; got {rules!r}."
    )


def match_rules(
    pairs: Sequence[tuple[str, Any]], params: Any, leaves: Iterable[KeyPath]
) -> dict[KeyPath, tuple[Any, str]]:
    """What the first regex found in a leaf's path gives it, and the name of that rule.

    Raises:
        ValueError: a regex that matches no leaf.
    """
    present = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_masked)[0]
    paths = [path_string(path) for path, _ in present]
    for regex, _ in pairs:
        if paths and not any(re.search(regex, path) for path in paths):
            raise ValueError(f"The rule {regex!r} matches no leaf. The paths are: {_some(paths)}.")
    found: dict[KeyPath, tuple[Any, str]] = {}
    for path in leaves:
        for regex, choice in pairs:
            if re.search(regex, path_string(path)):
                found[path] = (choice, f"rule {regex!r}")
                break
    return found


def _regex_pairs(rules: Routing, params: Any) -> list[tuple[str, Choice]] | None:
    """The rules as pairs, unless they are a tree of labels or a callable.

    A flat dict is a tree of labels if its keys are the params' own.
    """
    if isinstance(rules, Mapping):
        own = isinstance(params, Mapping) and set(params) == set(rules)
        flat = all(isinstance(key, str) and _is_choice(value) for key, value in rules.items())
        return list(rules.items()) if flat and rules and not own else None
    if isinstance(rules, Sequence) and not isinstance(rules, str) and not is_matrix_axes(rules):
        pairs = [tuple(rule) if isinstance(rule, (tuple, list)) else rule for rule in rules]
        if pairs and all(isinstance(rule, tuple) and _is_pair(rule) for rule in pairs):
            return pairs
    return None


def _is_pair(rule: tuple) -> bool:
    return (
        len(rule) == 2
        and isinstance(rule[0], (str, re.Pattern))
        and rule[0] not in LABELS
        and _is_choice(rule[1])
    )


def _is_choice(x: Any) -> bool:
    return isinstance(x, str) or is_matrix_axes(x)


def _matrices(leaf: Route) -> str:
    if leaf.axes is None:
        return "-"
    batch, fan_in, fan_out = leaf.axes.matrix_shape(leaf.shape)
    stack = " × ".join(map(str, batch))
    return f"{stack} × ({fan_in} × {fan_out})" if stack else f"{fan_in} × {fan_out}"


def _some(paths: list[str], limit: int = 12) -> str:
    return ", ".join(paths[:limit]) + (f" and {len(paths) - limit} more" * (len(paths) > limit))
