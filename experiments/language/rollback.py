"""Decides when a run goes back to its last checkpoint, because of a spike of the loss."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Annotated, Any

from experiments import settings
from experiments.runs import RunError
from experiments.settings import Count

# The number of losses in the running median, and the number from which on it is used.
_WINDOW, _SETTLED = 64, 8


class SpikeError(RunError):
    """The error of a run that has already gone back `--rollback.limit` times."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Rollback:
    """The rule for spikes of the loss: part of a run's settings, since it affects training."""

    above: Annotated[float, settings.above(1)] | None = None
    """Go back to the last checkpoint if the loss is NaN or Inf, or exceeds this multiple of the
    median of the last 64 steps, and skip the batches since then. 1.5 is usual. By default runs
    never go back. Only checkpoints of --save-every count."""
    steps: Count = 3
    """Number of consecutive steps with such a loss after which the run goes back."""
    limit: Count = 5
    """Number of times that the run may go back. The next spike ends it with an error."""


class Watch:
    """Watches the losses of a run and decides when it goes back.

    Decisions depend on the losses alone, so that a run that was killed and resumed makes the same.

    Args:
        rule: The rule of the run.
        told: The value of `as_json` in the checkpoint that is restored; None for a new run.

    Attributes:
        target: The step of the checkpoint to go back to; None means the start of the run.
        left_out: The number of batches that were skipped so far.
    """

    def __init__(self, rule: Rollback, told: dict[str, Any] | None = None):
        told = told or {}
        self._rule = rule
        self._losses: list[float] = told.get("losses", [])
        self._in_a_row: int = told.get("in_a_row", 0)
        self.target: int | None = told.get("target")
        self._then: list[float] = told.get("then", [])  # the losses when the target was saved
        self._done: list[list[int]] = [*told.get("done", [])]
        self._reason = ""

    @property
    def left_out(self) -> int:
        return sum(until - begin for begin, until in self._done)

    def judge(self, loss: float, *, is_lost: bool = False) -> bool:
        """Records the loss of the next step; returns whether the run must go back by its rule.

        Args:
            loss: The loss of the step.
            is_lost: Whether the params are NaN or Inf after its update; then it goes back at once.
        """
        if self._rule.above is None:
            return False
        median = statistics.median(self._losses) if len(self._losses) >= _SETTLED else math.inf
        if not is_lost and math.isfinite(loss) and loss <= self._rule.above * median:
            self._losses = [*self._losses, loss][-_WINDOW:]
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        self._reason = f"the loss is {loss:.4g}, after a median of {median:.4g}"
        return is_lost or self._in_a_row >= self._rule.steps

    def loses(self, held_out: float) -> bool:
        """Returns whether the run must go back because its held-out loss is NaN or Inf."""
        self._reason = "the held-out loss is NaN or Inf"
        return self._rule.above is not None and not math.isfinite(held_out)

    def saves(self, step: int, periodic: bool) -> dict[str, Any]:
        """Makes a checkpoint that is about to be saved the target, unless a spike is under way.

        Only periodic checkpoints count: one that is saved because the run was stopped would not
        exist in a run without the stop.

        Returns:
            What the checkpoint's meta must have for this watch.
        """
        if self._rule.above is None:
            return {}
        if periodic and not self._in_a_row:
            self.target, self._then = step, self._losses
        return {"rollback": self.as_json()}

    def go_back(self, step: int, on_message: Callable[[str], None], remedy: str) -> None:
        """Goes back to the target from `step`, the last one that was judged.

        Raises:
            SpikeError: The run has gone back too often. The message ends with `remedy`.
        """
        to, often = self.target or 0, len(self._done)
        if often >= self._rule.limit:
            raise SpikeError(
                f"Step {step}: {self._reason}, and the run has gone back {often} times, which is "
                f"--rollback.limit. Check the training data, or {remedy}"
            )
        self._done.append([to, step])
        self._losses, self._in_a_row = self._then, 0
        on_message(
            f"[yellow]step {step}:[/yellow] {self._reason}; back to step {to}, without the batches "
            f"in between ({often + 1} of {self._rule.limit} times)"
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the state as JSON values, for a checkpoint."""
        return {
            "losses": self._losses,
            "in_a_row": self._in_a_row,
            "target": self.target,
            "then": self._then,
            "done": self._done,
        }

    def record(self) -> dict[str, int]:
        """Returns the values for the log."""
        return {} if self._rule.above is None else {"rollbacks": len(self._done)}

    def summary(self) -> dict[str, Any]:
        """Returns the values for the run's summary."""
        back = [{"from_step": until, "to_step": begin} for begin, until in self._done]
        return {} if self._rule.above is None else {"rollbacks": back}
