"""Decides which device orthogonalises which matrix, from the shapes and the mesh."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from muon_jax._orthogonalize.devices import device_of
from muon_jax._orthogonalize.forms import Form
from muon_jax._orthogonalize.newton_schulz import SMALL, NewtonSchulz
from muon_jax._sharding.buckets import Axes, Bucket, Sizes, Span, Stack, by_call, call_seconds

# Up to this many shapes, all choices of which ones to split are compared.
_EXHAUSTIVE = 8

# A GPU takes 2 µs to launch a kernel, and a TPU takes time to fill and empty its matrix units.
# Matrices of several leaves are therefore copied into one call, until a product takes this many
# FLOPs, 0.2 ms on an H100. A CPU is as fast without.
_STACK_FLOPS = 2**37


@functools.lru_cache(maxsize=256)
def plan_buckets(
    stacks: tuple[Stack, ...], sizes: Sizes, newton_schulz: NewtonSchulz | None, platform: str
) -> tuple[Bucket, ...]:
    """Returns the buckets of these stacks, one for each array, on a mesh with axes of these sizes.

    `newton_schulz` is the orthogonalizer if it is Newton-Schulz, whose FLOPs are known and which
    can split matrices into tiles. `None` means any other orthogonalizer; matrices then stay whole
    and keep their orientation.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    whole: list[int] = []
    for index, stack in enumerate(stacks):
        axes = tuple(a for a, n in sizes if n > 1 and a not in stack.batch_axes)
        if axes:
            groups[axes, stack.dtype].append(index)
        elif stack.matrices:
            whole.append(index)
    buckets = _local(stacks, whole, newton_schulz, platform)
    for (axes, dtype), members in groups.items():
        buckets += _Assignment(axes, dtype, sizes, newton_schulz, platform).buckets(stacks, members)
    return tuple(buckets)


def _local(
    stacks: Sequence[Stack], whole: Iterable[int], newton_schulz: NewtonSchulz | None, platform: str
) -> list[Bucket]:
    """Returns the buckets of local matrices with the least predicted time for each short side."""
    calls = itertools.count(1)
    same_side: dict[Any, list[int]] = defaultdict(list)
    for index in whole:
        stack = stacks[index]
        same_side[min(stack.fan_in, stack.fan_out), stack.dtype].append(index)
    device = device_of(platform)
    buckets = []
    for members in same_side.values():
        if newton_schulz is None:
            buckets += _in_calls(stacks, members, None, platform, calls)
            continue
        options = [
            _in_calls(stacks, members, choose, platform, calls)
            for choose in _choices([stacks[i] for i in members], newton_schulz, platform)
        ]

        def seconds(option: list[Bucket]) -> float:
            return sum(call_seconds(call, newton_schulz, device) for call in by_call(option))

        least: list[Bucket] = min(options, key=seconds)
        buckets += least
    return buckets


def _choices(
    stacks: Sequence[Stack], newton_schulz: NewtonSchulz, platform: str
) -> list[Callable[[Stack], Form]]:
    """Returns ways to choose a form for each stack, all of which have the same short side.

    The time of few matrices is that of their kernel launches. Shapes that share a call have fewer,
    which the Gram form and a common padded shape allow.
    """

    def by_time(stack: Stack) -> Form:
        return newton_schulz.form(stack.fan_in, stack.fan_out, stack.dtype, platform)

    def by_flops(stack: Stack) -> Form:
        sides = stack.fan_in, stack.fan_out
        return newton_schulz.form(*sides, stack.dtype, platform, by_time=False)

    def padded(stack: Stack) -> Form:
        short = min(stack.fan_in, stack.fan_out)
        return newton_schulz.padded_form(short, longest, stack.dtype)

    longest = max(max(stack.fan_in, stack.fan_out) for stack in stacks)
    may_pad = platform == "gpu" and newton_schulz.method != "gram"
    return [by_time, by_flops, *[padded] * may_pad]


