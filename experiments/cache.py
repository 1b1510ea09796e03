"""Folders that are complete or absent; cached ones are made by one process, once."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from experiments import manifests

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
    _sweep(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as partial:
        manifest = {"meta": write(partial)}
        manifests.seal(epath.Path(partial), manifest)
    return _record(manifest)


def _sweep(folder: Path) -> None:
    """Removes unfinished folders of killed processes, which are those that nobody has locked."""
    for partial in folder.glob(".*.partial"):
        with contextlib.suppress(OSError), open(f"{partial.with_suffix('')}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which is renamed to `folder` at the end.

    One process at a time may fill it. What a killed process has left is removed.

    Raises:
        ValueError: If `folder` is not empty, or another process is filling it.
    """
    _check_empty(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = partial.exists() and partial.stat().st_ino == os.fstat(handle).st_ino
        except BlockingIOError:
            ours = False
        if not ours:
            raise ValueError(
                f"Another process is writing {folder}. Wait for it, or give another folder."
            )
        try:
            _check_empty(folder)
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _check_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty. Remove it, or give another folder.")
