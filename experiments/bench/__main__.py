"""`python -m experiments.bench`: our optimizer beside its rivals, in tables and figures."""

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
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.bench import accelerators, sharding, spectra, speed
from experiments.bench.cases import Case, simulated_cases, topology_cases
from experiments.bench.report import PARTS
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
    """Muon beside its rivals: what a step costs each device of a mesh, how long an update takes on
    one device, and what Newton-Schulz does to singular values.

    `sharding` compiles and runs nothing: FLOPs, bytes exchanged, collectives and memory are read
    from the program, so they are exact, and equal on every machine. `speed` measures on the
    device that JAX finds (two CPU cores are enough; on a GPU it takes larger trees), optimizers
    taking turns. `spectra` compares the standard and the Gram form. All together take minutes.

    `accelerators`, if asked for, compiles the update for an H100 and a v5e, eight of each too, that
    need not be there: kernels, bytes, roofline and compile time beside its rivals', in ten minutes.

    With --topology only `sharding` runs, or `accelerators` if it is asked for, compiled for those
    devices: `python -m experiments.bench --topology v5e:16x16`.
    """

    parts: tuple[PartName, ...] = ("sharding", "speed", "spectra")
    """Which parts to run."""
    topology: str | None = None
    """Compile for TPUs, as v5e:16x16 or v5p:8x8x8, or GPUs, as h100:8, h100:8x8 (hosts × devices),
    h200:8 or b200:8. Needs the extra `tpu` or `gpu-compile`."""
    devices: Annotated[int, _EVEN] = 16
    """Simulated CPU devices of the sharding part; an even number, at least 4."""
    layers: Count | None = None
    """Layers of the sharding part; by default 16, and 64 for a topology. With --width of the
    accelerators part too, by default 2."""
    width: Count | None = None
    """D, fan_in and fan_out of its square kernels; by default 256, and 2048 for a topology."""
    hidden: Count | None = None
    """F, of its up (D, F) and down (F, D); by default 4 × width."""
    rounds: Count = 7
    """Updates of each optimizer in the speed part."""
    out: Path = Path("runs/bench")
    """Where result folders are."""
    name: str | None = None
    """The folder of the results; by default the topology, or `cpu` or `gpu`. What is in it is
    replaced."""

    def __post_init__(self) -> None:
        check(self)
        check_different(self, "parts")

    def folder(self) -> Path:
        """Where the results go."""
        name = self.name or (self.topology or jax.default_backend()).replace(":", "-")
        return self.out / name

    def as_json(self) -> Row:
        """The settings, without where results are kept."""
        settings = dataclasses.asdict(self)
        del settings["out"], settings["name"]
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
        config = tyro.cli(Config, prog="python -m experiments.bench", args=arguments)
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
            f"--devices {config.devices} needs as many CPU devices, and JAX has {len(devices)}: it "
            "was started or told so before."
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