def _in_calls(
    stacks: Sequence[Stack],
    members: Iterable[int],
    choose: Callable[[Stack], Form] | None,
    platform: str,
    calls: Iterator[int],
) -> list[Bucket]:
    """Returns a bucket for each shape in each call, which small matrices of one form may share.

    Only the Gram and the padded form are shared; in the standard form each product depends on the
    shape.
    """
    most = 0 if platform == "cpu" else _STACK_FLOPS
    last: dict[Any, tuple[int, int]] = {}  # the last call of each kind, and the FLOPs left in it
    spans_of: dict[Any, list[Span]] = defaultdict(list)
    for index in members:
        stack = stacks[index]
        m, n = shape = stack.fan_in, stack.fan_out
        form = None if choose is None else choose(stack)
        joins = form is not None and (form.method == "gram" or form.padded > 0)
        shared = joins and min(shape) < SMALL
        alike = min(shape) if shared else shape, form, stack.dtype
        flops = 2 * m * n * min(m, n) * stack.matrices
        call, room = last.get(alike, (0, 0))
        if not call or flops > room:
            call, room = next(calls), most
        last[alike] = call, room - flops
        spans_of[call, m, n, form, stack.dtype].append(Span(index, 0, stack.matrices, False))
    return [
        Bucket(
            axes=(),
            devices=1,
            spans=tuple(spans),
            lead=m,
            other=n,
            slots=sum(span.matrices for span in spans),
            form=form,
            dtype=dtype,
            call=call,
        )
        for (call, m, n, form, dtype), spans in spans_of.items()
    ]


class _Alike(NamedTuple):
    """Matrices of one shape, split over the same mesh axes."""

    lead: int
    other: int
    lead_axes: Axes
    other_axes: Axes
    spans: tuple[Span, ...]

    @property
    def short(self) -> int:
        return min(self.lead, self.other)

    def turned(self, newton_schulz: NewtonSchulz) -> "_Alike":
        """Returns the same with the long side leading, or fan_out for oriented square matrices."""
        if newton_schulz.is_oriented(self.lead, self.other):
            turn = not self.spans[0].flip
        else:
            turn = self.lead < self.other
        if not turn:
            return self
        spans = tuple(span._replace(flip=not span.flip) for span in self.spans)
        return _Alike(self.other, self.lead, self.other_axes, self.lead_axes, spans)

    @property
    def matrices(self) -> int:
        return sum(span.matrices for span in self.spans)


