"""Text becomes tokens once, exactly; a step's batch is a function of the seed and the step."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import unicodedata

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.registry import _registry
from pyarrow import parquet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from waiting import wait_for

from experiments import corpus
from experiments.language import data, documents, tokenizer
from experiments.language.data import Data, prepare
from experiments.language.windows import batches, from_step, held_out

TEXTS = [
    f"Größe {i}: λ={i * i}, 東京🗼{'é' * (i % 7)}\n  def f(x):\n    return x + {i}\n"
    for i in range(400)
]
# Without the time, which would get into the test's name.
CUT_SHORT = gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20]


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def configured(tmp_path, *files, **settings):
    settings = {"vocabulary": 300, "cache": tmp_path / "cache"} | settings
    return Data(tuple(map(str, files)), **settings)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """TEXTS as tokens."""
    folder = tmp_path_factory.mktemp("texts")
    return prepare(configured(folder, write_jsonl(folder / "a.jsonl")))


def texts_of(tokens, side):
    """The documents of a side, from the bytes of their tokens."""
    letters = {letter: byte for byte, letter in byte_letters().items()}
    ends = {tokens.end_of_text}
    found, now = [], bytearray()
    for index in np.concatenate(side).tolist():
        if index in ends:
            found.append(now.decode())
            now = bytearray()
        else:
            piece = bytes(letters[letter] for letter in tokens.tokenizer.id_to_token(index))
            assert len(piece) == tokens.bytes_per_token[index]
            now += piece
    assert not now
    return found


def byte_letters():
    """GPT-2's letter of each byte, by its own rule: bytes without a print go from U+0100 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(others)}


def write_all(folder, kind):
    """TEXTS in files of one kind; returns a glob of them."""
    folder.mkdir()
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in TEXTS)
    match kind:
        case "txt":
            for i, text in enumerate(TEXTS):
                (folder / f"{i:03}.txt").write_bytes(text.encode())
        case "jsonl":
            (folder / "a.jsonl").write_text(lines)
        case "jsonl.gz":
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        case "parquet":
            for i, part in enumerate((TEXTS[:150], TEXTS[150:])):
                columns = {"id": range(len(part)), "text": part}
                parquet.write_table(pa.table(columns), folder / f"{i}.parquet", row_group_size=50)
    return folder / f"*.{kind}"


# Documents


def test_the_library_is_the_corpus_that_other_studies_learn():
    texts, sides = documents.standard_library(), {False: [], True: []}
    for file in texts.files:
        for document in texts.of(file):
            sides[document.held_out].append(document.text)
    other = corpus.standard_library()
    assert "".join(sides[False]).encode() == other.train.tobytes()
    assert "".join(sides[True]).encode() == other.validation.tobytes()


def test_by_default_the_library_is_learnt(tmp_path, monkeypatch):
    files = corpus.library_files
    monkeypatch.setattr(corpus, "library_files", lambda root: files(root)[:30])
    tokens = prepare(Data(vocabulary=300, cache=tmp_path))
    assert tokens.name.startswith("standard library of Python 3.")
    assert tokens.vocabulary == 300 == len(tokens.bytes_per_token)
    texts = texts_of(tokens, tokens.train) + texts_of(tokens, tokens.validation)
    assert sum(map(len, texts)) > 100_000 and any("def " in text for text in texts)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_file_gives_the_same_tokens(kind, tmp_path, prepared):
    tokens = prepare(configured(tmp_path, write_all(tmp_path / "texts", kind)))
    assert tokens.sha256 == prepared.sha256
    for side in ("train", "validation"):
        assert (getattr(tokens, side)[0] == getattr(prepared, side)[0]).all()


def test_tokens_are_the_documents_byte_for_byte(prepared):
    train, validation = (texts_of(prepared, side) for side in (prepared.train, prepared.validation))
    assert 0 < len(validation) < 20 and len(train) + len(validation) == len(TEXTS)
    held = iter(validation)
    kept = iter(train)
    for text in TEXTS:
        assert text == next(held if documents._is_held_out(text) else kept)


