"""Text becomes tokens exactly, whatever files it is in; each document stays on its side."""

import gzip
import io
import json
import unicodedata

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.registry import _registry
from pyarrow import parquet
from token_texts import TEXTS, all_texts, configured, jsonl, prepared_of, texts_of, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from experiments import corpus
from experiments.language import data, documents, tokenizer
from experiments.language.data import Data, prepare
from experiments.language.windows import held_out


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """TEXTS as tokens."""
    return prepared_of(tmp_path_factory.mktemp("texts"))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def table(columns, **options):
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def header(count, version=1):
    return np.array([20240520, version, count, *[0] * 253], "<i4").tobytes()


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
    texts = all_texts(tokens)
    assert sum(map(len, texts)) > 100_000 and any("def " in text for text in texts)


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


LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in TEXTS).encode()
KINDS = {
    "txt": [text.encode() for text in TEXTS],
    "jsonl": [LINES],
    "jsonl.gz": [gzip.compress(LINES)],
    "parquet": [
        table({"id": range(len(part)), "text": part}, row_group_size=50)
        for part in (TEXTS[:150], TEXTS[150:])
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_tokens_from_a_bucket_too(
    kind, bucket, tmp_path, prepared
):
    for i, content in enumerate(KINDS[kind]):
        write(bucket / f"{i:03}.{kind}", content)
    for folder in (bucket, "gs://b"):
        tokens = prepare(configured(tmp_path, f"{folder}/*.{kind}"))
        assert tokens.sha256 == prepared.sha256
        for side in ("train", "validation"):
            assert (getattr(tokens, side)[0] == getattr(prepared, side)[0]).all()


def test_token_files_in_a_bucket_are_fetched_once_and_again_when_they_change(bucket, tmp_path):
    np.arange(500, dtype="<u2").tofile(bucket / "a.bin")
    for _ in range(2):
        tokens = prepare(configured(tmp_path, "gs://b/*.bin", vocabulary=500))
        assert np.concatenate([*tokens.train, *tokens.validation]).tolist() == list(range(500))
    assert len(list((tmp_path / "cache" / "shards").glob("[!.]*"))) == 1
    np.arange(500, dtype="<u2")[::-1].tofile(bucket / "a.bin")
    assert prepare(configured(tmp_path, "gs://b/a.bin", vocabulary=500)).train[0][0] == 499


def test_a_document_stays_on_its_side_when_others_come_and_go(tmp_path, prepared):
    train, validation = texts_of(prepared)
    assert 0 < len(validation) < 20 and len(train) + len(validation) == len(TEXTS)
    kept, held = iter(train), iter(validation)
    for text in TEXTS:
        assert text == next(held if documents._is_held_out(text) else kept)
    more = [f"another {i}" for i in range(100)] + TEXTS[::2]
    before = {*validation} & {*TEXTS[::2]}
    assert before and before == {*texts_of(prepared_of(tmp_path, more))[1]} & {*TEXTS}


def test_few_documents_have_one_held_out_and_a_single_one_its_end(tmp_path):
    assert [*map(len, texts_of(prepared_of(tmp_path, TEXTS[1:4])))] == [2, 1]
    verse = "".join(f"line {i}\n" for i in range(100))
    (start,), (end,) = texts_of(
        prepare(configured(tmp_path, write(tmp_path / "verse.txt", verse.encode())))
    )
    assert start + end == verse and end.startswith("line ") and 0.05 < len(end) / len(verse) <= 0.1


SPELT = [f"say <|endoftext|> {i}" for i in range(20)]


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        # Tokenised in pieces, they are whole documents still.
        (["".join(TEXTS[:20]), "東" * 500, "".join(TEXTS[20:40])], slice(None)),
        (["", *TEXTS[:9], ""], slice(1, -1)),  # empty documents are none
        (SPELT, slice(None)),  # what spells the end of a text is text
    ],
    ids=["long", "empty", "spelt"],
)
def test_documents_are_kept_as_they_are(texts, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 64)
    monkeypatch.setattr(data, "_BATCH", 200)
    tokens = prepared_of(tmp_path, texts)
    assert tokens.bytes_per_token is not None
    assert all_texts(tokens) == sorted(texts[kept])


