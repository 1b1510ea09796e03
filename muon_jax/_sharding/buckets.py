"""What is dealt to devices: blocks of matrices as they lie, and the buckets that take them.

Matrices with the same exchange (the mesh axes that do not already share out their batch) form
buckets. A bucket deals cells to devices: a cell is a whole matrix, or some of its columns where
there are fewer matrices than devices. Every device holds the same number of equal cells, so one
program serves all.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from muon_jax._orthogonalize.iteration import Form
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._orthogonalize.symmetric import accumulator

Axes = tuple[str, ...]
Sizes = tuple[tuple[str, int], ...]

# FLOPs that a device does while one byte crosses the network: between 500 and 4000 on the TPUs and
# GPUs of today. It only breaks ties between spreading a matrix thinner and moving less.
FLOPS_PER_BYTE = 1000


class Block(NamedTuple):
    """The matrices of one array.

    Attributes:
        matrices: on one device: the product of its local batch axes.
        fan_in, fan_out: of the whole matrix.
        batch_axes, in_axes, out_axes: the mesh axes along the batch and along each fan, major
            first; along all others the array is replicated.
        dtype: of the exchange.
    """

    matrices: int
    fan_in: int
    fan_out: int
    batch_axes: Axes
    in_axes: Axes
    out_axes: Axes
    dtype: np.dtype

    @property
    def flip(self) -> bool:
        """Whether fan_out leads: the side that more mesh axes split.

        Of equals the order of the axes' names decides, and then the longer side, so that a matrix
        leads like its transpose that lies in the same way.
        """
        in_, out = (
            (len(axes), axes, fan)
            for axes, fan in ((self.in_axes, self.fan_in), (self.out_axes, self.fan_out))
        )
        return out > in_


class Part(NamedTuple):
    """The matrices `start:stop` of a block.

    Attributes:
        flip: they are transposed, so that fan_out leads.
        cells: how many each is cut into.
    """

    block: int
    start: int
    stop: int
    flip: bool
    cells: int = 1

    @property
    def matrices(self) -> int:
        return self.stop - self.start


class Bucket(NamedTuple):
    """Cells `(lead, other)` of one shape, dealt to the devices along `axes`.

    The leading side is the one to be put together from many devices' tiles: that is a mere reshape.

    Attributes:
        axes: mesh axes of the exchange, in mesh order; none for matrices that are whole on the
            device where they lie.
        devices: the product of their sizes.
        parts: the matrices.
        lead, other: the sides of a cell. Of matrices that are cut, `other` is the short side and
            `lead` a part of the long one, or more than it where zeros fill it up.
        lead_axes, other_axes: the mesh axes along which tiles lie when they are dealt.
        width: devices in a group; a matrix of several cells stays within one group.
        slots: cells a device holds.
        form: the arithmetic; `None` leaves it to the orthogonalizer.
        cut: whether the cells are such that only the Gram form may take them, with `other` as the
            short side.
        dtype: of the exchange.
        alignment: numbers that collectives bring to a device so that matrices to be cut lie along
            their long side first, and back.
        call: buckets with the same one, not 0, share a call of the orthogonalizer: their matrices
            have one short side.
    """

    axes: Axes
    devices: int
    parts: tuple[Part, ...]
    lead: int
    other: int
    lead_axes: Axes
    other_axes: Axes
    width: int
    slots: int
    form: Form | None
    dtype: np.dtype
    cut: bool = False
    alignment: int = 0
    call: int = 0

    @property
    def matrices(self) -> int:
        return sum(part.matrices for part in self.parts)

    @property
    def resident(self) -> bool:
        """Whether every matrix is cut where it lies, so that no cell has to move."""
        return self.width == self.devices and all(p.cells == self.width for p in self.parts)

    @property
    def reductions(self) -> int:
        """How often XXᵀ is summed within groups."""
        return len(self.form.restarts) + 1 if self.form is not None and self.width > 1 else 0

    def flops(self, solver: NewtonSchulz | None) -> int:
        """FLOPs of the matrix products on each device; a guess for other orthogonalizers."""
        short, long = (self.other, self.lead) if self.cut else sorted((self.lead, self.other))
        form = self.form or Form("standard")
        return self.slots * form.flops(short, long, (solver or NewtonSchulz()).rows(self.dtype))

    def exchanged_bytes(self, sizes: Sizes) -> int:
        """Bytes that the collectives of the bucket bring to each device."""
        if not self.axes:
            return 0
        size = dict(sizes)
        cells = self.slots * self.lead * self.other
        lie = self.lead_axes + self.other_axes
        replicas = math.prod(size[a] for a in self.axes if a not in lie)
        moved = self.alignment
        if not self.resident:
            moved += 2 * cells * (replicas < self.devices)
        if replicas > 1:
            moved += replicas * cells
        triangle = self.other * (self.other + 1) // 2
        summed = self.reductions * self.slots * triangle * accumulator(self.dtype).itemsize
        return moved * self.dtype.itemsize + summed

    def cost(self, solver: NewtonSchulz | None, sizes: Sizes) -> float:
        return self.flops(solver) + FLOPS_PER_BYTE * self.exchanged_bytes(sizes)

    def deal(self) -> tuple[np.ndarray, np.ndarray]:
        """The cell in each slot of each device, -1 if none, and whether its matrix is shared.

        Both `(devices, slots)`; cells are counted through the parts, matrix by matrix.
        """
        groups = self.devices // self.width
        table = np.full((groups * self.slots, self.width), -1)
        shared = np.zeros_like(table, dtype=bool)
        whole: list[int] = []
        row = cell = 0
        for part in self.parts:
            for _ in range(part.matrices):
                if part.cells == 1:
                    whole.append(cell)
                else:
                    table[row, : part.cells] = range(cell, cell + part.cells)
                    shared[row, : part.cells] = True
                    row += 1
                cell += part.cells
        empty = np.flatnonzero(table.ravel() < 0)[: len(whole)]
        table.reshape(-1)[empty] = whole

        def by_device(x):
            rows = x.reshape(groups, self.slots, self.width)
            return rows.transpose(0, 2, 1).reshape(self.devices, self.slots)

        return by_device(table), by_device(shared)


def exchange_dtype(dtype, solver: NewtonSchulz | None) -> np.dtype:
    """The dtype in which updates cross the network: bfloat16 if that is what is orthogonalised."""
    dtype = jnp.dtype(dtype)
    if solver is None or solver.dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    # float16 would overflow before it is normalised.
    smaller = solver.dtype == jnp.bfloat16 and dtype.itemsize > 2
    return jnp.dtype(solver.dtype) if smaller else dtype
