"""What routing by use knows of the values of a program: `Value`s made of `View`s of leaves."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from muon_jax._routing.trace.leaf_axes import NONE, Axes, LeafAxes, along, fit, resize


class View(NamedTuple):
    """One leaf within a value.

    Attributes:
        leaf: its number.
        axes: where its axes lie in the value.
        inner: its axes that are contracted with another parameter or a constant.
        shared: its axes that were batch axes of such a product.
        rows: its axes along which a part was looked up by data.
        taken: its axes along which constants took entries, some of them several times.
        partners: the leaves that it is multiplied with.
        statistic: whether it is reduced to a norm, mean or other statistic.
        unknown: primitives that it passed through and that this module does not know.
        place: where it was looked up, as a number of the tracer's.
    """

    leaf: int
    axes: Axes
    inner: LeafAxes = NONE
    shared: LeafAxes = NONE
    rows: LeafAxes = NONE
    taken: LeafAxes = NONE
    partners: frozenset[int] = frozenset()
    statistic: bool = False
    unknown: frozenset[str] = frozenset()
    place: int | None = None

    def carrying(self) -> frozenset[int]:
        """Axes of the value that run along the leaf's."""
        return frozenset(i for i, axis in enumerate(self.axes) if along([axis]))

    def free(self, taken: Iterable[int] = ()) -> LeafAxes:
        """Axes of the leaf along the value's axes, but for those `taken`."""
        taken = set(taken)
        return along(axis for i, axis in enumerate(self.axes) if i not in taken)


class Value(NamedTuple):
    """What is known of an array in the program.

    Attributes:
        views: the leaves in it; empty in activations and constants.
        data: whether it depends on the function's inputs. With views it is a looked-up or
            input-scaled parameter, of which what meets it next tells the use.
        stream: made of parameters alone, but it acts as an activation does (biases were added, or
            it was broadcast over a batch): learned queries and their like.
        deep: whether a matrix or an embedding lies between it and the function's inputs.
        frontier: the leaves whose product reaches it without another matrix in between.
        one_hot: whether it selects rows where it is multiplied.
        table: whether it is a constant whose entries differ.
        captured: whether it is an array that the function closes over.
        uniform: axes along which all entries are the same.
        outputs: leaves whose first axes, in front of fan_in, became axes of this activation. What
            follows tells whether they index matrices, as experts do, or are of fan_out.
    """

    views: frozenset[View] = frozenset()
    data: bool = False
    stream: bool = False
    deep: bool = False
    frontier: frozenset[int] = frozenset()
    one_hot: bool = False
    table: bool = False
    captured: bool = False
    uniform: frozenset[int] = frozenset()
    outputs: frozenset[View] = frozenset()


INPUT = Value(data=True)


class Use(NamedTuple):
    """Where a leaf meets activations.

    Attributes:
        leaf: its number.
        how: `"matrix"`, `"convolution"`, `"depthwise"`, `"vector"` (contracted without output
            axes, or between one input or output), `"rows"`, `"taken"` (contracted, after constants
            took entries several times), `"elementwise"`, `"statistic"`, `"mixed"` (its axes were
            merged before) or `"unknown"`.
        fan_in, fan_out: axes of the leaf; of `"rows"` and `"taken"` those looked up are `fan_in`.
        parts: into how many matrices fan_in and fan_out are split: groups of one axis.
        partners: leaves that it is multiplied with before.
        names: of the unknown primitives.
        reads_input: whether nothing but elementwise operations lie between it and the inputs.
        place: of the tracer's places.
    """

    leaf: int
    how: str
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    parts: tuple[int, int] = (1, 1)
    partners: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    reads_input: bool = False
    place: int = -1


MATRICES = ("matrix", "convolution", "mixed", "unknown")  # what may be a matrix, to be safe


def plain(values: Sequence[Value]) -> Value:
    """What the flags of several values are together; their views are left out."""
    constant = not any(v.data or v.views for v in values)
    return Value(
        data=any(v.data for v in values),
        stream=any(v.stream for v in values),
        deep=any(v.deep for v in values),
        frontier=frozenset().union(*(v.frontier for v in values)),
        table=constant and any(v.table for v in values),
        captured=constant and any(v.captured for v in values),
    )


def merge(views: Iterable[View]) -> frozenset[View]:
    """A leaf's statistics beside itself, as in a normalised weight, tell nothing more."""
    views = frozenset(views)
    whole = {view.leaf for view in views if not view.statistic}
    return frozenset(v for v in views if not (v.statistic and v.leaf in whole))


def with_views(value: Value, views: Iterable[View]) -> Value:
    return value._replace(views=merge(views))


def move(value: Value, axes: Callable[[Axes], Axes]) -> Value:
    """The value with its axes elsewhere."""
    views, outputs = (
        frozenset(view._replace(axes=axes(view.axes)) for view in of)
        for of in (value.views, value.outputs)
    )
    return value._replace(views=merge(views), outputs=outputs)


def fit_outputs(values: Sequence[Value], shape: Sequence[int]) -> frozenset[View]:
    outputs = (view._replace(axes=fit(view.axes, shape)) for x in values for view in x.outputs)
    return frozenset(view for view in outputs if view.carrying())


def resized(values: Sequence[Value], variables: Sequence[Any]) -> list[Value]:
    """The values in the shapes of these variables: shards, slices or wholes."""
    return [
        move(value, functools.partial(_resize_each, var.aval.shape))
        for value, var in zip(values, variables, strict=True)
    ]


def _resize_each(shape: Sequence[int], axes: Axes) -> Axes:
    return tuple(map(resize, axes, shape))
