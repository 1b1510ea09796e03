"""How the commands that train language models start, claim folders and show progress."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from etils import epath
from rich.console import Console
from rich.progress import Progress as Bar

from experiments.commands import INTERRUPTED, TIME_IS_UP, progress_bar, run_command
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
        parse: reads the command line; the command has `topology`, `processes` and `hours`.
        run: `(command, stop, console) -> exit code`.
    """

    def work(stop: threading.Event, console: Console) -> int:
        command: Any = parse(sys.argv[1:])
        if command.topology:
            leave_accelerators_alone()
        command.processes.join()
        if jax.process_index() > 0:
            console.quiet = True
        with _time_limit(command.hours, stop) as is_up:
            try:
                code = run(command, stop, console)
                if code != INTERRUPTED or not is_up():
                    return code
            except KeyboardInterrupt:
                if not is_up():
                    raise
        console.print(
            f"Stopped and saved, since --hours {command.hours:g} have passed; the same command "
            f"continues from there. Exit status {TIME_IS_UP}.",
            highlight=False,
        )
        return TIME_IS_UP

    return run_command(work)


@contextlib.contextmanager
def _time_limit(hours: float | None, stop: threading.Event) -> Iterator[Callable[[], bool]]:
    """Sets `stop` after so many hours from now; what it yields tells whether they have passed.

    Where one process of several stops, all do: then the others are some seconds short of it.
    """
    seconds, begin = 3600 * (hours or math.inf), time.monotonic()
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), stop.set)
    timer.daemon = True
    if hours:
        timer.start()
    try:
        yield lambda: time.monotonic() - begin > seconds - 30
    finally:
        timer.cancel()


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
def claimed(
    folder: epath.Path, settings: dict[str, Any], defaults: dict[str, Any]
) -> Iterator[None]:
    """Claims a run's folder, in the process that writes, while the context lasts.

    If the start fails, a folder that was free before is free again.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            is_new = not holds_run(folder)
            lock = claim(folder, settings, ("mesh",), defaults)
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
