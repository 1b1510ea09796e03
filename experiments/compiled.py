"""Reads FLOPs, kernels, collectives and memory from the text of a compiled XLA program.

`compiled.cost_analysis()` counts the body of a while loop only once and omits collectives; the text
of the program has both. All numbers are for one device.
"""

import dataclasses
import re
from collections import Counter
from typing import Any

from experiments.hlo import Computation, Instruction, Text, parse, root_of, size_in_bytes
from experiments.products import convolution_flops, dot_flops, library_flops
from experiments.trips import Trips

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind.

    Attributes:
        count: The number of executions; a collective in a loop counts once per iteration.
        in_loops: The number of these executions that are in a loop.
        output_bytes: The bytes that they write on a device. For an all-gather or all-to-all over 16
            devices, one sixteenth of these were on the device already.
        operand_bytes: The bytes that they read on a device.
        beside: The number of collectives that overlap with kernels, which run between the start and
            the end of the collective.
    """

    count: int = 0
    in_loops: int = 0
    output_bytes: int = 0
    operand_bytes: int = 0
    beside: int = 0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel: one launch on a GPU, elsewhere one unit of the compiler's schedule.

    Attributes:
        name: XLA's name of the kernel.
        runs: The number of executions; a kernel in a loop runs once per iteration.
        flops: The FLOPs of its matrix products in one run.
        wide_flops: The part of `flops` in products of float32 or wider operands.
        hbm_bytes: The bytes that one run reads and writes: its operands and outputs. Of an array
            that it only slices or updates in place, only the slice counts.
        cycles: The compiler's estimate for one run; 0 if it gives none, as for GPUs.
        operation: The JAX operation, such as `jit(step)/while/body/dot_general`.
        source: The place in the source, such as `model.py:12 attend`; empty if it is unknown.
    """

    name: str
    runs: int = 1
    flops: int = 0
    wide_flops: int = 0
    hbm_bytes: int = 0
    cycles: int = 0
    operation: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """The cost of one run of a program on one device.

    Attributes:
        flops: The FLOPs of the matrix products, two for each multiply-add. For a custom kernel that
            declares its FLOPs, the declared number.
        collectives: The collectives by XLA's name of their kind. Kinds that do not occur are
            omitted.
        temp_bytes: The memory that the program allocates besides arguments and outputs.
        argument_bytes: The bytes of all arguments.
        output_bytes: The bytes of all outputs, including those in the memory of donated arguments.
        unread: The number of runs of other custom calls that may hold matrix products, which
            `flops` excludes. The keys are their targets, or names for kernels of a TPU.
        kernels: All kernels except collectives, in the order of the program.
    """

    flops: int
    collectives: dict[str, Collective]
    temp_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    unread: dict[str, int] = dataclasses.field(default_factory=dict)
    kernels: tuple[Kernel, ...] = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def kernel_count(self) -> int:
        """The number of kernel executions."""
        return sum(kernel.runs for kernel in self.kernels)

    @property
    def hbm_bytes(self) -> int:
        """The bytes that all kernels read and write."""
        return sum(kernel.runs * kernel.hbm_bytes for kernel in self.kernels)

    @property
    def estimated_cycles(self) -> int:
        """The compiler's estimate for all kernels in sequence; 0 except on TPUs."""
        return sum(kernel.runs * kernel.cycles for kernel in self.kernels)

    @property
    def exchanged_bytes(self) -> int:
        """The output bytes of all collectives."""
        return sum(collective.output_bytes for collective in self.collectives.values())

    @property
    def in_loops(self) -> int:
        """The number of collectives that run in loops."""
        return sum(collective.in_loops for collective in self.collectives.values())


def measure(compiled: Any) -> Program:
    """Returns the cost of a program that `jax.jit(f).lower(...).compile()` returned.

    The body of a loop counts once per iteration, and a conditional as its most expensive branch.

    Raises:
        UnreadableLoopError: The number of iterations of a loop cannot be read from the program.
        UnreadableProductError: The program has a matrix product of an unsupported kind.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((8, 32), jnp.float32)
        >>> measure(jax.jit(lambda x: x @ x.T).lower(x).compile()).flops
        4096
    """
    memory = compiled.memory_analysis()
    return dataclasses.replace(
        read(compiled.as_text()),
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
    )


def read(text: str) -> Program:
    """Returns the cost of a program from its text, which lacks the sizes of its memory."""
    program = parse(text)
    cost = _Reader(program).cost(program.entry)
    fields = [field.name for field in dataclasses.fields(Collective)]
    collectives = {
        kind: Collective(*(cost.sums[kind, field] for field in fields))
        for kind in KINDS
        if cost.sums[kind, "count"]
    }
    unread = {key[1]: runs for key, runs in cost.sums.items() if key[0] == "unread"}
    return Program(
        cost.flops, collectives, unread=dict(sorted(unread.items())), kernels=tuple(cost.kernels)
    )