def test_a_tokenizer_learns_from_all_files_alike_and_never_from_held_out_text(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.jsonl", jsonl(f"{i}{text}" for text in TEXTS))
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
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20], "gz is damaged"),
        ("a.parquet", b"PAR1 not", r"a\.parquet cannot be read"),
        ("a.parquet", table({"body": ["x"]}), r'a\.parquet has no column "text", but body'),
        ("a.parquet", table({"text": ["x", None]}), r"parquet: .* must contain texts; got None"),
        ("a.npy", b"\x93NUMPY", r"a\.npy is not a complete \.npy file"),
        ("a.npy", npy(np.zeros((2, 3), np.uint16)), r"a\.npy must have one axis .* \(2, 3\)"),
        ("a.npy", npy(np.zeros(3)), r"a\.npy must have .* uint32; got float64"),
        ("a.npy", npy(np.zeros(0, np.uint16)), r"a\.npy has no tokens"),
        ("a.npy", npy(np.full(9, 300, np.uint16)), "than --data.vocabulary 300; got 300"),
        ("a.bin", b"", r"a\.bin must have an even .* got 0"),
        ("a.bin", b"abc", r"a\.bin must have an even .* got 3"),
        ("a.bin", header(10), "promises 10 tokens, which are 1044 bytes, but it has 1024"),
        ("a.bin", header(10)[:900], "900"),
        ("a.bin", header(0), "0 tokens"),
        ("a.bin", header(2, version=2) + b"1234", "must have a header of version 1"),
        ("s3://b/*.txt", None, r"s3://b/\*\.txt cannot be listed: .*s3fs"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_bad_files_are_refused_by_name(name, content, message, tmp_path):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        prepare(configured(tmp_path, name if "://" in name else tmp_path / name))


def test_texts_and_tokens_do_not_mix(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(ValueError, match="both text and token files"):
        prepare(configured(tmp_path, tmp_path / "a.npy", write(tmp_path / "a.jsonl", jsonl())))


# Tokenised shards


@pytest.mark.parametrize("kind", ["uint16.npy", "uint32.npy", "raw.bin", "headed.bin"])
def test_shards_are_tokens_as_they_are(kind, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 3_000)
    for i, part in enumerate(np.split(tokens, 3)):
        if kind.endswith("npy"):
            content = npy(part.astype(kind.split(".")[0]))
        else:
            content = header(1_000) * (kind == "headed.bin") + part.astype("<u2").tobytes()
        write(tmp_path / f"{i}.{kind}", content)
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
    said = r"held-out files, such as val0\.npy; give others to train on"
    with pytest.raises(ValueError, match=said):
        prepare(configured(tmp_path, tmp_path / "val0*.npy"))


# Tokenizers


def test_a_vocabulary_is_as_large_as_asked_for_and_holds_all_bytes(tmp_path):
    tokens = prepared_of(tmp_path, ["ab", "abc"], vocabulary=1000)
    assert tokens.vocabulary == 1000 == len(tokens.bytes_per_token)
    with pytest.raises(ValueError, match=r"--data\.vocabulary must be at least 257, .*; got 256"):
        prepared_of(tmp_path, ["ab", "abc"], vocabulary=256)
    # Large ones need four bytes a token.
    vocabulary = tokenizer.load(tokenizer.train(TEXTS, 300, "<end>"), "", "<end>", 70_000)
    assert vocabulary.size == 70_000 and vocabulary.bytes_per_token[300:].sum() == 0


def given(tmp_path, tok):
    tok.add_special_tokens(["<end>"])
    tok.save(str(tmp_path / "t.json"))
    return {"tokenizer": str(tmp_path / "t.json"), "end_of_text": "<end>"}


def test_a_given_tokenizer_adds_cuts_and_pads_nothing(tmp_path, prepared):
    tok = Tokenizer.from_str(prepared.tokenizer.to_str())
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tok.enable_truncation(5)
    tok.enable_padding(length=500)
    own = given(tmp_path, tok)
    tokens = prepared_of(tmp_path, **own)
    assert tokens.vocabulary == 301 and tokens.end_of_text == 300
    assert all_texts(tokens) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"t\.json has no token '</s>'.*--data\.end-of-text"):
        prepared_of(tmp_path, **own | {"end_of_text": "</s>"})
    # Shards may bring one, whose vocabulary is theirs.
    np.save(tmp_path / "a.npy", prepared.train[0])
    shards = prepare(configured(tmp_path, tmp_path / "a.npy", vocabulary=9, **own))
    assert shards.vocabulary == 301
    assert (shards.bytes_per_token[:300] == prepared.bytes_per_token).all()
    write(tmp_path / "t.json", b'{"model": ')
    with pytest.raises(ValueError, match=r"t\.json is not a valid tokenizer\.json"):
        prepared_of(tmp_path, **own)


def test_bytes_are_not_told_where_a_tokenizer_loses_them(tmp_path, prepared):
    file = jsonl(unicodedata.normalize("NFD", text) for text in TEXTS)
    file = write(tmp_path / "a.jsonl", file)
    changed = Tokenizer.from_str(prepared.tokenizer.to_str())
    changed.normalizer = normalizers.NFC()
    words = Tokenizer(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["?"]))
    np.save(tmp_path / "a.npy", np.zeros(5_000, np.uint16))
    for tok, path in ((changed, file), (words, file), (words, tmp_path / "a.npy")):
        tokens = prepare(configured(tmp_path, path, **given(tmp_path, tok)))
        assert tokens.bytes_per_token is None and len(tokens.train[0]) > 1_000
        assert held_out(tokens, 8, 64).bits_per_byte(1.0) is None
