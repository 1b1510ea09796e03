"""The arithmetic of Newton-Schulz: norm, polynomial steps and products of stacks of matrices."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muon_jax._orthogonalize.coefficients import Row
from muon_jax._orthogonalize.decompositions import each_matrix
from muon_jax._orthogonalize.forms import Form, iterate
from muon_jax._orthogonalize.symmetric import (
    Panels,
    accumulator,
    gram,
    join_panels,
    joined,
    matmul,
    product,
    split_panels,
    square,
)

# Of devices that hold different columns of the same matrices: partial sums, `(..., n, n)` or
# `(..., k, 1)`, -> their totals.
Share = Callable[[jax.Array], jax.Array]


def ALONE(x: jax.Array) -> jax.Array:
    """The `Share` of whole matrices."""
    return x


class Arithmetic(NamedTuple):
    """The settings that decide what is compiled: those of the schedule, the dtype and the form."""

    rows: tuple[Row, ...]
    normalization: str
    safety: float
    dtype: jnp.dtype
    form: Form


def orthogonalize_stacks(
    xs: Sequence[jax.Array],
    arithmetic: Arithmetic,
    share: Share = ALONE,
    *,
    eps: Any,
    absolute_eps: Any,
) -> tuple[jax.Array, ...]:
    """Orthogonalises stacks `(count, m, n)` of one short side, whose n × n products are shared.

    The stacks have one dtype; a single one may have any batch axes. `share`, `eps` and
    `absolute_eps` are as in `NewtonSchulz`.
    """
    if xs[0].size == 0:
        return tuple(xs)
    rows, normalization, safety, dtype, form = arithmetic

    def one(x: jax.Array) -> jax.Array:
        """Orthogonalises one stack, without padding."""
        unpadded = arithmetic._replace(form=form._replace(padded=0))
        return orthogonalize_stacks([x], unpadded, eps=eps, absolute_eps=absolute_eps)[0]

    if form.one_by_one and xs[0].ndim > 2:
        return tuple(jax.lax.map(one, x) for x in xs)
    if form.padded:
        return _in_one_shape(one, xs, form.padded)
    out_dtype = xs[0].dtype
    arrays = _Alike.of(xs)
    if not form.apart:
        xs = arrays.stacked(xs)
    tall = [x.shape[-2] > x.shape[-1] and share is ALONE for x in xs]
    upright = [is_tall and form.upright for is_tall in tall]
    turned = [is_tall and not form.upright for is_tall in tall]

    def scaled(x: jax.Array, norm: jax.Array, turned: bool, upright: bool) -> jax.Array:
        x = x.mT if turned else x
        factor: Any = 1
        if normalization != "frobenius":
            written = _written(x, dtype)
            written = written.mT if upright else written
            factor = _rescaling(share(join_panels(gram(written, 1))), normalization)
            factor = factor.mT if upright else factor
            x = x * factor
        if absolute_eps is not None:
            x = x / (1 + absolute_eps * factor / norm)
        return x / safety

    units = _unit_norms(xs, eps, form, share)
    xs = [scaled(*unit, *how) for unit, *how in zip(units, turned, upright, strict=True)]
    shapes = _Alike.of(xs)
    products = _Products(form, dtype, [upright[same[0]] for same in shapes.indices], share)
    stacks = shapes.stacked(xs)
    # Only products read these, so that rounding may be fused with what comes before. For large
    # matrices that takes a TPU's compiler half as long again, and saves 3 % of its cycles.
    stacks = [x.astype(dtype) if form.apart else _written(x, dtype) for x in stacks]
    p, stacks = iterate(stacks, rows, products)
    multiply = products.multiply if form.apart else products.rounded
    ys = [
        multiply(*each)
        for each in zip(shapes.panels(p), shapes.arrays(stacks), upright, strict=True)
    ]
    ys = [(y.mT if turn else y).astype(out_dtype) for y, turn in zip(ys, turned, strict=True)]
    return tuple(ys if form.apart else arrays.arrays(ys))


def _in_one_shape(
    orthogonalize: Callable[[jax.Array], jax.Array], xs: Sequence[jax.Array], length: int
) -> tuple[jax.Array, ...]:
    """Of stacks `(count, m, n)` of one short side, which zeros make equally long."""
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in xs]
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1]))) for x in wide]
    ys = split(orthogonalize(joined(padded)), [len(x) for x in xs])
    cut = [y[..., : x.shape[-1]] for x, y in zip(wide, ys, strict=True)]
    return tuple(y if y.shape == x.shape else y.mT for x, y in zip(xs, cut, strict=True))


class _Alike(NamedTuple):
    """Arrays `(count, m, n)`, those of one shape in one stack.

    Attributes:
        indices: of the arrays, stack by stack.
        counts: of each array's matrices.
    """

    indices: list[list[int]]
    counts: list[int]

    @classmethod
    def of(cls, xs: Sequence[jax.Array]) -> "_Alike":
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, x in enumerate(xs):
            by_shape.setdefault(x.shape[-2:], []).append(i)
        return cls([*by_shape.values()], [len(x) for x in xs])

    def stacked(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        return [joined([xs[i] for i in same]) for same in self.indices]

    def arrays(self, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Undoes `stacked`."""
        per_stack = (
            split(stack, [self.counts[i] for i in same])
            for same, stack in zip(self.indices, stacks, strict=True)
        )
        return self._in_order(itertools.chain.from_iterable(per_stack))

    def panels(self, p: Panels) -> list[Panels]:
        """Of n × n matrices, those of each array."""
        counts = [self.counts[i] for same in self.indices for i in same]
        return self._in_order(zip(*(split(panel, counts) for panel in p), strict=True))

    def _in_order(self, values: Iterable[Any]) -> list[Any]:
        order = [i for same in self.indices for i in same]
        at = dict(zip(order, values, strict=True))
        return [at[i] for i in range(len(order))]


