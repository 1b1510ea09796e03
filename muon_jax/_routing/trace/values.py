"""The abstract values of routing by use: a `Value` contains a `View` of each leaf in an array."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from muon_jax._routing.trace.leaf_axes import NONE, Axes, LeafAxes, along, fit, resize_all


class View(NamedTuple):
    """One leaf within a value.

    Attributes:
        leaf: The number of the leaf.
        axes: The axes of the value, as factors of the leaf's axes.
        inner: The leaf's axes that are contracted with another parameter or a constant.
        shared: The leaf's axes that were batch axes of such a product.
        rows: The leaf's axes along which a part was looked up by data.
        taken: The leaf's axes along which constant indices selected entries, some more than once.
        partners: The leaves that it is multiplied with.
        statistic: Whether it is reduced to a norm, mean or other statistic.
        unknown: The unknown primitives that it passed through.
        place: The number of the place where it was looked up, see `Tracer.places`.
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
        """Returns the axes of the value that run along axes of the leaf."""
        return frozenset(i for i, axis in enumerate(self.axes) if along([axis]))

    def free(self, taken: Iterable[int] = ()) -> LeafAxes:
        """Returns the leaf's axes along the value's axes, except along those in `taken`."""
        taken = set(taken)
        return along(axis for i, axis in enumerate(self.axes) if i not in taken)


class Value(NamedTuple):
    """The abstract value of an array in the program.

    Attributes:
        views: The leaves in it; empty for activations and constants.
        data: Whether it depends on the function's inputs. If it has views too, it is a parameter
            that was looked up or scaled by data, and the next operation determines its use.
        stream: Whether it depends on parameters only but acts as an activation, such as learned
            queries: biases were added to it, or it was broadcast over a batch.
        deep: Whether there is a matrix or an embedding between it and the function's inputs.
        frontier: The leaves whose product reaches it without another matrix in between.
        one_hot: Whether a product with it selects rows.
        table: Whether it is a constant whose entries differ.
        captured: Whether it is an array that the function closes over.
        uniform: The axes along which all entries are equal.
        outputs: The leaves whose first axes, before fan_in, became axes of this activation. Later
            operations show whether they index matrices, as experts do, or belong to fan_out.
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
    """A place of the program at which a leaf meets activations.

    Attributes:
        leaf: The number of the leaf.
        how: `"matrix"`, `"convolution"`, `"depthwise"`, `"vector"` (contracted without output
            axes, or with a single input or output), `"rows"`, `"taken"` (contracted after constant
            indices selected entries more than once), `"elementwise"`, `"statistic"`, `"mixed"` (its
            axes were merged before) or `"unknown"`.
        fan_in, fan_out: Axes of the leaf. For `"rows"` and `"taken"`, `fan_in` has the axes of the
            lookup.
        parts: The numbers of matrices into which fan_in and fan_out are split, groups of one axis.
        partners: The leaves that it is multiplied with before.
        names: The names of the unknown primitives.
        reads_input: Whether there are only elementwise operations between the inputs and it.
        place: The number of the place, see `Tracer.places`.
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


MATRICES = ("matrix", "convolution", "mixed", "unknown")  # all uses that may be those of a matrix


def plain(values: Sequence[Value]) -> Value:
    """Returns a value with the combined flags of several values, without their views."""
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
    """Returns the views without statistics of leaves that have another view, as in weight norm."""
    views = frozenset(views)
    whole = {view.leaf for view in views if not view.statistic}
    return frozenset(v for v in views if not (v.statistic and v.leaf in whole))


def with_views(value: Value, views: Iterable[View]) -> Value:
    return value._replace(views=merge(views))


def move(value: Value, axes: Callable[[Axes], Axes]) -> Value:
    """Returns the value with its axes mapped by a function."""
    views, outputs = (
        frozenset(view._replace(axes=axes(view.axes)) for view in of)
        for of in (value.views, value.outputs)
    )
    return value._replace(views=merge(views), outputs=outputs)


def fit_outputs(values: Sequence[Value], shape: Sequence[int]) -> frozenset[View]:
    outputs = (view._replace(axes=fit(view.axes, shape)) for x in values for view in x.outputs)
    return frozenset(view for view in outputs if view.carrying())


def resized(values: Sequence[Value], variables: Sequence[Any]) -> list[Value]:
    """Returns the values in the shapes of these variables, which may be shards or slices."""
    return [
        move(value, functools.partial(resize_all, shape=var.aval.shape))
        for value, var in zip(values, variables, strict=True)
    ]
