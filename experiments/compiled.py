"""What a compiled XLA program does, read from its text: FLOPs, collectives, memory.

`compiled.cost_analysis()` counts the body of a while loop once and knows no collectives; the
program's own text has both. Every figure is of one device.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import Any, NamedTuple

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
        count: how many run; one inside a loop counts once a trip.
        in_loops: how many of these run inside a loop.
        output_bytes: what they deliver to a device. Of an all-gather or all-to-all over 16 devices
            one sixteenth of it had been there already.
        operand_bytes: what they take from a device.
    """

    count: int = 0
    in_loops: int = 0
    output_bytes: int = 0
    operand_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """What one run of a program costs one device.

    Attributes:
        flops: of the matrix products alone, two for each multiply and add; of a kernel that tells
            its FLOPs, what it tells.
        collectives: by kind, as XLA names them; kinds that do not occur are left out.
        temp_bytes: what the program allocates beside arguments and outputs.
        argument_bytes: of all arguments.
        output_bytes: of all outputs, those that take the place of donated arguments included.
        unread: other custom calls that may hold matrix products, of which `flops` has none: how
            many run, by target or, of a TPU's kernels, by name.
    """

    flops: int
    collectives: dict[str, Collective]
    temp_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    unread: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def exchanged_bytes(self) -> int:
        """Output bytes of all collectives, whatever their kind."""
        return sum(collective.output_bytes for collective in self.collectives.values())

    @property
    def in_loops(self) -> int:
        """How many collectives run inside loops."""
        return sum(collective.in_loops for collective in self.collectives.values())


def measure(compiled: Any) -> Program:
    """Reads what `jax.jit(f).lower(...).compile()` returned.

    Loops count once a trip, a conditional as its dearest branch.

    Raises:
        ValueError: a loop whose number of trips depends on data.

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
    """`measure` of a program's text alone, which does not tell its memory."""
    computations, entry = _parse(text)
    cost = _Reader(computations).cost(entry)
    fields = [field.name for field in dataclasses.fields(Collective)]
    collectives = {
        kind: Collective(*(cost[kind, field] for field in fields))
        for kind in KINDS
        if cost[kind, "count"]
    }
    unread = {key[1]: runs for key, runs in cost.items() if key[0] == "unread"}
    return Program(cost["flops"], collectives, unread=dict(sorted(unread.items())))


