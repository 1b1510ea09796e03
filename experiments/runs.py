"""The folder of a run: its lock, its config, and its log of finished pieces of work."""

import contextlib
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
from flax.traverse_util import flatten_dict

from experiments import manifests, sealed
from experiments.json_files import read_json, write_json, write_text

__all__ = ["Run", "RunError", "claim", "machine", "read_json", "write_json", "write_text"]

CONFIG, LOG = "config.json", "metrics.jsonl"
_STARTED = CONFIG, "tokenizer.json"  # files that are written before the log
# Files that a killed or failed process may leave. A folder with no others is free for any run.
_LEFT = re.compile(r"\.lock|\.\w+\.jsonl?\.[a-z0-9_]{8}")
# Today's names of settings that earlier versions named otherwise.
_RENAMED = {
    "arms": "optimizers",
    "optimizer": "optimizers",
    "final": "final_lr_fraction",
    "patience": "max_nonfinite_steps",
}

# The files of a folder that record settings, each with these settings.
Recorded = list[tuple[str, dict[str, Any]]]
# The records of a finished piece of work, and its outcome.
Piece = tuple[list[dict[str, Any]], dict[str, Any]]


class RunError(Exception):
    """The error for a folder that cannot be used as asked. Its message says why and what to do."""

    exit_code = 2  # of a command


class Run:
    """A folder that only one process at a time writes, and that remains usable after any kill.

    `metrics.jsonl` is the source of truth; `experiments.sealed` defines its format. Each finished
    piece of work appends its records and a seal, which holds its outcome as `cell`. Opening a
    folder keeps complete pieces and removes the others, which must be repeated. A damaged log is
    first copied to `metrics.jsonl.damaged`.

    Args:
        folder, config, defaults: As in `claim`.
        grid: Keys of `config` that may differ from the folder's, since they select pieces of work
            and do not change their results.

    Attributes:
        finished: The outcomes of finished pieces, oldest first.
        notes: Messages to the user about what was removed and why.

    Raises:
        RunError: As in `claim`.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        grid: tuple[str, ...] = (),
        defaults: Mapping[str, Any] | None = None,
    ):
        self.folder = folder
        self._identity = identity(config, grid)
        self._lock = claim(folder, config, grid, defaults)
        try:
            self.finished, self._sealed, self.notes = self._recover()
        except BaseException:
            self.close()
            raise

    def extend(self, pieces: Sequence[Piece]) -> None:
        """Appends finished pieces of work and flushes them to disk, so that no kill loses them."""
        text, count = self._lines(pieces, self._sealed)
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._sealed = count
        self.finished += [cell for _, cell in pieces]

    def close(self) -> None:
        """Releases the folder to other processes."""
        self._lock.close()

    def _lines(self, pieces: Iterable[Piece], before: int) -> tuple[str, int]:
        text = ""
        for records, cell in pieces:
            lines = [sealed.record_line(record) for record in records]
            seal = sealed.seal_line(lines, before, cell=cell, config=self._identity)
            text, before = "".join([text, *lines, seal]), before + len(lines)
        return text, before

    def _recover(self) -> tuple[list[dict[str, Any]], int, list[str]]:
        path = self.folder / LOG
        found = sealed.read(path)
        pieces = finished_pieces(found)
        notes = []
        if not found.text and (self.folder / "summary.json").exists():
            notes.append(
                f"{path} is empty or missing although summary.json exists, so all work will be "
                "repeated. Restore the file from a backup to keep what was finished."
            )
        kept = sum(1 + len(records) for records, _ in pieces)
        if dropped := len(found.text) + bool(found.torn) - kept:
            what = "of an unfinished or damaged training were removed"
            notes.append(f"{dropped} lines {what}; it will be repeated.")
        if found.damage:
            copy = path.with_name(f"{LOG}.damaged")
            shutil.copyfile(path, copy)
            notes.append(
                f"{path} is damaged: {'; '.join(found.damage)}. It was copied to {copy.name}."
            )
        text, count = self._lines(pieces, 0)
        if dropped or found.damage:
            write_text(path, text)
        return [cell for _, cell in pieces], count, notes


def finished_pieces(log: sealed.Lines) -> list[Piece]:
    """Returns the records and the outcome of each complete piece of work, oldest first."""
    return [
        (block.records, block.seal["cell"])
        for block in log.blocks
        if not block.lost and "cell" in block.seal
    ]


def identity(config: Mapping[str, Any], free: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the settings that identify a run: all but those in `free`, as JSON values."""
    return json.loads(json.dumps({key: x for key, x in config.items() if key not in free}))


