"""A training in memory: when it evaluates, what it keeps, and how it ends."""

import json
import math

import pytest

from experiments.language.cell import train_in_memory


def trained(steps=7, every=3, losses=lambda step: 1.0 / step, **options):
    """A training whose state is its step."""

    def advance(state, first, until):
        assert state == first
        loss = losses(until) if until else None
        return until, {"train_loss": loss, "norms": [math.inf] * (until - first)}

    def evaluate(state):
        return {"validation_loss": losses(state) if state else 9.0, "accuracy": 0.5}

    return train_in_memory(0, steps, every, advance, evaluate, **options)


@pytest.mark.parametrize(
    ("every", "expected"), [(3, [3, 6, 7]), (7, [7]), (100, [7]), (1, [*range(1, 8)])]
)
def test_it_evaluates_every_so_often_and_at_the_end(every, expected):
    seen = []
    state, history, outcome = trained(every=every, on_evaluation=seen.append)
    assert [evaluation["step"] for evaluation in history] == expected and seen == history
    assert state == outcome["steps_run"] == 7
    assert outcome["train_loss"] == outcome["validation_loss"] == 1 / 7
    assert not outcome["diverged"] and outcome["accuracy"] == 0.5 and "norms" not in outcome


def test_it_may_begin_with_an_evaluation_and_keeps_what_json_has():
    _, history, outcome = trained(first=True)
    assert [evaluation["step"] for evaluation in history] == [0, 3, 6, 7]
    assert history[0]["train_loss"] is None and history[0]["validation_loss"] == 9.0
    assert history[1]["norms"] == [None] * 3
    json.dumps([history, outcome], allow_nan=False)


def test_it_ends_where_a_loss_is_not_finite():
    state, history, outcome = trained(losses=lambda step: math.nan if step > 3 else 1.0)
    assert state == outcome["steps_run"] == 6 and outcome["diverged"]
    assert [evaluation["step"] for evaluation in history] == [3]
    assert outcome["train_loss"] is outcome["validation_loss"] is outcome["accuracy"] is None
