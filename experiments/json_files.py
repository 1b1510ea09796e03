"""Reads JSON files from any source safely, replaces files atomically, and computes digests."""

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

LARGEST = 1 << 28  # largest size of a JSON file, in bytes


def loads(text: str | bytes | bytearray) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: The text is not JSON, is not UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: Any) -> dict[str, Any]:
    """Returns the object in a JSON file, which may be in gs:// or s3://.

    Raises:
        ValueError: The file holds no JSON object; the message names the file.
        OSError: The file cannot be read.
    """
    text = bytearray()
    with path.open("rb") as file:
        while len(text) <= LARGEST and (part := file.read(1 << 20)):
            text += part
    if len(text) > LARGEST:
        raise ValueError(f"{path} must have at most {LARGEST >> 20} MB, since it is a JSON file.")
    try:
        value = loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: invalid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}.")
    return value


def write_bytes(path: Any, content: bytes) -> None:
    """Replaces a file atomically: readers see the old or the new content, even after a kill."""
    if "://" in str(path):  # object stores replace files atomically themselves
        path.write_bytes(content)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Any, text: str) -> None:
    """Replaces a file by text atomically, as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Any, value: Any) -> None:
    """Replaces a file by JSON atomically. Numbers must be finite, as JSON has no others."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        name, number = next(_not_finite(value))
        raise ValueError(
            f"{path} cannot be written: {name} is {number}, but JSON has only finite numbers."
        ) from None
    write_text(path, text + "\n")


def _not_finite(value: Any, name: str = "") -> Any:
    """Yields the names and values of the numbers in a JSON value that are not finite."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(item, dict | list | tuple):
            yield from _not_finite(item, inner)
        elif isinstance(item, float) and not math.isfinite(item):
            yield inner, item


def digest(value: Any) -> str:
    """Returns the sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Any) -> str:
    """Returns the sha256 of a file, which may be in gs:// or s3://."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
