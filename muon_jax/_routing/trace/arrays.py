"""Handlers of primitives that move, resize, join, look up or combine arrays elementwise."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from muon_jax._routing.trace.leaf_axes import (
    NONE,
    Axes,
    along,
    blank,
    fit,
    length,
    pick,
    reshape,
    resize_all,
    without,
)
from muon_jax._routing.trace.tracer import Handler, Tracer
from muon_jax._routing.trace.values import Value, fit_outputs, move, plain, resized, with_views

Move = Callable[[Any, Sequence[int], Axes], Axes]


# --- Elementwise ---


def elementwise(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    uniform = [_uniform(v, x.aval.shape, shape) for v, x in zip(values, eqn.invars, strict=True)]
    pure = [i for i, value in enumerate(values) if value.data and not value.views]
    holders = [value for value in values if value.views]
    settled = bool(pure) and not _scales(name, values, uniform, pure)
    settled = settled or (name in _CURVED and any(value.data for value in holders))
    # A lookup acts as an activation when it is combined with a parameter that is not looked up.
    looked_up = any(view.rows for value in holders for view in value.views)
    if settled or (looked_up and not all(value.data for value in holders)):
        values = list(map(tracer.settle, values))
    views = [
        [view._replace(axes=fit(view.axes, shape)) for view in value.views] for value in values
    ]
    joined = with_views(plain(values), [view for one in views for view in one])
    if name in ("mul", "div"):
        stream = all(value.stream for value in values if value.views)
    else:
        carried = {
            frozenset(i for i in view.carrying() if shape[i] > 1)
            for one in views
            for view in one
            if not view.statistic
        }
        stream = joined.stream or (name in ("add", "sub") and len(carried) > 1)
    return [
        joined._replace(
            stream=stream and not joined.data,
            one_hot=_selects(name, values),
            uniform=frozenset.intersection(*uniform),
            outputs=fit_outputs(values, shape),
        )
    ]


# A parameter that is scaled by data and then enters one of these is not a modulated matrix.
_CURVED = frozenset(
    ("cos", "erf", "exp", "exp2", "expm1", "log", "log1p")
    + ("logistic", "max", "min", "pow", "sin", "tanh")
)


def _uniform(value: Value, before: Sequence[int], after: Sequence[int]) -> frozenset[int]:
    """Returns the axes of the result along which all entries of this operand are equal."""
    if len(before) != len(after):
        return frozenset(range(len(after)))
    grown = {i for i, sizes in enumerate(zip(before, after, strict=True)) if sizes[0] != sizes[1]}
    return value.uniform | grown


def _scales(name: str, values: list[Value], uniform: list[frozenset[int]], pure: list[int]) -> bool:
    """Whether a parameter is only scaled by data, as a whole or along some of its axes.

    Examples are a weight divided by its spectral norm, or modulated by a style. The next operation
    then determines its use.
    """
    if name != "mul" and not (name == "div" and pure == [1]):
        return False
    shared = frozenset.intersection(*(uniform[i] for i in pure))
    return all(view.carrying() & shared for value in values for view in value.views)


_KEEP_ROWS = {"convert_element_type", "mul", "copy", "copy_p", "stop_gradient", "select_n"}


def _selects(name: str, values: list[Value]) -> bool:
    if name == "eq":
        return any(value.table for value in values)
    return name in _KEEP_ROWS and any(value.one_hot for value in values)


def each(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles primitives with one output per operand."""
    return resized(values, eqn.outvars)


