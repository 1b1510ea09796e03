"""Stacks of matrices on a mesh, and the buckets that assign them to devices.

A bucket takes matrices that move over the same mesh axes: those that do not split their batch
already. It assigns tiles to devices: a tile is a whole matrix, or some of its columns where there
are fewer matrices than devices. Every device has the same number of slots for tiles of one size, so
one program serves all.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from muon_jax._orthogonalize.devices import Device, Kernel
from muon_jax._orthogonalize.forms import Form
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._orthogonalize.symmetric import accumulator

Axes = tuple[str, ...]
Sizes = tuple[tuple[str, int], ...]

# FLOPs that a device does while one byte crosses the network: between 500 and 4000 on the TPUs and
# GPUs of today. It only breaks ties between spreading a matrix thinner and moving less.
FLOPS_PER_BYTE = 1000


class Stack(NamedTuple):
    """The matrices of one array.

    Attributes:
        matrices: on one device: the product of the batch axes there.
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
        leads like its transpose of the same layout.
        """
        in_, out = (
            (len(axes), axes, fan)
            for axes, fan in ((self.in_axes, self.fan_in), (self.out_axes, self.fan_out))
        )
        return out > in_


class Span(NamedTuple):
    """The matrices `start:stop` of a stack.

    Attributes:
        flip: they are transposed, so that fan_out leads.
        tiles: how many each matrix is cut into.
    """

    stack: int
    start: int
    stop: int
    flip: bool
    tiles: int = 1

    @property
    def matrices(self) -> int:
        return self.stop - self.start


class Bucket(NamedTuple):
    """Tiles `(lead, other)` of one shape, assigned to the devices along `axes`.

    The shards of a tile are put together along its leading side, which is a mere reshape.

    Attributes:
        axes: mesh axes of the exchange, in mesh order; none for matrices that are already
            local to a device, which are not moved.
        devices: the product of their sizes.
        spans: the matrices.
        lead, other: the sides of a tile. Of matrices that are cut, `other` is the short side and
            `lead` a part of the long one, or more than it where zeros fill it up.
        slots: how many tiles a device takes.
        form: the arithmetic; `None` leaves it to the orthogonalizer.
        lead_axes, other_axes: the mesh axes that split the shards before the exchange.
        width: devices in a group; a matrix of several tiles stays within one group.
        cut: whether matrices may be cut into several tiles, which only the Gram form can take.
        dtype: of the exchange.
        alignment: numbers that collectives bring to a device so that matrices to be cut are split
            along their long side first, and back.
        call: buckets with the same one, not 0, share a call of the orthogonalizer: their matrices
            have one short side.
    """

    axes: Axes
    devices: int
    spans: tuple[Span, ...]
    lead: int
    other: int
    slots: int
    form: Form | None
    dtype: np.dtype
    lead_axes: Axes = ()
    other_axes: Axes = ()
    width: int = 1
    cut: bool = False
    alignment: int = 0
    call: int = 0

    @property
    def matrices(self) -> int:
        return sum(span.matrices for span in self.spans)

    @property
    def short(self) -> int:
        return self.other if self.cut else min(self.lead, self.other)

    @property
    def long(self) -> int:
        return self.lead if self.cut else max(self.lead, self.other)

    @property
    def resident(self) -> bool:
        """Whether every device already holds its tile of every matrix, so that none moves."""
        return self.width == self.devices and all(span.tiles == self.width for span in self.spans)

    @property
    def reductions(self) -> int:
        """How often XXᵀ is summed within groups."""
        return len(self.form.restarts) + 1 if self.form is not None and self.width > 1 else 0

    def flops(self, newton_schulz: NewtonSchulz | None) -> int:
        """FLOPs of the matrix products on each device; a guess for other orthogonalizers."""
        form = self.form or Form("standard")
        rows = (newton_schulz or NewtonSchulz()).rows(self.dtype)
        return self.slots * form.flops(self.short, self.long, rows)

    def exchanged_bytes(self, sizes: Sizes) -> int:
        """Bytes that the collectives of the bucket bring to each device."""
        if not self.axes:
            return 0
        size = dict(sizes)
        tiles = self.slots * self.lead * self.other
        split_axes = self.lead_axes + self.other_axes
        replicas = math.prod(size[a] for a in self.axes if a not in split_axes)
        moved = self.alignment
        if not self.resident:
            moved += 2 * tiles * (replicas < self.devices)
        if replicas > 1:
            moved += replicas * tiles
        triangle = self.other * (self.other + 1) // 2
        summed = self.reductions * self.slots * triangle * accumulator(self.dtype).itemsize
        return moved * self.dtype.itemsize + summed

    def cost(self, newton_schulz: NewtonSchulz | None, sizes: Sizes) -> float:
        return self.flops(newton_schulz) + FLOPS_PER_BYTE * self.exchanged_bytes(sizes)

    def assign_slots(self) -> tuple[np.ndarray, np.ndarray]:
        """The tile in each slot of each device, -1 if none, and whether its matrix is shared.

        Both `(devices, slots)`; tiles are counted through the spans, matrix by matrix.
        """
        groups = self.devices // self.width
        table = np.full((groups * self.slots, self.width), -1)
        shared = np.zeros_like(table, dtype=bool)
        whole: list[int] = []
        row = tile = 0
        for span in self.spans:
            for _ in range(span.matrices):
                if span.tiles == 1:
                    whole.append(tile)
                else:
                    table[row, : span.tiles] = range(tile, tile + span.tiles)
                    shared[row, : span.tiles] = True
                    row += 1
                tile += span.tiles
        empty = np.flatnonzero(table.ravel() < 0)[: len(whole)]
        table.reshape(-1)[empty] = whole

        def by_device(x):
            rows = x.reshape(groups, self.slots, self.width)
            return rows.transpose(0, 2, 1).reshape(self.devices, self.slots)

        return by_device(table), by_device(shared)


def by_call(buckets: Sequence[Bucket]) -> list[list[Bucket]]:
    """Those that share a call of the orthogonalizer together, in the order of the first."""
    calls: dict[int, list[Bucket]] = {}
    for index, bucket in enumerate(buckets):
        calls.setdefault(bucket.call or -1 - index, []).append(bucket)
    return list(calls.values())


def call_seconds(buckets: Sequence[Bucket], newton_schulz: NewtonSchulz, device: Device) -> float:
    """Predicted of the buckets that share a call, collectives aside."""
    first = buckets[0]
    form = first.form or Form("standard")
    stacks = [(bucket.slots, bucket.long) for bucket in buckets]
    kernels = form.kernels(first.short, stacks, newton_schulz.rows(first.dtype), device)
    for bucket in buckets:
        if form.padded:  # arrays keep what the stack is made of, and tall ones are turned with it
            array = Kernel(0, 2 * bucket.slots * bucket.short * bucket.long // len(bucket.spans))
            kernels += [array] * len(bucket.spans) * (7 if bucket.lead > bucket.other else 1)
        if bucket.axes:  # shards are put together, and taken apart
            kernels += [Kernel(0, 2 * bucket.slots * bucket.lead * bucket.other)] * 2
        triangles = Kernel(0, bucket.slots * bucket.short**2)  # packed, summed and unpacked
        kernels += [triangles] * 5 * bucket.reductions
    return device.seconds(kernels, newton_schulz.compute_dtype(first.dtype))


def exchange_dtype(dtype, newton_schulz: NewtonSchulz | None) -> np.dtype:
    """The dtype in which updates cross the network: bfloat16 if that is what is orthogonalised."""
    dtype = jnp.dtype(dtype)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if newton_schulz is None or newton_schulz.dtype != jnp.bfloat16 or is_complex:
        return dtype  # float16 would overflow before it is normalised
    return jnp.dtype(jnp.bfloat16) if dtype.itemsize > 2 else dtype