# Instructions that do no work on a device, or whose work is counted at their start.
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"}
    | {"after-all", "add-dependency", "partition-id", "replica-id", "get-dimension-size"}
    | {"async-update"}
)
# Matrix products that are not supported, since no program has had one yet.
_UNREAD = frozenset({"ragged-dot", "scaled-dot"})


class UnreadableProductError(ValueError):
    """The error for a matrix product whose FLOPs cannot be read from a program's text."""


@dataclasses.dataclass
class _Cost:
    """The cost of a part of a program.

    Attributes:
        kernels: The kernels, in program order.
        sums: Totals by the keys (kind of collective, field of Collective) and ("unread", target).
    """

    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    sums: Counter = dataclasses.field(default_factory=Counter)

    @property
    def flops(self) -> int:
        return sum(kernel.runs * kernel.flops for kernel in self.kernels)

    def add(self, other: "_Cost") -> None:
        self.kernels += other.kernels
        self.sums.update(other.sums)

    def repeated(self, trips: int) -> "_Cost":
        """Returns the cost of a loop with this body."""
        if trips == 0:
            return _Cost()
        sums = Counter({key: trips * n for key, n in self.sums.items()})
        for kind in KINDS:
            if (kind, "count") in sums:
                sums[kind, "in_loops"] = sums[kind, "count"]
        kernels = [dataclasses.replace(k, runs=trips * k.runs) for k in self.kernels]
        return _Cost(kernels, sums)

    def dearness(self) -> tuple[int, int, int]:
        """Returns the key by which the branches of a conditional are compared."""
        exchanged = sum(self.sums[kind, "output_bytes"] for kind in KINDS)
        return self.flops, exchanged, sum(k.runs * k.hbm_bytes for k in self.kernels)


class _Reader:
    """Adds up the cost of a program, one computation after the other."""

    def __init__(self, program: Text) -> None:
        self.computations = program.computations
        self.frames = program.frames
        self.trips = Trips(program.computations)
        # On TPUs several fusions may share one asynchronous collective; its channel counts once.
        self.channels: set[str] = set()

    def cost(self, name: str) -> _Cost:
        """Returns the cost of one call of a computation that is not the body of a fusion."""
        scope, total = self.computations[name], _Cost()
        begun: dict[str, tuple[int, _Cost]] = {}  # number of kernels before it, and its own cost
        for it in scope.values():
            part = self._cost_of(it, scope)
            begun[it.name] = len(total.kernels), part
            total.add(part)
            if it.opcode.endswith("-done"):
                start = scope[it.inputs()[0]]
                while start.opcode == "async-update":
                    start = scope[start.inputs()[0]]
                before, started = begun[start.name]
                if len(total.kernels) > before + len(started.kernels):
                    pair = started if it.opcode == "async-done" else part
                    for kind in KINDS:
                        total.sums[kind, "beside"] += pair.sums[kind, "count"]
        return total

    def _cost_of(self, it: Instruction, scope: Computation) -> _Cost:
        kind = it.opcode.removesuffix("-done")
        # A collective is counted at its end, all else at its start.
        begins = it.opcode.removesuffix("-start") in KINDS
        if it.opcode in _FREE or (kind not in KINDS and (begins or it.opcode.endswith("-done"))):
            return _Cost()
        if it.opcode == "while":
            return self.cost(it.attribute("body")).repeated(self.trips.of(it, scope))
        if it.opcode == "conditional":
            return max((self.cost(name) for name in it.called()), key=_Cost.dearness)
        if it.opcode in ("call", "async-start"):
            return self.cost(it.called()[0])
        if kind in KINDS:  # a synchronous collective, or the end of an asynchronous one
            begin = it if it.opcode == kind else scope[it.inputs()[0]]
            return _Cost(sums=_collective(kind, begin, it, scope))
        if it.opcode == "fusion" and it.called()[0].startswith("all-reduce-scatter"):
            return _Cost(sums=_collective("reduce-scatter", it, it, scope))  # as TPUs express it
        sums: Counter = Counter()
        flops, wide = self._flops(it, scope, sums)
        if not flops and any(key[0] in KINDS for key in sums):
            return _Cost(sums=sums)
        cycles = re.search(r'"estimated_cycles":"(\d{1,15})"', it.attributes)
        frame = re.search(r"stack_frame_id=(\d+)", it.attributes)
        kernel = Kernel(
            it.name,
            flops=flops,
            wide_flops=wide,
            hbm_bytes=_traffic(it, scope, self.computations),
            cycles=int(cycles[1]) if cycles else 0,
            operation=it.attribute("op_name"),
            source=self.frames.get(frame[1], "") if frame else "",
        )
        return _Cost([kernel], sums)

    def _flops(self, it: Instruction, scope: Computation, sums: Counter) -> tuple[int, int]:
        """Returns the FLOPs and the wide FLOPs of a kernel; adds its other costs to `sums`."""
        flops = 0
        if it.opcode == "dot":
            flops = dot_flops(it, scope)
        elif it.opcode == "convolution":
            flops = convolution_flops(it, scope)
        elif it.opcode in _UNREAD:
            raise UnreadableProductError(
                f"%{it.name} is a {it.opcode}, an operation whose FLOPs cannot be counted. Add it "
                "to experiments.products."
            )
        elif it.opcode == "custom-call":
            flops = _call_flops(it, scope, sums)
        elif it.opcode in ("fusion", "call", "async-start"):
            inner = self.computations[it.called()[0]]
            found = [self._flops(part, inner, sums) for part in inner.values()]
            return sum(f for f, _ in found), sum(w for _, w in found)
        elif it.opcode in KINDS and it.attribute("channel_id") not in self.channels:
            self.channels |= {it.attribute("channel_id")} - {""}
            sums.update(_collective(it.opcode, it, it, scope))
            sums[it.opcode, "beside"] += 1
        if not flops:
            return 0, 0
        wide = re.match(r"[(]?[fc](32|64|128)", scope[it.inputs()[0]].shape)
        return flops, flops if wide else 0


