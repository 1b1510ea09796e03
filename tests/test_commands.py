"""What the commands of all studies share: messages in place of tracebacks, signals, the output."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.commands import INTERRUPTED, guard, print_error, reporting
from experiments.grok import speed
from experiments.report import __main__ as report
from experiments.runs import RunError

ROOT = Path(__file__).parent.parent


def python(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["no param [blocks]", "[/tmp/x] is no folder", "word " * 40])
def test_an_error_is_printed_to_the_letter_and_in_one_line(text, capsys):
    print_error(text)
    assert capsys.readouterr() == ("", f"error: {text}\n")


def fail(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("--x is 1"), 2, "--x is 1"),
        (RunError("in use"), 2, "in use"),
        (OSError(28, "No space left on device", "/runs/a"), 1,
         "No space left on device: '/runs/a'. Free some space"),
        (OSError("[Errno 28] No space left on device: 'a'. It is whole"), 1,
         "No space left on device: 'a'. It is whole"),
        (PermissionError(13, "Permission denied", "/a"), 1, "Change its permissions"),
        (FileNotFoundError(2, "No such file or directory", "/a"), 2, "No such file or directory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2,
         "torch is not installed, but this command requires it"),
        (RuntimeError("Unable to initialize backend 'tpu': no libtpu"), 1,
         "JAX cannot initialize the platform"),
        (RuntimeError("RESOURCE_EXHAUSTED: 5 GB\nmore"), 1, "has not enough memory (RES"),
        (MemoryError(), 1, "has not enough memory"),
    ],
)  # fmt: skip
def test_what_a_user_can_cause_is_a_message_and_an_exit_code(error, code, said, capsys):
    assert guard(fail(error)) == code
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told and "Errno" not in told
    with pytest.raises(SystemExit, match=r"^error: "), reporting("folder"):
        fail(error)()


def test_an_error_of_the_code_has_its_traceback_and_ctrl_c_an_exit_code(capsys):
    with pytest.raises(KeyError):
        guard(fail(KeyError("x")))
    assert guard(fail(KeyboardInterrupt())) == INTERRUPTED
    assert "run the same command to continue" in capsys.readouterr().out
    with (
        pytest.raises(SystemExit, match=r"folder holds no readable run of this study"),
        reporting("folder"),
    ):
        fail(KeyError("x"))()


def test_speed_without_torch_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert speed.main(["--layers", "1", "--width", "16"]) == 2
    assert "torch is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "5", "[" * 100_000, "{", '{"cells": 5}'])
def test_a_report_of_other_files_is_refused_in_a_sentence(tmp_path, text):
    for name in ("config.json", "summary.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=r"error: .*config.json"):
        report.main(str(tmp_path))


def test_a_platform_that_is_not_here_is_told(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "experiments.grok", "--out", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "tpu", "TPU_SKIP_MDS_QUERY": "1"},
        text=True, capture_output=True,
    )  # fmt: skip
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert "JAX_PLATFORMS=tpu" in process.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_output_is_told_once():
    code = "import sys; from experiments.commands import guard; sys.exit(guard(lambda: print(1)))"
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 1
    assert process.stderr.startswith(
        "error: No space left on device, for a file or for the standard output. Free some space"
    )
    assert "Exception ignored" not in process.stderr and "Traceback" not in process.stderr


def wait_for(process, line):
    assert process.stdout.readline().strip() == line, process.stderr.read()


def test_a_second_ctrl_c_ends_at_once_without_a_traceback():
    code = """
import threading, time
from experiments.commands import stop_on_signals
stop = stop_on_signals()
threading.Thread(target=time.sleep, args=(600,)).start()
print("begun", flush=True)
stop.wait()
print("stopping", flush=True)
time.sleep(600)
"""
    process = python(code)
    wait_for(process, "begun")
    process.send_signal(signal.SIGINT)
    wait_for(process, "stopping")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "Traceback" not in error
    assert "Stopped immediately" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wait_for_another_process_hears_signals(number, tmp_path):
    code = """
import sys, pathlib
from experiments.commands import guard, stop_on_signals
from experiments import cache
stop = stop_on_signals()

def wait():
    print("waiting", flush=True)
    if stop.is_set():
        raise KeyboardInterrupt

def work():
    with cache.alone(pathlib.Path(sys.argv[1]), wait):
        print("has it", flush=True)
        return 0

sys.exit(guard(work))
"""
    from experiments import cache

    with cache.alone(tmp_path / "x"):
        process = python(code, tmp_path / "x")
        wait_for(process, "waiting")
        began = time.monotonic()
        process.send_signal(number)
        said, error = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED and "Traceback" not in error, error
        assert "has it" not in said and time.monotonic() - began < 30
