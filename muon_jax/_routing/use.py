"""Routing by use: how a traced function uses each parameter decides its label."""

import dataclasses
import functools
import sys
import sysconfig
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from muon_jax._matrix_axes import MatrixAxes
from muon_jax._routing.rules import (
    ALIASES,
    CONV,
    EMBEDDING,
    FROZEN,
    LABELS,
    MATRIX,
    MUON,
    OTHER,
    VECTOR,
    Choice,
    Decision,
    as_rules,
    is_choice,
    match_rules,
)
from muon_jax._routing.table import routing_table
from muon_jax._routing.trace.primitives import HANDLERS
from muon_jax._routing.trace.tracer import Tracer, captured
from muon_jax._routing.trace.values import INPUT, MATRICES, Use
from muon_jax._trees import leaf_names, path_strings, positions, some

# Frames in these libraries are skipped, so that the line of the user's model is shown.
_LIBRARIES = ("jax", "jaxlib", "flax", "haiku", "equinox", "optax", "penzai", "haliax", "keras")


@dataclasses.dataclass(frozen=True, eq=False)
class TracedRouting:
    """The result of `trace_routing`, a routing whose `str` is its `routing_table`.

    Attributes:
        leaves: The shape and dtype of each leaf that was traced, by path.
        decisions: The decision for each leaf according to its use, by path.
    """

    leaves: OrderedDict[str, jax.ShapeDtypeStruct]
    decisions: dict[str, Decision]

    def __call__(self, path: str, leaf: Any) -> Decision:
        """Returns the decision for a leaf of the params, or of a subset with the same paths."""
        if path in self.decisions:
            return self.decisions[path]
        if not hasattr(leaf, "shape"):  # a setting in a module, not an array
            return Decision(None)
        raise ValueError(
            f"The routing was traced without a leaf {path!r}. Trace the function again with these "
            "params."
        )

    def __str__(self) -> str:
        return routing_table(self.leaves, self)