def claim(
    folder: Path,
    config: dict[str, Any],
    free: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> IO[str]:
    """Locks a run's folder for this process and writes its `config.json`.

    The settings recorded in `config.json`, in the log's seals and in the checkpoints must all agree
    with `config`, otherwise nothing is written. A missing or damaged `config.json` is rewritten.

    Args:
        folder: The folder, which is created if it is missing.
        config: Settings as JSON values. A folder with other settings is an error.
        free: Keys of `config` that may differ from the folder's.
        defaults: The default settings. A run of an earlier version that lacks a setting counts as
            one with its default.

    Returns:
        The lock. Closing it releases the folder to other processes.

    Raises:
        RunError: Another process writes the folder, or it holds a run with other settings or
            files that belong to no run.
    """
    if not (folder / ".lock").exists():
        _check(folder, config, free, defaults or {})
    folder.mkdir(parents=True, exist_ok=True)
    # Object stores (gs://, s3://) do not support file locks.
    lock = io.StringIO() if "://" in str(folder) else open(folder / ".lock", "w")  # noqa: SIM115
    try:
        if isinstance(lock, io.TextIOWrapper):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check(folder, config, free, defaults or {})
        _remove_temporary_files(folder)
        write_json(folder / CONFIG, config)
    except BaseException as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            why = f"Another process is writing {folder}. Wait for it, or give another --out."
            raise RunError(why) from None
        raise
    return lock


def leave_nothing_of_no_run(folder: Path) -> None:
    """Removes what a failed start has written, so that the folder is free for other settings."""
    if not (folder / LOG).exists():
        for name in _STARTED:
            (folder / name).unlink(missing_ok=True)


def check_free(folder: Path, keys: Iterable[str]) -> None:
    """Checks that a folder is missing, empty or a run of this study.

    Args:
        folder: The folder, which may be missing.
        keys: The names of the settings that runs of this study have. A config that lacks most of
            them belongs to another study.

    Raises:
        RunError: The folder holds other files, or a run of another study.
    """
    _check_study(folder, _names(folder), _recorded_settings(folder), {*keys})


def _check_study(
    folder: Path, names: Collection[str], recorded: Recorded, keys: Collection[str]
) -> None:
    others = [where for where, its in recorded if 2 * len(its.keys() & keys) < len(keys)]
    if others:
        found = f"no run of this study according to {others[0]}"
    elif names and not recorded:
        found = f"{CONFIG}, which is damaged," if CONFIG in names else min(names)
        found += f"{' and other files' * (len(names) > 1)} but no run of this study"
    else:
        return
    raise RunError(
        f"{folder} holds {found}; nothing was written. Give another --out, or an empty folder."
    )


def check_group(folder: Path, parts: Iterable[str], keys: Iterable[str]) -> None:
    """Checks, as `check_free`, a folder of several runs, which lie in folders of these names."""
    names, parts = _names(folder), {*parts}
    runs = [name for name in names if name in parts]
    for name in runs:
        check_free(folder / name, keys)
    if not any(_names(folder / name) for name in runs):
        _check_study(folder, {*names} - parts, [], {*keys})


def known_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings of the run in a folder, from its seals or else from `config.json`.

    Raises:
        RunError: Its files record contradictory settings, or none.
        ValueError: The only record is a damaged `config.json`.
        OSError: A file cannot be read.
    """
    recorded = _recorded_settings(folder)
    if not recorded:
        if not (folder / CONFIG).exists():
            raise RunError(f"{folder} holds no run: it has no {CONFIG}. Give the folder of a run.")
        recorded = [(CONFIG, read_settings(folder / CONFIG))]
    (where, settings), *more = reversed(recorded)
    for other, there in more:
        # A setting that only one of them has was added between two versions.
        theirs, ours = with_defaults(there, settings), with_defaults(settings, there)
        if changed := [key for key in changed_settings(theirs, ours) if key in settings]:
            raise RunError(
                f"{folder}: {other} and {where} belong to different runs "
                f"({_differences(changed, there, settings)}). Restore {other} from a backup."
            )
    return with_defaults(settings, more[-1][1] if more else {})


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings in a `config.json` of any version, by today's names, as `read_json`."""
    return current_names(read_json(path))


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of any version by today's names."""

    def current(key: str, value: Any) -> str:
        # Only a list under "optimizer" is renamed. It may also name the one optimizer of a run, or
        # hold the settings that all arms share.
        is_other = key == "optimizer" and not isinstance(value, list)
        return key if is_other else _RENAMED.get(key, key)

    return {current(key, value): value for key, value in settings.items()}


def holds_run(folder: Path) -> bool:
    """Returns whether a folder has the settings of a run, complete or damaged."""
    return (folder / CONFIG).exists() or bool(_recorded_settings(folder))


def _recorded_settings(folder: Path) -> Recorded:
    """Returns the settings that each file of a folder records. Seals come after `config.json`."""
    if not _names(folder):
        return []
    recorded: Recorded = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        recorded.append((CONFIG, read_settings(folder / CONFIG)))
    if (config := sealed.read(folder / LOG).config) is not None:
        recorded.append((f"{LOG}, by its seals,", current_names(config)))
    if (config := manifests.newest_meta(folder / "checkpoints").get("config")) is not None:
        recorded.append(("its newest checkpoint", current_names(config)))
    return recorded


def _check(
    folder: Path, config: dict[str, Any], free: tuple[str, ...], defaults: Mapping[str, Any]
) -> None:
    """Raises a RunError unless a folder is empty or holds a run with this config."""
    here, known = identity(config, free), _recorded_settings(folder)
    _check_study(folder, _names(folder), known, here)
    for where, recorded in known:
        there = with_defaults(recorded, defaults)
        changed = changed_settings(there, here, free)
        if where != CONFIG:  # a seal of an earlier version may have fewer settings
            changed = [key for key in changed if key in recorded]
        if changed:
            raise RunError(
                f"{folder} holds a run with other settings according to {where} "
                f"({_differences(changed, there, here)}). Give another --out, or the same settings."
            )


def _differences(changed: Sequence[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    ours, theirs = (flat({key: x.get(key) for key in changed}) for x in (here, there))
    return "; ".join(
        f"{key}: there {theirs.get(key)!r}, here {ours.get(key)!r}"
        for key in dict.fromkeys([*theirs, *ours])
        if theirs.get(key) != ours.get(key)
    )


def _names(folder: Path) -> list[str]:
    """Returns the file names in a folder, without those that a failed start may have left."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise RunError(f"{folder} is a file; a run is a folder. Give the path of a folder.")
    return sorted(path.name for path in folder.iterdir() if not _LEFT.fullmatch(path.name))


def _remove_temporary_files(folder: Path) -> None:
    """Removes what killed processes have left. The folder must be locked."""
    for path in [] if "://" in str(folder) else Path(folder).iterdir():
        if path.name != ".lock" and _LEFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def changed_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = ()
) -> list[str]:
    """Returns the keys, except those in `free`, under which two configs as JSON values differ.

    Under `rates` only optimizers in both configs are compared. A run that began before an optimizer
    was added has no cell of it and can continue.
    """

    def same(key: str) -> bool:
        there, here = old.get(key), new.get(key)
        if key == "rates" and isinstance(there, dict) and isinstance(here, dict):
            return all(there[name] == here[name] for name in there.keys() & here.keys())
        return there == here

    return sorted(key for key in {*old, *new} if key not in free and not same(key))


def with_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings with the default of each setting that they lack.

    >>> with_defaults({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}, "d": 4})
    {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    found = dict(defaults) | dict(settings)
    for key in settings.keys() & defaults.keys():
        if isinstance(settings[key], dict) and isinstance(defaults[key], dict):
            found[key] = with_defaults(settings[key], defaults[key])
    return found


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings by dotted names, as on the command line."""
    return flatten_dict(dict(settings), sep=".")


def machine() -> dict[str, str]:
    """Returns a description of the machine, the versions and the command of this process."""
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
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