def test_a_document_stays_on_its_side_when_others_come_and_go(tmp_path, prepared):
    more = [f"another {i}" for i in range(100)] + TEXTS[::2]
    tokens = prepare(configured(tmp_path, write_jsonl(tmp_path / "b.jsonl", more)))
    before = set(texts_of(prepared, prepared.validation)) & set(TEXTS[::2])
    assert before and before == set(texts_of(tokens, tokens.validation)) & set(TEXTS)


def test_few_documents_have_one_held_out_and_a_single_one_its_end(tmp_path):
    few = TEXTS[1:4]
    tokens = prepare(configured(tmp_path, write_jsonl(tmp_path / "few.jsonl", few)))
    assert [len(texts_of(tokens, side)) for side in (tokens.train, tokens.validation)] == [2, 1]

    verse = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "verse.txt").write_text(verse)
    tokens = prepare(configured(tmp_path, tmp_path / "verse.txt"))
    (start,), (end,) = (texts_of(tokens, side) for side in (tokens.train, tokens.validation))
    assert start + end == verse and end.startswith("line ") and 0.05 < len(end) / len(verse) <= 0.1


def test_a_long_document_is_one_though_it_is_tokenised_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 64)
    monkeypatch.setattr(data, "_BATCH", 200)
    texts = ["".join(TEXTS[:20]), "東" * 500, "".join(TEXTS[20:40])]
    tokens = prepare(configured(tmp_path, write_jsonl(tmp_path / "long.jsonl", texts)))
    assert tokens.bytes_per_token is not None
    found = texts_of(tokens, tokens.train) + texts_of(tokens, tokens.validation)
    assert sorted(found) == sorted(texts)


def test_empty_documents_are_none(tmp_path):
    tokens = prepare(configured(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["", *TEXTS[:9], ""])))
    found = texts_of(tokens, tokens.train) + texts_of(tokens, tokens.validation)
    assert sorted(found) == sorted(TEXTS[:9])


