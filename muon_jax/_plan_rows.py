"""The result of `plan`: rows and totals, as a table and as JSON."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One row of a `Plan`: a bucket of Muon's matrices, or all leaves with another label.

    Attributes:
        route: The label of the leaves, `"muon"`, `"other"` or `"frozen"`, or `"all"` if `plan` has
            an `optimizer`.
        leaves: The paths of the leaves.
        matrices: The number of matrices on all devices together.
        shape: `(fan_in, fan_out)` of the first matrix; `()` for labels other than `"muon"`.
        form: The form of Newton-Schulz, with its restarts.
        placing: How the matrices are distributed over the devices.
        standard_flops: The FLOPs of the standard form if each matrix is orthogonalised once.
        flops: The FLOPs of all devices together, including padding.
        device_flops: The FLOPs of one device.
        exchanged_bytes: The bytes that one device receives from collectives.
        decomposition_flops: The FLOPs of one device's eigendecompositions, SVDs and QRs, with
            vectors, by textbook counts (9 n³ for an eigendecomposition). `flops` excludes them.
        momentum_bytes: The optimizer state on one device, in bytes.
        working_bytes: The temporary memory of one device, in bytes: the tiles before and after
            orthogonalisation, and the square matrices.
        seconds: The predicted time of one device, including momentum, decay and the step, but not
            the network.
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
    """The result of `plan`. `print` shows it as a table, and `to_dict` prepares it for JSON.

    Attributes:
        rows: One row for each bucket and for each label other than `"muon"`.
        devices: The number of devices of the mesh.
        model_flops: The model's FLOPs for a training step, 6 × active parameters × tokens; `None`
            if the number of tokens is not given.
        assumptions: A sentence that says which hardware the predicted time refers to.
    """

    rows: tuple[PlanRow, ...]
    devices: int
    model_flops: int | None
    assumptions: str = ""

    def total(self, field: str) -> Any:
        """Returns the sum of a field over all rows."""
        if field == "working_bytes":
            warnings.warn(
                'total("working_bytes") is the maximum over rows, not their sum. Use peak().',
                DeprecationWarning,
                stacklevel=2,
            )
            return self.peak()
        return sum(getattr(row, field) for row in self.rows)

    def peak(self) -> int:
        """Returns the largest `working_bytes` of any row, since buckets run one after another."""
        return max((row.working_bytes for row in self.rows), default=0)

    def _totals(self) -> dict[str, Any]:
        fields = [f.name for f in dataclasses.fields(PlanRow) if f.type in (int, float)]
        sums = {name: self.total(name) for name in fields if name != "working_bytes"}
        return sums | {"working_bytes": self.peak()}

    @property
    def overhead(self) -> float | None:
        """Muon's FLOPs as a fraction of the model's."""
        return self.total("flops") / self.model_flops if self.model_flops else None

    def to_dict(self) -> dict[str, Any]:
        """Returns rows and totals as plain numbers and strings."""
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
                f"Newton-Schulz: {_count(self.total('flops'))}FLOP per step, {share:.2f} of the "
                f"standard form's {_count(standard)}FLOP"
            )
        if decomposed := self.total("decomposition_flops"):
            text.append(
                f"Decompositions: {_count(decomposed)}FLOP per step and device, not in FLOPs"
            )
        if self.overhead is not None:
            whose = "The optimizer" if self.rows[0].route == "all" else "Muon"
            text.append(
                f"{whose}'s overhead: {100 * self.overhead:.2f} % of the model's "
                f"{_count(self.model_flops or 0)}FLOP per step"
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
