"""What the commands of all studies share: how they begin, stop, show progress and exit."""

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from experiments.runs import Run, RunError

INTERRUPTED = 130

Config = TypeVar("Config")


def conduct(
    begin: Callable[[], tuple[Config, Run]],
    study: Callable[[Config, Run, threading.Event, Console], int],
) -> int:
    """Opens a run and works on it.

    Args:
        begin: reads the command line and opens the run's folder.
        study: `(config, run, stop, console) -> exit code`; when `stop` is set it should end soon.

    Returns:
        The command's exit code.
    """
    stop = stop_on_signals()
    console = Console()
    try:
        config, run = begin()
    except (ValueError, RunError, OSError) as error:
        print_error(error)
        return 2
    try:
        return study(config, run, stop, console)
    except OSError as error:
        print_error(
            f"{error}. {len(run.finished)} finished cells are safe in {run.folder}; the same "
            "command goes on from there."
        )
        return 1
    finally:
        run.close()


def stop_on_signals() -> threading.Event:
    """Set by Ctrl-C and SIGTERM, and read between pieces of work; a second Ctrl-C stops at once.

    An exception raised in the middle of XLA's work can crash the process on its way out.
    """
    stop = threading.Event()

    def ask(signum, frame):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def print_error(error: Exception | str) -> None:
    """Says on stderr what went wrong: to the letter, brackets too, and in one line."""
    Console(stderr=True).print("[red]error:[/red]", Text(str(error)), soft_wrap=True)


def print_warning(text: str) -> None:
    """Says on stderr what a command goes on in spite of."""
    Console(stderr=True).print("[yellow]warning:[/yellow]", Text(text), soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar with what is under way and the time left at most."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("left ≤"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def option(*fields: str) -> str:
    """A field as it is spelt on the command line."""
    return "--" + ".".join(fields).replace("_", "-")


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names that they have on the command line."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
