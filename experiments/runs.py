"""A run's folder: whose it is, its config, and its log of finished pieces of work."""

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

from experiments import sealed
from experiments.json_files import read_json, write_json, write_text
from experiments.language import manifests

__all__ = ["Run", "RunError", "claim", "machine", "read_json", "write_json", "write_text"]

CONFIG, LOG = "config.json", "metrics.jsonl"
_STARTED = CONFIG, "tokenizer.json"  # what a start writes before its log
# What a kill, or a start that failed, may leave in a folder that is free for any run.
_LEFT = re.compile(r"\.lock|\.\w+\.jsonl?\.[a-z0-9_]{8}")


# Settings of earlier versions, by the names that they have today.
_RENAMED = {
    "arms": "optimizers",
    "optimizer": "optimizers",
    "final": "final_lr_fraction",
    "patience": "max_nonfinite_steps",
}

# Settings, and which of a folder's files tells them.
Told = list[tuple[str, dict[str, Any]]]


class RunError(Exception):
    """A folder that cannot be used as asked; the message says why and what to do."""

    exit_code = 2  # of a command


class Run:
    """A folder that one process at a time writes, and that any kill leaves usable.

    `metrics.jsonl` is the source of truth, a log of `experiments.sealed`. A finished piece of work
    is appended to it: its records, and the seal with its outcome as `cell`. Opening a folder keeps
    the whole pieces, and cuts away the others, which are to be done again; a log with damage is
    kept beside it as `metrics.jsonl.damaged`.

    Args:
        folder: made if missing.
        config: JSON-able settings; a folder that holds others is refused.
        grid: keys of `config` that may differ from the folder's: they say which pieces are wanted,
            not what a piece is.
        defaults: settings that a folder of an earlier version may lack, as in `claim`.

    Attributes:
        finished: the outcomes, oldest first.
        notes: what was cut away and why, to be told.

    Raises:
        RunError: another process writes the folder, it holds a run with other settings, or none.
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
        self._lock = claim(folder, config, grid, other="another --out", defaults=defaults)
        try:
            self.finished, self._sealed, self.notes = self._recover()
        except BaseException:
            self.close()
            raise

    def extend(self, pieces: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]]) -> None:
        """Adds finished pieces of work, durably: after this returns no kill loses them."""
        text, count = self._lines(pieces, self._sealed)
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._sealed = count
        self.finished += [cell for _, cell in pieces]

    def close(self) -> None:
        """Lets another process have the folder."""
        self._lock.close()

    def _lines(
        self, pieces: Iterable[tuple[list[dict[str, Any]], dict[str, Any]]], before: int
    ) -> tuple[str, int]:
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
            notes.append(
                f"{dropped} lines of an unfinished or damaged training were removed; it will be "
                "repeated."
            )
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


def finished_pieces(log: sealed.Lines) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Records and outcome of the pieces of work that a log has whole, oldest first."""
    return [
        (block.records, block.seal["cell"])
        for block in log.blocks
        if not block.lost and "cell" in block.seal
    ]


def identity(config: Mapping[str, Any], free: Sequence[str] = ()) -> dict[str, Any]:
    """What of a config says which run it is, as JSON gives it back."""
    return json.loads(json.dumps({key: x for key, x in config.items() if key not in free}))


def claim(
    folder: Path,
    config: dict[str, Any],
    free: tuple[str, ...] = (),
    *,
    other: str,
    defaults: Mapping[str, Any] | None = None,
) -> IO[str]:
    """Makes a run's folder this process's own, and writes its `config.json`.

    What the folder says of its run, `config.json` and the seals of its log and of its checkpoints,
    must agree with `config`; one that is lost or damaged is made again. Before that is sure nothing
    is written.

    Args:
        folder: made if missing.
        config: JSON-able settings; a folder that holds others is refused.
        free: keys of `config` that may differ from the folder's.
        other: what an error advises to give.
        defaults: the default settings; a folder of an earlier version that lacks one was run with
            its default.

    Returns:
        The lock; closing it lets another process have the folder.

    Raises:
        RunError: another process writes the folder, it holds a run with other settings, or none.
    """
    if not (folder / ".lock").exists():
        _check(folder, config, free, other, defaults)
    folder.mkdir(parents=True, exist_ok=True)
    # Object stores (gs://, s3://) have no locks.
    lock = io.StringIO() if "://" in str(folder) else open(folder / ".lock", "w")  # noqa: SIM115
    try:
        if isinstance(lock, io.TextIOWrapper):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check(folder, config, free, other, defaults)
        _sweep(folder)
        write_json(folder / CONFIG, config)
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
    if not (folder / LOG).exists():
        for name in _STARTED:
            (folder / name).unlink(missing_ok=True)


def check_free(folder: Path, keys: Iterable[str], *, other: str) -> None:
    """Refuses a folder that has files and is no run of a study, before any work.

    Args:
        folder: which may be missing.
        keys: settings of the study's runs; a config that lacks most of them is another's.
        other: what an error advises to give.

    Raises:
        RunError: it is not free.
    """
    _refuse_strangers(folder, _names(folder), _told(folder), keys, other)


