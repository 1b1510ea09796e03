"""Makes instructions from the installed packages: write the body of a documented Python function.

The sources are the standard library and the packages installed beside it, which are parsed and
never imported. The order of the rows depends only on them.
"""

import ast
import contextlib
import gc
import gzip
import importlib.metadata
import itertools
import json
import platform
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments import corpus
from experiments.language import cache

FILE = "instructions.jsonl.gz"
_FORMAT = 1  # version of the cache; changing it discards cached rows
_GROUP = 500  # maximum rows of a top-level module, so that no package dominates
_WORDS = 5  # minimum words of a docstring
_DOCSTRING, _BODY = 800, 1200  # maximum characters
_LINES = range(2, 31)  # number of lines of a body
_SKIPPED = {  # folders of tests, and of copies of other packages
    *("test", "tests", "_test", "_tests", "testing", "_testing", "idle_test"),
    *("_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"),
}


class Instructions(NamedTuple):
    """A file of instructions.

    Attributes:
        path: The .jsonl.gz file. Each row has `messages`, and its top-level module as `group`.
        rows: The number of rows of each top-level module.
        packages: The versions of the installed distributions and of Python.
        sha256: The digest of all rows.
    """

    path: Path
    rows: dict[str, int]
    packages: dict[str, str]
    sha256: str


def prepare(folder: Path | None = None, on_wait: Callable[[], None] = lambda: None) -> Instructions:
    """Makes the instructions of the installed packages, or takes them from the cache.

    No two rows have the same docstring or body up to white space, so that copies of a function in
    other modules are omitted.

    Args:
        folder: The cache. By default muon_jax/finetune in $XDG_CACHE_HOME or ~/.cache.
        on_wait: Called repeatedly while another process makes the same rows. It may raise to give
            up.

    Raises:
        ValueError: If no installed package has documented functions.
        OSError: If the cache cannot be written.
    """
    roots = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    installed = importlib.metadata.distributions(path=roots)
    packages = {item.name: item.version for item in installed if item.name}
    packages = {"Python": platform.python_version(), **dict(sorted(packages.items()))}
    limits = [_GROUP, _WORDS, _DOCSTRING, _BODY, _LINES.start, _LINES.stop, sorted(_SKIPPED)]
    key = cache.digest([_FORMAT, packages, roots, limits])[:16]
    folder = (folder or cache.home("finetune")) / f"instructions-{key}"

    def write(partial: Path) -> dict[str, Any]:
        library = Path(sysconfig.get_path("stdlib"))
        with _uncollected():
            rows = list(from_files(_files(library, map(Path, roots))))
        if not rows:
            raise ValueError("No installed package has documented source code; give --data.")
        with gzip.GzipFile(partial / FILE, "wb", compresslevel=5, mtime=0) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        groups = Counter(row["group"] for row in rows)
        return {"rows": dict(groups), "sha256": cache.digest(rows)}

    with cache.alone(folder, on_wait):
        meta = cache.read(folder) or cache.make(folder, write)
    return Instructions(folder / FILE, meta["rows"], packages, meta["sha256"])


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Disables garbage collection, which would take a third of the time and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parts = _parts(node, lines)
                if parts is not None:
                    docstring = "".join((ast.get_docstring(node) or "").split())
                    yield docstring, "".join(parts[1].split()), _row(name, *parts)


def _parts(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> tuple[str, str] | None:
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