def test_a_tokenizer_learns_from_all_files_alike_and_never_from_held_out_text(tmp_path):
    for i in range(4):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"{i}{text}" for text in TEXTS])
    texts = documents.from_files(documents.matching((f"{tmp_path}/*.jsonl",), (".jsonl",)))
    sample = list(texts.sample(4_000))
    assert sum(map(len, sample)) == 4_000
    assert {text[0] for text in sample} == {"0", "1", "2", "3"}
    every = set(texts.sample(10**9))
    everything = [document for file in texts.files for document in texts.of(file)]
    assert every == {document.text for document in everything if not document.held_out}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("*.txt", None, r"\*\.txt matches no file"),
        ("a.csv", b"x", r"a\.csv, which must end in one of \.txt, "),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl:2 must be a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', r"a\.jsonl:3 must be a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "', r"a\.jsonl:2 must be a JSON object"),
        ("a.jsonl", b'{"text": "half \\ud83d"}\n', r"a\.jsonl:1 .* Unicode text"),
        ("a.jsonl", b"\n", r"a\.jsonl .* must contain text"),
        ("a.txt", b"", r"a\.txt .* must contain text"),
        ("a.txt", b"x", "nothing is left to hold out"),
        ("a.txt", b"fine \xff", r"a\.txt must be UTF-8: invalid start byte at byte 5"),
        ("a.jsonl.gz", CUT_SHORT, r"a\.jsonl\.gz is damaged"),
        ("a.parquet", b"PAR1 not", r"a\.parquet cannot be read"),
        ("a.npy", b"\x93NUMPY", r"a\.npy is not a complete \.npy file"),
        ("a.bin", b"", r"a\.bin must have an even .* got 0"),
        ("a.bin", b"abc", r"a\.bin must have an even .* got 3"),
    ],
)
def test_bad_files_are_refused_by_name(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(configured(tmp_path, tmp_path / name))


def test_a_parquet_file_needs_a_column_of_texts(tmp_path):
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r'a\.parquet has no column "text", but body'):
        prepare(configured(tmp_path, tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"b\.parquet: .* must contain texts; got None"):
        prepare(configured(tmp_path, tmp_path / "b.parquet"))


def test_texts_and_tokens_do_not_mix(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(ValueError, match="both text and token files"):
        prepare(configured(tmp_path, tmp_path / "a.npy", write_jsonl(tmp_path / "a.jsonl")))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs:// as a folder, below the same library that real buckets are read through."""

    class Bucket(DirFileSystem):
        protocol = ("gcs", "gs")

        def __init__(self, **_):
            super().__init__(str(tmp_path / "bucket"), fsspec.filesystem("file"))

    (tmp_path / "bucket" / "b").mkdir(parents=True)
    for name in Bucket.protocol:
        monkeypatch.setitem(_registry, name, Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield tmp_path / "bucket" / "b"
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_files_may_be_in_a_bucket(bucket, tmp_path, prepared):
    for kind in ("jsonl", "jsonl.gz", "parquet"):
        write_all(bucket / kind.replace(".", ""), kind)
        glob = f"gs://b/{kind.replace('.', '')}/*.{kind}"
        assert prepare(configured(tmp_path, glob)).sha256 == prepared.sha256
    np.arange(500, dtype="<u2").tofile(bucket / "a.bin")
    for _ in range(2):
        tokens = prepare(configured(tmp_path, "gs://b/*.bin", vocabulary=500))
        assert np.concatenate([*tokens.train, *tokens.validation]).tolist() == list(range(500))
    assert len(list((tmp_path / "cache" / "shards").glob("[!.]*"))) == 1
    np.arange(500, dtype="<u2")[::-1].tofile(bucket / "a.bin")
    assert prepare(configured(tmp_path, "gs://b/a.bin", vocabulary=500)).train[0][0] == 499


def test_a_bucket_without_its_package_says_which(tmp_path):
    with pytest.raises(ValueError, match=r"s3://b/\*\.txt cannot be listed: .*s3fs"):
        prepare(configured(tmp_path, "s3://b/*.txt"))


# Tokenised shards


def header(count, version=1):
    return np.array([20240520, version, count, *[0] * 253], "<i4").tobytes()


@pytest.mark.parametrize("kind", ["uint16.npy", "uint32.npy", "raw.bin", "headed.bin"])
def test_shards_are_tokens_as_they_are(kind, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 3_000)
    for i, part in enumerate(np.split(tokens, 3)):
        path = tmp_path / f"{i}.{kind}"
        if kind.endswith("npy"):
            np.save(path, part.astype(kind.split(".")[0]))
        else:
            path.write_bytes(header(1_000) * (kind == "headed.bin") + part.astype("<u2").tobytes())
    got = prepare(configured(tmp_path, tmp_path / f"*.{kind}", vocabulary=60_000))
    assert [len(part) for part in got.train] == [1_000, 1_000, 990]
    assert (np.concatenate([*got.train, *got.validation]) == tokens).all()
    assert got.bytes_per_token is got.tokenizer is None and got.vocabulary == 60_000
    assert not (tmp_path / "cache").exists()


def test_shards_that_say_so_in_a_whole_word_are_held_out(tmp_path):
    kept = ["interval_001", "invalid", "latest-2", "train_0", "values"]
    held = ["Test.3", "corpus-validation", "fineweb_val_000000", "val0", "x_valid_1"]
    for number, name in enumerate([*held, *kept]):
        np.save(tmp_path / f"{name}.npy", np.full(50, number, np.uint16))
    got = prepare(configured(tmp_path, tmp_path / "*.npy"))
    assert [part[0] for part in got.validation] == [0, 1, 2, 3, 4]
    assert [part[0] for part in got.train] == [5, 6, 7, 8, 9]
    other = prepare(configured(tmp_path, tmp_path / "train*.npy"))
    assert other.sha256 != got.sha256
    with pytest.raises(
        ValueError, match=r"held-out files, such as val0\.npy; give others to train on"
    ):
        prepare(configured(tmp_path, tmp_path / "val0*.npy"))


def test_shards_may_bring_their_tokenizer(tmp_path, prepared):
    path = tmp_path / "tokenizer.json"
    prepared.tokenizer.save(str(path))
    np.save(tmp_path / "a.npy", prepared.train[0])
    got = prepare(configured(tmp_path, tmp_path / "a.npy", tokenizer=str(path), vocabulary=9))
    assert got.vocabulary == 300 and (got.bytes_per_token == prepared.bytes_per_token).all()
    error = r"a\.npy must be less than --data.vocabulary 299; got 299"
    with pytest.raises(ValueError, match=error):
        prepare(configured(tmp_path, tmp_path / "a.npy", vocabulary=299))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(10), "its header promises 10 tokens, which are 1044 bytes, but it has 1024"),
        (header(10)[:900], "900"),
        (header(0), "0 tokens"),
        (header(2, version=2) + b"1234", "must have a header of version 1"),
    ],
)
def test_a_damaged_shard_is_refused(content, message, tmp_path):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(configured(tmp_path, tmp_path / "a.bin"))


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3), np.uint16), np.zeros(3), np.zeros(0, np.uint16)]
)
def test_an_array_that_is_no_tokens_is_refused(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy"):
        prepare(configured(tmp_path, tmp_path / "a.npy"))


# Tokenizers


def test_text_that_spells_the_end_of_text_is_text(tmp_path):
    texts = [f"say <|endoftext|> {i}" for i in range(20)]
    tokens = prepare(configured(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts)))
    found = texts_of(tokens, tokens.train) + texts_of(tokens, tokens.validation)
    assert sorted(found) == sorted(texts)


