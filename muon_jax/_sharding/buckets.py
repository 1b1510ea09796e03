"""Stacks of matrices on a mesh, and the buckets that assign them to devices.

The matrices of a bucket move over the same mesh axes, namely those that do not split their batch
already. A bucket assigns tiles to devices. A tile is a whole matrix or, if there are fewer matrices
than devices, some of its columns. Every device has the same number of slots for tiles of one size,
so that all devices run one program.
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

# The FLOPs of a device in the time that one byte takes on the network: between 500 and 4000 on
# current TPUs and GPUs. It only decides between using more devices for a matrix and moving less.
FLOPS_PER_BYTE = 1000


class Stack(NamedTuple):
    """The matrices of one array.

    Attributes:
        matrices: The number of matrices on one device, the product of its batch axes there.
        fan_in, fan_out: The sides of the whole matrix.
        batch_axes, in_axes, out_axes: The mesh axes along the batch and along each fan, major
            first. Along all other mesh axes the array is replicated.
        dtype: The dtype of the exchange.
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
        """Whether fan_out is the leading side, which is the one that more mesh axes split.

        If both are split equally often, the order of the axes' names decides, and then the longer
        side, so that a matrix and its transpose with the same layout have the same leading side.
        """
        in_, out = (
            (len(axes), axes, fan)
            for axes, fan in ((self.in_axes, self.fan_in), (self.out_axes, self.fan_out))
        )
        return out > in_


class Span(NamedTuple):
    """The matrices `start:stop` of a stack.

    Attributes:
        stack: The index of the stack.
        flip: Whether the matrices are transposed, so that fan_out is the leading side.
        tiles: The number of tiles that each matrix is split into.
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

    The shards of a tile are concatenated along its leading side, which is only a reshape.

    Attributes:
        axes: The mesh axes of the exchange, in mesh order; empty for matrices that are already
            local to a device, which are not moved.
        devices: The product of the sizes of these axes.
        spans: The matrices.
        lead, other: The sides of a tile. If matrices are split into tiles, `other` is the short
            side and `lead` a part of the long one, including padding.
        slots: The number of tiles that a device takes.
        form: The form of Newton-Schulz; `None` for other orthogonalizers.
        lead_axes, other_axes: The mesh axes that split the shards before the exchange.
        width: The number of devices in a group; the tiles of a matrix stay within one group.
        cut: Whether matrices may be split into several tiles, which only the Gram form supports.
        dtype: The dtype of the exchange.
        alignment: The numbers that a device receives when matrices to be split into tiles are
            first split along their long side, and on the way back.
        call: Buckets with the same nonzero number share a call of the orthogonalizer. Their
            matrices have the same short side.
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
        """Whether every device already holds its tile of every matrix, so that no tile moves."""
        return self.width == self.devices and all(span.tiles == self.width for span in self.spans)

    @property
    def reductions(self) -> int:
        """The number of times that XXᵀ is summed within groups."""
        return len(self.form.restarts) + 1 if self.form is not None and self.width > 1 else 0

    def flops(self, newton_schulz: NewtonSchulz | None) -> int:
        """Returns the FLOPs of each device's products, an estimate for other orthogonalizers."""
        form = self.form or Form("standard")
        rows = (newton_schulz or NewtonSchulz()).rows(self.dtype)
        return self.slots * form.flops(self.short, self.long, rows)

    def exchanged_bytes(self, sizes: Sizes) -> int:
        """Returns the bytes that each device receives from the bucket's collectives."""
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
        """Returns the tile in each slot of each device, or -1, and whether its matrix is shared.

        Both arrays are `(devices, slots)`. Tiles are numbered across the spans, matrix by matrix.
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
    """Groups the buckets by the call of the orthogonalizer, in the order of their first bucket."""
    calls: dict[int, list[Bucket]] = {}
    for index, bucket in enumerate(buckets):
        calls.setdefault(bucket.call or -1 - index, []).append(bucket)
    return list(calls.values())


def call_seconds(buckets: Sequence[Bucket], newton_schulz: NewtonSchulz, device: Device) -> float:
    """Returns the predicted time of the buckets that share a call, without collectives."""
    first = buckets[0]
    form = first.form or Form("standard")
    stacks = [(bucket.slots, bucket.long) for bucket in buckets]
    kernels = form.kernels(first.short, stacks, newton_schulz.rows(first.dtype), device)
    for bucket in buckets:
        if form.padded:  # arrays are copied into the stack, and tall ones are transposed for it
            array = Kernel(0, 2 * bucket.slots * bucket.short * bucket.long // len(bucket.spans))
            kernels += [array] * len(bucket.spans) * (7 if bucket.lead > bucket.other else 1)
        if bucket.axes:  # shards are concatenated to tiles, and tiles are split again
            kernels += [Kernel(0, 2 * bucket.slots * bucket.lead * bucket.other)] * 2
        triangles = Kernel(0, bucket.slots * bucket.short**2)  # packed, summed and unpacked
        kernels += [triangles] * 5 * bucket.reductions
    return device.seconds(kernels, newton_schulz.compute_dtype(first.dtype))


def exchange_dtype(dtype, newton_schulz: NewtonSchulz | None) -> np.dtype:
    """Returns the dtype of the exchange: bfloat16 if the updates are orthogonalised in it."""
    dtype = jnp.dtype(dtype)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if newton_schulz is None or newton_schulz.dtype != jnp.bfloat16 or is_complex:
        return dtype  # float16 could overflow, since updates are not normalised yet
    return jnp.dtype(jnp.bfloat16) if dtype.itemsize > 2 else dtype
