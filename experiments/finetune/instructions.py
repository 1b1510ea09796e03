"""Instructions from what is installed: write the body of this documented Python function.

Rows are made of the source of the standard library and of the packages beside it, which is parsed
and never imported, in an order that these alone decide.
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
_FORMAT = 1  # of the cache; another one makes all rows be made again
_GROUP = 500  # rows of a top-level module at most, so that no package is most of them
_WORDS = 5  # of a docstring at least
_DOCSTRING, _BODY = 800, 1200  # characters at most
_LINES = range(2, 31)  # of a body
_SKIPPED = {  # folders of tests, and of copies of other packages
    *("test", "tests", "_test", "_tests", "testing", "_testing", "idle_test"),
    *("_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"),
}


class Instructions(NamedTuple):
    """Rows in a file.

    Attributes:
        path: a .jsonl.gz; each row has `messages`, and its top-level module as `group`.
        rows: of each top-level module.
        packages: versions of the distributions that were installed, and of Python.
        sha256: digest of all rows.
    """

    path: Path
    rows: dict[str, int]
    packages: dict[str, str]
    sha256: str


def prepare(folder: Path | None = None, on_wait: Callable[[], None] = lambda: None) -> Instructions:
    """The rows of what is installed, from the cache in `folder` if it has them whole.

    No two rows have the same docstring or the same body, whatever spaces they have: a copy in
    another module is left out.

    Args:
        folder: of the cache; by default muon_jax/finetune in $XDG_CACHE_HOME or ~/.cache.
        on_wait: called while another process makes the same rows; it may raise to give up.

    Raises:
        ValueError: nothing that is installed has documented functions.
        OSError: the cache cannot be written.
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
            raise ValueError("No installed package has source code; give --data.")
        with gzip.GzipFile(partial / FILE, "wb", compresslevel=5, mtime=0) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        groups = Counter(row["group"] for row in rows)
        return {"rows": dict(groups), "sha256": cache.digest(rows)}

    with cache.alone(folder, on_wait):
        meta = cache.read(folder) or cache.make(folder, write)
    return Instructions(folder / FILE, meta["rows"], packages, meta["sha256"])


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which takes a third of the time and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _files(library: Path, roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Each file with its top-level module: the library's first, then those of packages."""
    named = [(name, library / name) for name, _ in corpus.library_files(library)]
    for root in roots:
        found = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
        named += sorted(found)
    for name, path in named:
        *folders, module = name.removesuffix(".py").split("/")
        if _SKIPPED.isdisjoint(folders) and not module.startswith(("test_", "conftest")):
            yield (folders or [module])[0], path


def from_files(files: Iterable[tuple[str, Path]]) -> Iterator[dict[str, Any]]:
    """The rows of Python files, each with its top-level module, group by group.

    The files of a group are in an order that spreads the share of a large one over all of it.
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
    """A file's functions and methods: docstring and body without spaces, and the row."""
    try:
        source = path.read_text(encoding="utf-8-sig")
        if '"""' not in source and "'''" not in source:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python will refuse one day
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
    """Signature with docstring, and body; None for a function that is no exercise."""
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
        return None  # a text that spans lines begins at their start
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