def trace_routing(
    function: Callable[..., Any],
    params: Any = None,
    *args: Any,
    rules: Sequence[tuple[str, Any]] = (),
    first: str = OTHER,
    last: str = OTHER,
) -> TracedRouting:
    """Returns a routing based on how a function uses each parameter, not on the parameter's name.

    The function is traced but not run: nothing is computed or allocated. A parameter that is
    contracted with activations is a matrix: its contracted axes are fan_in, its free axes fan_out,
    and batch or scanned axes make it a stack. A parameter whose rows are looked up is an embedding.
    One that is added to activations or multiplied with them elementwise is a vector, whatever its
    shape. Embeddings, vectors, depthwise convolutions, the first matrices (which read the
    function's inputs) and the last ones (whose output no other matrix reads) are `"other"`; all
    other matrices are `"muon"`.

    Args:
        function: A forward pass or loss `function(params, *args)`; all its outputs count. It may
            also be a Flax NNX module, followed by its inputs.
        params: Arrays or `jax.ShapeDtypeStruct`s in any tree, such as those of Linen, Haiku and
            Equinox, or a Flax NNX module, whose `nnx.Param`s are then the params. Values that are
            not arrays are passed on unchanged.
        *args: The other arguments: trees of arrays, `jax.ShapeDtypeStruct`s and static values. A
            tree with arrays in the same modules as the params, such as the frozen model below an
            adapter, is part of the model; all others are its inputs.
        rules: `(regex, choice)` pairs as in `label_params`, which override the trace.
        first: The label of the first matrices: `"other"`, `"muon"` or `"frozen"`.
        last: The label of the last matrices.

    Returns:
        A routing, for `routing=` of any optimizer here, `label_params`, `routing_table` or `plan`.
        It fits all trees with the same paths, and subsets of them. Its `str` is the table of
        routes, with the source line of each use. A leaf that the function does not use, or that
        passes through an unknown operation, is left to the rules by name, and the table says so.

    Raises:
        ValueError: A choice is unknown, or a rule decides no leaf.

    Example:
        >>> import jax, jax.numpy as jnp, muon_jax
        >>> def model(params, tokens):
        ...     x = params["table"][tokens]
        ...     x = x + jax.nn.relu(x @ params["a"] + params["b"][None, None]) @ params["c"]
        ...     return x @ params["d"]
        >>> shapes = {"a": (8, 32), "b": (32,), "c": (32, 8), "d": (8, 50), "table": (50, 8)}
        >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
        >>> tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)
        >>> routing = muon_jax.trace_routing(model, params, tokens)
        >>> muon_jax.label_params(params, routing)
        {'a': 'muon', 'b': 'other', 'c': 'muon', 'd': 'other', 'table': 'other'}
        >>> optimizer = muon_jax.muon(0.02, routing=routing)
    """
    for name, choice in (("first", first), ("last", last)):
        if choice not in (*LABELS, *ALIASES):
            raise ValueError(f"{name} must be one of {', '.join(LABELS)}; got {choice!r}.")
    if _is_nnx_module(function):
        args = args if params is None else (params, *args)
        function, params = type(function).__call__, function
    if _is_nnx_module(params):
        function, params, args = _functional(function, params, args)
    strings = path_strings(params)
    arrays = {path: x for path, x in positions(params) if _is_array(x)}
    leaves = OrderedDict(
        (strings[path], jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)) for path, x in arrays.items()
    )
    tracer, outputs = _trace(function, params, args)
    names, uses = list(leaves), defaultdict(list)
    for use in tracer.uses:
        out = tuple(axis for axis in use.fan_out if (use.leaf, axis) not in tracer.stacks)
        uses[use.leaf].append(use._replace(fan_out=out or use.fan_out))
    lines = [_line(sources) for sources in tracer.places]
    decisions = {}
    for number, (name, leaf) in enumerate(leaves.items()):
        reaches = number in outputs or number not in tracer.passed
        end = last if reaches and number not in tracer.read else None
        decisions[name] = _decide(leaf, uses[number], names, lines, first, end)
    chosen = match_rules(as_rules(rules, "rules", "choice", is_choice), params, arrays)
    for path, (choice, why) in chosen.items():
        kind = decisions[strings[path]].kind
        decisions[strings[path]] = Decision(choice, why, kind=kind)
    return TracedRouting(leaves, decisions)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_nnx_module(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


def _functional(
    function: Callable[..., Any], module: Any, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """Returns the function with the module's params and the rest of its state as arguments."""
    nnx = sys.modules["flax.nnx"]
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def call(params: Any, rest: Any, *args: Any) -> Any:
        return function(nnx.merge(graph, params, rest), *args)

    return call, params, (rest, *args)


def _trace(function: Callable[..., Any], params: Any, args: Any) -> tuple[Tracer, frozenset[int]]:
    """Returns a tracer with the leaves' uses, and the leaves whose products are the outputs."""
    given, treedef = jax.tree.flatten((params, args))

    def run(arrays: list[jax.Array]) -> list[jax.Array]:
        rest = iter(arrays)
        params, args = jax.tree.unflatten(
            treedef, [next(rest) if _is_array(x) else x for x in given]
        )
        return [x for x in jax.tree.leaves(function(params, *args)) if isinstance(x, jax.Array)]

    jaxpr = jax.make_jaxpr(run)(_arrays(given))
    leaves = _arrays(params)
    tracer = Tracer([jnp.shape(x) for x in leaves], HANDLERS)
    values = [tracer.leaf(n) if _is_trained(x) else captured(x) for n, x in enumerate(leaves)]
    for arg in args:
        is_rest = _is_rest(arg, params)
        values += [captured(x) if is_rest and _is_trained(x) else INPUT for x in _arrays(arg)]
    outputs = [tracer.settle(x) if x.data else x for x in tracer.run(jaxpr, values)]
    return tracer, frozenset().union(*(x.frontier for x in outputs))


def _arrays(tree: Any) -> list[Any]:
    return list(filter(_is_array, jax.tree.leaves(tree)))


def _is_rest(arg: Any, params: Any) -> bool:
    """Whether an argument shares modules with the params, as the frozen base of an adapter does."""
    modules = [{name[:-1] for name in leaf_names(tree).values()} - {()} for tree in (arg, params)]
    return bool(modules[0] & modules[1])


def _is_trained(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jnp.inexact)


# --- From uses to decisions ---


def _decide(
    leaf: Any,
    uses: Sequence[Use],
    names: Sequence[str],
    lines: Sequence[str],
    first: str,
    last: str | None,
) -> Decision:
    """Returns the decision for a leaf; `last` is None if another matrix reads its output."""
    if not _is_trained(leaf):
        return Decision(FROZEN, f"{leaf.dtype}: quantised, or not a weight")
    vector = len(leaf.shape) < 2
    if not uses:
        doubt = "the traced function does not use it, so its name decides"
        return Decision(None, "not used", "" if vector else doubt)
    uses = [use for use in uses if use.how != "statistic"] or uses
    if unknown := [use for use in uses if use.how == "unknown"]:
        passed = ", ".join(sorted(frozenset().union(*(use.names for use in unknown))))
        doubt = f"it passes through {passed}, an unknown operation, so its name decides"
        why = f"passes through {passed}" + lines[unknown[0].place]
        return Decision(None, why, "" if vector else doubt)
    if any(use.how == "mixed" for use in uses):
        doubt = "its axes are merged before they are contracted, so its name decides"
        return Decision(None, "its axes are merged" + lines[uses[0].place], doubt)
    ways = list({(use.how, use.fan_in, use.fan_out): use for use in reversed(uses)}.values())[::-1]
    why = " and ".join(dict.fromkeys(_words(use, names) for use in ways)) + lines[ways[0].place]
    hows = {use.how for use in ways}
    if "rows" in hows:
        tied = "tied: " if hows - {"rows", "elementwise"} else ""
        return Decision(OTHER, tied + why, kind=EMBEDDING)
    if "taken" in hows:
        doubt = "constant indices select some entries more than once; it could be a matrix"
        return Decision(OTHER, why, doubt, MATRIX)
    if not hows & set(MATRICES):
        summed = hows == {"statistic"} and any(use.fan_in for use in ways)
        doubt = "only a norm or a sum of it is contracted; it could be a matrix" if summed else ""
        if not vector and any(use.how == "elementwise" and use.partners for use in ways):
            doubt = "its product with other leaves is used elementwise; it could be a matrix"
        kind = MATRIX if doubt or "depthwise" in hows else VECTOR
        return Decision(OTHER, why, doubt, kind)
    fans = {frozenset((use.fan_in, use.fan_out)) for use in ways}  # transposed uses are equal
    if not hows <= set(MATRICES) or len(fans) > 1:
        doubt = "it is used in several ways, and Muon fits at most one of them"
        return Decision(OTHER, why, doubt, MATRIX)
    use = ways[0]
    choice: Choice = MatrixAxes(use.fan_in, use.fan_out, *use.parts)
    if last is not None:
        why = f"the last matrix, {why}"
    elif all(use.reads_input for use in uses):
        why, last = f"the first matrix, {why}", first
    kind = CONV if use.how == "convolution" else MATRIX
    return Decision(choice if last in (None, MUON) else last, why, kind=kind)


_WORDS = {
    "matrix": "contracted over",
    "convolution": "convolved over",
    "vector": "contracted as a vector over",
    "rows": "looked up along",
    "taken": "contracted after its entries were selected by constant indices along",
    "elementwise": "elementwise with activations",
    "depthwise": "a depthwise convolution",
    "statistic": "used through a norm or a sum",
}


def _words(use: Use, names: Sequence[str]) -> str:
    axes = ""
    if use.fan_in:
        axes = f" {'axis' if len(use.fan_in) == 1 else 'axes'} {', '.join(map(str, use.fan_in))}"
    partners = sorted(names[i] for i in use.partners)
    product = f", in a product with {some(partners, 3)}" if partners else ""
    return _WORDS[use.how] + axes + product


# --- Source lines ---


def _line(sources: Sequence[tuple[Any, Any]]) -> str:
    """Returns the line of a use in the model's source, such as ` · model.py:57`, or ""."""
    line = None
    for eqn, info in sources:
        frames = _frames(eqn)
        program = getattr(info, "func_src_info", None) or ""
        # A library's function counts as used on the line that calls it. If it was traced elsewhere,
        # its cached program may have the line of an earlier call.
        if frames and (line is None or line in frames or not _in_library(program)):
            line = frames[0]
    return f" · {Path(line[0]).name}:{line[1]}" if line else ""


def _frames(eqn: Any) -> list[tuple[str, int]]:
    """Returns the lines outside of libraries that led to an equation, the innermost first."""
    traceback = getattr(eqn.source_info, "traceback", None)
    frames = traceback.frames if traceback else []
    return [(x.file_name, x.line_num) for x in frames if not _in_library(x.file_name)]


@functools.cache
def _in_library(file: str) -> bool:
    parts = Path(file.split(" at ")[-1]).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1] in _LIBRARIES
    return file.startswith((sysconfig.get_path("stdlib"), "<frozen")) or file == __file__
