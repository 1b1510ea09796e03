"""Rows are made of the functions of installed packages."""

import ast
import functools
import gzip
import json
import sys
import sysconfig

import pytest

from experiments.finetune import chat, data, instructions

MODULE = '''
import functools

def add(a, b):
    """Adds one number to another one."""
    total = a  # of both
    total += b

    return total

@functools.cache
async def later(x: int = 1,
                *, y) -> int:
    r"""Says later what \\d is, with words enough.

    And more of them.
    """
    def inner():
        """An inner function is part of the outer one."""
        return y
    return x

class Book:
    class Page:
        def turn(self):
            'Turns one page of the book.'
            self.number += 1
            return self

    def text(self):
        """Gives a text that begins at the line's start."""
        x = """
at the start"""
        return x

def short(x):
    """One line is no exercise for anybody."""
    return x

def quiet(x):
    """Too few words."""
    y = x
    return y

def beside(x): "Has its docstring beside the signature."; y = x; return y

def nothing():
    """Has no body at all, but a docstring."""
'''
TEST = '''
def test():
    """What tests do is no instruction."""
    found = 1 + 1
    assert found == 2
'''


def test_a_row_is_a_documented_function_without_its_body(tmp_path):
    sources = {
        "a": MODULE,
        "b": MODULE.replace("    total = a", "      \n    total  = a"),
        "c": MODULE.replace("total", "x").replace("return x", "return 1"),
        "d": MODULE.replace("words enough", "enough").replace("Adds", "Has"),
        "e": '"""No Python."""\nprint "x"',
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    rows = list(instructions.from_files((name, tmp_path / f"{name}.py") for name in sources))
    assert {row["group"] for row in rows} == {"a"}  # the others are copies
    asked, answered = zip(*([m["content"] for m in row["messages"]] for row in rows), strict=True)
    assert [text.split("\n")[0] for text in asked] == [
        "Write the body of this Python function.",
        "Write the body of this Python function.",
        "Write the body of this method of the Python class `Page`.",
    ]
    assert asked[0].endswith(
        '\n\n```python\ndef add(a, b):\n    """Adds one number to another one."""\n```'
    )
    assert (
        answered[0]
        == "```python\n    total = a  # of both\n    total += b\n\n    return total\n```"
    )
    assert "@functools.cache\nasync def later(" in asked[1] and "def inner" in answered[1]
    tree = ast.parse(MODULE)
    functions = [tree.body[1], tree.body[2], tree.body[3].body[0].body[0]]
    for row, function in zip(rows, functions, strict=True):
        assert ast.dump(ast.parse(joined(row)).body[0]) == ast.dump(function)


def joined(row):
    """The function of a row's two halves."""
    return "\n".join(
        message["content"].split("```python\n")[1].removesuffix("\n```")
        for message in row["messages"]
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What is installed is the standard library, and a package that has a copy of a part of it."""
    site = tmp_path_factory.mktemp("site")
    library = sysconfig.get_path("stdlib")
    (site / "copies" / "tests").mkdir(parents=True)
    (site / "copies-1.2.dist-info").mkdir()
    (site / "copies-1.2.dist-info" / "METADATA").write_text("Name: copies\nVersion: 1.2\n")
    with open(f"{library}/textwrap.py") as file:
        (site / "copies" / "textwrap.py").write_text(file.read() + MODULE)
    (site / "copies" / "tests" / "a.py").write_text(TEST)
    paths = {"stdlib": library, "purelib": str(site), "platlib": str(site)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instructions.sysconfig, "get_path", paths.get)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield instructions.prepare(listed=None)


@pytest.fixture(scope="module")
def prepared(installed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chat.write_tokenizer(folder, [MODULE], 300)
    return data.prepare("installed", chat.Chat(folder), 512)


def test_instructions_are_made_once(installed):
    made = installed
    assert made.packages.keys() == {"Python", "copies"} and made.packages["copies"] == "1.2"
    assert made.rows["copies"] == 3 and made.rows["textwrap"] > 2
    assert sum(made.rows.values()) > 2500 and max(made.rows.values()) <= 500
    before = made.path.stat().st_mtime_ns
    again = functools.partial(instructions.prepare, listed=None)
    assert again() == made and made.path.stat().st_mtime_ns == before
    whole = made.path.read_bytes()
    made.path.write_bytes(whole[:-1])
    assert again() == made and made.path.read_bytes() == whole


def test_no_module_and_no_function_is_on_both_sides(installed, prepared):
    made, (train, held_out, report) = installed, prepared
    rows = [json.loads(line) for line in gzip.decompress(made.path.read_bytes()).splitlines()]
    held = data._held_out(row["group"] for row in rows)
    functions = set(), set()
    for row in rows:
        function = ast.parse(joined(row)).body[0]
        docstring = function.body.pop(0)
        own = ast.dump(docstring), ast.dump(ast.Module(function.body))
        functions[row["group"] in held].update(own)
    assert functions[0].isdisjoint(functions[1])
    assert report.modules == made.rows and report.packages == made.packages
    assert report.held_out_rows == len(held_out.lengths) <= sum(made.rows[name] for name in held)
    assert 0.02 < report.held_out_rows / report.rows < 0.3
    assert len(train.lengths) + len(held_out.lengths) + report.too_long == len(rows) == report.rows


def test_other_examples_than_the_pinned_ones_are_refused(prepared):
    report = prepared.report
    data._check_digest(report, None)
    data._check_digest(report, report.sha256[:8])
    data._check_digest(report, report.text_sha256[:8])
    with pytest.raises(ValueError, match=r"install the versions .* Here are Python .*copies 1\.2"):
        data._check_digest(report, "0" * 8)
    with pytest.raises(ValueError, match="Give the same file, --model and --context"):
        data._check_digest(report._replace(packages=None), "0" * 8)


def test_listed_rows_do_not_depend_on_what_else_is_installed(tmp_path):
    """Further functions change nothing, and one that is edited is left out."""
    edited = MODULE.replace("total += b", "total = total + b")
    listed: dict[str, str] = {}
    for name, text in {"a": MODULE, "b": edited}.items():
        (tmp_path / f"{name}.py").write_text(text)
    files = [(name, tmp_path / f"{name}.py") for name in "ba"]
    whole = list(instructions.from_files([files[1]]))
    listed["a"] = "".join(instructions._digest(row) for row in reversed(whole))
    assert list(instructions.from_list(files, listed)) == whole[::-1]
    (tmp_path / "a.py").write_text(edited)
    assert list(instructions.from_list(files, listed)) == whole[:0:-1]


def test_a_list_has_what_all_environments_have(monkeypatch, tmp_path):
    library, site = tmp_path / "library", tmp_path / "site"
    for folder, text in {library: MODULE, site / "copies": MODULE.replace("total", "own")}.items():
        folder.mkdir(parents=True)
        (folder / "textwrap.py").write_text(text)
    paths = {"stdlib": library, "purelib": site, "platlib": site}
    monkeypatch.setattr(instructions.sysconfig, "get_path", lambda name: str(paths[name]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed = tmp_path / "rows.json"
    instructions.narrow(listed)
    rows = json.loads(listed.read_text())
    whole = instructions.prepare(listed=None)
    assert {name: len(own) // 8 for name, own in rows.items()} == whole.rows == {"textwrap": 3}
    assert instructions.prepare(listed=listed)[1:] == whole[1:]
    fewer = {"textwrap": rows["textwrap"][8:]}
    listed.write_text(json.dumps({"other": "01234567"} | fewer))
    assert instructions.prepare(listed=listed).absent == 1
    instructions.narrow(listed)
    assert json.loads(listed.read_text()) == fewer


def test_the_default_rows_are_in_every_python(installed):
    digests = json.loads(instructions.LIST.read_text())
    listed = {name: len(own) // 8 for name, own in digests.items()}
    made = instructions.prepare()
    assert made.absent + sum(made.rows.values()) == sum(listed.values()) > 8000
    library = sum(rows for name, rows in listed.items() if name in sys.stdlib_module_names)
    assert 0.97 * library < sum(made.rows.values()) <= library