def _collective(kind: str, begin: Instruction, end: Instruction, scope: Computation) -> Counter:
    operands = sum(size_in_bytes(scope[name].shape) for name in begin.inputs())
    return Counter(
        {
            (kind, "count"): 1,
            (kind, "output_bytes"): size_in_bytes(end.shape),
            (kind, "operand_bytes"): operands,
        }
    )


def _call_flops(it: Instruction, scope: Computation, sums: Counter) -> int:
    # The FLOPs that a Pallas kernel declares: its cost estimate on TPUs, its metadata on GPUs.
    told = re.search(
        r'"cost_estimate":\{"flops":"(\d+)"|\\22flops\\22: \\22(\d+)\\22', it.attributes
    )
    if told:
        return int(told[1] or told[2])
    target = it.attribute("custom_call_target")
    flops = library_flops(it, scope) if target.startswith(("__cublas", "__cudnn")) else None
    if flops is not None:
        return flops
    if target == "tpu_custom_call":
        sums["unread", re.sub(r"[.\d]+$", "", it.name)] += 1
    elif re.search("gemm|matmul|dot|conv|triton|cudnn", target):
        sums["unread", target] += 1
    return 0


def _traffic(it: Instruction, scope: Computation, computations: dict[str, Computation]) -> int:
    """Returns the bytes of HBM that one run of a kernel reads and writes."""

    def size(name: str) -> int:
        return size_in_bytes(scope[name].shape, on_chip=False)

    inputs = it.inputs()
    written = size_in_bytes(it.shape, on_chip=False)
    if it.opcode == "copy-start":
        return written  # the size of its operand and its copy
    if it.opcode in ("slice-start", "dynamic-slice-start"):  # operands, slice and context
        part = re.search(r"\), (\w+\[[\d,]*\](?:\{[^}]*\})?)", it.shape)[1]
        return size_in_bytes(part) + size_in_bytes(part, on_chip=False)
    if it.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if it.opcode == "dynamic-update-slice":
        return 2 * size(inputs[1])
    if it.opcode == "custom-call" and it.attribute("custom_call_target").startswith("__cublas"):
        arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", it.shape)
        written = sum(size_in_bytes(a) for a in arrays if not a.startswith("s8["))  # workspace
    if it.opcode != "fusion":
        return written + sum(size(name) for name in dict.fromkeys(inputs))
    inner = computations[it.called()[0]]
    read = {}
    for parameter in (p for p in inner.values() if p.opcode == "parameter"):
        name = inputs[int(parameter.operands)]
        taken = min(size(name), _taken(parameter, inner, size_in_bytes(parameter.shape)))
        read[name] = max(taken, read.get(name, 0))
    root = root_of(inner)
    outputs = [inner[name] for name in root.inputs()] if root.opcode == "tuple" else [root]
    for output in outputs:
        while output.opcode in ("bitcast", "copy", "convert") and output.inputs():
            output = inner[output.inputs()[0]]
        if output.opcode == "dynamic-update-slice":  # in place
            update = inner[output.inputs()[1]].shape
            written += min(0, size_in_bytes(update) - size_in_bytes(output.shape))
    return max(written, 0) + sum(read.values())


def _taken(it: Instruction, inner: Computation, whole: int) -> int:
    """Returns the bytes of `it` that a fusion reads: all, or the slices if it only slices it."""
    total = 0
    for user in inner.values():
        if it.name not in user.inputs():
            continue
        if user.opcode == "bitcast":
            total += _taken(user, inner, whole)
        elif user.inputs()[0] == it.name and user.opcode in ("dynamic-slice", "slice", "gather"):
            total += size_in_bytes(user.shape)
        elif user.inputs()[0] != it.name or user.opcode != "dynamic-update-slice":
            return whole
    return min(total, whole)
