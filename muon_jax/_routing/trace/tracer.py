"""Follows the leaves of a parameter tree through a jaxpr, to where they meet activations.

This is an abstract interpretation: each value of the program is a `Value`, which contains the
leaves that it is computed from and the positions of their axes. Operations between parameters keep
the leaves. A `Use` is recorded when a leaf meets a value that depends on the function's inputs.
The handler of each primitive is in `primitives.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from muon_jax._routing.trace.leaf_axes import (
    NONE,
    Axes,
    Axis,
    LeafAxes,
    along,
    blank,
    fit,
    leaf_axes,
    length,
)
from muon_jax._routing.trace.values import MATRICES, Use, Value, View, fit_outputs, merge, plain

Handler = Callable[["Tracer", Any, list[Value]], list[Value]]


class Tracer:
    """Interprets a jaxpr on `Value`s.

    Attributes:
        shapes: The shapes of the leaves.
        handlers: The handler of each primitive, by name.
        uses: The uses of the leaves, in program order.
        read: The leaves whose output a later matrix reads.
        passed: The leaves whose output is contracted with a vector.
        stacks: Pairs of a leaf and one of its output axes that turned out to index matrices.
        enclosing: The current equation and those that call it, the innermost last, each with the
            debug information of its program.
        places: The enclosing equations of uses and lookups.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], handlers: dict[str, Handler]):
        self.shapes = shapes
        self.handlers = handlers
        self.uses: list[Use] = []
        self.read: set[int] = set()
        self.passed: set[int] = set()
        self.stacks: set[tuple[int, int]] = set()
        self.enclosing: list[tuple[Any, Any]] = []
        self.places: list[tuple[tuple[Any, Any], ...]] = []
        self._numbers: dict[tuple[int, ...], int] = {}

    def leaf(self, number: int) -> Value:
        shape = self.shapes[number]
        return Value(frozenset((View(number, leaf_axes(shape)),)))

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        """Returns the outputs of an open or closed jaxpr."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        env = dict(zip(inner.invars, args, strict=True))
        env |= {var: captured(var.aval) for var in inner.constvars}

        def read(var: Any) -> Value:
            return captured(var.aval) if hasattr(var, "val") else env[var]

        for eqn in inner.eqns:
            self.enclosing.append((eqn, inner.debug_info))
            outputs = self.apply(eqn, [read(var) for var in eqn.invars])
            self.enclosing.pop()
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in inner.outvars]

    def place(self) -> int:
        """Returns the number of the current place in the program."""
        key = tuple(id(eqn) for eqn, _ in self.enclosing)
        if key not in self._numbers:
            self._numbers[key] = len(self.places)
            self.places.append(tuple(self.enclosing))
        return self._numbers[key]

    def apply(self, eqn: Any, values: list[Value]) -> list[Value]:
        handler = self.handlers.get(eqn.primitive.name)
        if handler is not None:
            return handler(self, eqn, values)
        jaxpr = called_jaxpr(eqn)
        return self.unknown(eqn, values) if jaxpr is None else self.run(jaxpr, values)

    def record(self, view: View, how: str, fan_in=(), fan_out=(), **details: Any) -> None:
        if view.statistic:
            how, fan_out = "statistic", ()
        if view.unknown:
            how, fan_in, fan_out = "unknown", (), ()
        self.uses.append(
            Use(
                view.leaf,
                how,
                tuple(sorted(fan_in)),
                tuple(sorted(fan_out)),
                partners=view.partners,
                names=view.unknown,
                place=self.place() if view.place is None else view.place,
                **details,
            )
        )

    def settle(self, value: Value) -> Value:
        """Records the uses of the value's leaves, if any, as it meets activations elementwise."""
        if not value.views:
            return value
        matrices = set()
        for view in value.views:
            free = view.free()
            if view.rows:
                self.record(view, "rows", view.rows)
            elif view.inner and free and not view.partners:  # a product with a constant
                how = self.fans(view, view.inner, free)
                fans = ("taken", view.taken) if view.taken else (how, view.inner, free)
                self.record(view, *fans)
                matrices.add(view.leaf)
            else:
                self.record(view, "elementwise")
        return value._replace(
            views=frozenset(),
            data=True,
            stream=False,
            table=False,
            deep=value.deep or bool(matrices),
            frontier=value.frontier | matrices,
        )

    def fans(self, view: View, fan_in: LeafAxes, fan_out: LeafAxes) -> str:
        """Returns the kind of use of a contraction over `fan_in` with outputs along `fan_out`."""
        shape = self.shapes[view.leaf]
        sizes = [length(tuple((NONE, shape[i]) for i in fan)) for fan in (fan_in, fan_out)]
        if len(shape) < 2 or not fan_in or not fan_out:
            return "vector"
        if fan_in & fan_out:
            return "mixed"
        return "vector" if 1 in sizes else "matrix"

    def meet(
        self,
        value: Value,
        activation: Value,
        contracted: Sequence[int],
        batch: Sequence[int],
        how: str = "",
        place: Callable[[Axes], Axes] | None = None,
    ) -> Value:
        """Returns the product of a parameter and an activation, and records the parameter's use.

        `batch` are the axes that both have and keep; `place` maps the others to the result.
        """
        reads_input = activation.data and not activation.deep
        hows, outputs = {}, set()
        for view in value.views:
            if view.taken and contracted:
                self.record(view, "taken", view.taken)
                hows[view.leaf] = "matrix"
                continue
            fan_in = along(view.axes[i] for i in contracted) - view.rows
            free = view.free([*contracted, *batch]) - view.rows
            fan_out = free | view.inner
            if not fan_in and view.inner:
                fan_in, fan_out = view.inner, free - view.shared or free
            kind = self.fans(view, fan_in, fan_out)
            details: dict[str, Any] = {"reads_input": reads_input}
            if kind == "matrix":
                kind = how or kind
                details["parts"] = tuple(_parts(view, batch, fan) for fan in (fan_in, fan_out))
            if kind == "vector" and view.rows:
                self.record(view, "rows", view.rows)
            if kind == "vector" and not fan_in:
                self.record(view, "elementwise")
                continue
            self.record(view, kind, fan_in, fan_out, **details)
            if not view.statistic:
                hows[view.leaf] = kind
            front = frozenset(i for i in fan_out if i < min(fan_in)) - {max(fan_out, default=0)}
            if kind == "matrix" and front and place is not None:
                outputs.add(View(view.leaf, place(tuple(_only(front, a) for a in view.axes))))
        before = activation.frontier | value.frontier
        if set(hows.values()) & set(MATRICES):
            self.read |= before
        else:
            self.passed |= before
        deep = activation.deep or bool(hows)
        return Value(
            data=True, deep=deep, frontier=frozenset(hows) or before, outputs=frozenset(outputs)
        )

    def index(self, value: Value, axes: Iterable[int]) -> None:
        """Records that entries along these axes are taken singly, so that they index matrices."""
        for view in value.outputs:
            self.stacks |= {(view.leaf, i) for i in along(view.axes[j] for j in axes)}

    def unknown(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Marks the leaves in an unknown primitive, so that their names decide."""
        name = eqn.primitive.name
        views = [v._replace(unknown=v.unknown | {name}) for value in values for v in value.views]
        joined = plain(values)
        if views and joined.data:
            for view in views:
                self.record(view, "unknown")
            self.read |= joined.frontier
            joined = Value(data=True, deep=True, frontier=frozenset(view.leaf for view in views))
            views = []

        def mixed(view: View, shape: Sequence[int]) -> View:
            return view._replace(axes=tuple(((view.free(), size),) for size in shape))

        return [
            joined._replace(views=merge(mixed(view, var.aval.shape) for view in views))
            for var in eqn.outvars
        ]

    def join(self, values: Sequence[Value], shape: Sequence[int]) -> Value:
        """Returns a value that may be any of these: branches of a condition, or a loop's carry."""
        if any(v.data and not v.views for v in values):
            values = list(map(self.settle, values))
        views = merge(v._replace(axes=fit(v.axes, shape)) for x in values for v in x.views)
        shared = frozenset.intersection(*(v.uniform for v in values))
        outputs = fit_outputs(values, shape)
        return plain(values)._replace(views=views, uniform=shared, outputs=outputs)

    def loop(
        self, run: Callable[[list[Value]], list[Value]], carry: list[Value], variables: Sequence
    ) -> list[Value]:
        """Runs a loop's body until its carry no longer changes; returns all its outputs."""
        shapes = [var.aval.shape for var in variables]

        def joined(outputs: list[Value]) -> list[Value]:
            triples = zip(carry, outputs, shapes, strict=False)
            return [self.join([before, after], shape) for before, after, shape in triples]

        while True:
            mark = len(self.uses)
            outputs = run(carry)
            if (wider := joined(outputs)) == carry:
                return wider + outputs[len(carry) :]
            del self.uses[mark:]
            carry = joined(outputs)  # computed again, because it records uses


def _only(which: LeafAxes, axis: Axis) -> Axis:
    """Returns the axis if it runs along only these axes of the leaf, else a blank one."""
    return axis if along([axis]) and along([axis]) <= which else blank(length(axis))


def _parts(view: View, batch: Sequence[int], fan: LeafAxes) -> int:
    """Returns the size of the batch axis that is a part of the fan's single axis, or 1."""
    own = [length(view.axes[i]) for i in batch if along([view.axes[i]]) & fan]
    return own[0] if len(own) == 1 and len(fan) == 1 else 1


def called_jaxpr(eqn: Any) -> Any:
    """Returns the only jaxpr that an equation calls with its own operands, or None."""
    jaxprs = [x for x in eqn.params.values() if hasattr(getattr(x, "jaxpr", x), "eqns")]
    if len(jaxprs) != 1:
        return None
    inner = getattr(jaxprs[0], "jaxpr", jaxprs[0])
    pairs = ((inner.invars, eqn.invars), (inner.outvars, eqn.outvars))
    same = all([x.aval.shape for x in a] == [x.aval.shape for x in b] for a, b in pairs)
    return jaxprs[0] if same else None


def captured(x: Any) -> Value:
    """Returns the value of an array that is neither a parameter nor an input."""
    axes = len(getattr(x, "shape", ()))
    return Value(table=axes > 0, captured=axes > 1)
