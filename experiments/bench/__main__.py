"""`python -m experiments.bench` compares muon_jax with other implementations of Muon."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.bench import accelerators, sharding, spectra, speed
from experiments.bench.cases import Case, simulated_cases, topology_cases
from experiments.bench.report import PARTS
from experiments.command_line import parse
from experiments.commands import guard
from experiments.report.studies import show
from experiments.runs import machine, write_json
from experiments.settings import Count, Rule, check, check_different
from experiments.topology import leave_accelerators_alone, topology_devices

Row = dict[str, Any]
PartName = Literal["sharding", "speed", "spectra", "accelerators"]

# XLA partitions each program in a single thread.
COMPILER_THREADS = 2

_EVEN = Rule("even and at least 4", lambda value: value >= 4 and value % 2 == 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares muon_jax with other implementations of Muon: the cost of an update on each device of
    a mesh, the time of an update on one device, and the accuracy of Newton-Schulz.

    The part `sharding` compiles the update without running it. FLOPs, bytes exchanged, collectives
    and memory are read from the compiled program, so they are exact and equal on every machine. The
    part `speed` times the implementations on JAX's default device, in turns. Two CPU cores are
    enough; on a GPU the models are larger. The part `spectra` compares the singular values that the
    standard and the Gram form of Newton-Schulz produce. These three parts take minutes.

    The part `accelerators` runs only if --parts names it, and takes ten minutes. It compiles the
    update for one and for eight H100 GPUs and v5e TPUs, which need not be present, and reports
    kernels, bytes, roofline time and compile time.

    With --topology, only `sharding` runs (or `accelerators`, if --parts names it), compiled for
    that topology: `python -m experiments.bench --topology v5e:16x16`.
    """

    parts: tuple[PartName, ...] = ("sharding", "speed", "spectra")
    """Parts to run."""
    topology: str | None = None
    """Accelerators to compile for; they need not be present. TPUs: v5e:16x16 or v5p:8x8x8. GPUs:
    h100:8, h200:8, b200:8, or h100:8x8 for 8 hosts of 8 devices. Requires the extra `tpu` or
    `gpu-compile`. By default, simulated CPU devices."""
    devices: Annotated[int, _EVEN] = 16
    """Number of simulated CPU devices in the sharding part. Must be even and at least 4."""
    layers: Count | None = None
    """Number of layers. The default is 16 in the sharding part, 64 with --topology, and 2 in the
    accelerators part."""
    width: Count | None = None
    """Width of the model. The default is 256, or 2048 with --topology."""
    hidden: Count | None = None
    """Width of the MLP. The default is 4 × --width."""
    rounds: Count = 7
    """Timed rounds, whose median is reported. In a round of the speed part each implementation
    makes one update."""
    out: str | None = None
    """Folder of the run. Results already in it are replaced. By default a folder in runs/bench,
    named after the topology, or `cpu` or `gpu`."""

    def __post_init__(self) -> None:
        check(self)
        check_different(self, "parts")

    def folder(self) -> Path:
        """Returns the folder of the results."""
        name = (self.topology or jax.default_backend()).replace(":", "-")
        return Path(self.out or f"runs/bench/{name}")

    def as_json(self) -> Row:
        """Returns the settings as JSON values, without the folder of the results."""
        settings = dataclasses.asdict(self)
        del settings["out"]
        return json.loads(json.dumps(settings))


class Part(NamedTuple):
    """One part of the benchmark: a list of tasks that return rows of results.

    Attributes:
        name: The part's name, as in --parts.
        work: A description and a function that returns rows, for each task.
        threads: The number of tasks that run at once. It is 1 where time is measured.
    """

    name: str
    work: list[tuple[str, Callable[[], list[Row]]]]
    threads: int = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def work() -> int:
        config = parse(Config, "python -m experiments.bench", arguments)
        chosen = parts(config)
        folder = config.folder()
        folder.mkdir(parents=True, exist_ok=True)
        run(config, chosen, folder, Console())
        return 0

    return guard(work)


