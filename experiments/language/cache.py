"""Cached folders: each is made by one process, once, and is complete or absent."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from experiments.language import manifests

_POLL = 0.1  # seconds


def home(study: str) -> Path:
    """Returns a study's cache folder, muon_jax/STUDY in $XDG_CACHE_HOME or ~/.cache."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "muon_jax" / study


@contextlib.contextmanager
def alone(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Locks a path against other processes of this host, and waits until it is free.

    Args:
        path: The path to lock. It need not exist.
        on_wait: Called repeatedly while another process holds the lock. It may raise to give up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        # A blocking system call would not react to Ctrl-C or SIGTERM.
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(_POLL)
        yield


def read(folder: Path) -> dict[str, Any] | None:
    """Returns the record that `make` stored, with the `sha256` of each file under `files`.

    Returns None unless every file is unchanged since then.
    """
    manifest = manifests.read(epath.Path(folder))
    return None if manifests.problems(epath.Path(folder), manifest) else _record(manifest)


def _record(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["meta"] | {"files": {name: sha for name, (_, sha) in manifest["files"].items()}}


def make(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Makes the folder, and replaces a damaged one. Call it while holding the lock of `alone`.

    Args:
        folder: The path of the folder.
        write: Writes the files into the folder that it is given, and returns the record to store.

    Returns:
        The record, as `read` returns it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _sweep(folder.parent)
    partial.mkdir()
    try:
        manifest = {"meta": write(partial)}
        manifests.seal(epath.Path(partial), manifest)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return _record(manifest)


def _sweep(folder: Path) -> None:
    """Removes unfinished folders of killed processes, which are those that nobody has locked."""
    for partial in folder.glob(".*.partial"):
        with contextlib.suppress(OSError), open(f"{partial.with_suffix('')}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
