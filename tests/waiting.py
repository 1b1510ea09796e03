"""Waiting for what a process of its own does."""

import time


def wait_for(there, process, seconds=180):
    """Until `there()`; fails where the process ends before, or takes longer."""
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not there after {seconds} s"
        time.sleep(0.02)
