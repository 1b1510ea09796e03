"""Measures times to be compared: calls take turns, so that a noisy machine affects all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

ROUNDS = 5  # of `step_costs`

State = TypeVar("State")
Name = TypeVar("Name", bound=str)


def seconds_of(call: Callable[[], Any]) -> float:
    """Returns the time of a call, in seconds. The call must wait for its work to finish."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def repeated(step: Callable[[State], State], state: State, steps: int) -> Callable[[], None]:
    """Returns a function that runs `steps` steps and waits. Each call continues the last one."""

    def call() -> None:
        nonlocal state
        for _ in range(steps):
            state = step(state)
        jax.block_until_ready(state)

    return call


def take_turns(
    calls: Mapping[Name, Callable[[], Any]],
    rounds: int,
    before: Callable[[Name], Any] = lambda name: None,
    after: Callable[[Name], Any] = lambda name: None,
) -> dict[Name, list[float]]:
    """Returns the seconds of each call in each round.

    Args:
        calls: The calls by name. Each must wait for its work to finish.
        rounds: The number of timed rounds. An untimed round precedes them, for compilation.
        before, after: Functions that are called with the name around each turn, and not timed.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            before(name)
            seconds[name].append(seconds_of(call))
            after(name)
    return {name: turns[1:] for name, turns in seconds.items()}


def step_costs(
    calls: Mapping[Name, Callable[[], Any]],
    steps: int,
    baseline: str,
    on_turn: Callable[[Name], Any] = lambda name: None,
) -> dict[Name, dict[str, float | None]]:
    """Measures the time of a step, with calls that take turns of several steps.

    Args:
        calls: The calls by name, each of which runs one turn.
        steps: The number of steps in a turn.
        baseline: The name of the call with which the others are compared.
        on_turn: A function that is called after each of the `ROUNDS + 1` turns of each call.

    Returns:
        For each call, `milliseconds`, the median over rounds, and `times_baseline`, the median of
        the rounds' ratios to the baseline. The latter is None if there is no baseline.
    """
    seconds = take_turns(calls, ROUNDS, after=on_turn)
    base = {str(name): turns for name, turns in seconds.items()}.get(baseline)
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(turns) / steps,
            "times_baseline": base and spread(turns, base)["median"],
        }
        for name, turns in seconds.items()
    }


def spread(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Returns the median, minimum and maximum of the round-by-round ratios of two calls' times."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
