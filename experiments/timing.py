"""Times that are compared: calls take turns, so that a noisy machine disturbs all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

ROUNDS = 5  # of `step_costs`

State = TypeVar("State")
Name = TypeVar("Name", bound=str)


def seconds_of(call: Callable[[], Any]) -> float:
    """How long a call takes, which returns when its work is done."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def repeated(step: Callable[[State], State], state: State, steps: int) -> Callable[[], None]:
    """A call that takes so many steps and waits for them; the next one goes on from there."""

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
    """Seconds of each call in each round.

    Args:
        calls: each returns when its work is done.
        rounds: that count; one more comes first, in which programs may be compiled.
        before, after: called around each turn, with its name, and not timed.
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
    """What a step costs, in turns of so many steps.

    Args:
        calls: a turn of each.
        steps: of a turn.
        baseline: the name of the call that the others are compared with.
        on_turn: called after each of `ROUNDS + 1` turns of each call.

    Returns:
        `milliseconds`, the median of the rounds, and `times_baseline`, the median of each round's
        ratio to the baseline; None without one.
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
    """The ratio of two that took turns, round by round: its median, and the least and greatest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
