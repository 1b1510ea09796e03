"""Files from elsewhere can neither hang nor exhaust what reads them, and stay apart."""

import gzip
import json
import os
import shutil
import struct
import time

import numpy as np
import pyarrow as pa
import pytest
from etils import epath
from finetuning import NORMED, initial, written
from pretraining import DENSE, VOCABULARY
from pyarrow import parquet
from safetensors.numpy import save_file

from experiments import cache, manifests
from experiments.finetune import weights
from experiments.finetune.architecture import read as read_architecture
from experiments.finetune.chat import Chat
from experiments.language import documents, hugging_face, tokenizer
from experiments.pretrain import export, export_config

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return written(tmp_path_factory.mktemp("model"), NORMED)[0]


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture(autouse=True)
def quick():
    began = time.perf_counter()
    yield
    assert time.perf_counter() - began < 60


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- Bounds ------------------------------------------------------------------------------------


def test_brackets_in_brackets_are_a_damaged_file(copy):
    def rows():
        return next(documents.lines(epath.Path(copy / "a.jsonl")))

    readers = {
        "config.json": lambda: weights.check(copy, read_architecture(copy / "config.json")),
        "tokenizer_config.json": lambda: Chat(copy),
        "tokenizer.json": lambda: Chat(copy),
        "model.safetensors.index.json": lambda: hugging_face.read_files(copy),
    }
    for name, read in readers.items():
        before = (copy / name).read_bytes() if (copy / name).exists() else None
        for text in (DEEP, "[]", "5", "\xff", "{"):
            (copy / name).write_text(text, encoding="latin-1")
            with pytest.raises(ValueError, match=name):
                read()
        (copy / name).unlink() if before is None else (copy / name).write_bytes(before)
    (copy / "manifest.json").write_text(DEEP)
    assert manifests.read(epath.Path(copy)) == {}
    assert cache.read(copy) is None
    (copy / "a.jsonl").write_text(DEEP)
    with pytest.raises(ValueError, match=r"a.jsonl:1 must be a JSON object"):
        list(documents._lines(epath.Path(copy / "a.jsonl")))
    assert rows()[0] == 1


@pytest.mark.parametrize("layers", [10_000_000, 10**30])
def test_a_config_of_more_layers_than_tensors_is_refused(copy, tmp_path, layers):
    change(copy / "config.json", num_hidden_layers=layers)
    with pytest.raises(ValueError, match=f"has {layers} layers, but there are 24 tensors"):
        weights.check(copy, read_architecture(copy / "config.json"))
    dense = tmp_path / "dense"
    dense.mkdir()
    change_to = export_config.to_json(DENSE, VOCABULARY) | {"num_hidden_layers": layers}
    (dense / "config.json").write_text(json.dumps(change_to))
    save_file({"model.norm.weight": np.ones(4, np.float32)}, dense / "model.safetensors")
    with pytest.raises(ValueError, match=f"has {layers} layers, but there are 1 tensors"):
        export.read(dense)


def test_a_file_that_unpacks_to_no_text_is_refused(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "a.jsonl.gz")
    line = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    path.write_bytes(gzip.compress(line * 2000, 9))
    assert len(list(documents.lines(path))) == 2000
    monkeypatch.setattr(documents, "_UNPACKED", 1 << 16)
    with pytest.raises(ValueError, match=r"more than 100 times its size.*unpack it and give the"):
        list(documents.lines(path))
    monkeypatch.setattr(documents, "_LINE", 500)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:1 exceeds"):
        list(documents.lines(path))


def test_a_table_that_expands_to_no_text_is_refused(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "a.parquet")

    def read(column, **how):
        """The rows that come before the error, and the error."""
        how = {"compression": "zstd", "store_schema": False} | how
        parquet.write_table(pa.table({"text": column}), path, **how)
        rows = []
        with pytest.raises(ValueError) as error:
            rows.extend(documents._column(path))
        return len(rows), str(error.value)

    long = pa.array(["a" * (48 << 20)])
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000, np.int32)), long)
    nested = pa.ListArray.from_arrays([0, 10_000], many)
    for column, told in (
        (many, "unpacks to more than 100 times its size, which is not plausible for text. If it "
         "is intended, write it as .jsonl."),
        (nested, "takes more than 4096 MB to read; convert it to .jsonl."),
    ):  # fmt: skip
        count, error = read(column)
        assert path.stat().length < 10_000 and count < 2
        assert error == f"{path} {told}"
    encoding = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    for how in ({}, encoding):
        count, error = read(pa.array(["a" * (1 << 20)] * 80), **how)
        assert f"{path} unpacks to more than 100 times its size" in error
        assert "write it as .jsonl" in error
    monkeypatch.setattr(documents, "_LINE", 500)
    assert read(pa.array(["a" * 1000] * 10))[1] == f"{path}: row 1 exceeds 0 MB; split it."
    with pytest.raises(FileNotFoundError):
        list(documents.table(epath.Path(tmp_path / "b.parquet"), {"text"}))


