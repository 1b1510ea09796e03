"""Rows of files become tokens, windows of them, and batches; and rows are made of what there is."""

import ast
import functools
import gzip
import itertools
import json
import sys
import sysconfig
import zlib
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from etils import epath
from pyarrow import parquet

from experiments.finetune import base, chat, data, instructions
from experiments.finetune.config import Base
from experiments.finetune.packing import Batches, Rows, in_order, pack
from experiments.language import documents


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chat.write_tokenizer(folder, ["user assistant system 0 1 2 3 4 5 6 7 8 9 plus is"] * 3, 300)
    return chat.Chat(folder)


def question(i):
    return f"{i} plus {i}?"


def turns(i):
    return [
        {"role": "user", "content": question(i)},
        {"role": "assistant", "content": f"It is {2 * i}."},
    ]


def rows_of(kind, count=60):
    match kind:
        case "messages":
            return [{"id": i, "messages": turns(i), "tools": None} for i in range(count)]
        case "lists":
            return [{"prompt": turns(i)[:1], "completion": turns(i)[1:]} for i in range(count)]
    return [{"prompt": question(i), "completion": f" {2 * i}"} for i in range(count)]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n\n" for row in rows)
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        case ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        case _:
            path.write_text(text)
    return str(path)


def each(rows):
    """The rows, as lists of tokens and of what is learnt."""
    return [
        (rows.tokens[a:b].tolist(), rows.learnt[a:b].tolist())
        for a, b in itertools.pairwise(rows.starts)
    ]


def test_rows_are_what_the_chat_makes_of_them(model, tmp_path):
    train, held_out, report = data.prepare(
        write(tmp_path / "a.jsonl", rows_of("messages")), model, 100
    )
    encoded = model.encode([model.conversation(turns(i)) for i in range(60)])
    held = [zlib.crc32(question(i).encode()) % 10 == 0 for i in range(60)]
    for side, rows in ((False, train), (True, held_out)):
        wanted = [encoded[i] for i in range(60) if held[i] is side]
        assert each(rows) == [(tokens.tolist(), learnt.tolist()) for tokens, learnt in wanted]
    tokens, learnt = (np.concatenate(part) for part in zip(*encoded, strict=True))
    assert report.as_json() == {
        "name": "a.jsonl",
        "rows": 60,
        "too_long": 0,
        "truncated": 0,
        "escaped": 0,
        "dropped": 0,
        "groups": 60,
        "tokens": len(tokens),
        "learnt": learnt.sum(),
        "held_out_rows": sum(held),
        "held_out_learnt": held_out.learnt.sum(),
        "lost": 0,
        "sha256": report.sha256,
        "packages": None,
        "modules": None,
        "absent": 0,
        "text_sha256": None,
    }
    json.dumps(report.as_json())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("kind", ["messages", "lists", "texts"])
def test_kinds_of_files_hold_the_same(model, tmp_path, name, kind):
    rows = rows_of(kind)
    expected = data.prepare(write(tmp_path / "a.jsonl", rows), model, 100).report
    found = data.prepare(write(tmp_path / name, rows), model, 100).report
    assert found == expected._replace(name=name)
    assert len({data.prepare(write(tmp_path / "b.jsonl", rows_of(k)), model, 100).report.sha256
                for k in ("messages", "lists", kind)}) == 1 + (kind == "texts")  # fmt: skip


def test_a_table_gives_objects_no_keys_of_other_rows(tmp_path):
    chat.write_tokenizer(tmp_path, ["abc"], 300)
    show = "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m.content }}"
    source = "{% generation %}" + show + "{% endfor %}{% endgeneration %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    rows = rows_of("messages")
    for i, row in enumerate(rows):
        row["messages"][1] |= {"tool_calls": [{"function": {"arguments": {"abc"[i % 3]: i}}}]}
    files = [write(tmp_path / name, rows) for name in ("a.jsonl", "a.parquet")]
    one, other = (data.prepare(file, chat.Chat(tmp_path), 200).report.sha256 for file in files)
    assert one == other


def test_a_table_keeps_the_null_content_of_a_call(tmp_path):
    chat.write_tokenizer(tmp_path, ["abc"], 300)
    show = "{% for m in messages %}{{ m.role }}{{ m.tool_calls | tojson if m.tool_calls }}"
    show += "{{ m.content is none }}{{ m.content }}"
    source = show.replace("{% for", "{% generation %}{% for") + "{% endfor %}{% endgeneration %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    rows = rows_of("messages")
    for row in rows[::2]:
        call = {"function": {"arguments": {"content": "x", "a": 1}}}
        row["messages"][1] |= {"content": None, "tool_calls": [call]}
    for row in rows[1::4]:
        row["messages"][1] |= {"tool_calls": [{"function": {"arguments": {"a": 2}}}]}
    files = [write(tmp_path / name, rows) for name in ("a.jsonl", "a.parquet")]
    one, other = (data.prepare(file, chat.Chat(tmp_path), 200).report.sha256 for file in files)
    assert one == other


