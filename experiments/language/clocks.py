"""Measurements of a training loop: seconds of training alone, and profiles of steps."""

import contextlib
import time
from collections.abc import Iterator

import jax
from etils import epath


def looks(step: int, log_every: int) -> bool:
    """Returns whether the record of a step must have the exact largest attention logit.

    Computing it takes time if the kernel does not return the logits. Therefore, if every step is
    logged, only each tenth has it. Other steps have it if the kernel returns it.
    """
    return step % log_every == 0 and (step - 1) // 10 != (step - 1 - log_every) // 10


class Clock:
    """Counts seconds of training alone. It is stopped while a run compiles, evaluates and saves."""

    def __init__(self, seconds: float) -> None:
        self._until = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        now = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._until + now

    def go(self) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def stand(self) -> None:
        """Stops the clock until `go`."""
        self._until, self._since = self.seconds, None

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Stops the clock while the context lasts."""
        self.stand()
        yield
        self.go()


class Profiler:
    """Profiles a range of steps, as far as this process runs them.

    Args:
        steps: The first step of the range and the first step after it; None profiles nothing.
        folder: The folder of the traces.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: epath.Path) -> None:
        self._steps, self._folder, self._watches = steps, folder, False

    def before(self, step: int) -> None:
        """Starts or stops profiling; call it before each step."""
        begin, end = self._steps or (0, 0)
        if self._watches and step >= end:
            self.close()
        elif not self._watches and begin <= step < end:
            jax.profiler.start_trace(str(self._folder))
            self._watches = True

    def close(self) -> None:
        """Writes the trace, if there is one."""
        if self._watches:
            jax.profiler.stop_trace()
            self._watches = False
