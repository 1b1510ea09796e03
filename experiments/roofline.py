"""Estimates a compiled program's time by the roofline model, from its kernels' bytes and FLOPs."""

import dataclasses
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from experiments.compiled import Collective, Kernel, Program
from experiments.report.text import flop, readable
from muon_jax._orthogonalize.devices import DEVICES


@dataclasses.dataclass(frozen=True)
class Chip:
    """The assumptions about a device.

    Attributes:
        name: The name of the device.
        bandwidth: The bandwidth of its memory, in bytes per second.
        flops: The achieved FLOPs per second of bfloat16 products. On a GPU this is less than the
            peak of the data sheet. Float32 products are assumed to take twice as long.
        launch: The additional time of each kernel launch, in seconds.
    """

    name: str
    bandwidth: float
    flops: float
    launch: float

    def seconds(self, kernel: Kernel) -> float:
        """Returns the time of one run: launch, plus the longer of memory traffic and products."""
        products = (kernel.flops + kernel.wide_flops) / self.flops
        return self.launch + max(kernel.hbm_bytes / self.bandwidth, products)

    def total(self, program: Program) -> float:
        """Returns the time of all kernels in sequence, in seconds, without collectives."""
        return sum(kernel.runs * self.seconds(kernel) for kernel in program.kernels)

    def floor(self, flops: float, hbm_bytes: float) -> float:
        """Returns a lower bound of the time for this work, in seconds, whatever its kernels."""
        return max(flops / self.flops, hbm_bytes / self.bandwidth)

    def assumptions(self) -> str:
        """Returns the assumptions as a sentence."""
        launch = f"{1e6 * self.launch:g} µs per launch, " if self.launch else ""
        return (
            f"Roofline of {self.name}: {launch}{self.bandwidth / 1e12:.3g} TB/s, "
            f"{self.flops / 1e12:.4g} TFLOP/s (float32 products at half of it); kernels in "
            "sequence, collectives overlapping with them."
        )


_H100 = DEVICES["gpu"]

# By `device_kind`. On GPUs, products reach about 70 % of the dense bfloat16 peak; `plan` assumes
# the same of the H100. On TPUs, kernels have no launch time and products reach the peak. A device
# of a v4 topology or a TPU7x is half of a chip.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(_H100.name, _H100.bandwidth, _H100.flops, _H100.launch),
        Chip("NVIDIA H200", 4.8e12, _H100.flops, _H100.launch),
        Chip("NVIDIA B200", 7.67e12, 1600e12, _H100.launch),
        Chip("TPU v4", 0.614e12, 137.5e12, 0),
        Chip("TPU v5 lite", 0.819e12, 197e12, 0),
        Chip("TPU v5", 2.765e12, 459e12, 0),
        Chip("TPU v6 lite", 1.64e12, 918e12, 0),
        Chip("TPU7x", 3.69e12, 1154e12, 0),
    )
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated time of one run of a program. `dataclasses.asdict` gives JSON values.

    Attributes:
        kernels: The number of kernel executions.
        hbm_bytes: The bytes that they read and write.
        seconds: The time by the roofline of the chip.
        cycles: The compiler's estimate of cycles; 0 if it gives none, as for GPUs.
        dearest: The ten most expensive kernels, each with the seconds of all its runs.
    """

    kernels: int
    hbm_bytes: int
    seconds: float
    cycles: int
    dearest: tuple[tuple[Kernel, float], ...]

    def figures(self) -> dict[str, str]:
        """Returns the numbers as text, by name."""
        cycles = {"estimated cycles": f"{self.cycles / 1e6:,.2f} M"} if self.cycles else {}
        return {
            "kernels": f"{self.kernels:,}",
            "HBM traffic": readable(self.hbm_bytes),
            "roofline": f"{1e3 * self.seconds:,.3g} ms",
            **cycles,
        }


def estimate(program: Program, device_kind: str) -> Estimate | None:
    """Returns the estimate for devices of this kind; None if `CHIPS` lacks it, as for CPUs."""
    chip = CHIPS.get(device_kind)
    if chip is None:
        return None
    return Estimate(
        kernels=program.kernel_count,
        hbm_bytes=program.hbm_bytes,
        seconds=chip.total(program),
        cycles=program.estimated_cycles,
        dearest=tuple(dearest(program, chip)),
    )


def exchange_text(collective: Collective | None) -> str:
    """Returns bytes and number of collectives as text, such as "1.20 MB in 12 (3 in loops)"."""
    if collective is None:
        return "–"
    parts = []
    if collective.in_loops:
        parts.append(f"{collective.in_loops:,} in loops")
    if collective.beside:
        parts.append(f"{collective.beside:,} overlapped with computation")
    more = f" ({', '.join(parts)})" if parts else ""
    return f"{readable(collective.output_bytes)} in {collective.count:,}{more}"


def print_estimates(estimates: Mapping[str, Estimate], device_kind: str, console: Console) -> None:
    """Prints the assumptions, and the most expensive kernels of each program."""
    console.print(CHIPS[device_kind].assumptions(), highlight=False, soft_wrap=True)
    for name, found in estimates.items():
        console.print(dearest_table(found.dearest, f"Most expensive kernels of {name}"))


def unread_text(unread: Mapping[str, int]) -> str:
    """Returns a sentence on kernels that the FLOPs, and hence the roofline, exclude."""
    kernels = ", ".join(f"{runs:,} × {name}" for name, runs in unread.items())
    return f"FLOPs and roofline exclude {kernels}, whose matrix products could not be read."


def dearest(program: Program, chip: Chip, count: int = 10) -> list[tuple[Kernel, float]]:
    """Returns the kernels with the longest total time, each with its time in seconds.

    Kernels with the same operation, source line and work are merged.
    """
    together: Counter = Counter()
    first: dict[tuple, Kernel] = {}
    for kernel in program.kernels:
        work = (kernel.operation, kernel.source, kernel.flops, kernel.hbm_bytes, kernel.cycles)
        first.setdefault(work, kernel)
        together[work] += kernel.runs
    merged = [dataclasses.replace(first[work], runs=runs) for work, runs in together.items()]
    timed = [(kernel, kernel.runs * chip.seconds(kernel)) for kernel in merged]
    return heapq.nlargest(count, timed, key=lambda pair: pair[1])


def dearest_table(
    found: Sequence[tuple[Kernel, float]], title: str = "Most expensive kernels"
) -> Table:
    """Returns a table with one row for each kernel."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("ms", "runs", "MB per run", "FLOPs per run"):
        table.add_column(heading, justify="right")
    table.add_column("kernel", overflow="fold")
    table.add_column("source", overflow="fold")
    for kernel, seconds in found:
        table.add_row(
            f"{1e3 * seconds:.3f}",
            f"{kernel.runs:,}",
            f"{kernel.hbm_bytes / 1e6:,.2f}",
            flop(kernel.flops or None),
            f"{kernel.name} ({'/'.join(kernel.operation.split('/')[-2:])})",
            kernel.source or "–",
        )
    return table