def test_a_vocabulary_is_as_large_as_asked_for_and_holds_all_bytes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", "abc"])
    tokens = prepare(configured(tmp_path, path, vocabulary=1000))
    assert tokens.vocabulary == 1000 == len(tokens.bytes_per_token)
    with pytest.raises(ValueError, match=r"--data\.vocabulary must be at least 257, .*; got 256"):
        prepare(configured(tmp_path, path, vocabulary=256))


def given(tmp_path, name, tok, end="<end>"):
    tok.add_special_tokens([end])
    tok.save(str(tmp_path / name))
    return str(tmp_path / name)


def test_a_given_tokenizer_adds_cuts_and_pads_nothing(tmp_path, prepared):
    tok = Tokenizer.from_str(prepared.tokenizer.to_str())
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tok.enable_truncation(5)
    tok.enable_padding(length=500)
    path = given(tmp_path, "t.json", tok)
    file = write_jsonl(tmp_path / "a.jsonl")
    tokens = prepare(configured(tmp_path, file, tokenizer=path, end_of_text="<end>"))
    assert tokens.vocabulary == 301 and tokens.end_of_text == 300
    found = texts_of(tokens, tokens.train) + texts_of(tokens, tokens.validation)
    assert sorted(found) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"t\.json has no token '</s>'.*--data\.end-of-text"):
        prepare(configured(tmp_path, file, tokenizer=path, end_of_text="</s>"))


def test_bytes_are_not_told_where_a_tokenizer_loses_them(tmp_path, prepared):
    file = write_jsonl(tmp_path / "a.jsonl", [unicodedata.normalize("NFD", text) for text in TEXTS])
    changed = Tokenizer.from_str(prepared.tokenizer.to_str())
    changed.normalizer = normalizers.NFC()
    words = Tokenizer(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["?"]))
    np.save(tmp_path / "a.npy", np.zeros(5_000, np.uint16))
    for tok, path in ((changed, file), (words, file), (words, tmp_path / "a.npy")):
        name = given(tmp_path, "t.json", tok)
        tokens = prepare(configured(tmp_path, path, tokenizer=name, end_of_text="<end>"))
        assert tokens.bytes_per_token is None and len(tokens.train[0]) > 1_000
        assert held_out(tokens, 8, 64).bits_per_byte(1.0) is None


def test_a_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "t.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"t\.json is not a valid tokenizer\.json"):
        prepare(
            configured(tmp_path, write_jsonl(tmp_path / "a.jsonl"), tokenizer=f"{tmp_path}/t.json")
        )


def test_large_vocabularies_need_four_bytes_a_token():
    source = tokenizer.train(TEXTS, 300, "<end>")
    vocabulary = tokenizer.load(source, "", "<end>", 70_000)
    assert vocabulary.size == 70_000 and vocabulary.bytes_per_token[300:].sum() == 0


# The cache


def watched(config):
    """Tokens, and what was under way for them."""
    seen = []
    tokens = prepare(config, lambda what, done, total: seen.append(what))
    return tokens, set(seen)


