"""Documents to train on: Python's standard library, or local or remote files given by globs.

About one document in ten of the standard library is held out, as in `experiments.corpus`, and one
in a hundred of other texts. The choice depends only on a document's name or its text.
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

HELD_OUT_SHARE = 100  # one in this many of the user's documents
# Maximum bytes of a line; a file may unpack to _UNPACKED bytes or _RATIO times its size.
_LINE, _UNPACKED, _RATIO = 1 << 26, 1 << 26, 100
_TOO_MUCH = (
    f"{{}} unpacks to more than {_RATIO} times its size, which is not plausible for text. If it "
    "is intended, {}."
)
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


class Document(NamedTuple):
    """A text to train on or to hold out. An end-of-text token follows it."""

    text: str
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents in a fixed order.

    Attributes:
        files: The files that contain them.
        divide: Decides whether a file's text is held out. It may cut the text into two documents.
    """

    files: tuple[epath.Path, ...]
    divide: Callable[[epath.Path, str], list[Document]]

    def of(self, file: epath.Path) -> Iterator[Document]:
        """Yields the non-empty documents of a file."""
        for text in _texts(file):
            yield from (document for document in self.divide(file, text) if document.text)

    def sample(self, characters: int) -> Iterator[str]:
        """Yields training texts with at most `characters` in all, evenly from all files."""
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
    """Returns the name of the text that `standard_library` returns."""
    return f"standard library of Python {platform.python_version()}"


def standard_library() -> Documents:
    """Returns the source files of the running Python's standard library, each as a document.

    Raises:
        ValueError: If this Python installation has no source files.
    """
    root = epath.Path(sysconfig.get_path("stdlib"))
    held_out = {root / name: side for name, side in corpus.library_files(Path(root))}
    if not held_out:
        raise ValueError(
            "This Python installation has no source of the standard library; give --data.files."
        )
    return Documents(tuple(held_out), lambda file, text: [Document(text, held_out[file])])


def from_files(files: tuple[epath.Path, ...]) -> Documents:
    """Returns the documents of text files, of which some are held out and some are not.

    The hash of a text decides. If that would hold out no text or all of them, the text with the
    smallest hash is held out; if there is only one text, its end is.

    Raises:
        ValueError: If the files contain no text, or one is damaged.
        OSError: If a file cannot be read.
    """
    hashes: set[int] = set()
    sides: set[bool] = set()
    for text in itertools.chain.from_iterable(map(_texts, files)):
        hashes.add(_hash(text))
        sides.add(_is_held_out(text))
        if len(sides) == 2:
            return Documents(files, lambda _, text: [Document(text, _is_held_out(text))])
    if not hashes:
        raise ValueError(f"The files of --data.files, {files[0]} first, must contain text.")
    if len(hashes) == 1:
        return Documents(files, lambda _, text: _cut(text))
    smallest = min(hashes)
    return Documents(files, lambda _, text: [Document(text, _hash(text) == smallest)])


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def _is_held_out(text: str) -> bool:
    return _hash(text) % HELD_OUT_SHARE == 0


def _cut(text: str) -> list[Document]:
    """Cuts off the last tenth of a text as held out, at the start of a line if there is one."""
    tenth = len(text) - len(text) // corpus.VALIDATION_SHARE
    cut = text.find("\n", tenth, len(text) - 1) + 1 or tenth
    return [Document(text[:cut], False), Document(text[cut:], True)]


def matching(patterns: tuple[str, ...], suffixes: tuple[str, ...]) -> tuple[epath.Path, ...]:
    """Returns the files that match globs, without repetition, sorted by name within a glob.

    Raises:
        ValueError: If a glob matches no file, matches a file without one of the suffixes, or
            requires a package that is not installed.
    """
    matched: dict[epath.Path, None] = {}
    for pattern in patterns:
        path = epath.Path(pattern).expanduser()
        try:
            files = [path] if path.exists() else sorted(path.parent.glob(path.name))
        except (ImportError, NotImplementedError) as error:
            raise ValueError(f"--data.files {pattern} cannot be listed: {error}.") from None
        if not files:
            raise ValueError(f"--data.files {pattern} matches no file; give other paths.")
        matched.update(dict.fromkeys(files))
    for file in matched:
        if not file.name.endswith(suffixes):
            raise ValueError(
                f"--data.files names {file}, which must end in one of {', '.join(suffixes)}."
            )
    return tuple(matched)


def fingerprint(file: epath.Path) -> str:
    """Returns a text that changes with a file, made of its path, size and times or its remote tag.

    A link has the fingerprint of the file that it points to.
    """
    system, path = fsspec.url_to_fs(str(file if "://" in str(file) else file.resolve()))
    return system.ukey(path)


def _texts(file: epath.Path) -> Iterator[str]:
    """Yields the non-empty texts of a file."""
    read = next(read for suffix, read in _READERS.items() if file.name.endswith(suffix))
    try:
        yield from filter(None, read(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error.reason} at byte {error.start}.") from None


def _whole(file: epath.Path) -> Iterator[str]:
    yield file.read_bytes().decode()


def lines(file: epath.Path) -> Iterator[tuple[int, bytes]]:
    """Yields the numbers and contents of the non-blank lines of a .jsonl or .jsonl.gz file.

    Raises:
        ValueError: If the file is damaged, has a line that is too long, or unpacks to implausibly
            many bytes.
        OSError: If it cannot be read.
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
                    raise ValueError(f"{file}:{number} exceeds {_LINE >> 20} MB; split it.")
                left -= len(line)
                if packed and left < 0:
                    raise ValueError(_TOO_MUCH.format(file, "unpack it and give the .jsonl"))
                if line.strip():
                    yield number, line
    except _DAMAGE as error:
        raise ValueError(f"{file} is damaged ({error}); write or download it again.") from None


def _lines(file: epath.Path) -> Iterator[str]:
    for number, line in lines(file):
        try:
            text = loads(line)["text"]
            text.encode()  # JSON can contain half a surrogate pair, which is not valid text
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{file}:{number} must be a JSON object whose "text" is Unicode text.'
            ) from None
        yield text


def table(file: epath.Path, columns: Set[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a .parquet file, with those of the columns that it has.

    Raises:
        ValueError: If it is damaged, has none of the columns, or expands to implausibly many bytes.
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
                    raise ValueError(f"{file}: row {number} exceeds {_LINE >> 20} MB; split it.")
                left -= size
                if left < 0:
                    raise ValueError(_TOO_MUCH.format(file, "write it as .jsonl"))
                packed = process.stdout.read(size)
                if not packed or len(packed) < size:
                    raise ValueError(
                        f"{file} cannot be read: row {number} is damaged, or requires more than "
                        f"{table_reader.MEMORY >> 20} MB."
                    )
                row = pickle.loads(packed)  # trusted, since our own process wrote it
                if isinstance(row, str):
                    raise ValueError(f"{file} {row.removesuffix('.')}.")
                yield row
        finally:
            process.kill()


@contextlib.contextmanager
def _copied_here(file: epath.Path) -> Iterator[Path]:
    """Gives the path of a local file, or of a temporary copy of a remote one."""
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
            raise ValueError(f'{file}: the column "text" must contain texts; got {row["text"]!r}.')
        yield row["text"]


_READERS: dict[str, Callable[[epath.Path], Iterator[str]]] = {
    ".txt": _whole,
    ".py": _whole,
    ".jsonl": _lines,
    ".jsonl.gz": _lines,
    ".parquet": _column,
}
SUFFIXES = tuple(_READERS)
