"""Which device orthogonalises which matrix: decided from shapes and mesh, before anything runs."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from muon_jax._orthogonalize.newton_schulz import SMALL, NewtonSchulz
from muon_jax._sharding.buckets import Axes, Block, Bucket, Part, Sizes

# Up to this many shapes the choice of which to split is exhaustive.
_EXHAUSTIVE = 8

# On one device a GPU takes 2 µs to begin a kernel, and a TPU its time to fill its matrix units and
# to empty them: matrices of several leaves are worth one call, which costs their memory once more,
# until a product takes so many FLOPs, 0.2 ms of an H100. A CPU is as fast without.
_STACK_FLOPS = 2**37


@functools.lru_cache(maxsize=256)
def plan_buckets(
    blocks: tuple[Block, ...], sizes: Sizes, solver: NewtonSchulz | None, platform: str
) -> tuple[Bucket, ...]:
    """The buckets of these blocks on a mesh with axes of these sizes.

    Args:
        blocks: one an array.
        sizes: `(name, size)` of the mesh axes, major first.
        solver: knows its FLOPs and may be cut; `None` for any other orthogonalizer, whose matrices
            stay whole and keep their orientation.
        platform: of the devices: `"cpu"`, `"gpu"`, `"tpu"`.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    whole: list[int] = []
    for index, block in enumerate(blocks):
        axes = tuple(a for a, n in sizes if n > 1 and a not in block.batch_axes)
        if axes:
            groups[axes, block.dtype].append(index)
        elif block.matrices:
            whole.append(index)
    buckets = _local(blocks, whole, solver, platform)
    for (axes, dtype), members in groups.items():
        buckets += _Exchange(axes, dtype, sizes, solver, platform).buckets(blocks, members)
    return tuple(buckets)


def _local(
    blocks: Sequence[Block], whole: Iterable[int], solver: NewtonSchulz | None, platform: str
) -> list[Bucket]:
    """A bucket for each shape in each call: small ones of one form and short side share a call."""
    most = 0 if platform == "cpu" else _STACK_FLOPS
    calls = itertools.count(1)
    last: dict[Any, tuple[int, int]] = {}  # of those that may share one: the last, and its room
    stacks: dict[Any, list[Part]] = defaultdict(list)
    for index in whole:
        block = blocks[index]
        m, n = shape = block.fan_in, block.fan_out
        form = None if solver is None else solver.form(m, n, block.dtype, platform)
        alike = shape if form is None or min(shape) >= SMALL else min(shape), form, block.dtype
        flops = 2 * m * n * min(m, n) * block.matrices
        call, room = last.get(alike, (0, 0))
        if not call or flops > room:
            call, room = next(calls), most
        last[alike] = call, room - flops
        stacks[call, m, n, form, block.dtype].append(Part(index, 0, block.matrices, False))
    return [
        Bucket(
            axes=(),
            devices=1,
            parts=tuple(parts),
            lead=m,
            other=n,
            lead_axes=(),
            other_axes=(),
            width=1,
            slots=sum(part.matrices for part in parts),
            form=form,
            dtype=dtype,
            call=call,
        )
        for (call, m, n, form, dtype), parts in stacks.items()
    ]


class _Class(NamedTuple):
    """Matrices of one shape that lie in the same way."""

    lead: int
    other: int
    lead_axes: Axes
    other_axes: Axes
    parts: tuple[Part, ...]

    @property
    def short(self) -> int:
        return min(self.lead, self.other)

    def turned(self, solver: NewtonSchulz) -> "_Class":
        """The same with the long side leading, or fan_out where both are equal and it matters."""
        if solver.tells_sides(self.lead, self.other):
            turn = not self.parts[0].flip
        else:
            turn = self.lead < self.other
        if not turn:
            return self
        parts = tuple(part._replace(flip=not part.flip) for part in self.parts)
        return _Class(self.other, self.lead, self.other_axes, self.lead_axes, parts)

    @property
    def matrices(self) -> int:
        return sum(part.matrices for part in self.parts)