def parts(config: Config) -> list[Part]:
    """Returns the parts that --parts selects, before any of their work is done."""
    if config.topology is not None:
        leave_accelerators_alone()
        if "accelerators" in config.parts:
            return [accelerators_part(config, [config.topology])]
        return [sharding_part(topology_table(config), jnp.bfloat16)]
    if config.parts == ("accelerators",):
        leave_accelerators_alone()
    if "sharding" in config.parts:
        # JAX accepts a number of simulated devices only before it has looked for devices.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", config.devices)
    made = {
        "sharding": lambda: sharding_part(simulated_table(config), jnp.float32),
        "speed": lambda: speed_part(config.rounds),
        "spectra": spectra_part,
        "accelerators": lambda: accelerators_part(config, accelerators.TOPOLOGIES),
    }
    return [made[name]() for name in config.parts]


def topology_table(config: Config) -> list[Case]:
    """Returns the cases for the devices of --topology, which need not be present."""
    width = config.width or 2048
    hidden = config.hidden or 4 * width
    devices = topology_devices(config.topology)
    return topology_cases(devices, config.topology, config.layers or 64, width, hidden)


def simulated_table(config: Config) -> list[Case]:
    """Returns the cases for simulated CPU devices."""
    width = config.width or 256
    hidden = config.hidden or 4 * width
    devices = jax.devices("cpu")
    if len(devices) < config.devices:
        raise ValueError(
            f"--devices {config.devices} requires {config.devices} simulated CPU devices, but JAX "
            f"has already started with {len(devices)}. Run the command in a new process."
        )
    return simulated_cases(devices[: config.devices], config.layers or 16, width, hidden)


def sharding_part(cases: Sequence[Case], dtype: Any) -> Part:
    """Returns the part that compiles every implementation for every case."""
    work = [
        (f"{case.name} · {arm}", lambda case=case, arm=arm: [sharding.cost(case, arm, dtype)])
        for case in cases
        for arm in case.arms
    ]
    return Part("sharding", work, COMPILER_THREADS)


def accelerators_part(config: Config, topologies: Sequence[str]) -> Part:
    """Returns the part that compiles for each topology, one by one since compilation is timed."""
    sizes = config.layers, config.width, config.hidden
    made, refused = accelerators.pieces(topologies, *sizes)
    work = [(piece.name, lambda piece=piece: [accelerators.cost(piece)]) for piece in made]
    return Part("accelerators", [*work, ("", lambda: refused)])


def speed_part(rounds: int) -> Part:
    """Returns the part that times every implementation on every tree of parameters."""
    # PyTorch runs on the same GPU in turns, so JAX must not reserve all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    backend = jax.default_backend()
    work = [
        (f"updates of {tree.name}", lambda tree=tree: speed.compare(tree, rounds, backend))
        for tree in speed.trees(backend)
    ]
    return Part("speed", work)


def spectra_part() -> Part:
    """Returns the part that computes singular values for each spectrum, shape, schedule, dtype."""
    work = [
        (f"singular values, {of[0]}, {of[2]}, {of[3]}", lambda of=of: spectra.singular_values(*of))
        for of in itertools.product(
            spectra.SPECTRA, spectra.SHAPES, spectra.SCHEDULES, spectra.DTYPES
        )
    ]
    return Part("spectra", work)


def run(config: Config, chosen: Sequence[Part], folder: Path, console: Console) -> None:
    """Runs the parts. Prints and saves each one's results as it ends, then writes the report."""
    summary: Row = {"machine": machine() | versions(), "config": config.as_json()}
    for part in chosen:
        rows = finish(part, console)
        summary[part.name] = rows
        write_json(folder / "summary.json", summary)
        console.print(PARTS[part.name][1](rows))
    show(folder, console, table=False)


def finish(part: Part, console: Console) -> list[Row]:
    """Runs a part with a progress bar and returns its rows, in the order of its tasks."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )

    def show(piece: tuple[str, Callable[[], list[Row]]]) -> list[Row]:
        description, work = piece
        progress.update(bar, description=description)
        rows = work()
        progress.advance(bar)
        return rows

    with progress, ThreadPoolExecutor(part.threads) as pool:
        bar = progress.add_task("", total=len(part.work))
        try:
            return [row for rows in pool.map(show, part.work) for row in rows]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def versions() -> dict[str, str]:
    """Returns the versions of further packages that affect the results."""
    found = {}
    for package in ("jaxlib", "libtpu", "jax-cuda12-plugin", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
