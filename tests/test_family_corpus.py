"""The corpus is the same bytes every time, and says clearly when it is none."""

import hashlib
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from experiments import corpus


def library(root, **files):
    """A standard library of a few modules."""
    for name, text in files.items():
        path = root / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return corpus.standard_library(root=root)


def test_the_standard_library_is_megabytes_of_source():
    text = corpus.standard_library()
    assert len(text.train) > 5_000_000 and len(text.validation) > 300_000
    assert b"def " in text.train.tobytes() and text.train.dtype == np.uint8
    digest = hashlib.sha256(text.train.tobytes() + text.validation.tobytes()).hexdigest()
    assert text.sha256 == digest == corpus.standard_library().sha256
    assert sys.prefix not in str(text.as_json())


def test_held_out_files_have_no_near_copies_to_train_on():
    """Where more than half of a file's lines are in one other, of lines that say something."""
    root = Path(sysconfig.get_path("stdlib"))
    files = corpus.library_files(root)
    lines = {
        name: {line for line in map(bytes.strip, (root / name).read_bytes().splitlines()) if line}
        for name, _ in files
    }
    copied = [
        name
        for name, held_out in files
        if held_out
        and any(
            len(lines[name] & lines[other]) > len(lines[name]) / 2
            for other, its in files
            if not its
        )
    ]
    sizes = {name: (root / name).stat().st_size for name, held_out in files if held_out}
    assert sum(sizes[name] for name in copied) < 0.01 * sum(sizes.values()), copied


def test_files_come_in_order_and_tests_and_other_packages_stay_out(tmp_path):
    files = {"copy": "4\n", "abc": "1\n", "json.scanner": "3\n", "ast": "2\n"}
    files |= {
        "test.test_ast": "no",
        "json.test.all": "no",
        "site-packages.numpy": "no",
        "_sysconfigdata_x": "no",
    }
    text = library(tmp_path, **files)
    assert text.train.tobytes() == b"1\n2\n3\n" and text.validation.tobytes() == b"4\n"


def test_a_file_keeps_its_side_when_others_come_and_go(tmp_path):
    names = ("abc", "argparse", "ast", "bdb", "copy", "doctest", "glob")
    few = library(tmp_path / "few", **{name: f"{name}\n" for name in names[::2]})
    more = library(tmp_path / "more", **{name: f"{name}\n" for name in names})
    for side in ("train", "validation"):
        kept = getattr(few, side).tobytes().splitlines()
        assert kept and set(kept) <= set(getattr(more, side).tobytes().splitlines())


def test_a_limit_takes_the_beginning_of_both_sides():
    whole, part = corpus.standard_library(), corpus.standard_library(10_000)
    assert (len(part.train), len(part.validation)) == (9_000, 1_000)
    assert (part.train == whole.train[:9_000]).all()
    assert part.sha256 != whole.sha256


def test_a_file_of_ones_own_is_cut_at_a_line(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    text = corpus.load(path)
    assert text.name == "verse.txt"
    assert text.train.tobytes().endswith(b"\n") and text.validation.tobytes().startswith(b"line 9")
    assert text.train.tobytes() + text.validation.tobytes() == path.read_bytes()
    assert len(corpus.load(path, 100).train) < 100


def test_no_text_is_a_clear_error(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes for training and 0 for validation"):
        corpus.load(path)
    with pytest.raises(FileNotFoundError):
        corpus.load(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="give --text FILE"):
        corpus.standard_library(root=tmp_path / "none")
