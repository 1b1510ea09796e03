"""The forms of Newton-Schulz: which products follow each other, and what they cost."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from muon_jax._orthogonalize.coefficients import Row
from muon_jax._orthogonalize.devices import Device, Kernel
from muon_jax._orthogonalize.symmetric import symmetric_kernels


class Form(NamedTuple):
    """The arithmetic chosen for a shape, a dtype and a platform.

    Attributes:
        method: `"standard"` or `"gram"`.
        restarts: the steps after which the Gram form forms XXᵀ anew.
        panels: how many slices symmetric products are computed in.
        one_by_one: a stack is a loop over its matrices, and no batched product.
        rounded: products are written in the dtype of their operands, and not in that of their
            sums, so that half of the bytes are read again.
        upright: matrices with more rows than columns are multiplied from the right, and not
            transposed first and last.
        apart: arrays that make one stack are scaled before they are put together, and multiplied
            last once they are taken apart, so that XLA fuses what comes before and after.
        padded: to so many columns matrices of one short side are filled up with zeros, and make
            one stack; 0 is as many as they have.
        joint_sums: the sums of a norm are one reduction with several results: a GPU ends each of
            several in a kernel of its own, where arrays make several stacks. A TPU fuses them.
    """

    method: str
    restarts: tuple[int, ...] = ()
    panels: int = 1
    one_by_one: bool = False
    rounded: bool = False
    upright: bool = False
    apart: bool = False
    padded: int = 0
    joint_sums: bool = False

    def flops(self, short: int, long: int, rows: tuple[Row, ...]) -> int:
        """FLOPs of the matrix products for one matrix, or for a tile with `long` of its columns."""
        stacks = ((1, self.padded or long),)
        return sum(kernel.flops for kernel in _iteration(self, short, stacks, rows, True))

    def kernels(
        self, short: int, stacks: Sequence[tuple[int, int]], rows: tuple[Row, ...], device: Device
    ) -> list[Kernel]:
        """Returns the kernels that XLA makes of `orthogonalize_stacks` for an accelerator.

        `stacks` has `(matrices, long)` of each shape; `short` is the side that all matrices have.
        """
        scaled = [Kernel(0, 0)] * 2  # the norms of all matrices
        if self.padded:
            together = sum(matrices for matrices, _ in stacks)
            stacks = [(together, self.padded)]
            scaled.append(Kernel(0, 2 * together * short * self.padded))  # the stack is written
        for matrices, long in stacks:
            entries = matrices * short * long
            read = 0 if device.on_chip else entries  # there with the momentum
            scaled += [Kernel(0, read), *[Kernel(0, 0)] * 3, Kernel(0, 2 * entries)]
        return scaled + list(_iteration(self, short, tuple(stacks), rows, device.on_chip))


class Products(Protocol):
    """What a form multiplies: arrays, or their sizes alone."""

    @property
    def form(self) -> Form: ...
    def gram(self, xs: Any) -> Any: ...
    def symmetric(self, p: Any, q: Any) -> Any: ...
    def polynomial(self, row: Row, r: Any) -> Any: ...
    def apply(self, p: Any, xs: Any) -> Any: ...


def iterate(xs: Any, rows: Sequence[Row], products: Products) -> tuple[Any, Any]:
    """Returns P and X, whose product is the result.

    The iteration is on R = XXᵀ; Q collects the factor that X still lacks. The standard form
    restarts after every step: X becomes PX, and R is computed from it.
    """
    form = products.form
    restarts = form.restarts if form.method == "gram" else range(1, len(rows))
    r = products.gram(xs)
    q: Any = None  # the identity
    for step, row in enumerate(rows, start=1):
        p = products.polynomial(row, r)
        q = p if q is None else products.symmetric(q, p)
        if step in restarts:
            xs = products.apply(q, xs)
            r, q = products.gram(xs), None
        elif step < len(rows):
            r = products.symmetric(p, products.symmetric(r, p))
    assert q is not None
    return q, xs


@functools.lru_cache(maxsize=1024)
def _iteration(
    form: Form, short: int, stacks: tuple[tuple[int, int], ...], rows: tuple[Row, ...], fused: bool
) -> tuple[Kernel, ...]:
    """The kernels from XXᵀ to the result; `fused`: sums of products are parts of these."""
    counted = _Counted(form, short, fused)
    counted.apply(*iterate(stacks, rows, counted))
    return tuple(counted.kernels)


class _Counted:
    """Products that are counted: X is `(matrices, long)` of each stack, P how many matrices."""

    def __init__(self, form: Form, short: int, fused: bool):
        self.form = form
        self.short = short
        self.fused = fused
        self.kernels: list[Kernel] = []

    def gram(self, xs: tuple[tuple[int, int], ...]) -> int:
        for matrices, long in xs:
            self._symmetric(matrices, long, matrices * self.short * long)
        together = sum(matrices for matrices, _ in xs)
        if len(xs) > 1:  # one stack of all
            self.kernels.append(Kernel(0, 2 * together * self.short**2))
        return together

    def symmetric(self, p: int, q: int) -> int:
        return self._symmetric(p, self.short, 2 * p * self.short**2)

    def polynomial(self, row: Row, r: int) -> int:
        summands = 2 if row[2] else 1
        if summands == 2:
            self._symmetric(r, self.short, r * self.short**2)
        if not self.fused:
            self.kernels.append(Kernel(0, (summands + 1) * r * self.short**2))
        return r

    def apply(self, p: int, xs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for matrices, long in xs:
            factor, entries = matrices * self.short**2, matrices * self.short * long
            if len(xs) > 1:  # its part of P
                self.kernels.append(Kernel(0, 2 * factor))
            self.kernels.append(Kernel(2 * self.short * entries, factor + 2 * entries))
        return xs

    def _symmetric(self, matrices: int, k: int, read: int) -> int:
        self.kernels += symmetric_kernels(matrices, self.short, k, read, self.form.panels)
        return matrices
