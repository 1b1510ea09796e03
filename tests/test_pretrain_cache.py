"""Text is tokenised once, by one process; no kill, damage or full disk leaves what counts."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from full_disk import full_disk
from token_texts import configured, jsonl, prepared_of, write
from waiting import wait_for

from experiments.language.data import Data, prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepared_of(tmp_path_factory.mktemp("texts"))


def watched(config):
    """Tokens, and what was under way for them."""
    seen = []
    tokens = prepare(config, lambda what, done, total: seen.append(what))
    return tokens, set(seen)


def test_text_is_tokenised_once_and_again_when_it_or_a_setting_changes(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl())
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


DAMAGES = {
    "flip": lambda x: x[: len(x) // 2] + bytes([x[len(x) // 2] ^ 1]) + x[len(x) // 2 + 1 :],
    "cut": lambda x: x[:-1],
    "gone": lambda x: None,
    "lie": lambda x: x.replace(b'"exact": true', b'"exact": false'),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["train.bin", "validation.bin", "tokenizer.json", "manifest.json"])
def test_a_damaged_cache_is_made_anew(file, damage, tmp_path, prepared):
    config = configured(tmp_path, write(tmp_path / "a.jsonl", jsonl()))
    prepare(config)
    (path,) = (tmp_path / "cache").glob(f"*/{file}")
    content = DAMAGES[damage](whole := path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    tokens, work = watched(config)
    # The line's end after the manifest means nothing.
    is_harmless = content == whole or (file, damage) == ("manifest.json", "cut")
    assert ("tokenizing damaged files again" in work) == (not is_harmless)
    assert tokens.sha256 == prepared.sha256 and tokens.bytes_per_token is not None
    assert not watched(config)[1]


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


def folders(cache):
    return [path for path in cache.iterdir() if path.is_dir()]


def test_a_kill_in_the_middle_leaves_nothing_that_counts(tmp_path, prepared):
    path, cache = write(tmp_path / "a.jsonl", jsonl()), tmp_path / "cache"
    with start(tmp_path, kill=300) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert [path.name.endswith(".partial") for path in folders(cache)] == [True]
    tokens, work = watched(configured(tmp_path, path))
    assert "tokenising" in work and tokens.sha256 == prepared.sha256
    (folder,) = folders(cache)
    assert (folder / "manifest.json").exists()


def test_two_processes_do_the_work_once(tmp_path, prepared):
    write(tmp_path / "a.jsonl", jsonl())
    first = start(tmp_path, name="first", RAYON_NUM_THREADS="1", PYTHONHASHSEED="1")
    wait_for((tmp_path / "first.training").exists, first)
    second = start(tmp_path, name="second")
    outputs = [process.communicate(timeout=60)[0].strip() for process in (first, second)]
    assert outputs == [prepared.sha256] * 2
    assert (tmp_path / "first.tokenising").exists()
    assert not (tmp_path / "second.tokenising").exists()


def test_a_stop_and_a_full_disk_leave_nothing(tmp_path):
    config = configured(tmp_path, write(tmp_path / "a.jsonl", jsonl()))

    def stop(what, done, total):
        if what == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop)
    with full_disk(12_000), pytest.raises(OSError):
        prepare(config)
    assert not folders(tmp_path / "cache")
    assert len(prepare(config).train[0]) > 1_000


def test_the_cache_is_where_the_system_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Data().folder() == tmp_path / "muon_jax" / "pretrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(Data().folder()) == "/home/someone/.cache/muon_jax/pretrain"