class _Assignment(NamedTuple):
    axes: Axes
    dtype: np.dtype
    sizes: Sizes
    newton_schulz: NewtonSchulz | None
    platform: str

    @property
    def devices(self) -> int:
        return self._product(self.axes)

    def buckets(self, stacks: Sequence[Stack], members: Iterable[int]) -> list[Bucket]:
        """Returns full rounds of whole matrices, and the remainder whole or split, if cheaper."""
        buckets, remainders = [], defaultdict(list)
        for shape in self._group_alike(stacks, members):
            full = shape.matrices - shape.matrices % self.devices
            rounds, remainder = _divide(shape, full)
            if not remainder.spans:
                buckets.append(self._whole(rounds))
            else:
                remainders[shape.short].append((rounds, remainder))
        for shapes in remainders.values():
            buckets += self._place_remainders(shapes)
        return buckets

    def _group_alike(self, stacks: Sequence[Stack], members: Iterable[int]) -> list[_Alike]:
        alike: dict[Any, list[Span]] = defaultdict(list)
        for index in members:
            stack = stacks[index]
            if not stack.matrices:
                continue
            fans = [(stack.fan_in, stack.in_axes), (stack.fan_out, stack.out_axes)]
            (lead, lead_axes), (other, other_axes) = reversed(fans) if stack.flip else fans
            # Orthogonalizers other than Newton-Schulz may treat fan_in and fan_out differently.
            oriented = self.newton_schulz is None or self.newton_schulz.is_oriented(lead, other)
            orientation = stack.flip if oriented else None
            span = Span(index, 0, stack.matrices, stack.flip)
            alike[lead, other, lead_axes, other_axes, orientation].append(span)
        return [
            _Alike(lead, other, lead_axes, other_axes, tuple(spans))
            for (lead, other, lead_axes, other_axes, _), spans in alike.items()
        ]

    def _place_remainders(self, shapes: list[tuple[_Alike, _Alike]]) -> list[Bucket]:
        """Places each `(full rounds, remainder)` with one padded round more, or in tiles."""
        padded = [self._whole(_join(rounds, rest)) for rounds, rest in shapes]
        if self.newton_schulz is None or self.newton_schulz.method == "standard":
            return padded
        full = [self._whole(rounds) if rounds.spans else None for rounds, _ in shapes]
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
            cost = sum(bucket.cost(self.newton_schulz, self.sizes) for bucket in buckets)
            if cost < least:
                best, least = buckets, cost
        return best

    def _whole(self, shape: _Alike) -> Bucket:
        slots = -(-shape.matrices // self.devices)
        sides = shape.lead, shape.other
        form = None
        if self.newton_schulz is not None:
            form = self.newton_schulz.form(*sides, self.dtype, self.platform)
        return Bucket(
            axes=self.axes,
            devices=self.devices,
            spans=shape.spans,
            lead=shape.lead,
            other=shape.other,
            lead_axes=shape.lead_axes,
            other_axes=shape.other_axes,
            slots=slots,
            form=form,
            dtype=self.dtype,
        )

    def _cut(self, shapes: tuple[_Alike, ...]) -> Bucket:
        """Returns the cheapest bucket of tiles for all these matrices, which have one short side.

        Every matrix is first split along its long side over all devices. A tile then consists of
        `piece` rows of each device's share.
        """
        assert self.newton_schulz is not None
        shapes = tuple(shape.turned(self.newton_schulz) for shape in shapes)
        short = shapes[0].other
        near_square = any(shape.lead < 2 * short for shape in shapes)
        form = self.newton_schulz.cut_form(short, self.dtype, self.platform, near_square)
        shares = [self._share(shape) for shape in shapes]
        pieces = {
            -(-own // tiles) for own in shares for tiles in range(1, min(own, self.devices) + 1)
        }
        best, least = None, math.inf
        for piece in sorted(pieces):
            tiles = [-(-own // piece) for own in shares]
            width = next(
                (d for d in range(max(tiles), self.devices + 1) if self.devices % d == 0), None
            )
            if width is None:
                continue
            counts = [shape.matrices for shape in shapes]
            total = sum(n * c for n, c in zip(counts, tiles, strict=True))
            shared = sum(n for n, c in zip(counts, tiles, strict=True) if c > 1)
            rows = max(shared, -(-total // width))
            bucket = Bucket(
                axes=self.axes,
                devices=self.devices,
                spans=tuple(
                    span._replace(tiles=c)
                    for shape, c in zip(shapes, tiles, strict=True)
                    for span in shape.spans
                ),
                lead=max(shares) if min(tiles) == self.devices else piece * self.devices,
                other=short,
                lead_axes=self.axes,
                width=width,
                slots=-(-rows // (self.devices // width)),
                form=form,
                dtype=self.dtype,
                cut=True,
                alignment=sum(map(self._alignment, shapes)),
            )
            cost = bucket.cost(self.newton_schulz, self.sizes)
            if cost < least:
                best, least = bucket, cost
        assert best is not None
        return best

    def _share(self, shape: _Alike) -> int:
        """Returns a device's share of the long side if all devices split that side only."""
        ways = self._product(shape.lead_axes)
        held = -(-shape.lead // ways)
        return -(-held // (self.devices // ways))

    def _alignment(self, shape: _Alike) -> int:
        shard = shape.matrices * shape.other * self._share(shape)
        over_short = self._product(shape.other_axes)
        replicas = self.devices // over_short // self._product(shape.lead_axes)
        moved = 2 * shard * replicas if over_short > 1 else 0
        return moved + (shard * replicas if replicas > 1 else 0)

    def _product(self, axes: Axes) -> int:
        size = dict(self.sizes)
        return math.prod(size[axis] for axis in axes)


def _divide(shape: _Alike, at: int) -> tuple[_Alike, _Alike]:
    """Splits the matrices into the first `at` and the others."""
    first, second = [], []
    for span in shape.spans:
        here = min(span.matrices, at)
        at -= here
        if here:
            first.append(span._replace(stop=span.start + here))
        if here < span.matrices:
            second.append(span._replace(start=span.start + here))
    return shape._replace(spans=tuple(first)), shape._replace(spans=tuple(second))


def _join(first: _Alike, second: _Alike) -> _Alike:
    spans = list(first.spans)
    for span in second.spans:
        if spans and spans[-1].stack == span.stack and spans[-1].stop == span.start:
            spans[-1] = spans[-1]._replace(stop=span.stop)
        else:
            spans.append(span)
    return first._replace(spans=tuple(spans))