def test_text_is_tokenised_once_and_again_when_it_or_a_setting_changes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    first, work = watched(configured(tmp_path, path))
    assert work == {"training a tokenizer", "tokenising"}
    again, work = watched(configured(tmp_path, path))
    assert not work and again.sha256 == first.sha256 and again.as_json() == first.as_json()
    assert (again.train[0] == first.train[0]).all() and isinstance(again.train[0], np.memmap)

    other, work = watched(configured(tmp_path, path, vocabulary=290))
    assert work and other.sha256 != first.sha256
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    before, _ = watched(configured(tmp_path, link))
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"return", b"RETURN"))
    os.utime(path, ns=(time, time))
    for name in (path, link):
        changed, work = watched(configured(tmp_path, name))
        assert work and changed.sha256 != before.sha256 == first.sha256


@pytest.mark.parametrize("file", ["train.bin", "validation.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_cache_is_made_anew(file, damage, tmp_path, prepared):
    config = configured(tmp_path, write_jsonl(tmp_path / "a.jsonl"))
    prepare(config)
    (path,) = (tmp_path / "cache").glob(f"*/{file}")
    content = bytearray(path.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[:-1])
        case "gone":
            path.unlink()
    tokens, work = watched(config)
    # a flip that leaves the record's meaning as it was, or a final line's end, costs nothing
    assert "tokenizing damaged files again" in work or (file, damage) == ("meta.json", "cut")
    assert tokens.sha256 == prepared.sha256
    assert not watched(config)[1]


def test_a_changed_record_is_damage_too(tmp_path, prepared):
    config = configured(tmp_path, write_jsonl(tmp_path / "a.jsonl"))
    prepare(config)
    (path,) = (tmp_path / "cache").glob("*/meta.json")
    path.write_text(path.read_text().replace('"exact": true', '"exact": false'))
    tokens, work = watched(config)
    assert "tokenising" in work and tokens.bytes_per_token is not None


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from experiments.language.data import Data, prepare

folder, kill, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
count = 0

def on_progress(what, done, total):
    global count
    (folder / f"{name}.{what.split()[0]}").touch()
    count += what == "tokenising"
    if count and count == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    while name == "first" and not (folder / "second.waiting").exists():
        time.sleep(0.01)

config = Data((f"{folder}/a.jsonl",), vocabulary=300, cache=folder / "cache")
print(prepare(config, on_progress).sha256)
"""


def start(folder, kill=0, name="any", **environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(kill), name],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_kill_in_the_middle_leaves_nothing_that_counts(tmp_path, prepared):
    write_jsonl(tmp_path / "a.jsonl")
    with start(tmp_path, kill=300) as process:
        assert process.wait(60) == -signal.SIGKILL
    left = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert [path.name.endswith(".partial") for path in left] == [True]
    tokens, work = watched(configured(tmp_path, tmp_path / "a.jsonl"))
    assert "tokenising" in work and tokens.sha256 == prepared.sha256
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert (folder / "meta.json").exists()


def test_two_processes_do_the_work_once(tmp_path, prepared):
    write_jsonl(tmp_path / "a.jsonl")
    first = start(tmp_path, name="first", RAYON_NUM_THREADS="1", PYTHONHASHSEED="1")
    wait_for((tmp_path / "first.training").exists, first)
    second = start(tmp_path, name="second")
    outputs = [process.communicate(timeout=60)[0].strip() for process in (first, second)]
    assert outputs == [prepared.sha256] * 2
    assert (tmp_path / "first.tokenising").exists()
    assert not (tmp_path / "second.tokenising").exists()


def test_a_stop_and_a_full_disk_leave_nothing(tmp_path):
    config = configured(tmp_path, write_jsonl(tmp_path / "a.jsonl"))

    def stop(what, done, total):
        if what == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(OSError):
            prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(prepare(config).train[0]) > 1_000


def test_the_cache_is_where_the_system_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Data().folder() == tmp_path / "muon_jax" / "pretrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(Data().folder()) == "/home/someone/.cache/muon_jax/pretrain"


# Batches


def counted(*sizes, validation=100):
    """Tokens 0, 1, 2, ... in shards of these sizes."""
    count = np.arange(sum(sizes), dtype=np.uint32)
    train = tuple(np.split(count, np.cumsum(sizes)[:-1]))
    held = (np.arange(validation, dtype=np.uint32),)
    return data.Tokens("", train, held, 2**20, None, None, None, "")


def test_windows_cover_the_text_over_all_shards_every_epoch_in_another_order():
    tokens = counted(50, 3, 1, 107)  # 161 tokens: 40 windows of 4 targets
    steps = batches(tokens, batch=5, context=4, seed=0)
    epochs = [np.concatenate([steps[8 * epoch + i] for i in range(8)]) for epoch in range(3)]
    for windows in epochs:
        assert windows.dtype == np.int32
        assert (np.diff(windows) == 1).all()
        assert sorted(windows[:, 0]) == list(range(0, 160, 4))
    orders = [tuple(windows[:, 0]) for windows in epochs]
    assert len({*orders, tuple(range(0, 160, 4))}) == 4


def test_neighbouring_seeds_have_other_orders_in_every_epoch():
    orders = set()
    for seed in range(4):
        steps = batches(counted(161), batch=40, context=4, seed=seed)
        orders |= {tuple(steps[epoch][:, 0]) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_the_same_with_every_version_of_the_libraries():
    steps = batches(counted(161), batch=8, context=4, seed=7)
    assert steps[0][:, 0].tolist() == [12, 32, 144, 88, 64, 16, 120, 20]
    assert steps[1000][:, 0].tolist() == [16, 68, 116, 104, 12, 156, 72, 84]


@pytest.mark.parametrize("rows", [[0], [2, 5], [1, 2, 3, 4]])
def test_processes_load_rows_of_the_same_batch(rows):
    settings = {"tokens": counted(203), "batch": 6, "context": 4, "seed": 3}
    whole, part = batches(**settings), batches(**settings, rows=rows)
    for step in (0, 7, 8, 9, 1_000_003):  # 50 windows an epoch: step 8 has windows of two
        assert (part[step] == whole[step][rows]).all()
        assert whole[step].shape == (6, 5)


def test_a_run_goes_on_from_any_step_with_the_same_batches():
    steps = batches(counted(203), batch=6, context=4, seed=3, rows=[1, 3])
    run = from_step(steps, 0)
    first = [next(run) for _ in range(30)]
    run.close()
    resumed = from_step(steps, 13)
    for step in range(13, 30):
        assert (next(resumed) == first[step]).all() and (steps[step] == first[step]).all()
    resumed.close()


def test_batches_that_cannot_be_are_refused():
    settings = {"batch": 6, "context": 4, "seed": 0}
    with pytest.raises(ValueError, match=r"at least 5 tokens to train on \(one sequence\); got 4"):
        batches(counted(2, 2), **settings)
    with pytest.raises(ValueError, match="--seed must be at least 0"):
        batches(counted(99), **settings | {"seed": -1})
    assert batches(counted(5), **settings)[9].shape == (6, 5)


# Held-out text


def test_held_out_windows_are_fixed_and_spread(prepared):
    every = held_out(prepared, 8, 10**9)
    tokens = np.concatenate(prepared.validation)
    assert len(every.windows) == (len(tokens) - 1) // 8 and every.windows.dtype == np.int32
    assert (every.windows[:, 1:].ravel() == tokens[1 : 1 + every.windows[:, 1:].size]).all()

    some = held_out(counted(99, validation=1_001), 10, 59)
    assert some.windows[:, 0].tolist() == [0, 200, 400, 600, 800]


def test_bits_per_byte_are_of_the_bytes_of_the_targets(prepared):
    tokens = prepared.validation[0]
    held = held_out(prepared, 8, 10**9)
    targets = held.windows[:, 1:].size
    dropped = [tokens[0], *tokens[1 + targets :]]
    text = "".join(texts_of(prepared, prepared.validation)).encode()
    assert held.bytes == len(text) - prepared.bytes_per_token[dropped].sum()
    assert held.bits_per_byte(0.5) == pytest.approx(0.5 * targets / np.log(2) / held.bytes)


def test_held_out_text_must_hold_a_window():
    with pytest.raises(ValueError, match=r"at least 5 tokens held out \(one sequence\); got 3"):
        held_out(counted(99, validation=3), 4, 100)
    with pytest.raises(ValueError, match="--evaluation-tokens must be at least --context 4; got 3"):
        held_out(counted(99), 4, 3)
    assert held_out(counted(99), 4, 4).bytes is None
