"""A run's folder: its config, its log of finished pieces of work, and files written whole."""

import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax


class RunError(Exception):
    """A folder that cannot be used as asked; the message says why and what to do."""


class Run:
    """A folder that one process at a time writes, and that any kill leaves usable.

    `metrics.jsonl` is the source of truth. A finished piece of work is appended to it as a block:
    its records, then one record `{"cell": ..., "sha256": ...}` that seals them. Opening a folder
    keeps the sealed blocks and cuts everything else away.

    Args:
        folder: made if missing.
        config: JSON-able settings; a folder that holds others is refused.
        grid: keys of `config` that may differ from the folder's: they say which pieces are wanted,
            not what a piece is.

    Attributes:
        finished: the sealed records, oldest first.
        dropped: lines cut away because they were unsealed or damaged.

    Raises:
        RunError: another process writes the folder, or it holds a run with other settings.
    """

    def __init__(self, folder: Path, config: dict[str, Any], grid: tuple[str, ...] = ()):
        self.folder = folder
        self._lock = claim(folder, config, grid, other="another --name")
        try:
            self.finished, self.dropped = self._recover()
        except BaseException:
            self.close()
            raise

    def append(self, records: list[dict[str, Any]], cell: dict[str, Any]) -> None:
        """Adds a finished piece of work, durably: after this returns no kill loses it."""
        self.extend([(records, cell)])

    def extend(self, pieces: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]]) -> None:
        """Adds pieces that were made together, in one write."""
        text = ""
        for records, cell in pieces:
            lines = [_line(record) for record in records]
            text += "".join([*lines, _line({"cell": cell, "sha256": _digest(lines, cell)})])
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.finished += [cell for _, cell in pieces]

    def close(self) -> None:
        """Lets another process have the folder."""
        self._lock.close()

    def _recover(self) -> tuple[list[dict[str, Any]], int]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return [], 0
        blocks, dropped = read_blocks(path)
        if dropped:
            write_text(path, "".join(block.text for block in blocks))
        return [block.cell for block in blocks], dropped


def claim(
    folder: Path, config: dict[str, Any], free: tuple[str, ...] = (), *, other: str
) -> IO[str]:
    """Makes a run's folder this process's own, and writes its `config.json`.

    Args:
        folder: made if missing.
        config: JSON-able settings; a folder that holds others is refused.
        free: keys of `config` that may differ from the folder's.
        other: what an error advises to give.

    Returns:
        The lock; closing it lets another process have the folder.

    Raises:
        RunError: another process writes the folder, or it holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Object stores (gs://, s3://) have no locks.
    lock = io.StringIO() if "://" in str(folder) else open(folder / ".lock", "w")  # noqa: SIM115
    try:
        if isinstance(lock, io.TextIOWrapper):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_config(folder, config, free, other)
        write_json(folder / "config.json", config)
    except BlockingIOError:
        lock.close()
        raise RunError(
            f"Another process is writing {folder}. Wait for it, or give {other}."
        ) from None
    except BaseException:
        lock.close()
        raise
    return lock


def leave_nothing_of_no_run(folder: Path) -> None:
    """A start that failed leaves a folder free for another, whose settings are mended."""
    if not (folder / "metrics.jsonl").exists():
        (folder / "config.json").unlink(missing_ok=True)


def _check_config(folder: Path, config: dict[str, Any], free: tuple[str, ...], other: str) -> None:
    path = folder / "config.json"
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path} is damaged ({error}), so what its run trained is unknown. Give {other}, or "
            "remove the folder."
        ) from None
    new = json.loads(json.dumps(config))
    if changed := changed_settings(old, new, free):
        differences = "; ".join(
            f"{key}: there {old.get(key)!r}, here {new.get(key)!r}" for key in changed
        )
        raise RunError(
            f"{folder} holds a run with other settings ({differences}). Give {other}, or the same "
            "settings."
        )


def changed_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = ()
) -> list[str]:
    """The keys, but for those in `free`, under which two configs as JSON say different things.

    Of `rates` the optimizers that both know count: a run from before one was added has no cell of
    it, and goes on.
    """

    def same(key: str) -> bool:
        there, here = old.get(key), new.get(key)
        if key == "rates" and isinstance(there, dict) and isinstance(here, dict):
            return all(there[name] == here[name] for name in there.keys() & here.keys())
        return there == here

    return sorted(key for key in {*old, *new} if key not in free and not same(key))


class Block(NamedTuple):
    """A sealed piece of work: its records, its outcome, and its lines as they stand in the log."""

    records: list[dict[str, Any]]
    cell: dict[str, Any]
    text: str


def read_blocks(path: Path) -> tuple[list[Block], int]:
    """The sealed blocks of a `metrics.jsonl`, oldest first, and how many other lines it has."""
    blocks: list[Block] = []
    lines: list[str] = []
    dropped = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        seal = _parse(line)
        if seal is None or "cell" not in seal:
            lines.append(line)
            continue
        if seal.get("sha256") == _digest(lines, seal["cell"]):
            records = [json.loads(record) for record in lines]
            blocks.append(Block(records, seal["cell"], "".join([*lines, line])))
        else:
            dropped += len(lines) + 1
        lines = []
    return blocks, dropped + len(lines)


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once: a reader, or a kill, sees the old text or the new."""
    if "://" in str(path):  # object stores do that by themselves
        path.write_text(text)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's are for their maker alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; NaN is refused, since it is none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it has none; the message names the file.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: no valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: no JSON object but a {type(value).__name__}")
    return value


def machine() -> dict[str, str]:
    """What a figure was measured on."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
        "processor": platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": importlib.metadata.version("optax"),
        "flax": importlib.metadata.version("flax"),
        "command": " ".join(["python -m", *_command()]),
    }


def _command() -> list[str]:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return [name, *sys.argv[1:]]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _digest(lines: list[str], cell: dict[str, Any]) -> str:
    return hashlib.sha256("".join([*lines, _line(cell)]).encode()).hexdigest()