def test_of_a_prompt_and_a_completion_only_the_latter_is_learnt(model, tmp_path):
    rows = [{"prompt": turns(i) + turns(i)[:1], "completion": turns(i + 1)[1:]} for i in range(60)]
    train, _, _ = data.prepare(write(tmp_path / "a.jsonl", rows), model, 100)
    one = model.encode([model.conversation(turns(2)[:1] + turns(3)[1:])])[0]
    assert {sum(learnt) for _, learnt in each(train)} <= set(range(3, 12))
    assert one.learnt.sum() in {sum(learnt) for _, learnt in each(train)}


def test_a_row_is_cut_at_its_end_and_left_out_where_nothing_is_to_learn(model, tmp_path):
    rows = rows_of("messages")
    for i, row in enumerate(rows):
        row["messages"][0]["content"] += " 1" * (i % 10)
    file = write(tmp_path / "a.jsonl", rows)
    *whole, report = data.prepare(file, model, 1000)
    context = int(np.median([learnt.index(True) for side in whole for _, learnt in each(side)])) + 1
    *cut, found = data.prepare(file, model, context)
    assert 10 < found.too_long < 40 and report.too_long == report.truncated == report.lost == 0
    for side, kept in zip(whole, cut, strict=True):
        shorter = [(tokens[:context], learnt[:context]) for tokens, learnt in each(side)]
        assert each(kept) == [row for row in shorter if any(row[1])]
    lengths = np.concatenate([side.lengths for side in whole])
    assert found.truncated == (lengths > context).sum()
    assert found.lost == np.maximum(lengths - context, 0).sum()
    assert found.tokens == sum(len(side.tokens) for side in cut)
    none = r"60 examples in 60 groups.* 3 tokens, 0 of these can be trained on and 0 held"
    with pytest.raises(ValueError, match=none):
        data.prepare(file, model, 3)
    with pytest.raises(ValueError, match="at least two tokens; got 1"):
        data.prepare(file, model, 1)


def test_groups_stay_together(model, tmp_path):
    rows = [row | {"group": f"book {i % 20}"} for i, row in enumerate(rows_of("texts"))]
    train, held_out, report = data.prepare(write(tmp_path / "a.jsonl", rows), model, 100)
    held = {i % 20 for i in range(60) if zlib.crc32(f"book {i % 20}".encode()) % 10 == 0}
    assert report.groups == 20 and len(held_out.lengths) == 3 * len(held) == report.held_out_rows
    assert len(held) > 0 and len(train.lengths) == 60 - 3 * len(held)
    two = [row | {"group": f"book {i % 2}"} for i, row in enumerate(rows_of("texts", 10))]
    *sides, _ = data.prepare(write(tmp_path / "two.jsonl", two), model, 100)
    assert [len(side.lengths) for side in sides] == [5, 5]
    one = [{"prompt": "Why?", "completion": str(i)} for i in range(9)]
    with pytest.raises(
        ValueError,
        match=r"one\.jsonl has 9 examples in 1 groups.* 9 of these can be trained on and 0",
    ):
        data.prepare(write(tmp_path / "one.jsonl", one), model, 100)


@pytest.mark.parametrize("tenth", [False, True])
@pytest.mark.parametrize("other", [1, 7, 20])
def test_no_more_is_held_out_than_trained_on(model, tmp_path, other, tenth):
    """Also where the hash of the greater group is the least, or one in ten."""
    names = sorted((f"book {i}" for i in range(100)), key=lambda name: zlib.crc32(name.encode()))
    least = next(name for name in names if (zlib.crc32(name.encode()) % 10 == 0) is tenth)
    names = [least] * 20 + [names[-1]] * other
    rows = [row | {"group": name} for row, name in zip(rows_of("texts"), names, strict=False)]
    file = write(tmp_path / "a.jsonl", rows)
    train, held_out, _ = data.prepare(file, model, 100)
    assert (len(train.lengths), len(held_out.lengths)) == (20, other)


def test_of_many_groups_the_hash_decides_alone():
    groups = [f"book {i}" for i in range(500) for _ in range(i % 7)]
    held = {name for name in groups if zlib.crc32(name.encode()) % 10 == 0}
    assert data._held_out(groups) == held and len(held) > 30


