"""Training text as bytes: the standard library of the running Python, or a file."""

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
VALIDATION_SHARE = 10  # one byte, or file, in ten is for validation
_TESTS = {"test", "tests", "idle_test"}
_ALIKE = "encodings/"  # near copies of each other, so validating on some would leak


class Corpus(NamedTuple):
    """A text, split into bytes for training and for validation.

    Attributes:
        name: The source of the text.
        train, validation: The bytes, `(bytes,)` uint8.
        sha256: The digest of the training bytes followed by the validation bytes.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    sha256: str

    def as_json(self) -> dict[str, str | int]:
        """Returns the description that a run records."""
        return {
            "name": self.name,
            "train_bytes": len(self.train),
            "validation_bytes": len(self.validation),
            "sha256": self.sha256,
        }


def load(text: Path | None = None, limit: int | None = None) -> Corpus:
    """Returns the corpus of a file, or by default of the standard library.

    Args:
        text: The file. Its last tenth, from the start of a line, is for validation.
        limit: The number of bytes to use, from the beginning. A tenth is for validation.

    Raises:
        ValueError: The text for training or for validation is empty.
        OSError: The file cannot be read.
    """
    if text is None:
        return standard_library(limit)
    with open(text, "rb") as file:
        found = file.read() if limit is None else file.read(limit)
    cut = found.find(b"\n", len(found) - len(found) // VALIDATION_SHARE) + 1
    return _corpus(text.name, found[:cut], found[cut:])


@functools.cache
def standard_library(limit: int | None = None, root: Path | None = None) -> Corpus:
    """Returns the source of Python's standard library, without tests: about ten megabytes.

    Files are sorted by name, and about every tenth is for validation. A hash of its name decides
    this for each file, so that it does not depend on the version of Python. The tables of
    encodings, which are near copies of each other, are all for training.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    train, validation = io.BytesIO(), io.BytesIO()
    for name, held_out in library_files(root):
        (validation if held_out else train).write((root / name).read_bytes())
    if not train.tell():
        raise ValueError(
            "This Python installation lacks the source of the standard library; give --text FILE."
        )
    tenth = None if limit is None else limit // VALIDATION_SHARE
    return _corpus(
        f"standard library of Python {platform.python_version()}",
        train.getvalue()[: None if limit is None else limit - tenth],
        validation.getvalue()[:tenth],
    )


def library_files(root: Path) -> list[tuple[str, bool]]:
    """Returns the files of the library, sorted by name, and whether each is for validation.

    The files do not depend on the machine: they exclude tests, installed packages and settings of
    the build.
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


def _corpus(name: str, train: bytes, validation: bytes) -> Corpus:
    if not (train and validation):
        raise ValueError(
            f"{name} has {len(train)} bytes for training and {len(validation)} for validation; "
            "neither may be empty. Use more bytes, or a longer text with several lines."
        )
    digest = hashlib.sha256(train + validation).hexdigest()
    arrays = (np.frombuffer(side, np.uint8) for side in (train, validation))
    return Corpus(name, *arrays, digest)