def test_a_reader_that_is_killed_is_no_end_of_a_table(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": ["a"] * 9}), path)
    assert len(list(documents.table(path, {"text"}))) == 9
    reader = tmp_path / "reader.py"
    for said in (b"", b"abc", struct.pack("<Q", 9) + b"abc"):
        reader.write_text(
            "import os, sys\n"
            f"sys.stdout.buffer.write({said})\n"
            "sys.stdout.flush()\n"
            "os.kill(os.getpid(), 9)\n"
        )
        monkeypatch.setattr(documents.table_reader, "__file__", str(reader))
        with pytest.raises(ValueError, match=r"row 1 is damaged, or requires more than 4096 MB"):
            list(documents.table(path, {"text"}))


@pytest.mark.parametrize("index", [2**32 - 1, 1 << 22])
def test_ids_that_no_vocabulary_has_are_refused(index):
    source = json.loads(tokenizer.train(["a b"], 300, "<|end|>"))
    source["model"]["vocab"]["zz"] = index
    with pytest.raises(
        ValueError, match=f"t.json has the token {index}, but a vocabulary must have"
    ):
        tokenizer.load(json.dumps(source).encode(), "t.json", "<|end|>")


# --- Links and locks ---------------------------------------------------------------------------


def test_a_link_is_known_by_what_it_leads_to(tmp_path):
    text, link = tmp_path / "text.txt", tmp_path / "link.txt"
    text.write_text("one")
    link.symlink_to(text)
    first = documents.fingerprint(epath.Path(link))
    assert documents.fingerprint(epath.Path(link)) == first
    text.write_text("two")
    os.utime(text, ns=(1, 1))
    assert documents.fingerprint(epath.Path(link)) != first


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/tmp/x.safetensors", "..", "", 5])
def test_an_index_names_no_file_outside_its_folder(copy, name):
    index = {"weight_map": {"a": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name one in this folder"):
        weights.check(copy, NORMED)


def test_links_of_a_hub_s_cache_are_read(copy, tmp_path):
    blob = tmp_path / "blob"
    (copy / "model.safetensors").rename(blob)
    (copy / "model.safetensors").symlink_to(blob)
    weights.check(copy, NORMED)


def test_a_model_s_fingerprint_is_of_all_its_files(copy):
    seen = {hugging_face.fingerprint(copy)}
    files = sorted(path for path in copy.iterdir() if path.is_file())
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in files}
    for path in files:
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(hugging_face.fingerprint(copy))
    assert len(seen) == 1 + len(files)


def test_two_exports_to_one_folder_do_not_mix(tmp_path):
    folder = tmp_path / "model"
    left = tmp_path / ".model.partial"
    (left / "sub").mkdir(parents=True)
    (left / "old.safetensors").write_text("of a killed one")
    with cache.new_folder(folder) as first:
        (first / "a").write_text("x")
        with (
            pytest.raises(ValueError, match="Another process is writing"),
            cache.new_folder(folder),
        ):
            pass
    assert [path.name for path in folder.iterdir()] == ["a"]
    with pytest.raises(ValueError, match="is not empty"):
        weights.write(folder, NORMED, initial())
    with pytest.raises(OSError, match="full"), cache.new_folder(tmp_path / "b") as second:
        (second / "a").write_text("x")
        raise OSError("full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_killed_processes_leave_in_a_cache_is_swept(tmp_path):
    with cache.alone(tmp_path / "c"):
        for name in "abc":
            (tmp_path / f".{name}.partial").mkdir()
            (tmp_path / f".{name}.partial" / "x").write_text("x")

        def write(partial):
            (partial / "x").write_text("x")
            return {}

        with cache.alone(tmp_path / "a"):
            cache.make(tmp_path / "a", write)
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == [".c.partial", "a"]
