"""Trains one cell of a suite in memory, with evaluations but without files."""

import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.language.trainer import Metrics


class Trained(NamedTuple):
    """The result of training a cell.

    Attributes:
        state: The state after the last step.
        history: The evaluations, each with `step`, the `seconds` of training until then,
            `train_loss`, `validation_loss` and further metrics. Values that are not finite are
            None.
        outcome: Whether the cell `diverged`, the values of the last evaluation (None if it did),
            and the time of its steps.
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
    """Trains to the last step, or until a loss is not finite.

    Apart from the times, the result depends only on the arguments.

    Args:
        state: The state before the first step.
        steps: The number of steps.
        every: The number of steps between evaluations.
        advance: Runs the steps from `first` up to but without `until`, and waits for them:
            `(state, first, until) -> (state, metrics)`. The metrics have `train_loss`.
        evaluate: Returns the metrics of a state, with `validation_loss`.
        on_evaluation: Called after each evaluation. It may raise to stop the cell.
        first: Whether to evaluate before the first step, too.
    """
    history: list[Metrics] = []
    seconds, step, diverged = 0.0, 0, False
    for until in [0] * first + [*range(every, steps, every), steps]:
        began = time.perf_counter()
        state, metrics = advance(state, step, until)
        seconds, step = seconds + time.perf_counter() - began, until
        evaluation = metrics | evaluate(state)
        losses = evaluation["train_loss"], evaluation["validation_loss"]
        diverged = not all(math.isfinite(loss) for loss in losses if loss is not None)
        if diverged:
            break
        record = {"step": step, "seconds": seconds} | evaluation
        history.append(json.loads(json.dumps(record), parse_constant=lambda constant: None))
        on_evaluation(history[-1])
    numbers = {name: x for name, x in evaluation.items() if not isinstance(x, list | dict)}
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