class _Instruction(NamedTuple):
    """One line: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str

    def inputs(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.operands)

    def attribute(self, name: str) -> str:
        """The value of `name=`, without quotes, braces or %; empty where there is none."""
        found = re.search(rf'\b{name}=(?:\{{([^}}]*)\}}|"([^"]*)"|%?([^\s,]+))', self.attributes)
        return "".join(group or "" for group in found.groups()) if found else ""


_Computation = dict[str, _Instruction]
# Sums under the keys "flops", (kind of collective, field of Collective) and ("unread", target).
_Cost = Counter


class _Reader:
    """Adds up one program, computation by computation."""

    def __init__(self, computations: dict[str, _Computation]) -> None:
        self.computations = computations
        # A TPU spreads one asynchronous collective over several fusions: one channel, one exchange.
        self.channels: set[str] = set()

    @functools.cache  # noqa: B019 - a reader lives for one program
    def cost(self, name: str, fused: bool = False) -> _Cost:
        """Of one call of a computation, which lies inside a fusion or not."""
        scope, total = self.computations[name], _Cost()
        for it in scope.values():
            total.update(self._cost_of(it, scope, fused))
        return total

    def _cost_of(self, it: _Instruction, scope: _Computation, fused: bool) -> dict[Any, int]:
        kind = it.opcode.removesuffix("-done")
        if it.opcode == "dot":
            return {"flops": _dot_flops(it, scope)}
        if it.opcode == "convolution":
            return {"flops": _convolution_flops(it, scope)}
        if it.opcode == "while":
            trips = self._trips(it)
            body = {key: trips * n for key, n in self.cost(it.attribute("body")).items()}
            return body | {(k, "in_loops"): body[k, "count"] for k in KINDS if (k, "count") in body}
        if it.opcode == "conditional":
            return max((self.cost(name) for name in _branches(it)), key=_dearness)
        if it.opcode in ("fusion", "call", "async-start"):
            called = it.attribute("calls") or it.attribute("to_apply")
            if called.startswith("all-reduce-scatter"):  # how a TPU spells it
                return _collective("reduce-scatter", it, it, scope)
            return self.cost(called, fused or it.opcode == "fusion")
        if it.opcode == "custom-call":
            return _kernel(it)
        if kind in KINDS:  # a whole one, or the end of a pair
            channel = it.attribute("channel_id")
            if fused and channel in self.channels:
                return {}
            if fused and channel:
                self.channels.add(channel)
            begin = it if it.opcode == kind else scope[it.inputs()[0]]
            return _collective(kind, begin, it, scope)
        return {}

    def _trips(self, loop: _Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # XLA for TPUs drops it; JAX's counted loops go from 0 up to a constant.
        condition = self.computations[loop.attribute("condition")]
        for it in condition.values():
            if it.opcode == "compare" and it.attribute("direction") == "LT":
                index, limit = (condition[name] for name in it.inputs())
                if index.opcode == "get-tuple-element" and limit.opcode == "constant":
                    return int(limit.operands)
        raise ValueError(
            f"The loop %{loop.name} ends when its data say so, so its cost is unknown. Measure one "
            "with a fixed number of trips."
        )


def _collective(
    kind: str, begin: _Instruction, end: _Instruction, scope: _Computation
) -> dict[Any, int]:
    return {
        (kind, "count"): 1,
        (kind, "output_bytes"): _bytes(end.shape),
        (kind, "operand_bytes"): sum(_bytes(scope[name].shape) for name in begin.inputs()),
    }


def _kernel(it: _Instruction) -> dict[Any, int]:
    told = re.search(r'"cost_estimate":\{"flops":"(\d+)"', it.attributes)
    if told:
        return {"flops": int(told[1])}
    target = it.attribute("custom_call_target")
    if target == "tpu_custom_call":
        return {("unread", re.sub(r"[.\d]+$", "", it.name)): 1}
    return {("unread", target): 1} if re.search("gemm|matmul|dot|conv|triton", target) else {}


def _branches(it: _Instruction) -> list[str]:
    names = re.findall(r"%([\w.-]+)", it.attribute("branch_computations"))
    return names or [it.attribute("true_computation"), it.attribute("false_computation")]


def _dearness(cost: _Cost) -> tuple[int, int]:
    return cost["flops"], sum(cost[kind, "output_bytes"] for kind in KINDS)


def _dot_flops(it: _Instruction, scope: _Computation) -> int:
    lhs = _dims(scope[it.inputs()[0]].shape)
    contracted = _ints(it.attribute("lhs_contracting_dims"))
    return 2 * math.prod(_dims(it.shape)) * math.prod(lhs[axis] for axis in contracted)


def _convolution_flops(it: _Instruction, scope: _Computation) -> int:
    """A TPU's matrix products are convolutions.

    The batch of a batched one is a spatial axis, spread by dilation (`window={size=64 stride=63
    lhs_dilate=64}`) until a window meets one matrix and otherwise holes, which cost nothing.
    """
    lhs_labels, rhs_labels, out_labels = re.split("_|->", it.attribute("dim_labels"))
    lhs, rhs = (_dims(scope[name].shape) for name in it.inputs()[:2])
    out = _dims(it.shape)
    flops = 2 * rhs[rhs_labels.index("i")] * out[out_labels.index("b")] * out[out_labels.index("f")]
    window = dict(re.findall(r"(\w+)=(\S+)", it.attribute("window")))
    for axis, size in enumerate(window["size"].split("x") if window else ()):

        def of(name: str, default: str, axis: int = axis) -> str:
            return window[name].split("x")[axis] if name in window else default

        flops *= _products(
            places=out[out_labels.index(str(axis))],
            size=int(size),
            elements=lhs[lhs_labels.index(str(axis))],
            stride=int(of("stride", "1")),
            low=int(of("pad", "0_0").split("_")[0]),
            element_step=int(of("lhs_dilate", "1")),
            window_step=int(of("rhs_dilate", "1")),
        )
    return flops


def _products(
    *, places: int, size: int, elements: int, stride: int, low: int, element_step: int, window_step
) -> int:
    """Pairs (place of the window, place in it) that meet an element: no padding, no hole.

    >>> batch = {"places": 64, "size": 64, "elements": 64, "stride": 63, "element_step": 64}
    >>> _products(**batch, low=0, window_step=1)
    64
    """
    met = range(0, elements * element_step, element_step)
    return sum(
        place * stride + inside * window_step - low in met
        for place in range(places)
        for inside in range(size)
    )


def _bytes(shape: str) -> int:
    """Of an array or a tuple of arrays, without the padding of its layout.

    >>> _bytes("(bf16[64,8]{1,0:T(8,128)(2,1)}, s4[6]{0}, pred[])")
    1028
    """
    bits = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        width = re.search(r"\d+", dtype)
        bits += math.prod(_ints(dims)) * (int(width[0]) if width else 8 * (dtype == "pred"))
    return bits // 8


def _dims(shape: str) -> list[int]:
    return _ints(shape[shape.index("[") + 1 : shape.index("]")])


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, each its instructions by name; and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry, scope = "", None
    text = re.sub(r'\{\n(".*")\n\}', r"{\1}", text)  # metadata of kernels, in lines of their own
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line)
        if head:
            scope = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            scope = None
        elif scope is not None:
            it = _parse_line(line)
            scope[it.name] = it
    return computations, entry


def _parse_line(line: str) -> _Instruction:
    """
    >>> _parse_line("  ROOT %a.1 = (f32[2]{0:T(128)}, /*index=1*/u32[]) f-done(%b), x=1")[:4]
    ('a.1', '(f32[2]{0:T(128)}, u32[])', 'f-done', '%b')
    """
    line = re.sub(r"/\*.*?\*/", "", line).strip().removeprefix("ROOT ")
    name, rest = line.split(" = ", 1)
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    end = _closing(rest, opening)
    operands = rest[opening + 1 : end - 1]
    return _Instruction(name.removeprefix("%"), shape, rest[:opening], operands, rest[end:])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there has closed."""
    depth = 0
    for bracket in re.finditer(r"[()]", text[opening:]):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return opening + bracket.end()
    raise ValueError(f"Unbalanced parentheses in {text[:80]!r}.")
