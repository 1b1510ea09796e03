"""Folders that are made once, by one process, and are there whole or not at all."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.json_files import digest, file_digest, read_json

_META = "meta.json"
_POLL = 0.1  # seconds


def home(study: str) -> Path:
    """What a study can make again is kept in muon_jax/STUDY of $XDG_CACHE_HOME or ~/.cache."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "muon_jax" / study


@contextlib.contextmanager
def alone(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keeps this host's other processes from a path, which need not exist; waits for its turn.

    Args:
        path: to have alone.
        on_wait: called again and again while another process has it; it may raise to give up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        # A wait in the system's call would hear neither Ctrl-C nor SIGTERM.
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(_POLL)
        yield


def read(folder: Path) -> dict[str, Any] | None:
    """What `make` recorded of the folder, with the `sha256` of each file as `files`.

    None unless all of it is as it was made.
    """
    try:
        meta = read_json(folder / _META)
        seal = meta.pop("seal")
        whole = seal == digest(meta) and meta["files"] == {
            name: file_digest(folder / name) for name in meta["files"]
        }
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return meta if whole else None


def make(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Makes the folder, in the place of a damaged one; to be called `alone`.

    Args:
        folder: where it is to be.
        write: writes the files into the folder that it is given, and returns what to record.

    Returns:
        What `read` will return.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _sweep(folder.parent)
    partial.mkdir()
    try:
        meta = write(partial)
        meta["files"] = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
        (partial / _META).write_text(json.dumps(meta | {"seal": digest(meta)}, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return meta


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed have left half-made: nobody holds its lock."""
    for partial in folder.glob(".*.partial"):
        with contextlib.suppress(OSError), open(f"{partial.with_suffix('')}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
