"""Handlers of matrix products, ragged products and convolutions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from muon_jax._routing.trace.arrays import looked_up
from muon_jax._routing.trace.leaf_axes import Axes, along, length, pick, reshape
from muon_jax._routing.trace.tracer import Tracer
from muon_jax._routing.trace.values import Value, View, plain, with_views


def dot_general(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    return [_Product(tracer, eqn, *eqn.params["dimension_numbers"])(values)]


def ragged_dot_general(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles ragged products; the groups of the right operand are a batch axis."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    contracted, (left, right) = dims.dot_dimension_numbers
    batch = left, (*right, *dims.rhs_group_dimensions)
    first = values[0]._replace(deep=values[0].deep or plain(values[2:]).deep)
    return [_Product(tracer, eqn, contracted, batch)([first, values[1]])]


class _Product(NamedTuple):
    """A product of two operands, with the axes of each that are contracted or batch axes."""

    tracer: Tracer
    eqn: Any
    contracted: Sequence[Sequence[int]]
    batch: Sequence[Sequence[int]]

    def __call__(self, values: Sequence[Value]) -> Value:
        holders = [i for i in (0, 1) if values[i].views]
        if not holders:
            return _product_of_activations(self.tracer, values)
        if len(holders) == 1:
            [i] = holders
            value, other = values[i], values[1 - i]
            if other.one_hot:
                rows = looked_up(
                    self.tracer, value, other, self.contracted[i], lambda axes: self.place(i, axes)
                )
                return rows._replace(one_hot=False)
            if other.data:
                return self.meet(i, value, other)
            if value.data:
                return self.tracer.settle(value)
            inside = [self.inside(i, view, other) for view in value.views]
            return with_views(plain(values)._replace(stream=value.stream), inside)
        ranks = [_rank(value, axes) for value, axes in zip(values, self.contracted, strict=True)]
        if ranks == [0, 0]:
            views = [self.inside(i, v, values[1 - i]) for i in (0, 1) for v in values[i].views]
            return with_views(plain(values), views)
        if ranks[0] == ranks[1]:
            return plain([self.tracer.settle(value) for value in values])
        i = ranks.index(min(ranks))
        activation = self.tracer.settle(values[1 - i])
        deep = activation.deep or not values[1 - i].data
        return self.meet(i, values[i], activation._replace(deep=deep))

    def place(self, side: int, axes: Axes) -> Axes:
        """Maps an operand's axes to the result's: batch, left free, right free."""
        free = [
            [i for i in range(len(x.aval.shape)) if i not in (*contracted, *batch)]
            for x, contracted, batch in zip(
                self.eqn.invars[:2], self.contracted, self.batch, strict=True
            )
        ]
        start = len(self.batch[side]) + side * len(free[0])
        source = dict(enumerate(self.batch[side])) | dict(enumerate(free[side], start))
        return pick(axes, source, self.eqn.outvars[0].aval.shape)

    def inside(self, side: int, view: View, other: Value) -> View:
        """Returns the view of a leaf in a product with another parameter or a constant."""
        return view._replace(
            axes=self.place(side, view.axes),
            inner=view.inner | along(view.axes[i] for i in self.contracted[side]),
            shared=view.shared | along(view.axes[i] for i in self.batch[side]),
            partners=view.partners | {v.leaf for v in other.views},
        )

    def meet(self, side: int, value: Value, activation: Value) -> Value:
        """Records a use. The activation's batch axes also index matrices in the product before."""
        self.tracer.index(activation, self.batch[1 - side])
        return self.tracer.meet(
            value,
            activation,
            self.contracted[side],
            self.batch[side],
            place=lambda axes: self.place(side, axes),
        )


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


def convolution(tracer: Tracer, eqn: Any, values: list[Value]) -> list[Value]:
    """Handles convolutions; the left operand always counts as the activation."""
    left, right = values
    learned = bool(left.views)
    left = tracer.settle(left)
    if not right.views:
        return [_product_of_activations(tracer, [left, right])]
    left = left._replace(data=True)  # even if it is a constant
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