def sort(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles sorting, where the first operand determines the order of all."""
    keys = plain(values)
    return [
        value._replace(data=keys.data, deep=keys.deep, frontier=keys.frontier, uniform=NONE)
        for value in each(tracer, eqn, values)
    ]


# --- Moved and resized ---


def moved(place: Move) -> Handler:
    """Makes a handler of how the axes of the first operand move; a second is a padding value."""

    def handler(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
        value = values[0]._replace(uniform=NONE)
        return [move(value, functools.partial(place, eqn, var.aval.shape)) for var in eqn.outvars]

    return handler


def sliced(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    before, shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    tracer.index(values[0], _single(before, shape))
    return resized(values * len(eqn.outvars), eqn.outvars)


def unstack(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    at = eqn.params["axis"]
    tracer.index(values[0], [at])
    part = move(values[0], lambda axes: without(axes, [at]))
    return [part._replace(uniform=NONE)] * len(eqn.outvars)


def _single(before: Sequence[int], after: Sequence[int]) -> list[int]:
    return [
        i for i, sizes in enumerate(zip(before, after, strict=True)) if sizes[0] > sizes[1] == 1
    ]


@moved
def _broadcast_axes(eqn: Any, shape: Sequence[int], axes: Axes) -> Axes:
    placed = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
    return tuple(
        placed[i] if i in placed and length(placed[i]) == size else blank(size)
        for i, size in enumerate(shape)
    )


def broadcast(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    [value] = _broadcast_axes(tracer, eqn, values[:1])
    shape, kept = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    before = dict(zip(kept, eqn.invars[0].aval.shape, strict=True))
    grown = frozenset(i for i, size in enumerate(shape) if before.get(i, 1) != size)
    inherited = frozenset(kept[i] for i in values[0].uniform if i < len(kept))
    batch = bool(value.views) and bool(grown) and not value.data
    return [
        value._replace(
            uniform=grown | inherited,
            stream=value.stream or batch,
            table=value.table and bool(before),
        )
    ]


@moved
def _repeat_axes(eqn: Any, shape: Sequence[int], axes: Axes) -> Axes:
    return resize_all(tuple(blank(1) if length(axis) == 1 else axis for axis in axes), shape)


def tile(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    [value] = _repeat_axes(tracer, eqn, values)
    batch = bool(value.views) and not value.data
    return [value._replace(stream=value.stream or batch)]


@moved
def transpose_axes(eqn: Any, shape: Sequence[int], axes: Axes) -> Axes:
    return tuple(axes[i] for i in eqn.params["permutation"])


@moved
def reshape_axes(eqn: Any, shape: Sequence[int], axes: Axes) -> Axes:
    order = eqn.params.get("dimensions")
    return reshape(axes if order is None else tuple(axes[i] for i in order), shape)


@moved
def squeeze_axes(eqn: Any, shape: Sequence[int], axes: Axes) -> Axes:
    return without(axes, eqn.params["dimensions"])


@moved
def resize_axes(eqn: Any, shape: Sequence[int], axes: Axes) -> Axes:
    return resize_all(axes, shape)


@moved
def gather_shards(eqn: Any, shape: Sequence[int], axes: Axes) -> Axes:
    """Resizes the axes; without tiling, adds or removes the axis of the shards."""
    if len(axes) < len(shape):
        at = eqn.params["all_gather_dimension"]
        axes = (*axes[:at], blank(shape[at]), *axes[at:])
    elif len(axes) > len(shape):  # reduce_scatter
        axes = without(axes, [eqn.params["scatter_dimension"]])
    return resize_all(axes, shape)


def reduce(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Marks a leaf as a statistic if it is reduced along its own axes, not those of a broadcast."""
    gone = set(eqn.params["axes"])
    one_hot = eqn.primitive.name in ("reduce_sum", "reduce_max")
    marked = [
        with_views(
            value._replace(one_hot=value.one_hot and one_hot, uniform=NONE),
            (v._replace(statistic=v.statistic or bool(v.carrying() & gone)) for v in value.views),
        )
        for value in values[: len(eqn.outvars)]
    ]
    return [move(value, lambda axes: without(axes, gone)) for value in marked]


def combine(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles operands that are concatenated, stacked or written into a buffer."""
    if any(value.data and not value.views for value in values):
        values = list(map(tracer.settle, values))
    shape = eqn.outvars[0].aval.shape
    views = []
    for value in values:
        for view in value.views:
            axes = view.axes
            if eqn.primitive.name == "stack":
                at = eqn.params["axis"]
                axes = (*axes[:at], blank(1), *axes[at:])
            views.append(view._replace(axes=resize_all(axes, shape)))
    return [with_views(plain(values), views)]


# --- Lookups ---


def gather(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    operand, indices = values[0], plain(values[1:])
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, before = eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    kept = [i for i in range(len(before)) if i not in gone]
    searched = [i for i in dims.start_index_map if sizes[i] < before[i] or before[i] == 1]
    batch = [i for i in range(len(shape)) if i not in dims.offset_dims]
    paired = zip(dims.start_indices_batching_dims, dims.operand_batching_dims, strict=True)
    source = dict(zip(dims.offset_dims, kept, strict=True)) | {batch[i]: j for i, j in paired}
    single = [i for i in searched if sizes[i] == 1]
    free = [i for i in batch if i not in source]
    if not indices.data and len(single) == len(free) == 1:
        [at], [out] = single, free
        if 1 < shape[out] <= before[at]:  # a permutation or a subset of the rows
            source[out], single, free = at, [], []
    scattered = [i for i in single if before[i] > 1] if free else []
    if not indices.data:
        tracer.index(operand, single)
    place = functools.partial(pick, source=source, shape=shape)
    return [looked_up(tracer, operand, indices, searched, place, scattered)]


def dynamic_slice(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    shape, before = eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
    searched = [i for i, size in enumerate(shape) if size < before[i]]
    tracer.index(values[0], _single(before, shape))
    starts = plain([value for i, value in enumerate(values[1:]) if i in searched])
    place = functools.partial(resize_all, shape=shape)
    return [looked_up(tracer, values[0], starts, searched, place)]


def looked_up(
    tracer: Tracer,
    operand: Value,
    indices: Value,
    searched: Sequence[int],
    move: Callable[[Axes], Axes],
    scattered: Sequence[int] = (),
) -> Value:
    """Returns a part of the operand, which is looked up if the indices are data, else a slice.

    Along the `scattered` axes it may contain an entry more than once.
    """
    flags = plain([operand, indices])._replace(one_hot=operand.one_hot, stream=operand.stream)
    if not operand.views:
        deep = flags.deep or (operand.captured and indices.data)
        return flags._replace(deep=deep)
    by_data = indices.data
    return with_views(
        flags._replace(deep=flags.deep or by_data, stream=operand.stream and not by_data),
        (
            view._replace(
                axes=move(view.axes),
                rows=view.rows | along(view.axes[i] for i in searched) if by_data else view.rows,
                taken=view.taken | along(view.axes[i] for i in scattered if not by_data),
                place=tracer.place() if by_data else view.place,
            )
            for view in operand.views
        ),
    )