def split(x: jax.Array, counts: Sequence[int]) -> list[jax.Array]:
    """Returns consecutive parts with these numbers of matrices; for one part `x` itself."""
    if len(counts) == 1:
        return [x]
    stops = itertools.accumulate(counts)
    return [x[stop - count : stop] for count, stop in zip(counts, stops, strict=True)]


class _Products(NamedTuple):
    """The products of a form, each rounded to `dtype` once; its symmetric matrices are panels.

    Attributes:
        form: of the arithmetic.
        dtype: of the operands.
        upright: of which stacks X has more rows than columns, and Xᵀ takes its place.
        share: how partial sums are combined.
    """

    form: Form
    dtype: jnp.dtype
    upright: list[bool]
    share: Share

    @property
    def written(self) -> jnp.dtype | None:
        return self.dtype if self.form.rounded else None

    def gram(self, xs: Sequence[jax.Array]) -> Panels:
        """XXᵀ of all stacks as one."""
        count, panels = self.form.panels, []
        for x, upright in zip(xs, self.upright, strict=True):
            x = x.mT if upright else x
            if self.share is ALONE:
                own = gram(x, count, self.written)
            else:
                own = split_panels(self.share(join_panels(gram(x, count))), count)
            panels.append(_rounded(own, self.dtype))
        return tuple(map(joined, zip(*panels, strict=True)))

    def symmetric(self, p: Panels, q: Panels) -> Panels:
        """PQ."""
        return _rounded(product(p, q, self.written), self.dtype)

    def apply(self, p: Panels, xs: Sequence[jax.Array]) -> list[jax.Array]:
        """PX of each stack, whose P follow each other."""
        own = _Alike.of(xs).panels(p)
        return [self.rounded(*each) for each in zip(own, xs, self.upright, strict=True)]

    def rounded(self, p: Panels, x: jax.Array, upright: bool) -> jax.Array:
        """PX, the same numbers for every reader."""
        [x] = _rounded((self.multiply(p, x, upright),), self.dtype)
        return x

    def multiply(self, p: Panels, x: jax.Array, upright: bool) -> jax.Array:
        p_ = join_panels(p)
        pair = (x, jnp.conj(p_)) if upright else (p_, x)
        return matmul(*pair, dtype=self.written)

    def polynomial(self, row: Row, r: Panels) -> Panels:
        """aI + bR + cR², which a step multiplies X by; summed in `accumulator`, rounded once.

        A number of Python's takes the dtype of the array that it meets: in bfloat16, 3.4445 would
        be 3.4375.
        """
        a, b, c = row
        wide = accumulator(self.dtype)
        eye = jnp.expand_dims(jnp.eye(r[0].shape[-1], dtype=wide), range(r[0].ndim - 2))
        ones = split_panels(eye, self.form.panels)
        if c == 0:
            sums = tuple(a * one + b * u.astype(wide) for one, u in zip(ones, r, strict=True))
            return _rounded(sums, self.dtype)
        squares = zip(ones, r, square(r, self.written), strict=True)
        sums = tuple(a * one + (b * u.astype(wide) + c * v.astype(wide)) for one, u, v in squares)
        return _rounded(sums, self.dtype)


def _rounded(panels: Panels, dtype: jnp.dtype) -> Panels:
    """In `dtype`, and the same numbers for every reader.

    XLA drops a rounding where float32 arithmetic follows. R would then be exact in bR and rounded
    in cR², and where the two cancel the rounding would be what is left.
    """
    if dtype == accumulator(dtype):
        return panels
    return jax.lax.optimization_barrier(tuple(panel.astype(dtype) for panel in panels))


