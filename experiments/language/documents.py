"""Documents: the running Python's standard library, or files that globs name, here or in a bucket.

About one document in ten of the standard library is held out, as in `experiments.corpus`, and of
other texts one in a hundred; a document's name, or its text, alone decides.
"""

import contextlib
import dataclasses
import gzip
import itertools
import pickle
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from etils import epath

from experiments import corpus
from experiments.json_files import loads
from experiments.language import table_reader

HELD_OUT_SHARE = 100  # one document of the user's in so many
# Bytes of a line at most, of what a file may unpack to in any case, and how many times its size.
_LINE, _UNPACKED, _RATIO = 1 << 26, 1 << 26, 100
_TOO_MUCH = (
    f"{{}} unpacks to more than {_RATIO} times its size, which is not plausible for text. If it "
    "is intended, {}."
)
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


class Document(NamedTuple):
    """A text that ends with an end-of-text token; held out for validation, or trained on."""

    text: str
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents in a fixed order.

    Attributes:
        files: that hold them.
        divide: gives a file's text its side; it may cut a text in two documents.
    """

    files: tuple[epath.Path, ...]
    divide: Callable[[epath.Path, str], list[Document]]

    def of(self, file: epath.Path) -> Iterator[Document]:
        """A file's documents, without empty ones."""
        for text in _texts(file):
            yield from (document for document in self.divide(file, text) if document.text)

    def sample(self, characters: int) -> Iterator[str]:
        """Texts of documents to train on, so many characters at most, from all files alike."""
        budget = 0
        for file in self.files:
            budget += characters // len(self.files)
            for document in self.of(file):
                if budget <= 0:
                    break
                if not document.held_out:
                    yield document.text[:budget]
                    budget -= len(document.text[:budget])


def library_name() -> str:
    """Of the text that `standard_library` has."""
    return f"standard library of Python {platform.python_version()}"


def standard_library() -> Documents:
    """The files of the running Python's standard library, each a document.

    Raises:
        ValueError: this Python came without them.
    """
    root = epath.Path(sysconfig.get_path("stdlib"))
    held_out = {root / name: side for name, side in corpus.library_files(Path(root))}
    if not held_out:
        raise ValueError(
            "This Python installation has no source of the standard library; give --data.files."
        )
    return Documents(tuple(held_out), lambda file, text: [Document(text, held_out[file])])


def from_files(files: tuple[epath.Path, ...]) -> Documents:
    """The documents of text files; reads them until it is sure that some are for each side.

    Where a text's hash holds none out, or all, the smallest hash is held out; the end of the text
    where there is but one.

    Raises:
        ValueError: there is no text in them, or one is damaged.
        OSError: one cannot be read.
    """
    hashes: set[int] = set()
    sides: set[bool] = set()
    for text in itertools.chain.from_iterable(map(_texts, files)):
        hashes.add(_hash(text))
        sides.add(_is_held_out(text))
        if len(sides) == 2:
            return Documents(files, lambda _, text: [Document(text, _is_held_out(text))])
    if not hashes:
        raise ValueError(f"The files of --data.files, {files[0]} first, contain no text.")
    if len(hashes) == 1:
        return Documents(files, lambda _, text: _cut(text))
    smallest = min(hashes)
    return Documents(files, lambda _, text: [Document(text, _hash(text) == smallest)])


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def _is_held_out(text: str) -> bool:
    return _hash(text) % HELD_OUT_SHARE == 0


def _cut(text: str) -> list[Document]:
    """The text, and its last tenth, from a line's start where one is near."""
    tenth = len(text) - len(text) // corpus.VALIDATION_SHARE
    cut = text.find("\n", tenth, len(text) - 1) + 1 or tenth
    return [Document(text[:cut], False), Document(text[cut:], True)]


def matching(patterns: tuple[str, ...], suffixes: tuple[str, ...]) -> tuple[epath.Path, ...]:
    """Files that globs name, each once; those of a glob in the order of their names.

    Raises:
        ValueError: a glob names none, or one without such a suffix, or needs a package.
    """
    found: dict[epath.Path, None] = {}
    for pattern in patterns:
        path = epath.Path(pattern).expanduser()
        try:
            files = [path] if path.exists() else sorted(path.parent.glob(path.name))
        except (ImportError, NotImplementedError) as error:
            raise ValueError(f"--data.files {pattern} cannot be listed: {error}") from None
        if not files:
            raise ValueError(f"--data.files {pattern} matches no file.")
        found.update(dict.fromkeys(files))
    for file in found:
        if not file.name.endswith(suffixes):
            raise ValueError(
                f"--data.files names {file}, which must end in one of {', '.join(suffixes)}."
            )
    return tuple(found)


