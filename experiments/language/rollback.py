"""When a run goes back to its last checkpoint: a spike of the loss that does not pass."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Annotated, Any

from experiments import settings
from experiments.runs import RunError
from experiments.settings import Count

# Losses that the running median is of, and as many as it takes to be trusted.
_WINDOW, _SETTLED = 64, 8


class SpikeError(RunError):
    """A run that has gone back as often as it may."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Rollback:
    """A rule for spikes of the loss, which is part of what is trained."""

    above: Annotated[float, settings.above(1)] | None = None
    """Go back to the last checkpoint where the loss is NaN or Inf, or exceeds this multiple of the
    median of the last 64 steps, and leave out the batches since then. 1.5 is usual. By default no
    run goes back. Checkpoints between those of --save-every are not gone back to."""
    steps: Count = 3
    """Consecutive steps with such a loss after which the run goes back."""
    limit: Count = 5
    """Number of times that the run goes back; the next spike ends it."""


class Watch:
    """The losses of a run, by which it goes back. It depends on them alone, so that a run that is
    killed anywhere comes to the same.

    Args:
        rule: of the run.
        told: what `as_json` gave when the state at hand was saved; None at the start.

    Attributes:
        rule: as given.
        target: step of the checkpoint to go back to; None is the start.
        left_out: batches that were left out so far.
    """

    def __init__(self, rule: Rollback, told: dict[str, Any] | None = None):
        self.rule = rule
        start: dict[str, Any] = {
            "losses": [],
            "in_a_row": 0,
            "target": None,
            "then": [],
            "done": [],
        }
        told = told or start
        self._losses: list[float] = list(told["losses"])
        self._in_a_row: int = told["in_a_row"]
        self.target: int | None = told["target"]
        self._then: list[float] = list(told["then"])  # the losses when the target was saved
        self._done: list[list[int]] = list(told["done"])
        self._reason = ""

    @property
    def left_out(self) -> int:
        return sum(until - begin for begin, until in self._done)

    def judge(self, loss: float, *, is_lost: bool = False) -> bool:
        """Takes note of the next step's loss; whether the run is to go back.

        Args:
            loss: of the step.
            is_lost: whether its update has broken the params, so that it goes back at once.
        """
        median = statistics.median(self._losses) if len(self._losses) >= _SETTLED else math.inf
        if not is_lost and loss <= self.rule.above * median:
            self._losses = [*self._losses, loss][-_WINDOW:]
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        self._reason = f"the loss is {loss:.4g}, after a median of {median:.4g}"
        return is_lost or self._in_a_row >= self.rule.steps

    def loses(self, held_out: float) -> bool:
        """Whether the run is to go back since it has no held-out loss to be saved with."""
        self._reason = "the held-out loss is NaN or Inf"
        return self.rule.above is not None and not math.isfinite(held_out)

    def saves(self, step: int, periodic: bool) -> None:
        """To be called before a checkpoint is saved; it becomes the target if there is no spike.

        One that is saved since somebody stopped the run does not: a run that nobody stops has none.
        """
        if periodic and not self._in_a_row:
            self.target, self._then = step, self._losses

    def go_back(self, step: int, on_message: Callable[[str], None], remedy: str) -> None:
        """To where the target was saved, from the step that was judged last.

        Raises:
            SpikeError: it has gone back too often; the message ends with the remedy.
        """
        to, often = self.target or 0, len(self._done)
        if often >= self.rule.limit:
            raise SpikeError(
                f"Step {step}: {self._reason}, and the run has gone back {often} times, which is "
                f"--rollback.limit. Check the training data, or {remedy}"
            )
        self._done.append([to, step])
        self._losses, self._in_a_row = self._then, 0
        on_message(
            f"[yellow]step {step}:[/yellow] {self._reason}; back to step {to}, without the batches "
            f"in between ({often + 1} of {self.rule.limit} times)"
        )

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "losses": self._losses,
            "in_a_row": self._in_a_row,
            "target": self.target,
            "then": self._then,
            "done": self._done,
        }

    def record(self) -> dict[str, int]:
        """What is logged of it."""
        return {} if self.rule.above is None else {"rollbacks": len(self._done)}

    def summary(self) -> dict[str, Any]:
        """What a run's summary has of it."""
        back = [{"from_step": until, "to_step": begin} for begin, until in self._done]
        return {} if self.rule.above is None else {"rollbacks": back}
