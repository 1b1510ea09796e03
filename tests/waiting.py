"""Waiting for what processes of their own do."""

import socket
import time


def wait_for(there, process, seconds=180):
    """Until `there()`; fails where the process ends before, or takes longer."""
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not there after {seconds} s"
        time.sleep(0.02)


def run_pair(start, seconds=240):
    """Waits for `start(port, 0)` and `start(port, 1)`, two processes that have to succeed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start(port, index) for index in range(2)]
    try:
        said = [process.communicate(timeout=seconds) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said
