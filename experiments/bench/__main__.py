"""`python -m experiments.bench`: our optimizer beside its rivals, in tables and figures."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import dataclasses
import importlib.metadata
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

# XLA's partitioner has one thread a program.
COMPILER_THREADS = 2

_EVEN = Rule("even and at least 4", lambda value: value >= 4 and value % 2 == 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares Muon with other implementations: the cost of a step on each device of a mesh, the
    time of an update on one device, and the accuracy of Newton-Schulz.

    `sharding` compiles and does not run: FLOPs, bytes exchanged, collectives and memory are read
    from the compiled program, so they are exact and the same on every machine. `speed` times
    updates on JAX's default device, in turns; two CPU cores are enough, and a GPU gets larger
    models. `spectra` compares the singular values after the standard and the Gram form of
    Newton-Schulz. All three together take minutes.

    `accelerators` runs only if --parts names it. It compiles the update for one and for eight H100
    and v5e, which need not be present, and reports kernels, bytes, roofline and compile time, in
    ten minutes.

    With --topology only `sharding` runs, or `accelerators` if --parts names it, compiled for those
    devices: `python -m experiments.bench --topology v5e:16x16`.
    """

    parts: tuple[PartName, ...] = ("sharding", "speed", "spectra")
    """Parts to run."""
    topology: str | None = None
    """Accelerators to compile for, which need not be present. TPUs: v5e:16x16 or v5p:8x8x8. GPUs:
    h100:8, h200:8, b200:8, or h100:8x8 for hosts × devices. Requires the extra `tpu` or
    `gpu-compile`."""
    devices: Annotated[int, _EVEN] = 16
    """Simulated CPU devices of the sharding part. Must be even and at least 4."""
    layers: Count | None = None
    """Number of layers. By default 16 in the sharding part, 64 with --topology, and 2 in the
    accelerators part."""
    width: Count | None = None
    """Width of the model. By default 256, and 2048 with --topology."""
    hidden: Count | None = None
    """Width of the MLP. By default 4 × --width."""
    rounds: Count = 7
    """Timed rounds, whose median is reported. A round of the speed part is one update."""
    out: str | None = None
    """Folder of the run. By default the topology's, or `cpu` or `gpu`, in runs/bench. Results in it
    are replaced."""

    def __post_init__(self) -> None:
        check(self)
        check_different(self, "parts")

    def folder(self) -> Path:
        """Where the results go."""
        name = (self.topology or jax.default_backend()).replace(":", "-")
        return Path(self.out or f"runs/bench/{name}")

    def as_json(self) -> Row:
        """The settings, without where results are kept."""
        settings = dataclasses.asdict(self)
        del settings["out"]
        return json.loads(json.dumps(settings))


class Part(NamedTuple):
    """Pieces of work that give rows.

    Attributes:
        name: of the part.
        work: a description and what gives its rows, for each piece.
        threads: pieces that run at once; one where time is measured.
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
    """The parts asked for, their work not yet begun."""
    if config.topology is not None:
        leave_accelerators_alone()
        if "accelerators" in config.parts:
            return [accelerators_part(config, [config.topology])]
        return [sharding_part(topology_table(config), jnp.bfloat16)]
    if config.parts == ("accelerators",):
        leave_accelerators_alone()
    if "sharding" in config.parts:
        # Only before JAX has looked for devices can it be told how many to simulate.
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
    """The cases on devices that are not there."""
    width = config.width or 2048
    hidden = config.hidden or 4 * width
    devices = topology_devices(config.topology)
    return topology_cases(devices, config.topology, config.layers or 64, width, hidden)


def simulated_table(config: Config) -> list[Case]:
    """The cases on simulated CPU devices."""
    width = config.width or 256
    hidden = config.hidden or 4 * width
    devices = jax.devices("cpu")
    if len(devices) < config.devices:
        raise ValueError(
            f"--devices {config.devices} requires as many CPU devices, but JAX has already "
            f"started with {len(devices)}."
        )
    return simulated_cases(devices[: config.devices], config.layers or 16, width, hidden)


def sharding_part(cases: Sequence[Case], dtype: Any) -> Part:
    """Every optimizer compiled for every case."""
    work = [
        (f"{case.name} · {arm}", lambda case=case, arm=arm: [sharding.cost(case, arm, dtype)])
        for case in cases
        for arm in case.arms
    ]
    return Part("sharding", work, COMPILER_THREADS)


def accelerators_part(config: Config, topologies: Sequence[str]) -> Part:
    """The update compiled for each topology, one program at a time since that is timed too."""
    sizes = config.layers, config.width, config.hidden
    made, refused = accelerators.pieces(topologies, *sizes)
    work = [*accelerators.work(made), ("", lambda: refused)]
    return Part("accelerators", work)


def speed_part(rounds: int) -> Part:
    """Every optimizer timed on every tree."""
    # PyTorch takes turns on the same GPU and needs some of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    backend = jax.default_backend()
    work = [
        (f"updates of {tree.name}", lambda tree=tree: speed.compare(tree, rounds, backend))
        for tree in speed.trees(backend)
    ]
    return Part("speed", work)


def spectra_part() -> Part:
    """Singular values for every spectrum, shape, schedule and dtype."""
    work = [
        (
            f"singular values, {setting[0]}, {setting[2]}, {setting[3]}",
            lambda setting=setting: spectra.singular_values(*setting),
        )
        for setting in spectra.settings()
    ]
    return Part("spectra", work)


def run(config: Config, chosen: Sequence[Part], folder: Path, console: Console) -> None:
    """Prints each part's table when it is done, keeps its rows, and writes the report."""
    summary: Row = {"machine": machine() | versions(), "config": config.as_json()}
    for part in chosen:
        rows = finish(part, console)
        summary[part.name] = rows
        write_json(folder / "summary.json", summary)
        console.print(PARTS[part.name][1](rows))
    show(folder, console, table=False)


def finish(part: Part, console: Console) -> list[Row]:
    """All rows of a part, in the order of its work, with a bar that shows how far it is."""
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
    """Of what else took part."""
    found = {}
    for package in ("jaxlib", "libtpu", "jax-cuda12-plugin", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
