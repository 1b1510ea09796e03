"""What a compiled program takes, and how long at best: from its kernels' bytes and FLOPs."""

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
    """What is assumed of a device.

    Attributes:
        name: of the device.
        bandwidth: of its memory, in bytes a second.
        flops: a second, of bfloat16 products as they reach it, which is less than the data sheet's
            peak on a GPU; float32 products are taken to need twice as long.
        launch: seconds that each kernel takes beside.
    """

    name: str
    bandwidth: float
    flops: float
    launch: float

    def seconds(self, kernel: Kernel) -> float:
        """Of one run: its launch, and the longer of its traffic and its products."""
        products = (kernel.flops + kernel.wide_flops) / self.flops
        return self.launch + max(kernel.hbm_bytes / self.bandwidth, products)

    def total(self, program: Program) -> float:
        """Seconds of all kernels, one after another; collectives take none."""
        return sum(kernel.runs * self.seconds(kernel) for kernel in program.kernels)

    def floor(self, flops: float, hbm_bytes: float) -> float:
        """Seconds that this work takes in any number of kernels: traffic beside products."""
        return max(flops / self.flops, hbm_bytes / self.bandwidth)

    def assumptions(self) -> str:
        """In a sentence."""
        launch = f"{1e6 * self.launch:g} µs per launch, " if self.launch else ""
        return (
            f"Roofline of {self.name}: {launch}{self.bandwidth / 1e12:.3g} TB/s, "
            f"{self.flops / 1e12:.4g} TFLOP/s (float32 products at half of it); kernels in "
            "sequence, collectives overlapping with them."
        )


_H100 = DEVICES["gpu"]

# By `device_kind`. GPUs: about 70 % of the peak of dense bfloat16 products, the H100 as `plan` has
# it. TPUs start the next kernel without a launch, and products reach the peak; of a v4 of a
# topology and a TPU7x, a device is half of a chip.
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
    """How long one run of a program takes, and of what; `dataclasses.asdict` is ready for JSON.

    Attributes:
        kernels: how many run.
        hbm_bytes: that they read and write.
        seconds: by the roofline of the chip.
        cycles: by the compiler; 0 where it tells none, as for GPUs.
        dearest: ten kernels, and how many seconds each takes in all its runs.
    """

    kernels: int
    hbm_bytes: int
    seconds: float
    cycles: int
    dearest: tuple[tuple[Kernel, float], ...]

    def figures(self) -> dict[str, str]:
        """As text, by name."""
        cycles = {"estimated cycles": f"{self.cycles / 1e6:,.2f} M"} if self.cycles else {}
        return {
            "kernels": f"{self.kernels:,}",
            "HBM traffic": readable(self.hbm_bytes),
            "roofline": f"{1e3 * self.seconds:,.3g} ms",
            **cycles,
        }


def estimate(program: Program, device_kind: str) -> Estimate | None:
    """Of a program for devices of this kind; None where `CHIPS` has no such chip, as for CPUs."""
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
    """How much crosses the network and by how many, as in "1.20 MB in 12 (3 in loops)"."""
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
    """What is assumed, and the dearest kernels of each program by name."""
    console.print(CHIPS[device_kind].assumptions(), highlight=False, soft_wrap=True)
    for name, found in estimates.items():
        console.print(dearest_table(found.dearest, f"Most expensive kernels of {name}"))


def unread_text(unread: Mapping[str, int]) -> str:
    """That FLOPs, and so the roofline, are without those of some kernels."""
    kernels = ", ".join(f"{runs:,} × {name}" for name, runs in unread.items())
    return f"FLOPs and roofline exclude {kernels}, which could not be read."


def dearest(program: Program, chip: Chip, count: int = 10) -> list[tuple[Kernel, float]]:
    """The kernels that take longest in all their runs, and how many seconds.

    Kernels of one operation and source line, and of the same work, count together.
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
    found: Sequence[tuple[Kernel, float]], title: str = "The dearest kernels"
) -> Table:
    """A row a kernel."""
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