def _refuse_strangers(
    folder: Path, names: Collection[str], told: Told, keys: Iterable[str], other: str
) -> None:
    keys = {*keys}
    if names and not told:
        found = f"{CONFIG}, which is damaged," if CONFIG in names else min(names)
        raise RunError(
            f"{folder} holds {found} {'and other files ' * (len(names) > 1)}but no run of this "
            f"study; nothing was written. Give {other}, or an empty folder."
        )
    for where, settings in told:
        if 2 * len(settings.keys() & keys) < len(keys):
            raise RunError(
                f"{folder} holds no run of this study according to {where}; nothing was "
                f"written. Give {other}, or an empty folder."
            )


def check_group(folder: Path, parts: Iterable[str], keys: Iterable[str], *, other: str) -> None:
    """`check_free` for a folder that has a run in each of some folders, and their report.

    Args:
        folder: which may be missing.
        parts: names of the folders that runs have.
        keys, other: as of `check_free`.

    Raises:
        RunError: it is not free.
    """
    names, parts = _names(folder), {*parts}
    runs = [name for name in names if name in parts]
    for name in runs:
        check_free(folder / name, keys, other=other)
    if not any(_names(folder / name) for name in runs):
        _refuse_strangers(folder, {*names} - parts, [], keys, other)


def known_settings(folder: Path) -> dict[str, Any]:
    """What the run in a folder was told, by its seals, or else its `config.json`.

    Raises:
        RunError: these contradict each other, or there are none.
        ValueError: there is only a damaged `config.json`.
        OSError: a file cannot be read.
    """
    told = _told(folder)
    if not told:
        if not (folder / CONFIG).exists():
            raise RunError(f"{folder} holds no run: it has no {CONFIG}.")
        told = [(CONFIG, read_settings(folder / CONFIG))]
    (where, settings), *more = reversed(told)
    for other, there in more:
        # A setting that only one of them has was added between two versions.
        known, recorded = with_defaults(settings, there), with_defaults(there, settings)
        if changed := [key for key in changed_settings(recorded, known) if key in settings]:
            raise RunError(
                f"{folder}: {other} and {where} belong to different runs "
                f"({_differences(changed, there, settings)}). Restore {other} from a backup."
            )
    return with_defaults(settings, more[-1][1] if more else {})


def read_settings(path: Path) -> dict[str, Any]:
    """A `config.json` of any version.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    return current_names(read_json(path))


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of any version by the names that they have today."""

    def current(key: str, value: Any) -> str:
        # Under "optimizer" is also the one that a run trains with, or what all arms share.
        is_other = key == "optimizer" and not isinstance(value, list)
        return key if is_other else _RENAMED.get(key, key)

    return {current(key, value): value for key, value in settings.items()}


def holds_run(folder: Path) -> bool:
    """Whether a folder has a run's settings, whole or damaged."""
    return (folder / CONFIG).exists() or bool(_told(folder))


def _told(folder: Path) -> Told:
    """The settings that a folder's files tell, and which file each is from; seals come last."""
    if not _names(folder):
        return []
    told: Told = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        told.append((CONFIG, read_settings(folder / CONFIG)))
    if (config := sealed.read(folder / LOG).config) is not None:
        told.append((f"{LOG}, by its seals,", current_names(config)))
    if (config := manifests.newest_meta(folder / "checkpoints").get("config")) is not None:
        told.append(("its newest checkpoint", current_names(config)))
    return told


def _check(
    folder: Path,
    config: dict[str, Any],
    free: tuple[str, ...],
    other: str,
    defaults: Mapping[str, Any] | None,
) -> None:
    """Raises a RunError unless what a folder holds is a run with this config, or nothing."""
    here, told = identity(config, free), _told(folder)
    _refuse_strangers(folder, _names(folder), told, here, other)
    for where, recorded in told:
        there = with_defaults(recorded, defaults or {})
        changed = changed_settings(there, here, free)
        if where != CONFIG:  # a seal of an earlier version may know fewer settings
            changed = [key for key in changed if key in recorded]
        if changed:
            raise RunError(
                f"{folder} holds a run with other settings according to {where} "
                f"({_differences(changed, there, here)}). Give {other}, or the same settings."
            )


def _differences(changed: Sequence[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    ours, theirs = (flat({key: x.get(key) for key in changed}) for x in (here, there))
    return "; ".join(
        f"{key}: there {theirs.get(key)!r}, here {ours.get(key)!r}"
        for key in dict.fromkeys([*theirs, *ours])
        if theirs.get(key) != ours.get(key)
    )


def _names(folder: Path) -> list[str]:
    """What is in a folder, without what a start that failed may have left there."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise RunError(f"{folder} is a file; a run is a folder. Give the path of a folder.")
    return sorted(path.name for path in folder.iterdir() if not _LEFT.fullmatch(path.name))


def _sweep(folder: Path) -> None:
    """Removes the temporary files of processes that were killed; the folder is claimed."""
    if "://" in str(folder):
        return
    for path in Path(folder).iterdir():
        if path.name != ".lock" and _LEFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


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


def with_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, with the default of each setting that they lack.

    >>> with_defaults({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}, "d": 4})
    {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    found = dict(defaults) | dict(settings)
    for key in settings.keys() & defaults.keys():
        if isinstance(settings[key], dict) and isinstance(defaults[key], dict):
            found[key] = with_defaults(settings[key], defaults[key])
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names that they have on the command line."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


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
