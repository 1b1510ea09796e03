"""Handlers of matrix products, ragged products and convolutions."""

from collections.abc import Callable, Sequence
from typing import Any

from muon_jax._routing.trace.arrays import looked_up
from muon_jax._routing.trace.leaf_axes import Axes, along, blank, length, reshape, resize
from muon_jax._routing.trace.tracer import Tracer
from muon_jax._routing.trace.values import Value, View, plain, with_views


def dot_general(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    return [_product(tracer, eqn, values, contracted, batch)]


def ragged_dot_general(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles ragged products; the groups of the right operand are a batch axis."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    contracted, (left, right) = dims.dot_dimension_numbers
    groups = tuple(dims.rhs_group_dimensions)
    sizes = plain(values[2:])
    operands = [values[0]._replace(deep=values[0].deep or sizes.deep), values[1]]
    result = _product(tracer, eqn, operands, contracted, (left, (*right, *groups)))
    return [result]


def _product(
    tracer: Tracer,
    eqn: Any,
    values: Sequence[Value],
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
) -> Value:
    holders = [i for i in (0, 1) if values[i].views]
    if not holders:
        return _product_of_activations(tracer, values)
    if len(holders) == 1:
        [i] = holders
        value, other = values[i], values[1 - i]
        if other.one_hot:
            axes = _product_axes(eqn, i, contracted, batch)
            rows = looked_up(tracer, value, other, contracted[i], axes)
            return rows._replace(one_hot=False)
        if other.data:
            return _meet(tracer, eqn, i, value, other, contracted, batch)
        if not value.data:
            inside = [_inside(v, i, eqn, contracted, batch, frozenset()) for v in value.views]
            return with_views(plain(values)._replace(stream=value.stream), inside)
        return tracer.settle(value)
    ranks = [_rank(value, contracted[i]) for i, value in enumerate(values)]
    if ranks == [0, 0]:
        views = [
            _inside(view, i, eqn, contracted, batch, frozenset(v.leaf for v in values[1 - i].views))
            for i in (0, 1)
            for view in values[i].views
        ]
        return with_views(plain(values), views)
    if ranks[0] == ranks[1]:
        return plain([tracer.settle(value) for value in values])
    i = ranks.index(min(ranks))
    activation = tracer.settle(values[1 - i])
    deep = activation.deep or not values[1 - i].data
    activation = activation._replace(deep=deep)
    return _meet(tracer, eqn, i, values[i], activation, contracted, batch)


def _meet(
    tracer: Tracer,
    eqn: Any,
    side: int,
    value: Value,
    activation: Value,
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
) -> Value:
    """Records a use. The activation's batch axes index matrices in the product that made it too."""
    tracer.index(activation, batch[1 - side])
    place = _product_axes(eqn, side, contracted, batch)
    return tracer.meet(value, activation, contracted[side], batch[side], place=place)


def _rank(value: Value, contracted: Sequence[int]) -> int:
    """Returns how much a value resembles an activation; the operand with less is the matrix."""
    vector = all(
        all(length(axis) == 1 for i, axis in enumerate(view.axes) if i not in contracted)
        for view in value.views
    )
    return 2 if value.data else 1 if value.stream or vector else 0


def _product_of_activations(tracer: Tracer, values: Sequence[Value]) -> Value:
    """Handles products without leaves; a captured array counts as a matrix, as below adapters."""
    result = plain(values)._replace(captured=all(v.captured for v in values))
    if result.data and any(value.captured and not value.data for value in values):
        tracer.read |= result.frontier
        return result._replace(deep=True, frontier=frozenset())
    return result


def _product_axes(
    eqn: Any, side: int, contracted: Sequence[Sequence[int]], batch: Sequence[Sequence[int]]
) -> Callable[[Axes], Axes]:
    """Returns a map of an operand's axes to the result's: batch, left free, right free."""
    ranks = [len(x.aval.shape) for x in eqn.invars[:2]]
    free = [[i for i in range(ranks[s]) if i not in (*contracted[s], *batch[s])] for s in (0, 1)]
    shape = eqn.outvars[0].aval.shape
    start = len(batch[side]) + (len(free[0]) if side else 0)
    places = dict(enumerate(batch[side])) | dict(enumerate(free[side], start))

    def move(axes: Axes) -> Axes:
        return tuple(
            resize(axes[places[i]], size) if i in places else blank(size)
            for i, size in enumerate(shape)
        )

    return move


def _inside(
    view: View,
    side: int,
    eqn: Any,
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
    partners: frozenset[int],
) -> View:
    """Returns the view of a leaf in a product with another parameter or a constant."""
    return view._replace(
        axes=_product_axes(eqn, side, contracted, batch)(view.axes),
        inner=view.inner | along(view.axes[i] for i in contracted[side]),
        shared=view.shared | along(view.axes[i] for i in batch[side]),
        partners=view.partners | partners,
    )


def convolution(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles convolutions; the left operand always counts as the activation."""
    left, right = values
    if not right.views:
        left = tracer.settle(left) if left.views else left
        return [_product_of_activations(tracer, [left, right])]
    learned = bool(left.views)
    left = tracer.settle(left) if learned else left
    if not left.data:  # a constant
        left = left._replace(data=True)
    dims = eqn.params["dimension_numbers"]
    outputs, inputs, *window = dims.rhs_spec
    shape = eqn.invars[1].aval.shape
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    if groups > 1:
        right = with_views(right, (_grouped(v, outputs, groups) for v in right.views))
        inputs, window = inputs + (inputs > outputs), [i + (i > outputs) for i in window]
        if shape[dims.rhs_spec[1]] == 1 and shape[outputs] == groups:
            for view in right.views:
                tracer.record(view, "depthwise")
            return [plain([left])]
    activation = left._replace(deep=left.deep or learned)
    batch = [outputs] * (groups > 1)
    return [tracer.meet(right, activation, [inputs, *window], batch, how="convolution")]


def _grouped(view: View, outputs: int, groups: int) -> View:
    """Returns the kernel with an axis for its feature groups, before the axis of the outputs."""
    shape = [length(axis) for axis in view.axes]
    split = reshape((view.axes[outputs],), (groups, shape[outputs] // groups))
    return view._replace(axes=(*view.axes[:outputs], *split, *view.axes[outputs + 1 :]))