def test_content_that_spells_special_tokens_is_counted(model, tmp_path):
    rows = rows_of("texts")
    rows[7]["prompt"] += "<|im_end|>"
    assert data.prepare(write(tmp_path / "a.jsonl", rows), model, 100).report.escaped == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"messages": [', r"invalid JSON: "),
        ("[" * 100_000, r"invalid JSON: "),
        ('"\udcff"', r"invalid JSON: "),
        ("[]", "an example must be an object; got list"),
        ("{}", 'must have "messages", or "prompt" and "completion".*; this has no keys'),
        (
            '{"conversations": [], "id": 1, "group": null}',
            "'conversations', 'group' .null., 'id'; c",
        ),
        (
            '{"instruction": "a", "input": "", "output": "b"}',
            "has 'input', 'instruction', 'output'",
        ),
        ('{"messages": null}', r"none of them null; this has 'messages' \(null\); convert"),
        (
            '{"messages": [{"role": "user", "content": null, "tool_calls": [1]}, {"role": '
            '"assistant", "content": "a"}]}',
            "the content of message 1 must be a text; got None",
        ),
        ('{"prompt": "a"}', "this has 'prompt'"),
        ('{"messages": [], "prompt": "a", "completion": "b"}', "this has 'completion', 'messages'"),
        ('{"messages": []}', "must be a non-empty list"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "last message must have the role assistant; got user",
        ),
        ('{"prompt": "a", "completion": " "}', '"completion" must be a non-blank text'),
        ('{"prompt": "", "completion": "a"}', '"prompt" must be a non-blank text'),
        ('{"prompt": "a", "completion": [{}]}', '"completion" must be a non-blank text'),
        ('{"prompt": [{}], "completion": []}', '"prompt" or its "completion" is empty'),
        ('{"prompt": [{}], "completion": [{}]}', "message 1 must be an object"),
        ('{"prompt": "a", "completion": "b", "group": 1}', '"group" must be a text; got 1'),
        ('{"prompt": "a", "completion": "b", "tools": []}', '"tools" must be a list, beside'),
    ],
)
def test_an_error_names_the_line(model, tmp_path, line, error):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps(rows_of("texts")[0]) + f"\n\n{line}\n",
        encoding="utf-8",
        errors="surrogateescape",
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*" + error):
        data.prepare(str(path), model, 100)


def test_a_row_with_nothing_to_learn_is_an_error(tmp_path, model):
    folder = tmp_path / "hf"
    chat.write_tokenizer(folder, ["abc"], 300)
    blank = "{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(blank)
    file = write(tmp_path / "a.jsonl", rows_of("messages"))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: it has no tokens to train on"):
        data.prepare(file, chat.Chat(folder), 100)


def test_files_that_cannot_be_read_are_errors(model, tmp_path):
    blank, cut = tmp_path / "blank.jsonl", tmp_path / "a.jsonl.gz"
    blank.write_text("\n  \n")
    cut.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 99, mtime=0)[:-20])
    for path, error in (
        (cut, "is damaged"),
        (tmp_path / "a.csv", "must end in one of .jsonl"),
        (write(tmp_path / "a.parquet", [{"text": "a"}]), 'has no column "completion" or "group"'),
        (write(tmp_path / "a.jsonl", []), r"a\.jsonl has no examples."),
        (blank, r"blank\.jsonl has no examples"),
    ):
        with pytest.raises(ValueError, match=error):
            data.prepare(str(path), model, 100)
    for name in ("missing.jsonl", "missing.parquet"):
        with pytest.raises(FileNotFoundError, match=rf"{name} does not exist; give the path"):
            data.prepare(str(tmp_path / name), model, 100)


