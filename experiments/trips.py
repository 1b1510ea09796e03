"""Counts the iterations of loops in a compiled program, from their start, step and condition."""

import operator
import re
from collections.abc import Callable, Mapping

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

# Returns the value of a parameter, by its number, or of an element of it, by its index.
_Arguments = Callable[[int, int | None], int | None]


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
        if told := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(told[1])
        condition, body = (self.computations[name] for name in loop.called())
        start = scope[loop.inputs()[0]]
        elements: list[dict[int, int | None]] = []  # of the tuple, by iteration and index

        def element(index: int | None, trip: int) -> int | None:
            if index is None:
                return None
            if index not in elements[trip]:
                elements[trip][index] = (
                    self._value(start, scope, None, index)
                    if trip == 0
                    else self._value(root_of(body), body, lambda _, i: element(i, trip - 1), index)
                )
            return elements[trip][index]

        for trip in range(MOST_TRIPS):
            elements.append({})
            # Elements known in one iteration are evaluated in the next one too. Otherwise a later
            # request could recurse through all earlier iterations.
            for index in list(elements[trip - 1]) if trip else ():
                element(index, trip)
            goes_on = self._value(
                root_of(condition), condition, lambda _, i, trip=trip: element(i, trip)
            )
            if goes_on is None:
                break
            if not goes_on:
                return trip
        raise UnreadableLoopError(
            f"Cannot count the iterations of the loop %{loop.name}: its end depends on data, or "
            "its start, step or bound is not an integer constant. Use a loop with a fixed number "
            "of iterations."
        )

    def _value(
        self,
        it: Instruction,
        scope: Computation,
        arguments: _Arguments | None,
        index: int | None = None,
    ) -> int | None:
        """Returns the value of a scalar or of an element of a tuple, or None if it is unknown.

        Args:
            it: The instruction.
            scope: Its computation.
            arguments: The computation's arguments. If None, those of all its callers.
            index: The index of the element.
        """
        operands = it.inputs()
        if it.opcode == "parameter":
            return self._parameter(it, scope, arguments, index)
        if it.opcode in ("fusion", "call"):
            given = [scope[name] for name in operands]
            inner = self.computations[it.called()[0]]
            return self._value(
                root_of(inner),
                inner,
                lambda n, i: self._value(given[n], scope, arguments, i),
                index,
            )
        if it.opcode in _SAME or (it.opcode == "while" and self._unchanged(it, index)):
            value = self._value(scope[operands[0]], scope, arguments, index)
            return None if value is None else _wrapped(value, it.shape)
        if index is not None:
            is_tuple = it.opcode == "tuple"
            return self._value(scope[operands[index]], scope, arguments) if is_tuple else None
        if it.opcode == "get-tuple-element":
            element = int(it.attribute("index"))
            return self._value(scope[operands[0]], scope, arguments, element)
        if it.opcode == "constant":
            text = {"true": "1", "false": "0"}.get(it.operands, it.operands)
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        if it.opcode not in ("compare", "not", *_ARITHMETIC):
            return None
        values = [self._value(scope[name], scope, arguments) for name in operands]
        if None in values:
            return None
        if it.opcode == "compare":
            return int(_COMPARISONS[it.attribute("direction")](*values))
        if it.opcode == "not":
            return int(not values[0]) if it.shape.startswith("pred") else ~values[0]
        return _wrapped(_ARITHMETIC[it.opcode](*values), it.shape)

    def _parameter(
        self, it: Instruction, scope: Computation, arguments: _Arguments | None, index: int | None
    ) -> int | None:
        """Returns the value of a parameter, or of its element, if all callers pass the same."""
        place = int(it.operands)
        if arguments is not None:
            return arguments(place, index)
        found, name = set(), self.names[id(scope)]
        for caller, outside in self.callers.get(name, []):
            if caller.opcode == "while" and not self._unchanged(caller, index):
                return None
            # The first operand of a conditional selects the branch.
            branch = caller.opcode == "conditional"
            operand = caller.inputs()[1 + caller.called().index(name) if branch else place]
            found.add(self._value(outside[operand], outside, None, index))
        return found.pop() if len(found) == 1 else None

    def _unchanged(self, loop: Instruction, index: int | None) -> bool:
        """Returns whether every iteration of a loop leaves this element unchanged."""
        body = self.computations[loop.attribute("body")]
        root = root_of(body)
        if root.opcode != "tuple" or index is None:
            return False
        it = body[root.inputs()[index]]
        while it.opcode in _SAME:
            it = body[it.inputs()[0]]
        return (
            it.opcode == "get-tuple-element"
            and int(it.attribute("index")) == index
            and body[it.inputs()[0]].opcode == "parameter"
        )


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
