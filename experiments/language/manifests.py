"""A folder's files as they were written: sizes and digests, in a manifest that makes it count."""

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
STEP = r"step_(\d+)"  # names of checkpoints
_READERS = 4  # threads that hash; hashlib lets go of the GIL


def seal(path: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, when all that it names is on disk."""
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
    else:  # an object appears whole or not at all
        (path / NAME).write_text(json.dumps(manifest, indent=2))


def read(path: epath.Path) -> dict[str, Any]:
    """The manifest, or an empty one where it is missing or damaged."""
    try:
        manifest = read_json(path / NAME)
        whole = manifest["sha256"] == _digest(manifest) and f"step_{manifest['step']}" == path.name
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}
    return manifest if whole else {}


def newest_meta(folder: epath.PathLike) -> dict[str, Any]:
    """What was saved beside the newest checkpoint whose manifest is whole; of none nothing."""
    folder = epath.Path(folder)
    if not folder.exists():
        return {}
    steps = [int(path.name[5:]) for path in folder.iterdir() if re.fullmatch(STEP, path.name)]
    manifests = (read(folder / f"step_{step}") for step in sorted(steps, reverse=True))
    return next(filter(None, manifests), {}).get("meta", {})


def problems(path: epath.Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the folder's files, by name; nothing where all are as they were sealed."""
    if not manifest:
        return [f"{NAME} is damaged"]
    files, sizes = manifest["files"], dict(_sizes(path))
    found = [f"{name} is missing" for name in files.keys() - sizes.keys()]
    found += [f"{name} was added" for name in sizes.keys() - files.keys()]
    found += [
        f"{name} has {sizes[name]} bytes instead of {size}"
        for name, (size, _) in files.items()
        if sizes.get(name, size) != size
    ]
    if not found:
        found = [
            f"{name} has other contents than were written"
            for name, same in _in_threads(lambda name: _has(path / name, files[name][1]), files)
            if not same
        ]
    return sorted(found)


def _sizes(folder: epath.Path, inside: str = "") -> Iterator[tuple[str, int]]:
    """Each file's name below the checkpoint's folder and its bytes, without the manifest."""
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
        if error.errno == errno.EIO:  # a bad sector
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
