"""Manifests with the sizes and digests of a folder's files, which mark it as complete.

They seal checkpoints and cached folders. `experiments.sealed` seals logs, which grow.
"""

import concurrent.futures
import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from experiments.json_files import digest, file_digest, read_json, write_json

NAME = "manifest.json"
_READERS = 4  # threads that compute digests; hashlib releases the GIL


def seal(path: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a folder, once all of its files are on disk."""
    local = "://" not in os.fspath(path)
    sizes = dict(_sizes(path))
    if local:
        for name in sizes:
            _sync(path / name)
        for folder in {(path / name).parent for name in sizes}:
            _sync(folder)
    manifest["files"] = {
        name: [sizes[name], sha256]
        for name, sha256 in _in_threads(lambda name: file_digest(path / name), sizes)
    }
    manifest["sha256"] = _digest(manifest)
    if local:
        write_json(Path(path / NAME), manifest)
        _sync(path)
        _sync(path.parent)
    else:  # object stores write atomically
        (path / NAME).write_text(json.dumps(manifest, indent=2))


def read(path: epath.Path) -> dict[str, Any]:
    """Returns the manifest of a folder, or an empty one if it is missing or damaged."""
    try:
        manifest = read_json(path / NAME)
        return manifest if manifest["sha256"] == _digest(manifest) else {}
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def steps(folder: epath.PathLike) -> list[int]:
    """Returns the steps of the checkpoints in a folder, finished or not, ascending."""
    folder = epath.Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name))


def of_step(folder: epath.PathLike, step: int) -> dict[str, Any]:
    """Returns the manifest of a checkpoint, or an empty one, as `read`, or if it was moved."""
    manifest = read(epath.Path(folder) / f"step_{step}")
    return manifest if manifest.get("step") == step else {}


def newest_meta(folder: epath.PathLike) -> dict[str, Any]:
    """Returns the `meta` of the newest checkpoint with a valid manifest; empty if there is none."""
    manifests = (of_step(folder, step) for step in reversed(steps(folder)))
    return next(filter(None, manifests), {}).get("meta", {})


def problems(path: epath.Path, manifest: dict[str, Any]) -> list[str]:
    """Returns a description of each file that does not match the manifest."""
    if not manifest:
        return [f"{NAME} is damaged"]
    files, sizes = manifest["files"], dict(_sizes(path))
    faults = [f"{name} is missing" for name in files.keys() - sizes.keys()]
    faults += [f"{name} was added" for name in sizes.keys() - files.keys()]
    faults += [
        f"{name} has {sizes[name]} bytes instead of {size}"
        for name, (size, _) in files.items()
        if sizes.get(name, size) != size
    ]
    if not faults:
        faults = [
            f"{name} has changed since it was written"
            for name, same in _in_threads(lambda name: _has(path / name, files[name][1]), files)
            if not same
        ]
    return sorted(faults)


def _sizes(folder: epath.Path, inside: str = "") -> Iterator[tuple[str, int]]:
    """Yields the name and the bytes of each file of a folder, except the manifest."""
    for path in sorted(folder.iterdir()):
        name, stat = inside + path.name, path.stat()
        if stat.is_directory:
            yield from _sizes(path, f"{name}/")
        elif name != NAME:
            yield name, stat.length


def _in_threads(work: Callable[[str], Any], names: Iterable[str]) -> list[tuple[str, Any]]:
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return list(zip(names, readers.map(work, names), strict=True))


def _has(path: epath.Path, sha256: str) -> bool:
    try:
        return file_digest(path) == sha256
    except OSError as error:
        if error.errno == errno.EIO:  # an unreadable sector
            return False
        raise


def _digest(manifest: dict[str, Any]) -> str:
    return digest({key: value for key, value in manifest.items() if key != "sha256"})


def _sync(path: epath.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
