"""Counts the iterations of loops in a compiled program, from their start, step and condition."""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from experiments.hlo import Computation, Instruction, root_of

# A loop that has not ended after this number of iterations counts as endless.
MOST_TRIPS = 1_000_000

_COMPARISONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "negate": operator.neg,
    "select": lambda which, yes, no: yes if which else no,
}
# Operations that return the value of their first operand.
_SAME = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier")

# Returns the value of element i of the tuple that a loop passes to its computations.
_State = Callable[[int], int | None]


class UnreadableLoopError(ValueError):
    """The error for a loop whose number of iterations cannot be read from a program's text."""


class Trips:
    """Evaluates the scalar integers of one program, to count the iterations of its loops."""

    def __init__(self, computations: Mapping[str, Computation]) -> None:
        self.computations = computations
        # The callers of each computation. XLA gives every loop, call and branch its own.
        self.callers: dict[str, list[tuple[Instruction, Computation]]] = {}
        for scope in computations.values():
            for it in scope.values():
                for called in it.called():
                    self.callers.setdefault(called, []).append((it, scope))
        self.names = {id(scope): name for name, scope in computations.items()}

    def of(self, loop: Instruction, scope: Computation) -> int:
        """Returns the number of iterations of a `while`.

        Raises:
            UnreadableLoopError: The number depends on data, or on operations that this class does
                not evaluate.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = (self.computations[name] for name in loop.called())
        start = scope[loop.inputs()[0]]
        values: dict[int, int | None] = {}  # known elements in the present iteration
        past: list[dict[int, int | None]] = []  # known elements in earlier iterations

        def element(index: int, trip: int) -> int | None:
            held = past[trip] if trip < len(past) else values
            if index not in held:
                held[index] = (
                    self._element(start, index, scope, None)
                    if trip == 0
                    else self._element(root_of(body), index, body, lambda i: element(i, trip - 1))
                )
            return held[index]

        for trip in range(MOST_TRIPS):
            goes_on = self._value(root_of(condition), condition, lambda i, t=trip: element(i, t))
            if goes_on is None:
                break
            if not goes_on:
                return trip
            past.append(values)
            values = {}
            # Elements known in one iteration are evaluated in the next one too. Otherwise a later
            # request could recurse through all earlier iterations.
            values.update({i: element(i, trip + 1) for i in list(past[-1])})
        raise UnreadableLoopError(
            f"Cannot count the iterations of the loop %{loop.name}: its end depends on data, or "
            "its start, step or bound is not an integer constant. Use a loop with a fixed number "
            "of iterations."
        )

    def _value(self, it: Instruction, scope: Computation, state: _State | None) -> int | None:
        """Returns the value of a scalar, or None if it cannot be evaluated."""
        if it.opcode == "constant":
            text = {"true": "1", "false": "0"}.get(it.operands, it.operands)
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        if it.opcode == "parameter":
            return self._parameter(it, None, scope, state)
        if it.opcode == "get-tuple-element":
            index = int(it.attribute("index"))
            return self._element(scope[it.inputs()[0]], index, scope, state)
        if it.opcode in ("fusion", "call"):
            return self._value_of_call(it, None, scope, state)
        operands = it.inputs()
        if it.opcode in _SAME:
            value = self._value(scope[operands[0]], scope, state)
            return None if value is None else _wrapped(value, it.shape)
        if it.opcode not in ("compare", "not", *_ARITHMETIC):
            return None
        values = [self._value(scope[name], scope, state) for name in operands]
        if None in values:
            return None
        if it.opcode == "compare":
            return int(_COMPARISONS[it.attribute("direction")](*values))
        if it.opcode == "not":
            return int(not values[0]) if it.shape.startswith("pred") else ~values[0]
        return _wrapped(_ARITHMETIC[it.opcode](*values), it.shape)

    def _element(
        self, it: Instruction, index: int, scope: Computation, state: _State | None
    ) -> int | None:
        """Returns the value of element `index` of a tuple, or None."""
        if it.opcode == "tuple":
            return self._value(scope[it.inputs()[index]], scope, state)
        if it.opcode == "parameter":
            return self._parameter(it, index, scope, state)
        if it.opcode == "while" and self._unchanged(it, index):
            return self._element(scope[it.inputs()[0]], index, scope, state)
        if it.opcode in ("fusion", "call"):
            return self._value_of_call(it, index, scope, state)
        if it.opcode in _SAME:
            return self._element(scope[it.inputs()[0]], index, scope, state)
        return None

    def _value_of_call(
        self, it: Instruction, index: int | None, scope: Computation, state: _State | None
    ) -> int | None:
        """Returns the value of a fusion or call, or of element `index` of its result."""
        inner = self.computations[it.called()[0]]
        given = [scope[name] for name in it.inputs()]

        def follow(parameter: int) -> int | None:
            return self._value(given[parameter], scope, state)

        root = root_of(inner)
        if index is not None:
            if root.opcode != "tuple":
                return None
            root = inner[root.inputs()[index]]
        return self._inside(root, inner, follow)

    def _inside(self, it: Instruction, scope: Computation, follow: _State) -> int | None:
        """Returns `_value` in a fusion. `follow` returns the value of a parameter by its number."""
        frame = {
            name: inner
            if inner.opcode != "parameter"
            else inner._replace(opcode="constant", operands=str(follow(int(inner.operands))))
            for name, inner in scope.items()
            if name in _needed(it, scope)
        }
        return self._value(frame.get(it.name, it), frame, None)

    def _parameter(
        self, it: Instruction, index: int | None, scope: Computation, state: _State | None
    ) -> int | None:
        """Returns the value of a parameter, or of its element, if all callers pass the same."""
        if state is not None and index is not None:
            return state(index)
        found = set()
        for caller, outside in self.callers.get(self.names.get(id(scope), ""), []):
            operand = outside[caller.inputs()[self._place(caller, it, scope)]]
            if index is None:
                found.add(self._value(operand, outside, None))
            elif caller.opcode != "while" or self._unchanged(caller, index):
                found.add(self._element(operand, index, outside, None))
            else:
                return None
        return found.pop() if len(found) == 1 else None

    def _place(self, caller: Instruction, it: Instruction, scope: Computation) -> int:
        """Returns the index of the caller's operand. A conditional's first selects the branch."""
        if caller.opcode == "conditional":
            return 1 + caller.called().index(self.names[id(scope)])
        return int(it.operands)

    def _unchanged(self, loop: Instruction, index: int) -> bool:
        """Returns whether every iteration of a loop leaves this element unchanged."""
        body = self.computations[loop.attribute("body")]
        root = root_of(body)
        if root.opcode != "tuple":
            return False
        it = body[root.inputs()[index]]
        while it.opcode in _SAME:
            it = body[it.inputs()[0]]
        return (
            it.opcode == "get-tuple-element"
            and int(it.attribute("index")) == index
            and body[it.inputs()[0]].opcode == "parameter"
        )


def _needed(it: Instruction, scope: Computation) -> set[str]:
    """Returns the names of an instruction and of all instructions that it depends on."""
    found: set[str] = set()
    ahead: list[Any] = [it.name]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += scope[name].inputs()
    return found


def _wrapped(value: int, shape: str) -> int:
    """Returns a value wrapped around to the range of an integer dtype, as on overflow.

    >>> _wrapped(130, "s8[]"), _wrapped(-1, "u32[]")
    (-126, 4294967295)
    """
    kind = re.match(r"([su])(\d+)\[", shape)
    if kind is None:
        return value
    bits = int(kind[2])
    value %= 1 << bits
    return value - (1 << bits) if kind[1] == "s" and value >> (bits - 1) else value
