"""Rows of files become tokens, windows of them, and batches."""

import gzip
import itertools
import json
import zlib
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from etils import epath
from pyarrow import parquet

from experiments.finetune import base, chat, data
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
    told = {"name": "a.jsonl", "rows": 60, "groups": 60, "sha256": report.sha256}
    told |= {"tokens": len(tokens), "learnt": learnt.sum(), "held_out_rows": sum(held)}
    told |= {"held_out_learnt": held_out.learnt.sum(), "packages": None, "modules": None}
    told |= {"absent": 0, "text_sha256": None}
    told |= dict.fromkeys(("too_long", "truncated", "escaped", "dropped", "lost"), 0)
    assert report._asdict() == told
    json.dumps(report._asdict())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("kind", ["messages", "lists", "texts"])
def test_kinds_of_files_hold_the_same(model, tmp_path, name, kind):
    rows = rows_of(kind)
    expected = data.prepare(write(tmp_path / "a.jsonl", rows), model, 100).report
    found = data.prepare(write(tmp_path / name, rows), model, 100).report
    assert found == expected._replace(name=name)
    assert len({data.prepare(write(tmp_path / "b.jsonl", rows_of(k)), model, 100).report.sha256
                for k in ("messages", "lists", kind)}) == 1 + (kind == "texts")  # fmt: skip


def test_a_table_has_the_keys_and_nulls_of_each_row_alone(tmp_path):
    """Calls have different arguments, and some have the content null."""
    chat.write_tokenizer(tmp_path, ["abc"], 300)
    (tmp_path / "chat_template.jinja").write_text(
        "{% generation %}{% for m in messages %}{{ m.role }}{{ m.tool_calls | tojson if "
        "m.tool_calls }}{{ m.content is none }}{{ m.content }}{% endfor %}{% endgeneration %}"
    )
    rows = rows_of("messages")
    for i, row in enumerate(rows):
        arguments = {"a": 1, "content": "x"} if i % 2 else {"abc"[i % 3]: i}
        row["messages"][1] |= {"tool_calls": [{"function": {"arguments": arguments}}]}
        row["messages"][1] |= {"content": None} if i % 4 else {}
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


def test_groups_stay_together(model, tmp_path):
    rows = [row | {"group": f"book {i % 20}"} for i, row in enumerate(rows_of("texts"))]
    rows[7]["prompt"] += "<|im_end|>"
    train, held_out, report = data.prepare(write(tmp_path / "a.jsonl", rows), model, 100)
    held = {i % 20 for i in range(60) if zlib.crc32(f"book {i % 20}".encode()) % 10 == 0}
    assert report.escaped == 1  # a prompt spells a special token
    assert report.groups == 20 and len(held_out.lengths) == 3 * len(held) == report.held_out_rows
    assert len(held) > 0 and len(train.lengths) == 60 - 3 * len(held)
    two = [row | {"group": f"book {i % 2}"} for i, row in enumerate(rows_of("texts", 10))]
    *sides, _ = data.prepare(write(tmp_path / "two.jsonl", two), model, 100)
    assert [len(side.lengths) for side in sides] == [5, 5]
    one = [{"prompt": "Why?", "completion": str(i)} for i in range(9)]
    none = r"one\.jsonl has 9 examples in 1 groups.* 9 of these can be trained on and 0"
    with pytest.raises(ValueError, match=none):
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


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"messages": [', r"invalid JSON: "),
        ("[" * 100_000, r"invalid JSON: "),
        ('"\udcff"', r"invalid JSON: "),
        ("[]", "an example must be an object; got list"),
        ("{}", 'must have "messages", or "prompt" and "completion".*; this has no keys'),
        ('{"conversations": [], "id": 1, "group": null}', "'conversations', 'group' .null., 'id'"),
        ('{"instruction": "a", "input": "", "output": "b"}', "has 'input', 'instruction', 'outpu"),
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
    text = json.dumps(rows_of("texts")[0]) + f"\n\n{line}\n"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
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
    """Each window of batches, as arrays `(3, context)`."""
    return [np.array(window) for batch in batches for window in zip(*batch, strict=True)]


def check_window(window):
    """The rows of a window, after the rules of segments, positions and targets."""
    tokens, targets, segments = window
    found = []
    filled = segments > 0
    assert not filled[np.argmin(filled) :].any() or filled.all()
    assert not tokens[~filled].any() and (targets[~filled] == -1).all()
    for segment in range(1, segments.max() + 1):
        (here,) = np.nonzero(segments == segment)
        np.testing.assert_array_equal(here, np.arange(here[0], here[-1] + 1))
        learnt = targets[here] >= 0
        np.testing.assert_array_equal(targets[here][learnt], tokens[here[1:]][learnt[:-1]])
        assert targets[here[-1]] == -1
        found.append((tokens[here].tolist(), [False, *learnt[:-1].tolist()]))
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
    found = [
        row for window in windows_of(batches) if window[0].any() for row in check_window(window)
    ]
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
    with pytest.raises(ValueError, match="must have 1 to 31 tokens"):
        Batches(random_rows(), batch=2, context=31, seed=0)


def test_the_text_of_a_pretraining_is_read(model, tmp_path):
    path = write(tmp_path / "texts.jsonl", [{"text": f"to be or not {i} " * 9} for i in range(9)])
    chat.write_tokenizer(tmp_path / "model", ["to be or not to be"] * 9, 300)
    command = SimpleNamespace(pretraining_text=path, context=16, evaluation_tokens=1000)
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
    path = write(tmp_path / "texts.jsonl", [{"text": f"{i} to be or not " * 99} for i in range(99)])
    few = documents.from_files((epath.Path(path),))
    monkeypatch.setattr(documents, "standard_library", lambda: few)
    sizes = {"layers": 1, "width": 16, "ffn": 16, "heads": 2, "head_dim": 8, "vocabulary": 300}
    small = Base(**sizes, context=32, batch=4, steps=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = base.prepare(small)
    assert base.prepare(small) == folder and not any(path.is_dir() for path in folder.iterdir())
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    windows = np.load(folder / data.HELD_OUT)
    assert windows.shape[1] == 33 and len(windows) >= 4
    command = SimpleNamespace(pretraining_text=None, context=64)
    rows = data.pretraining_text(command, folder)
    assert rows.tokens.tolist() == windows.ravel().tolist() and set(rows.lengths) == {33}
    told = chat.Chat(folder)._tokenizer.decode(windows[0].tolist())
    assert "to be or not" in told
