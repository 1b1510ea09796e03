"""Times that are compared: turns, what a step costs, and what does not count."""

import types

import pytest

from experiments import timing


@pytest.fixture
def clock(monkeypatch):
    hands = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: hands.now)
    return hands


def lasting(clock, *seconds):
    """A call that takes so long, in its turns."""
    left = list(seconds)

    def call():
        clock.now += left.pop(0)

    return call


def test_calls_take_turns_and_the_first_round_does_not_count(clock):
    order = []

    def wait(name):
        order.append(name)
        clock.now += 1000.0

    calls = {"a": lasting(clock, 50.0, 1.0, 2.0), "b": lasting(clock, 60.0, 3.0, 4.0)}
    seconds = timing.take_turns(calls, 2, before=wait, after=wait)
    assert seconds == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert order == ["a", "a", "b", "b"] * 3


def test_a_cost_is_a_median_and_a_median_of_ratios(clock, monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    calls = {"base": lasting(clock, 9.0, 1.0, 2.0, 4.0), "own": lasting(clock, 9.0, 2.0, 6.0, 4.0)}
    costs = timing.step_costs(calls, 2, "base")
    assert costs["base"] == {"milliseconds": 1000.0, "times_baseline": 1.0}
    assert costs["own"] == {"milliseconds": 2000.0, "times_baseline": 2.0}
    alone = timing.step_costs({"own": lasting(clock, 1.0, 1.0, 1.0, 1.0)}, 1, "base")
    assert alone["own"]["times_baseline"] is None


def test_steps_go_on_from_where_the_last_call_ended():
    states = []
    call = timing.repeated(lambda state: states.append(state + 1) or state + 1, 0, 3)
    call()
    call()
    assert states == [1, 2, 3, 4, 5, 6]
