"""Text to train on: the running Python's own standard library, or a file, as bytes."""

import functools
import hashlib
import io
import platform
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

VOCABULARY = 256
VALIDATION_SHARE = 10  # one byte, or file, in so many
_TESTS = {"test", "tests", "idle_test"}
_ALIKE = "encodings/"  # its files are near copies of each other: held out, they would be known


class Corpus(NamedTuple):
    """Bytes to train on and bytes to validate on, `(bytes,)` uint8.

    Attributes:
        name: where the text is from.
        sha256: digest of all its bytes, training before validation.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    sha256: str

    def as_json(self) -> dict[str, str | int]:
        """What a run records of it."""
        return {
            "name": self.name,
            "train_bytes": len(self.train),
            "validation_bytes": len(self.validation),
            "sha256": self.sha256,
        }


def load(text: Path | None = None, limit: int | None = None) -> Corpus:
    """A file, or by default the standard library.

    Args:
        text: the file; its last tenth, from a line's start, is for validation.
        limit: take no more bytes than this, from the beginning, a tenth of them for validation.

    Raises:
        ValueError: there is no text, or none for one of the two sides.
        OSError: the file cannot be read.
    """
    return standard_library(limit) if text is None else one_file(text, limit)


def standard_library(limit: int | None = None) -> Corpus:
    """The source of the running Python's standard library, without its tests: some ten megabytes.

    Files are in the order of their names, and about every tenth is for validation; a file's name
    alone decides, so that it stays on its side in every version of Python. The tables of encodings,
    which are near copies of each other, are all for training.
    """
    return _standard_library(Path(sysconfig.get_path("stdlib")), limit)


@functools.cache
def _standard_library(root: Path, limit: int | None) -> Corpus:
    train, validation = io.BytesIO(), io.BytesIO()
    for name, held_out in library_files(root):
        (validation if held_out else train).write((root / name).read_bytes())
    if not train.tell():
        raise ValueError(
            "This Python installation has no source of the standard library; give --text FILE."
        )
    tenth = None if limit is None else limit // VALIDATION_SHARE
    return _corpus(
        f"standard library of Python {platform.python_version()}",
        train.getvalue()[: None if limit is None else limit - tenth],
        validation.getvalue()[:tenth],
    )


def library_files(root: Path) -> list[tuple[str, bool]]:
    """The library's own files, in order of their names, and whether each is for validation.

    They are the same on every machine: no tests, no installed packages, no build's settings.
    """
    modules = sys.stdlib_module_names - _TESTS
    paths = (
        path for name in modules for path in (root / f"{name}.py", *(root / name).rglob("*.py"))
    )
    names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
    return [
        (name, not name.startswith(_ALIKE) and zlib.crc32(name.encode()) % VALIDATION_SHARE == 0)
        for name in names
        if not _TESTS & set(name.removesuffix(".py").split("/"))
    ]


def one_file(path: Path, limit: int | None = None) -> Corpus:
    """Any file as a corpus."""
    with open(path, "rb") as file:
        text = file.read() if limit is None else file.read(limit)
    cut = text.find(b"\n", len(text) - len(text) // VALIDATION_SHARE) + 1
    return _corpus(path.name, text[:cut], text[cut:])


def _corpus(name: str, train: bytes, validation: bytes) -> Corpus:
    if not (train and validation):
        raise ValueError(
            f"{name} has {len(train)} bytes for training and {len(validation)} for validation; "
            "both must have some. Use more bytes, or a longer text of several lines."
        )
    digest = hashlib.sha256(train + validation).hexdigest()
    arrays = (np.frombuffer(side, np.uint8) for side in (train, validation))
    return Corpus(name, *arrays, digest)
