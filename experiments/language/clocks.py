"""What a training loop measures itself with: seconds of training alone, and profiles of steps."""

import time
from typing import Any

import jax
from etils import epath


def looks(step: int, log_every: int) -> bool:
    """Whether the record of a step has the exact largest attention logit, on every platform.

    It takes time where a kernel keeps the logits, so that of steps that are all logged one in ten
    has it: of these the first. Steps in between have it where it is known without.
    """
    return step % log_every == 0 and (step - 1) // 10 != (step - 1 - log_every) // 10


class Clock:
    """Seconds of training alone: it stands while a run compiles, evaluates and saves."""

    def __init__(self, seconds: float) -> None:
        self._until = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Now."""
        now = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._until + now

    def go(self) -> None:
        """Begins to count."""
        self._since = time.perf_counter()

    def stand(self) -> None:
        """Ends it, until `go`."""
        self._until, self._since = self.seconds, None


class Profiler:
    """Watches the steps that it is asked to, or those of them that this part of a run has.

    Args:
        steps: the first that it watches, and the first that it does not; None for none.
        folder: where traces are written.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: epath.Path) -> None:
        self._steps, self._folder, self._watches = steps, folder, False

    def before(self, step: int) -> None:
        """To be called before each step."""
        if self._steps is None:
            return
        begin, end = self._steps
        if self._watches and step >= end:
            self.stop()
        elif not self._watches and begin <= step < end:
            jax.profiler.start_trace(str(self._folder))
            self._watches = True

    def stop(self, wait_for: Any = None) -> None:
        """Writes what it has seen, when `wait_for` is there."""
        if self._watches:
            jax.block_until_ready(wait_for)
            jax.profiler.stop_trace()
            self._watches = False
