"""What `plan` tells: rows and totals, as a table and as JSON."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """Leaves that are treated together: a bucket of Muon's, or all of another route.

    Attributes:
        route: `"muon"`, `"other"` or `"frozen"`; of a plan for an `optimizer`, `"all"`.
        leaves: their paths.
        matrices: how many, over all devices.
        shape: `(fan_in, fan_out)` of the first; `()` where the route knows no matrices.
        form: of Newton-Schulz, with its restarts.
        placing: how the matrices are spread over the devices.
        standard_flops: what the standard form takes for the matrices, each of them once.
        flops: of all devices together, padding included.
        device_flops: of one device.
        exchanged_bytes: that collectives bring to one device.
        decomposition_flops: of one device's eigendecompositions, SVDs and QRs, with vectors, by
            textbook counts (9 n³ for an eigendecomposition); `flops` has none of them.
        momentum_bytes: optimizer state of one device.
        working_bytes: of one device: tiles before and after, and the square matrices beside them.
        seconds: that one device is predicted to take, momentum, decay and the step included, the
            network not.
    """

    route: str
    leaves: tuple[str, ...]
    matrices: int = 0
    shape: tuple[int, ...] = ()
    form: str = ""
    placing: str = ""
    standard_flops: int = 0
    flops: int = 0
    device_flops: int = 0
    decomposition_flops: int = 0
    exchanged_bytes: int = 0
    momentum_bytes: int = 0
    working_bytes: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` returns; `print` shows a table, `to_dict` is ready for JSON.

    Attributes:
        rows: of each bucket and each other route.
        devices: of the mesh.
        model_flops: of a training step, 6 × active parameters × tokens; `None` without tokens.
        assumptions: what the time is predicted for, in a sentence.
    """

    rows: tuple[PlanRow, ...]
    devices: int
    model_flops: int | None
    assumptions: str = ""

    def total(self, field: str) -> Any:
        """The sum of a field over rows."""
        if field == "working_bytes":
            warnings.warn(
                'total("working_bytes") is the largest of all rows, and no sum: use peak().',
                DeprecationWarning,
                stacklevel=2,
            )
            return self.peak()
        return sum(getattr(row, field) for row in self.rows)

    def peak(self) -> int:
        """The most working bytes of any row: buckets follow each other."""
        return max((row.working_bytes for row in self.rows), default=0)

    def _totals(self) -> dict[str, Any]:
        fields = [f.name for f in dataclasses.fields(PlanRow) if f.type in (int, float)]
        sums = {name: self.total(name) for name in fields if name != "working_bytes"}
        return sums | {"working_bytes": self.peak()}

    @property
    def overhead(self) -> float | None:
        """Muon's FLOPs as a share of the model's."""
        return self.total("flops") / self.model_flops if self.model_flops else None

    def to_dict(self) -> dict[str, Any]:
        """Rows and totals as plain numbers and strings."""
        return {
            "devices": self.devices,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "total": self._totals(),
            "model_flops": self.model_flops,
            "overhead": self.overhead,
            "assumptions": self.assumptions,
        }

    def __str__(self) -> str:
        memory = ("exchanged", "momentum", "working")

        def figures(of: Callable[[str], Any]) -> list[str]:
            flops = [_count(of(field)) for field in ("flops", "device_flops")]
            held = [_bytes(of(f"{name}_bytes")) for name in memory]
            return [*flops, *held, _duration(of("seconds"))]

        head = ["route", "leaves", "matrices", "form", "placing", "FLOPs", "per device"]
        head += [*memory, "time"]
        lines = [head]
        for row in self.rows:
            shape = " × ".join(map(str, row.shape))
            matrices = f"{row.matrices} × ({shape})" if shape else "-"
            words = [row.route, _leaves(row.leaves), matrices, row.form or "-", row.placing or "-"]
            lines.append(words + figures(functools.partial(getattr, row)))
        devices = f"{self.devices} device{'s' * (self.devices > 1)}"
        total = ["total", "", str(self.total("matrices")), "", devices]
        lines.append(total + figures(self._totals().__getitem__))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        standard = self.total("standard_flops")
        text += ["", self.assumptions]
        if standard:
            share = self.total("flops") / standard
            text.append(
                f"Newton-Schulz: {_count(self.total('flops'))}FLOP a step, {share:.2f} of the "
                f"standard form's {_count(standard)}FLOP"
            )
        if decomposed := self.total("decomposition_flops"):
            text.append(f"Decompositions: {_count(decomposed)}FLOP a step and device, not in FLOPs")
        if self.overhead is not None:
            whose = "The optimizer" if self.rows[0].route == "all" else "Muon"
            text.append(
                f"{whose}'s overhead: {100 * self.overhead:.2f} % of the model's "
                f"{_count(self.model_flops or 0)}FLOP a step"
            )
        return "\n".join(text)


def _leaves(paths: tuple[str, ...]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _count(x: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(x) < 1000 or unit == "P":
            return f"{x:.3g} {unit}" if unit else f"{x:.0f} "
        x /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds else "-"


def _bytes(x: float) -> str:
    return _count(x) + "B"
