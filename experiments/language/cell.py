"""A training in memory: to its last step, with evaluations, and without a folder."""

import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.language.trainer import Metrics


class Trained(NamedTuple):
    """A cell that was trained.

    Attributes:
        state: after the last step.
        history: the evaluations, with `step`, the `seconds` of training until then, `train_loss`,
            `validation_loss` and what else a study has. What is not finite is None.
        outcome: whether it `diverged`, the numbers of the last evaluation (None if it did), and
            what its steps took.
    """

    state: Any
    history: list[Metrics]
    outcome: Metrics


def train_in_memory(
    state: Any,
    steps: int,
    every: int,
    advance: Callable[[Any, int, int], tuple[Any, Metrics]],
    evaluate: Callable[[Any], Metrics],
    on_evaluation: Callable[[Metrics], None] = lambda evaluation: None,
    *,
    first: bool = False,
) -> Trained:
    """Trains to the end.

    It ends early when a loss is no longer finite. It is a pure function, but for the clock, where
    `advance` and `evaluate` are.

    Args:
        state: before the first step.
        steps: of the whole training.
        every: steps between evaluations.
        advance: `(state, first, until) -> (state, metrics)` of the steps from `first` to before
            `until`, when they are done; the metrics have `train_loss`.
        evaluate: of a state; `validation_loss` and more.
        on_evaluation: called as it goes; it may raise to stop the cell.
        first: whether to evaluate before the first step, too.
    """
    history: list[Metrics] = []
    seconds, step, diverged = 0.0, 0, False
    for until in [0] * first + [*range(every, steps, every), steps]:
        began = time.perf_counter()
        state, metrics = advance(state, step, until)
        seconds, step = seconds + time.perf_counter() - began, until
        found = metrics | evaluate(state)
        losses = found["train_loss"], found["validation_loss"]
        diverged = not all(math.isfinite(loss) for loss in losses if loss is not None)
        if diverged:
            break
        record = {"step": step, "seconds": seconds} | found
        history.append(json.loads(json.dumps(record), parse_constant=lambda constant: None))
        on_evaluation(history[-1])
    numbers = {name: x for name, x in found.items() if not isinstance(x, list | dict)}
    return Trained(
        state,
        history,
        {"diverged": diverged}
        | (dict.fromkeys(numbers) if diverged else numbers)
        | {
            "steps_run": step,
            "seconds": seconds,
            "milliseconds_per_step": 1e3 * seconds / max(step, 1),
        },
    )