def fingerprint(file: epath.Path) -> str:
    """Another one when the file is another: made of its path, size, times, or its bucket's tag.

    Of a link it is that of the file that it leads to.
    """
    system, path = fsspec.url_to_fs(str(file if "://" in str(file) else file.resolve()))
    return system.ukey(path)


def _texts(file: epath.Path) -> Iterator[str]:
    """A file's texts that are not empty."""
    read = next(read for suffix, read in _READERS.items() if file.name.endswith(suffix))
    try:
        yield from filter(None, read(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at {error.start}.") from None


def _whole(file: epath.Path) -> Iterator[str]:
    yield file.read_bytes().decode()


def lines(file: epath.Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a .jsonl or .jsonl.gz that are not blank, each with its number.

    Raises:
        ValueError: the file is damaged, has a line that is too long for one document, or unpacks to
            so many times its size that it is no text.
        OSError: it cannot be read.
    """
    packed = file.suffix == ".gz"
    left = max(_UNPACKED, _RATIO * file.stat().length)
    try:
        with file.open("rb") as raw, gzip.open(raw) if packed else raw as text:
            for number in itertools.count(1):
                line = text.readline(_LINE + 1)
                if not line:
                    return
                if len(line) > _LINE:
                    raise ValueError(f"{file}:{number} has more than {_LINE >> 20} MB.")
                left -= len(line)
                if packed and left < 0:
                    raise ValueError(_TOO_MUCH.format(file, "unpack it and give the .jsonl"))
                if line.strip():
                    yield number, line
    except _DAMAGE as error:
        raise ValueError(f"{file} is damaged: {error}.") from None


def _lines(file: epath.Path) -> Iterator[str]:
    for number, line in lines(file):
        try:
            text = loads(line)["text"]
            text.encode()  # JSON may spell half a character, which is no text
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{file}:{number} must be a JSON object whose "text" is Unicode text.'
            ) from None
        yield text


def table(file: epath.Path, columns: Set[str]) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet, with those of the columns that it has.

    Raises:
        ValueError: it is damaged, has none of the columns, or expands to so much that it is no
            text.
    """
    left = max(_UNPACKED, _RATIO * file.stat().length)
    with (
        _copied_here(file) as here,
        subprocess.Popen(
            [sys.executable, "-P", table_reader.__file__, str(here), *sorted(columns)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for number in itertools.count(1):
                header = process.stdout.read(table_reader.LENGTH.size)
                if not header and process.wait() == 0:
                    return
                whole = len(header) == table_reader.LENGTH.size
                size = table_reader.LENGTH.unpack(header)[0] if whole else 0
                if size > _LINE:
                    raise ValueError(f"{file}: row {number} has more than {_LINE >> 20} MB.")
                left -= size
                if left < 0:
                    raise ValueError(_TOO_MUCH.format(file, "write it as .jsonl"))
                packed = process.stdout.read(size)
                if not packed or len(packed) < size:
                    raise ValueError(
                        f"{file} cannot be read: row {number} is damaged, or requires more than "
                        f"{table_reader.MEMORY >> 20} MB."
                    )
                row = pickle.loads(packed)  # of our own process
                if isinstance(row, str):
                    raise ValueError(f"{file} {row.removesuffix('.')}.")
                yield row
        finally:
            process.kill()


@contextlib.contextmanager
def _copied_here(file: epath.Path) -> Iterator[Path]:
    """A file of a bucket is copied to one that is deleted in the end; another is itself."""
    if "://" not in str(file):
        yield Path(file)
        return
    with tempfile.NamedTemporaryFile(suffix=file.suffix) as copy:
        with file.open("rb") as raw:
            shutil.copyfileobj(raw, copy, 1 << 20)
        copy.flush()
        yield Path(copy.name)


def _column(file: epath.Path) -> Iterator[str]:
    for row in table(file, {"text"}):
        if not isinstance(row["text"], str):
            raise ValueError(f'{file} has {row["text"]!r} in its column "text".')
        yield row["text"]


_READERS: dict[str, Callable[[epath.Path], Iterator[str]]] = {
    ".txt": _whole,
    ".py": _whole,
    ".jsonl": _lines,
    ".jsonl.gz": _lines,
    ".parquet": _column,
}
SUFFIXES = tuple(_READERS)