class _Exchange(NamedTuple):
    axes: Axes
    dtype: np.dtype
    sizes: Sizes
    solver: NewtonSchulz | None
    platform: str

    @property
    def devices(self) -> int:
        return self._product(self.axes)

    def buckets(self, blocks: Sequence[Block], members: Iterable[int]) -> list[Bucket]:
        """Full rounds of whole matrices; what is left over whole or cut, whichever is cheaper."""
        found, rest = [], defaultdict(list)
        for shape in self._classes(blocks, members):
            full = shape.matrices - shape.matrices % self.devices
            rounds, remainder = _divide(shape, full)
            if not remainder.parts:
                found.append(self._whole(rounds))
            else:
                rest[shape.short].append((rounds, remainder))
        for shapes in rest.values():
            found += self._place_remainders(shapes)
        return found

    def _classes(self, blocks: Sequence[Block], members: Iterable[int]) -> list[_Class]:
        classes: dict[Any, list[Part]] = defaultdict(list)
        for index in members:
            block = blocks[index]
            if not block.matrices:
                continue
            fans = [(block.fan_in, block.in_axes), (block.fan_out, block.out_axes)]
            (lead, lead_axes), (other, other_axes) = reversed(fans) if block.flip else fans
            # Any other orthogonalizer may tell fan_in from fan_out.
            told = self.solver is None or self.solver.tells_sides(lead, other)
            orientation = block.flip if told else None
            part = Part(index, 0, block.matrices, block.flip)
            classes[lead, other, lead_axes, other_axes, orientation].append(part)
        return [
            _Class(lead, other, lead_axes, other_axes, tuple(parts))
            for (lead, other, lead_axes, other_axes, _), parts in classes.items()
        ]

    def _place_remainders(self, shapes: list[tuple[_Class, _Class]]) -> list[Bucket]:
        """Of each shape `(full rounds, remainder)`: a padded round more, or cut and merged."""
        padded = [self._whole(_join(rounds, rest)) for rounds, rest in shapes]
        if self.solver is None or self.solver.method == "standard":
            return padded
        full = [self._whole(rounds) if rounds.parts else None for rounds, _ in shapes]
        if len(shapes) <= _EXHAUSTIVE:
            choices: Iterable = itertools.product((False, True), repeat=len(shapes))
        else:
            choices = [(False,) * len(shapes), (True,) * len(shapes)]
        best, least = padded, math.inf
        for cut in choices:
            buckets = [p for p, c in zip(padded, cut, strict=True) if not c]
            buckets += [f for f, c in zip(full, cut, strict=True) if c and f]
            merged = [rest for (_, rest), c in zip(shapes, cut, strict=True) if c]
            if merged:
                buckets.append(self._cut(tuple(merged)))
            cost = sum(bucket.cost(self.solver, self.sizes) for bucket in buckets)
            if cost < least:
                best, least = buckets, cost
        return best

    def _whole(self, shape: _Class) -> Bucket:
        slots = -(-shape.matrices // self.devices)
        sides = shape.lead, shape.other
        solver, platform = self.solver, self.platform
        return Bucket(
            axes=self.axes,
            devices=self.devices,
            parts=shape.parts,
            lead=shape.lead,
            other=shape.other,
            lead_axes=shape.lead_axes,
            other_axes=shape.other_axes,
            width=1,
            slots=slots,
            form=None if solver is None else solver.form(*sides, self.dtype, platform),
            dtype=self.dtype,
        )

    def _cut(self, shapes: tuple[_Class, ...]) -> Bucket:
        """The cheapest bucket that takes all of these, which have one short side.

        Every matrix first lies along its long side over all devices; a cell takes `piece` of each
        device's share.
        """
        assert self.solver is not None
        shapes = tuple(shape.turned(self.solver) for shape in shapes)
        short = shapes[0].other
        near_square = any(shape.lead < 2 * short for shape in shapes)
        form = self.solver.cut_form(short, self.dtype, self.platform, near_square)
        shares = [self._share(shape) for shape in shapes]
        pieces = {
            -(-own // cells) for own in shares for cells in range(1, min(own, self.devices) + 1)
        }
        best, least = None, math.inf
        for piece in sorted(pieces):
            cells = [-(-own // piece) for own in shares]
            width = next(
                (d for d in range(max(cells), self.devices + 1) if self.devices % d == 0), None
            )
            if width is None:
                continue
            counts = [shape.matrices for shape in shapes]
            total = sum(n * c for n, c in zip(counts, cells, strict=True))
            shared = sum(n for n, c in zip(counts, cells, strict=True) if c > 1)
            rows = max(shared, -(-total // width))
            bucket = Bucket(
                axes=self.axes,
                devices=self.devices,
                parts=tuple(
                    part._replace(cells=c)
                    for shape, c in zip(shapes, cells, strict=True)
                    for part in shape.parts
                ),
                lead=max(shares) if min(cells) == self.devices else piece * self.devices,
                other=short,
                lead_axes=self.axes,
                other_axes=(),
                width=width,
                slots=-(-rows // (self.devices // width)),
                form=form,
                dtype=self.dtype,
                cut=True,
                alignment=sum(map(self._alignment, shapes)),
            )
            cost = bucket.cost(self.solver, self.sizes)
            if cost < least:
                best, least = bucket, cost
        assert best is not None
        return best

    def _share(self, shape: _Class) -> int:
        """A device's share of the long side once that alone is split over all devices."""
        lying = self._product(shape.lead_axes)
        held = -(-shape.lead // lying)
        return -(-held // (self.devices // lying))

    def _alignment(self, shape: _Class) -> int:
        tile = shape.matrices * shape.other * self._share(shape)
        over_short = self._product(shape.other_axes)
        replicas = self.devices // over_short // self._product(shape.lead_axes)
        moved = 2 * tile * replicas if over_short > 1 else 0
        return moved + (tile * replicas if replicas > 1 else 0)

    def _product(self, axes: Axes) -> int:
        size = dict(self.sizes)
        return math.prod(size[axis] for axis in axes)


def _divide(shape: _Class, at: int) -> tuple[_Class, _Class]:
    """The first `at` matrices, and the others."""
    first, second = [], []
    for part in shape.parts:
        here = min(part.matrices, at)
        at -= here
        if here:
            first.append(part._replace(stop=part.start + here))
        if here < part.matrices:
            second.append(part._replace(start=part.start + here))
    return shape._replace(parts=tuple(first)), shape._replace(parts=tuple(second))


def _join(first: _Class, second: _Class) -> _Class:
    parts = list(first.parts)
    for part in second.parts:
        if parts and parts[-1].block == part.block and parts[-1].stop == part.start:
            parts[-1] = parts[-1]._replace(stop=part.stop)
        else:
            parts.append(part)
    return first._replace(parts=tuple(parts))