def random_rows(count=157, context=32, seed=0):
    """Rows whose tokens are all different, and never 0."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, context + 1, count)
    ends = np.cumsum(lengths)
    tokens = np.split(np.arange(1, ends[-1] + 1, dtype=np.int32), ends[:-1])
    learnt = [rng.random(length) < 0.5 for length in lengths]
    for mask in learnt:
        mask[0] = False
    return Rows.of(list(zip(tokens, learnt, strict=True)))


def windows_of(batches):
    """Each window of batches, as arrays `(5, context)`."""
    return [np.array(window) for batch in batches for window in zip(*batch, strict=True)]


def check_window(window):
    """The rows of a window, after the rules of segments, positions and targets."""
    tokens, targets, mask, segments, positions = window
    found = []
    filled = segments > 0
    assert not filled[np.argmin(filled) :].any() or filled.all()
    assert not window[:, ~filled].any()
    for segment in range(1, segments.max() + 1):
        (here,) = np.nonzero(segments == segment)
        np.testing.assert_array_equal(here, np.arange(here[0], here[-1] + 1))
        np.testing.assert_array_equal(positions[here], np.arange(len(here)))
        np.testing.assert_array_equal(targets[here[:-1]], tokens[here[1:]])
        assert targets[here[-1]] == mask[here[-1]] == 0
        found.append((tokens[here].tolist(), [False, *mask[here[:-1]].astype(bool).tolist()]))
    return found


def test_an_epoch_has_each_row_once_and_no_loss_between_rows():
    rows = random_rows()
    batches = Batches(rows, batch=1, context=32, seed=3)
    for epoch in range(3):
        steps = range(epoch * batches.windows, (epoch + 1) * batches.windows)
        windows = windows_of(batches[step] for step in steps)
        assert all(x.dtype == np.int32 and x.shape == (1, 32) for x in batches[steps[0]])
        assert sorted(itertools.chain.from_iterable(map(check_window, windows))) == each(rows)
    assert len(rows.tokens) / (32 * batches.windows) > 0.95


def test_held_out_rows_come_once_each_and_in_one_shape():
    rows = random_rows()
    batches = in_order(rows, batch=4, context=40)
    assert {x.shape for batch in batches for x in batch} == {(4, 40)}
    found = [row for window in windows_of(batches) if window.any() for row in check_window(window)]
    assert sorted(found) == each(rows)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    rows = random_rows()
    straight = Batches(rows, batch=6, context=32, seed=5)
    steps = 3 * straight.windows // 6 + 2
    wanted = [straight[step] for step in range(steps)]
    for first in (1, steps // 2, steps - 1):
        resumed = Batches(rows, batch=6, context=32, seed=5)
        assert all(same(resumed[step], wanted[step]) for step in range(first, steps))
    assert same(straight[0], wanted[0])  # and back
    epoch = [Batches(rows, batch=straight.windows, context=32, seed=5)[i] for i in range(2)]
    assert not same(*epoch)
    kinds = [np.bincount(batch.segments.max(axis=1)) for batch in epoch]
    np.testing.assert_array_equal(*kinds)  # windows are alike, in another order
    assert (epoch[0].segments.max(axis=1) != epoch[1].segments.max(axis=1)).any()
    assert not same(Batches(rows, batch=6, context=32, seed=6)[0], wanted[0])


def test_processes_make_rows_of_the_same_batch():
    rows = random_rows()
    whole = Batches(rows, batch=6, context=32, seed=0)
    part = Batches(rows, batch=6, context=32, seed=0, places=[1, 2, 5])
    for step in range(2 * whole.windows // 6):
        assert same(part[step], [x[[1, 2, 5]] for x in whole[step]])


def test_rows_fill_the_window_with_least_space_left():
    assert pack(np.array([3, 7, 6, 4, 10, 2]), 10) == [[4], [1, 0], [2, 3], [5]]
    assert pack(np.array([5, 8, 2, 5]), 10) == [[1, 2], [0, 3]]


def test_batches_that_cannot_be_are_refused():
    rows = random_rows()
    for settings, error in (
        ({"batch": 0}, "--batch must be at least 1; got 0"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"context": 31}, "must have 1 to 31 tokens"),
    ):
        with pytest.raises(ValueError, match=error):
            Batches(rows, **({"batch": 2, "context": 32, "seed": 0} | settings))
    with pytest.raises(IndexError):
        Batches(rows, batch=2, context=32, seed=0)[-1]


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
    (tmp_path / "a.py").write_text(MODULE)
    (tmp_path / "b.py").write_text(MODULE.replace("    total = a", "      \n    total  = a"))
    (tmp_path / "c.py").write_text(MODULE.replace("total", "x").replace("return x", "return 1"))
    (tmp_path / "d.py").write_text(MODULE.replace("words enough", "enough").replace("Adds", "Has"))
    (tmp_path / "e.py").write_text('"""No Python."""\nprint "x"')
    names = "a", "b", "c", "d", "e"
    rows = list(instructions.from_files((name, tmp_path / f"{name}.py") for name in names))
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
        folder = tmp_path_factory.mktemp("cache")
        yield folder, instructions.prepare(folder, listed=None)


def test_instructions_are_made_once(installed):
    folder, made = installed
    assert made.packages.keys() == {"Python", "copies"} and made.packages["copies"] == "1.2"
    assert made.rows["copies"] == 3 and made.rows["textwrap"] > 2
    assert sum(made.rows.values()) > 2500 and max(made.rows.values()) <= 500
    before = made.path.stat().st_mtime_ns
    again = functools.partial(instructions.prepare, folder, listed=None)
    assert again() == made and made.path.stat().st_mtime_ns == before
    whole = made.path.read_bytes()
    made.path.write_bytes(whole[:-1])
    assert again() == made and made.path.read_bytes() == whole


def test_no_module_and_no_function_is_on_both_sides(installed, model):
    folder, made = installed
    rows = [json.loads(line) for line in gzip.decompress(made.path.read_bytes()).splitlines()]
    for row in rows:
        ast.parse(joined(row))
    groups = [row["group"] for row in rows]
    held = data._held_out(groups)
    functions = [{}, {}]
    for row in rows:
        function = ast.parse(joined(row)).body[0]
        docstring = function.body.pop(0)
        functions[row["group"] in held] |= {
            ast.dump(docstring): 1,
            ast.dump(ast.Module(function.body)): 1,
        }
    assert not functions[0].keys() & functions[1].keys()
    train, held_out, report = data.prepare("installed", model, 512, cache=folder)
    assert report.modules == made.rows and report.packages == made.packages
    assert report.held_out_rows == len(held_out.lengths) <= sum(made.rows[name] for name in held)
    assert 0.02 < report.held_out_rows / report.rows < 0.3
    assert len(train.lengths) + len(held_out.lengths) + report.too_long == len(rows) == report.rows


def test_other_examples_than_the_pinned_ones_are_refused(installed, model):
    folder, _ = installed
    report = data.prepare("installed", model, 512, cache=folder).report
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
    folder, _ = installed
    digests = json.loads(instructions.LIST.read_text())
    listed = {name: len(own) // 8 for name, own in digests.items()}
    made = instructions.prepare(folder)
    assert made.absent + sum(made.rows.values()) == sum(listed.values()) > 8000
    library = sum(rows for name, rows in listed.items() if name in sys.stdlib_module_names)
    assert 0.97 * library < sum(made.rows.values()) <= library


def test_the_text_of_a_pretraining_is_read(model, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"to be or not {i} " * 9}) + "\n" for i in range(9))
    )
    chat.write_tokenizer(tmp_path / "model", ["to be or not to be"] * 9, 300)
    command = SimpleNamespace(pretraining_text=str(path), context=16, evaluation_tokens=1000)
    rows = data.pretraining_text(command, tmp_path / "model")
    assert len(rows.lengths) > 4 and set(rows.lengths) == {16}
    assert not rows.learnt[rows.starts[:-1]].any() and rows.learnt.sum() == 15 * len(rows.lengths)
    first = chat.Chat(tmp_path / "model").prompt("to be or not 0 " * 9)[:16]
    assert first in rows.tokens.reshape(-1, 16).tolist()
    command.pretraining_text = None
    assert data.pretraining_text(command, tmp_path / "model") is None
    np.save(tmp_path / "model" / data.HELD_OUT, np.ones((3, 40), np.int32))
    assert data.pretraining_text(command, tmp_path / "model").lengths.tolist() == [16] * 3
    command.pretraining_text = "nowhere.txt"
    with pytest.raises(ValueError, match="--pretraining-text must be a file that ends in"):
        data.pretraining_text(command, tmp_path / "model")


def test_the_small_model_keeps_text_that_it_has_not_learnt(tmp_path, monkeypatch):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{i} to be or not " * 99}) + "\n" for i in range(99))
    )
    few = documents.from_files((epath.Path(path),))
    monkeypatch.setattr(documents, "standard_library", lambda: few)
    sizes = {"layers": 1, "hidden": 16, "ffn": 16, "heads": 2, "head_dim": 8, "vocabulary": 300}
    small = Base(**sizes, context=32, batch=4, steps=2)
    folder = base.prepare(small, folder=tmp_path / "cache")
    assert base.prepare(small, folder=tmp_path / "cache") == folder
    windows = np.load(folder / data.HELD_OUT)
    assert windows.shape[1] == 33 and len(windows) >= 4
    command = SimpleNamespace(pretraining_text=None, context=64)
    rows = data.pretraining_text(command, folder)
    assert rows.tokens.tolist() == windows.ravel().tolist() and set(rows.lengths) == {33}
    told = chat.Chat(folder)._tokenizer.decode(windows[0].tolist())
    assert "to be or not" in told and folder.joinpath("model.safetensors").exists()
