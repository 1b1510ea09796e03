"""Makes instructions from the installed packages: write the body of a documented Python function.

The sources are the standard library and the packages installed beside it, which are parsed and
never imported. `rows.json` lists the digests of the functions that are the same in fresh
environments of Python 3.11 and 3.13. These are the default rows, so that neither further packages
nor another version of Python change them; a release that edits a function takes its row away, which
is counted. `python -m experiments.finetune.instructions FILE`, run in one environment after
another, makes such a list.
"""

import ast
import gc
import gzip
import importlib.metadata
import itertools
import json
import platform
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments import cache, corpus
from experiments.json_files import digest, read_json, write_json

FILE = "instructions.jsonl.gz"
LIST = Path(__file__).with_name("rows.json")
INSTALLED = "installed"  # as --data, all functions of what is installed
_DIGITS = 8  # of a row's digest in the list
_FORMAT = 2  # version of the cache; changing it discards cached rows
_GROUP = 500  # maximum rows of a top-level module, so that no package dominates
_WORDS = 5  # minimum words of a docstring
_DOCSTRING, _BODY = 800, 1200  # maximum characters
_LINES = range(2, 31)  # number of lines of a body
_SKIPPED = {  # folders of tests, and of copies of other packages
    *("test", "tests", "_test", "_tests", "testing", "_testing", "idle_test"),
    *("_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"),
}


_FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


class Instructions(NamedTuple):
    """A file of instructions."""

    path: Path  # of a .jsonl.gz; each row has `messages`, and its top-level module as `group`
    rows: dict[str, int]  # how many of each top-level module
    packages: dict[str, str]  # versions of the installed distributions and of Python
    sha256: str  # of all rows
    absent: int  # listed rows that the installed packages lack


