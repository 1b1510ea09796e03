"""How the commands that train language models start, claim folders and show progress."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from etils import epath
from rich.console import Console
from rich.progress import Progress as Bar

from experiments.commands import progress_bar, run_command
from experiments.language.training_loop import OnStep, Progress
from experiments.runs import claim, holds_run, leave_nothing_of_no_run
from experiments.topology import leave_accelerators_alone

Command = TypeVar("Command")
OnProgress = Callable[[str, int, int | None], None]
"""Takes what is under way, how much of it is done, and of how much."""


def launch(
    parse: Callable[[list[str]], Command], run: Callable[[Command, threading.Event, Console], int]
) -> int:
    """Parses and runs a command, and returns its exit code. Only the first process prints.

    Args:
        parse: reads the command line; the command has `topology` and `processes`.
        run: `(command, stop, console) -> exit code`.
    """

    def work(stop: threading.Event, console: Console) -> int:
        command: Any = parse(sys.argv[1:])
        if command.topology:
            leave_accelerators_alone()
        command.processes.join()
        if jax.process_index() > 0:
            console.quiet = True
        return run(command, stop, console)

    return run_command(work)


def check_alone(which: str, out: str | None) -> None:
    """Checks that a suite runs in one process and writes to a local folder."""
    if jax.process_count() > 1 or "://" in str(out):
        raise ValueError(
            f"--suite {which} requires one process and a local folder; got {jax.process_count()} "
            f"processes and --out {out}."
        )


@contextlib.contextmanager
def preparing(what: str, stop: threading.Event, console: Console) -> Iterator[OnProgress]:
    """Shows progress, and gives its callback, which raises KeyboardInterrupt once `stop` is set."""
    with progress_bar(console) as bar:
        task = bar.add_task(what, total=None)

        def show(what: str, done: int, total: int | None) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            bar.update(task, description=what, completed=done, total=total)

        yield show


@contextlib.contextmanager
def claimed(folder: epath.Path, settings: dict[str, Any]) -> Iterator[None]:
    """Claims a run's folder, in the process that writes, while the context lasts.

    If the start fails, a folder that was free before is free again.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            is_new = not holds_run(folder)
            lock = claim(folder, settings, ("mesh",), other="another --out")
            stack.enter_context(contextlib.closing(lock))
            if is_new:
                stack.callback(leave_nothing_of_no_run, folder)
        yield


def showing(name: str, bar: Bar, steps: int) -> OnStep:
    """Shows the steps of a training on one line of a progress bar."""
    task = bar.add_task(f"{name}: compiling", total=steps)

    def show(progress: Progress) -> None:
        parts = [f"{name}: step {progress.step}", f"loss {progress.loss:.3f}"]
        if progress.held_out is not None:
            parts.append(f"held out {progress.held_out:.3f}")
        if progress.tokens_per_second is not None:
            parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
        bar.update(task, completed=progress.step, description=" · ".join(parts))
        if progress.step == steps:
            bar.remove_task(task)

    return show