def _unit_norms(
    xs: Sequence[jax.Array], eps: Any, form: Form, share: Share
) -> list[tuple[jax.Array, jax.Array]]:
    """X over its Frobenius norm without overflow or underflow, in float32 or wider, and that norm.

    The norm itself may be 0 or infinite.
    """
    xs = [x.astype(accumulator(x.dtype)) for x in xs]
    # XLA:CPU would run through X for each of three sums, and form the momentum anew for each.
    if not form.rounded and share is ALONE:
        norms: Iterable = map(_norm_in_two_passes, xs)
    else:
        sums = map(joined, zip(*[_sums_of_squares(x, form, share) for x in xs], strict=True))
        counts = [len(x) for x in xs]
        norms = zip(*(split(each, counts) for each in _norm_of(*sums)), strict=True)
    return [
        (x * root * root / (jnp.where(norm == 0, 1, norm) * (1 + eps)), norm / root / root)
        for x, (root, norm) in zip(xs, norms, strict=True)
    ]


def _norm_in_two_passes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A factor r, and the norm of r²X, whose largest entry is 1."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    # XLA turns division into a product with 1 / largest, which above 2^126 is flushed to zero.
    root = jax.lax.rsqrt(jnp.where(largest == 0, 1, largest))
    x = x * root * root
    return root, jnp.sqrt(jnp.sum(jnp.real(x * jnp.conj(x)), axis=(-2, -1), keepdims=True))


def _sums_of_squares(x: jax.Array, form: Form, share: Share) -> Sequence[jax.Array]:
    """Three `(..., 1, 1)`: of huge, of usual and of tiny entries, in scales of their own.

    References:
        Blue, 1978, A portable Fortran program to find the Euclidean norm of a vector.
    """
    edge, scale = _scales(x.dtype)
    sums = []
    for part in (x.real, x.imag) if jnp.iscomplexobj(x) else (x,):
        size = jnp.abs(part)
        is_huge, is_tiny = size > edge, size < 1 / edge
        scaled = (
            jnp.where(is_huge, size / scale, 0),
            jnp.where(is_huge | is_tiny, 0, size),
            jnp.where(is_tiny, size * scale, 0),
        )
        squares = [s * s for s in scaled]
        sums.append(_joint_sums(squares) if form.joint_sums else [_sum(s) for s in squares])
    totals = [sum(same)[..., None, None] for same in zip(*sums, strict=True)]
    if share is ALONE:
        return totals
    return jnp.split(share(jnp.concatenate(totals, axis=-2)), 3, axis=-2)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=(-2, -1))


def _joint_sums(xs: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """`_sum` of each."""

    def added(xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(xs, ys, strict=True))

    zeros = tuple(jnp.zeros((), x.dtype) for x in xs)
    return jax.lax.reduce(tuple(xs), zeros, added, (xs[0].ndim - 2, xs[0].ndim - 1))


def _norm_of(huge: jax.Array, usual: jax.Array, tiny: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A factor r, and the norm of r²X, whose square is a number."""
    _, scale = _scales(usual.dtype)

    def scaled(squares: jax.Array) -> jax.Array:
        return jnp.square(jnp.sqrt(squares) / scale)  # scale² would be no number

    squares = jnp.where(usual == 0, tiny, usual + scaled(tiny))
    norm = jnp.sqrt(jnp.where(huge > 0, huge + scaled(usual), squares))
    root = scale**0.5
    factor = jnp.where(huge > 0, 1 / root, jnp.where(usual == 0, root, 1.0))
    return factor.astype(norm.dtype), norm


def _scales(dtype: jax.typing.DTypeLike) -> tuple[float, float]:
    """From where entries are huge, and below 1 / which tiny; and what these are multiplied by."""
    bits = jnp.finfo(dtype).maxexp
    return 2.0 ** (2 * bits // 5), 2.0 ** (2 * (7 * bits // 20))


def _rescaling(r: jax.Array, normalization: str) -> jax.Array:
    """What the matrix, or each of its rows, is multiplied by; R is its XXᵀ."""
    size = jnp.abs(r)
    if normalization == "aol":
        size = jnp.sum(size, axis=-1, keepdims=True)
    elif normalization == "schatten":
        size = jnp.sqrt(jnp.sum(size * size, axis=(-2, -1), keepdims=True))
    else:
        size = each_matrix(jnp.linalg.eigvalsh, r)[..., -1:, None]
    return jax.lax.rsqrt(jnp.where(size == 0, 1, size))


def _written(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """X in `dtype`, in row-major order.

    To XLA:CPU a transpose is the same numbers in another layout, which its bfloat16 products do
    not take: some versions run them in float32, others refuse. What is reshaped is row-major.
    """
    [x] = _rounded((jnp.expand_dims(x, -1),), dtype)
    return jnp.squeeze(x, -1)
