"""Commands of the studies, in the process of the tests."""

import signal
import sys
from unittest import mock


def run_command(main, *words):
    """The exit code of `main` with these arguments. Its handlers of signals do not stay."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with mock.patch.object(sys, "argv", ["command", *map(str, words)]):
            return main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
