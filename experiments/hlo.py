"""Parses the text of a compiled XLA program into computations, instructions and shapes."""

import math
import os
import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction, from one line: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    root: bool = False

    def inputs(self) -> list[str]:
        """Returns the names of the operands."""
        return re.findall(r"%([\w.-]+)", self.operands)

    def attribute(self, name: str) -> str:
        """Returns the value of `name=` without quotes, braces or %; empty if there is none."""
        found = re.search(rf'\b{name}=(?:\{{([^}}]*)\}}|"([^"]*)"|%?([^\s,]+))', self.attributes)
        return "".join(group or "" for group in found.groups()) if found else ""

    def called(self) -> list[str]:
        """Returns the names of computations that it runs, except those of reductions and sorts."""
        if self.opcode == "while":
            return [self.attribute("condition"), self.attribute("body")]
        if self.opcode == "conditional":
            names = re.findall(r"%([\w.-]+)", self.attribute("branch_computations"))
            return names or [
                self.attribute("true_computation"),
                self.attribute("false_computation"),
            ]
        if self.opcode in ("fusion", "call", "async-start"):
            return [self.attribute("calls") or self.attribute("to_apply")]
        return []


# Instructions by name, in the order of execution if the program is scheduled.
Computation = dict[str, Instruction]


class Text(NamedTuple):
    """A parsed program.

    Attributes:
        computations: The computations by name.
        entry: The name of the entry computation.
        frames: The places in the source, such as `model.py:12 attend`, by number of stack frame.
    """

    computations: dict[str, Computation]
    entry: str
    frames: dict[str, str]


def parse(text: str) -> Text:
    """Parses the text of a program."""
    computations: dict[str, Computation] = {}
    entry, scope = "", None
    text = re.sub(r'\{\n(".*")\n\}', r"{\1}", text)  # joins a kernel's metadata to its line
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line)
        if head:
            scope = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            scope = None
        elif scope is not None:
            it = parse_line(line)
            scope[it.name] = it
    return Text(computations, entry, _frames(text.partition("\n%")[0]))


def parse_line(line: str) -> Instruction:
    """Parses the line of an instruction.

    >>> parse_line("  ROOT %a.1 = (f32[2]{0:T(128)}, /*index=1*/u32[]) f-done(%b), x=1")[:4]
    ('a.1', '(f32[2]{0:T(128)}, u32[])', 'f-done', '%b')
    """
    line = re.sub(r"/\*.*?\*/", "", line).strip()
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    end = _closing(rest, opening)
    operands = rest[opening + 1 : end - 1]
    root = line.startswith("ROOT ")
    return Instruction(name.removeprefix("%"), shape, rest[:opening], operands, rest[end:], root)


def _closing(text: str, opening: int) -> int:
    """Returns the position after the bracket that closes the one at `opening`."""
    depth = 0
    for bracket in re.finditer(r"[()]", text[opening:]):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return opening + bracket.end()
    raise ValueError(f"Unbalanced parentheses in {text[:80]!r}.")


def _frames(head: str) -> dict[str, str]:
    """Returns the places of stack frames, from the tables before the computations."""
    tables: dict[str, dict[str, str]] = {}
    rows: dict[str, str] = {}
    for line in head.splitlines():
        if re.fullmatch(r"[A-Z]\w+", line):
            rows = tables.setdefault(line, {})
        elif row := re.match(r"(\d+) (.*)", line):
            rows[row[1]] = row[2]
    places = {}
    for frame, row in tables.get("StackFrames", {}).items():
        location = _fields(tables["FileLocations"][_fields(row)["file_location_id"]])
        file = tables["FileNames"][location["file_name_id"]].strip('"')
        function = tables["FunctionNames"][location["function_name_id"]].strip('"')
        places[frame] = f"{os.path.basename(file)}:{location['line']} {function.split('.')[-1]}"
    return places


def _fields(row: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\d+)", row))


def root_of(scope: Computation) -> Instruction:
    """Returns the instruction whose value a computation returns."""
    return next((it for it in scope.values() if it.root), [*scope.values()][-1])


def size_in_bytes(shape: str, on_chip: bool = True) -> int:
    """Returns the size of an array or a tuple of arrays, without the padding of its layout.

    Args:
        shape: The shape, as XLA writes it.
        on_chip: Whether to include arrays in on-chip memory of a TPU, outside its HBM.

    >>> size_in_bytes("(bf16[64,8]{1,0:T(8,128)(2,1)}, s4[6]{0}, pred[])")
    1028
    >>> size_in_bytes("(bf16[64,8]{1,0:T(8,128)(2,1)S(1)}, f32[6]{0})", on_chip=False)
    24
    """
    bits = 0
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape):
        if not on_chip and re.search(r"T\(.*S\([1-9]", layout):
            continue
        width = re.search(r"\d+", dtype)
        bits += math.prod(integers(dims)) * (int(width[0]) if width else 8 * (dtype == "pred"))
    return bits // 8


def dimensions(shape: str) -> list[int]:
    """Returns the dimensions of an array, or of the first array of a tuple."""
    return integers(shape[shape.index("[") + 1 : shape.index("]")])


def integers(text: str) -> list[int]:
    """Returns the integers of a text such as 1,2,3."""
    return [int(x) for x in text.split(",") if x]