def prepare(
    on_wait: Callable[[], None] = lambda: None, *, listed: Path | None = LIST
) -> Instructions:
    """Makes the instructions of the installed packages, or takes them from the cache.

    No two rows have the same docstring or body up to white space, so that copies of a function in
    other modules are omitted.

    Args:
        listed: The list of the rows to take. None means all functions of what is installed.
        on_wait: Called repeatedly while another process makes the same rows. It may raise to give
            up.

    Raises:
        ValueError: If no installed package has one of these functions.
        OSError: If the cache cannot be written.
    """
    roots = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    installed = importlib.metadata.distributions(path=roots)
    packages = {item.name: item.version for item in installed if item.name}
    packages = {"Python": platform.python_version(), **dict(sorted(packages.items()))}
    digests = {} if listed is None else read_json(listed)
    limits = [_GROUP, _WORDS, _DOCSTRING, _BODY, _LINES.start, _LINES.stop, sorted(_SKIPPED)]
    key = digest([_FORMAT, packages, roots, limits, digests])[:16]
    folder = cache.home("finetune") / f"instructions-{key}"

    def write(partial: Path) -> dict[str, Any]:
        files = _files(Path(sysconfig.get_path("stdlib")), map(Path, roots))
        gc.disable()  # collections would take a third of the time and find nothing
        try:
            rows = list(from_files(files) if listed is None else from_list(files, digests))
        finally:
            gc.enable()
        if not rows:
            raise ValueError(
                "No installed package has the source code of one of the default rows; give --data."
            )
        with gzip.GzipFile(partial / FILE, "wb", compresslevel=5, mtime=0) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        groups = Counter(row["group"] for row in rows)
        return {"rows": dict(groups), "sha256": digest(rows)}

    with cache.alone(folder, on_wait):
        meta = cache.read(folder) or cache.make(folder, write)
    absent = sum(len(own) // _DIGITS for own in digests.values()) - sum(meta["rows"].values())
    return Instructions(
        folder / FILE, meta["rows"], packages, meta["sha256"], absent if listed else 0
    )


def _files(library: Path, roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Yields files with their top-level modules: the library's first, then those of packages."""
    named = [(name, library / name) for name, _ in corpus.library_files(library)]
    for root in roots:
        sources = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
        named += sorted(sources)
    for name, path in named:
        *folders, module = name.removesuffix(".py").split("/")
        if _SKIPPED.isdisjoint(folders) and not module.startswith(("test_", "conftest")):
            yield (folders or [module])[0], path


def from_files(files: Iterable[tuple[str, Path]]) -> Iterator[dict[str, Any]]:
    """Yields the rows of Python files, each with its top-level module as group, by group.

    The files of a group are shuffled, so that its rows are not from the first folders only.
    """
    groups: dict[str, list[Path]] = {}
    for group, path in files:
        groups.setdefault(group, []).append(path)
    known: set[str] = set()

    def of(paths: list[Path]) -> Iterator[dict[str, Any]]:
        for docstring, body, row in itertools.chain.from_iterable(map(_functions, paths)):
            if known.isdisjoint((docstring, body)):
                known.update((docstring, body))
                yield row

    for group, paths in groups.items():
        paths.sort(key=lambda path: (zlib.crc32("/".join(path.parts[-3:]).encode()), path))
        yield from (row | {"group": group} for row in itertools.islice(of(paths), _GROUP))


def from_list(
    files: Iterable[tuple[str, Path]], digests: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of Python files that are in a list, in its order.

    Args:
        files: The files with their top-level modules.
        digests: By module, the digests of its rows, one after another.
    """
    wanted = {group: _split(own) for group, own in digests.items()}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for group, path in files:
        if group in wanted:
            for _, _, row in _functions(path):
                found.setdefault((group, _digest(row)), row | {"group": group})
    for group, own in wanted.items():
        yield from (found[group, digest] for digest in own if (group, digest) in found)


def _split(digests: str) -> list[str]:
    return [digests[place : place + _DIGITS] for place in range(0, len(digests), _DIGITS)]


def _digest(row: dict[str, Any]) -> str:
    return digest(row["messages"])[:_DIGITS]


def _functions(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields docstring and body without white space, and the row, of a file's functions."""
    try:
        source = path.read_text(encoding="utf-8-sig")
        if '"""' not in source and "'''" not in source:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # templates, other versions' syntax, other encodings
    lines = source.split("\n")
    scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    for name, scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                scopes.append((node.name, node))
            elif isinstance(node, _FUNCTIONS) and (parts := _parts(node, lines)):
                docstring = "".join((ast.get_docstring(node) or "").split())
                yield docstring, "".join(parts[1].split()), _row(name, *parts)


def _parts(node: Any, lines: list[str]) -> tuple[str, str] | None:
    """Returns a function's signature with docstring, and its body; None if it is unsuitable."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(docstring) > _DOCSTRING or len(docstring.split()) < _WORDS:
        return None
    last = node.body[0].end_lineno or 0
    if len(node.body) == 1 or node.body[1].lineno == last:
        return None
    start = min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1
    indent = " " * node.col_offset
    inside = lines[start : node.end_lineno]
    if any(line.strip() and not line.startswith(indent) for line in inside):
        return None  # a multi-line string is not indented
    inside = [line[len(indent) :].rstrip() for line in inside]
    cut = last - start
    head, body = "\n".join(inside[:cut]), "\n".join(inside[cut:]).strip("\n")
    if len(body) > _BODY or body.count("\n") + 1 not in _LINES or "```" in head + body:
        return None
    return head, body


def _row(name: str, head: str, body: str) -> dict[str, Any]:
    what = f"method of the Python class `{name}`" if name else "Python function"
    question = f"Write the body of this {what}.\n\n```python\n{head}\n```"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"```python\n{body}\n```"},
        ]
    }


def narrow(file: Path) -> None:
    """Writes the list of what is installed, or drops the rows of a list that are not installed.

    The functions of pip are left out, since an environment need not have it.
    """
    rows = prepare(listed=file if file.exists() else None).path
    digests: dict[str, str] = {}
    with gzip.open(rows) as lines:
        for row in map(json.loads, lines):
            if row["group"] != "pip":
                digests[row["group"]] = digests.get(row["group"], "") + _digest(row)
    write_json(file, digests)


if __name__ == "__main__":
    narrow(Path(sys.argv[1]))
