"""What the commands of all studies share: how they begin, stop, show progress, fail and exit."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from experiments.programs import keep_compiled_programs
from experiments.runs import RunError

INTERRUPTED = 130
TIME_IS_UP = 75  # EX_TEMPFAIL of sysexits.h: start it again
# What code that reads a file raises where it has not what it should have.
_MISREAD = (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError)
_NO_PLATFORM, _FULL_DEVICE = "Unable to initialize backend", "RESOURCE_EXHAUSTED"
_REMEDIES = {
    errno.ENOSPC: "Free some space; the same command then continues with what was finished.",
    errno.EDQUOT: "Free some space; the same command then continues with what was finished.",
    errno.EACCES: "Change its permissions, or give another path.",
    errno.EROFS: "Give a path that can be written.",
    errno.ENOTDIR: "Give a path whose parents are folders.",
    errno.EEXIST: "Give another path.",
}


def run_command(work: Callable[[threading.Event, Console], int]) -> int:
    """Does the work of a command that may take long.

    Args:
        work: `(stop, console) -> exit code`; when `stop` is set it should end soon.

    Returns:
        The command's exit code.
    """
    keep_compiled_programs()
    stop = stop_on_signals()
    console = Console()
    return guard(lambda: work(stop, console))


def guard(work: Callable[[], int]) -> int:
    """Does a command's work; what goes wrong outside its code becomes a message and an exit code.

    Returns:
        What `work` returns; 2 where an option or a file is wrong, 1 where the machine fails or a
        training does, 130 after Ctrl-C.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            Console().print("Stopped and saved; the same command continues from there.")
        _give_up_a_broken_stdout()
        return INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        _give_up_a_broken_stdout()
        if not isinstance(error, BrokenPipeError):
            print_error(explain(error))
        return code


@contextlib.contextmanager
def reporting(folder: object) -> Iterator[None]:
    """Within it a report is made of a folder's files; what is wrong with them ends the process.

    Raises:
        SystemExit: with the message.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except _MISREAD as error:
        raise SystemExit(
            f"error: {folder} holds no readable run of this study, or one of another version "
            f"({type(error).__name__}: {error}). Give the folder of a run of this study."
        ) from None
    except Exception as error:
        if _exit_code(error) is None:
            raise
        _give_up_a_broken_stdout()
        raise SystemExit(f"error: {explain(error)}") from None


def explain(error: BaseException) -> str:
    """An error as a sentence or two: what is wrong, and what to do."""
    if isinstance(error, ImportError):
        return f"{error.name or error} is not installed, but this command requires it."
    if isinstance(error, MemoryError):
        return f"The machine has not enough memory ({error or 'out of memory'})."
    text = re.sub(r"\[Errno -?\d+\] ", "", str(error))
    if _NO_PLATFORM in text:
        asked = os.environ.get("JAX_PLATFORMS")
        return (
            f"JAX cannot initialize the platform of JAX_PLATFORMS={asked} "
            f"({text.splitlines()[0]}). Install its plugin, or set JAX_PLATFORMS=cpu."
        )
    if _FULL_DEVICE in text:
        return (
            f"The device has not enough memory ({text.splitlines()[0]}). Use a smaller batch or "
            "model, or more devices."
        )
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        where = "" if error.filename else ", for a file or for the standard output"
        return f"{text.removesuffix('.')}{where}. {_REMEDIES[error.errno]}"
    return text


def _exit_code(error: Exception) -> int | None:
    """None for an error of the code itself, whose traceback is wanted."""
    if isinstance(error, RunError):
        return error.exit_code
    if isinstance(error, ValueError | FileNotFoundError | ImportError):
        return 2
    if isinstance(error, OSError | MemoryError):
        return 1
    known = (_NO_PLATFORM, _FULL_DEVICE)  # of JAX, which has no narrower kinds
    return 1 if any(words in str(error) for words in known) else None


def _give_up_a_broken_stdout() -> None:
    """Else the interpreter says once more, as it ends, that its output cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop_on_signals() -> threading.Event:
    """Set by Ctrl-C and SIGTERM, and read between pieces of work; a second Ctrl-C stops at once.

    An exception raised in the middle of XLA's work can crash the process on its way out, and
    threads would be waited for; so the second one ends the process as a kill does, which costs no
    more than what is under way.
    """
    stop = threading.Event()

    def ask(signum: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, end)

    def end(signum: int, frame: object) -> None:
        # By the descriptor: what was interrupted may hold the locks of sys.stderr.
        show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
        with contextlib.suppress(OSError):
            os.write(2, show_cursor + b"\nStopped immediately; finished work is kept.\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def print_error(error: Exception | str) -> None:
    """Says on stderr what went wrong: to the letter, brackets too, and in one line."""
    text = explain(error) if isinstance(error, Exception) else error
    Console(stderr=True).print("[red]error:[/red]", Text(text), soft_wrap=True)


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
