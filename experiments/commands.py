"""What all commands share: how they start, stop, show progress, report errors and exit."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from experiments.cache import home
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
    """Runs a command that may take long, and returns its exit code.

    Args:
        work: A function `(stop, console) -> exit code`. It should end soon after `stop` is set.
    """
    keep_compiled_programs()
    stop = stop_on_signals()
    console = Console()
    return guard(lambda: work(stop, console))


def keep_compiled_programs() -> None:
    """Enables JAX's compilation cache, in the user's cache folder unless another is configured.

    `JAX_COMPILATION_CACHE_DIR` names another folder, and `JAX_ENABLE_COMPILATION_CACHE=false` turns
    the cache off. A program that JAX cannot read there is compiled again, with a warning.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(home("programs")))
    # By default JAX does not cache programs that compile in less than a second. A run has many.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def guard(work: Callable[[], int]) -> int:
    """Runs a command and turns errors that are not the code's into a message and an exit code.

    Returns:
        The result of `work`; 2 if an option or a file is wrong, 1 if the machine or a training
        fails, 130 after Ctrl-C.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            Console().print("Stopped. Finished work is saved; run the same command to continue.")
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
    """A context in which a report reads a folder. Errors in its files end the process.

    Raises:
        SystemExit: A file is missing or wrong; the message says which and what to do.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except _MISREAD as error:
        raise SystemExit(
            f"error: {folder} holds no readable run of this study, or a run of an incompatible "
            f"version ({type(error).__name__}: {error}). Give the folder of a run of this study."
        ) from None
    except Exception as error:
        if _exit_code(error) is None:
            raise
        _give_up_a_broken_stdout()
        raise SystemExit(f"error: {explain(error)}") from None


def explain(error: BaseException) -> str:
    """Returns an error as one or two sentences: what is wrong, and what to do."""
    if isinstance(error, ImportError):
        return f"{error.name or error} is not installed, but this command requires it. Install it."
    if isinstance(error, MemoryError):
        return (
            f"The machine has not enough memory ({error or 'out of memory'}). Use a smaller model, "
            "or a machine with more memory."
        )
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
    """Returns the exit code of an error, or None for a bug, whose traceback should be shown."""
    if isinstance(error, RunError):
        return error.exit_code
    if isinstance(error, ValueError | FileNotFoundError | ImportError):
        return 2
    if isinstance(error, OSError | MemoryError):
        return 1
    known = (_NO_PLATFORM, _FULL_DEVICE)  # JAX has no exception types for these
    return 1 if any(words in str(error) for words in known) else None


def _give_up_a_broken_stdout() -> None:
    """Redirects a broken stdout to the null device, or Python would report it again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop_on_signals() -> threading.Event:
    """Returns an event that Ctrl-C and SIGTERM set. A second Ctrl-C ends the process at once.

    Commands read the event between units of work. The second Ctrl-C ends the process without
    cleaning up, since an exception during XLA's work can crash it, and threads would have to finish
    first. Only unfinished work is lost.
    """
    stop = threading.Event()

    def ask(signum: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, end)

    def end(signum: int, frame: object) -> None:
        # Writes to the file descriptor, since the interrupted code may hold sys.stderr's lock.
        show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
        with contextlib.suppress(OSError):
            os.write(2, show_cursor + b"\nStopped immediately; finished work is kept.\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def print_error(text: str) -> None:
    """Prints an error on stderr, in one line and without interpreting brackets as markup."""
    Console(stderr=True).print("[red]error:[/red]", Text(text), soft_wrap=True)


def print_warning(text: str) -> None:
    """Prints a warning on stderr; the command continues."""
    Console(stderr=True).print("[yellow]warning:[/yellow]", Text(text), soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """Returns a progress bar with a description and an upper bound of the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("left ≤"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def option(*fields: str) -> str:
    """Returns the command-line spelling of a field."""
    return "--" + ".".join(fields).replace("_", "-")
