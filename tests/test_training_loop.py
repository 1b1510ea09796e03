"""The loop that all runs share: what it times, watches, saves and refuses, with a clock by hand."""

import functools
import json
import math
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from pretraining import one_device

from experiments import log
from experiments.language import clocks, training_loop
from experiments.language.checkpoints import Restored
from experiments.language.rollback import Rollback
from experiments.language.training_loop import Keeping, TrainingError, TrainingLoop

STEP, EVALUATION, SAVE, COMPILATION = 1.0, 100.0, 1_000.0, 10_000.0  # seconds
TOKENS = 7


class Saved:
    """Checkpoints in memory."""

    def __init__(self, clock):
        self.clock, self.steps = clock, []

    def restore(self, abstract, step=None):
        if not self.steps:
            return None
        step, meta = self.steps[-1], {}
        state = types.SimpleNamespace(step=step)
        return Restored(step, state, meta, damaged=())

    def save(self, step, state, meta, spare):
        self.clock.now += SAVE
        self.steps.append(step)

    def wait(self):
        pass

    close = wait


class Trainer:
    """What `TrainingLoop` asks of one."""

    mesh, abstract = one_device(), None

    def __init__(self, loop, steps):
        self.loop, self.advance = loop, loop.advance
        self.config = types.SimpleNamespace(
            steps=steps, max_nonfinite_steps=3, tokens_per_step=TOKENS, rollback=Rollback()
        )

    @functools.cached_property
    def program(self):
        self.loop.clock.now += COMPILATION

    @functools.cached_property
    def looking(self):
        self.loop.clock.now += COMPILATION


class Loop(TrainingLoop):
    """A training whose steps do nothing; `bad` steps have an infinite update."""

    def __init__(self, clock, saved, folder, steps, bad=(), held_out=lambda step: 1.0, **keeping):
        self.clock, self.bad, self.losses, self.said = clock, bad, held_out, []
        stop, said = threading.Event(), self.said.append
        trainer = Trainer(self, steps)
        super().__init__(trainer, Keeping(**keeping), folder, stop, on_message=said)
        self.saved = saved
        self.until, self.looked = None, []

    def advance(self, state, batch, look):
        self.clock.now += STEP
        self.looked += [state.step + 1] if look else []
        if state.step + 1 == self.until:
            self.stop.set()
        rms = jnp.inf if state.step in self.bad else 1.0
        metrics = {"loss": 2.0, "nonfinite_in_a_row": 0, "update_rms": {"all": rms}}
        return types.SimpleNamespace(step=state.step + 1), jax.tree.map(np.float32, metrics)

    def to_the_end(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_loop, "Checkpoints", lambda folder, keep: self.saved)
            return super().to_the_end()

    def start(self):
        return types.SimpleNamespace(step=0)

    def batches(self, step):
        while True:
            yield None

    def evaluate(self, state):
        self.clock.now += EVALUATION
        value = self.losses(state.step)
        return {"validation_loss": value}, value

    def meta(self, step):
        return {}

    def remedy(self):
        return "lower the rate"

    def finish(self, state):
        pass


@pytest.fixture
def clock(monkeypatch):
    hands = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: hands.now)
    return hands


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def trained(folder, key="loss"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


@pytest.mark.parametrize(
    "every", [{"log_every": 10}, {"log_every": 7}, {"log_every": 100}, {"log_every": 1}]
)
@pytest.mark.parametrize("stops", [(), (13,), (25, 40)])
def test_seconds_are_of_training_alone(clock, folder, every, stops):
    saved, settings = Saved(clock), {"evaluate_every": 25, "save_every": 20} | every
    for stop in (*stops, None):
        loop = Loop(clock, saved, folder, 60, **settings)
        loop.until = stop
        assert loop.to_the_end() == (stop is None)
    for record in trained(folder):
        assert record["seconds"] == record["step"] * STEP
        assert record["tokens_per_second"] == TOKENS / STEP


def test_a_record_has_what_json_has_and_tensorboard_its_numbers(folder, monkeypatch):
    seen = []
    done = lambda: None  # noqa: E731
    board = types.SimpleNamespace(
        add_scalar=lambda *told: seen.append(told), flush=done, close=done
    )
    monkeypatch.setattr(log, "SummaryWriter", lambda *given, **more: board)
    written = log.Log(folder, -1)
    written.add(3, loss=math.nan, update_rms={"all": 0.5}, load=[math.inf, 1.0])
    written.close()
    assert seen == [("update_rms/all", 0.5, 3)]
    kept = {"step": 3, "loss": None, "update_rms": {"all": 0.5}, "load": [None, 1.0]}
    assert written.records == [kept]


@pytest.mark.parametrize(
    ("log_every", "expected"),
    [(1, [1, 11, 21, 31, 41, 51]), (10, [10, 20, 30, 40, 50, 60]), (25, [25, 50])]
    + [(4, [4, 12, 24, 32, 44, 52])],
)
def test_one_logged_step_in_ten_has_the_largest_logit(clock, folder, log_every, expected):
    """A run that stops and goes on looks at the same steps."""
    saved, looked = Saved(clock), []
    for stop in (13, 40, None):
        loop = Loop(clock, saved, folder, 60, log_every=log_every, save_every=20)
        loop.until = stop
        loop.to_the_end()
        looked += loop.looked
    assert looked == expected


def test_what_a_restart_tells_is_what_was_told(clock, folder, tmp_path_factory):
    """Records end at every checkpoint, so that means over their steps are the same."""
    settings = {"log_every": 10, "save_every": 25, "evaluate_every": 50}
    saved = Saved(clock)
    assert Loop(clock, saved, folder, 60, **settings).to_the_end()
    whole = trained(folder)
    saved.steps = [25]
    assert Loop(clock, saved, folder, 60, **settings).to_the_end()
    assert trained(folder) == whole
    assert [record["step"] for record in whole] == [10, 20, 25, 30, 40, 50, 60]


@pytest.mark.parametrize(
    "first, steps, profile, watched",
    [
        (0, 9, (2, 4), [2, 4]),
        (3, 9, (2, 5), [3, 5]),  # goes on in the middle
        (6, 9, (2, 4), []),  # goes on behind
        (0, 9, (7, 9), [7, 9]),  # until the last step
        (0, 9, (7, 50), [7, 9]),
    ],
)
def test_a_profile_has_the_steps_that_this_part_of_a_run_has(
    clock, folder, monkeypatch, first, steps, profile, watched
):
    saved, seen = Saved(clock), []
    saved.steps = [first] if first else []
    now = lambda *_: seen.append(first + clock.now - COMPILATION)  # noqa: E731
    monkeypatch.setattr(jax.profiler, "start_trace", now)
    monkeypatch.setattr(jax.profiler, "stop_trace", now)
    settings = {"save_every": 100, "evaluate_every": 100, "log_every": 1}
    loop = Loop(clock, saved, folder, steps, profile=profile, **settings)
    loop.evaluate = lambda state: ({"validation_loss": 1.0}, 1.0)
    loop.trainer.looking = loop.trainer.program  # compiled by now, as where logits are at hand
    monkeypatch.setattr(saved, "save", lambda *_, **__: None)
    assert loop.to_the_end()
    assert seen == watched
    assert bool(watched) != any("has no effect" in text for text in loop.said)


def test_a_profile_behind_the_last_step_is_refused(clock, folder):
    with pytest.raises(ValueError, match="--profile FIRST must be less than --steps"):
        Loop(clock, Saved(clock), folder, 9, profile=(9, 12)).to_the_end()


@pytest.mark.parametrize("bad", [4, 5, 9, 11])
def test_lost_params_are_not_saved(clock, folder, bad):
    """Whether the step that loses them is before a save, at it, or the last."""
    saved = Saved(clock)
    loop = Loop(clock, saved, folder, 12, bad={bad}, save_every=5, evaluate_every=100)
    with pytest.raises(TrainingError, match="update contains NaN or Inf") as caught:
        loop.to_the_end()
    assert saved.steps == [step for step in (5, 10) if step <= bad]
    safe = (
        f"The checkpoint of step {saved.steps[-1]} is valid"
        if saved.steps
        else "No checkpoint was saved"
    )
    assert safe in str(caught.value) and "lower the rate" in str(caught.value)
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # not sealed
    assert Loop(clock, saved, folder, 12, save_every=5, evaluate_every=100).to_the_end()
    evaluated = [record["step"] for record in trained(folder, "validation_loss")]
    assert evaluated == [0, 12]  # once each, from the start as well


@pytest.mark.parametrize("evaluate_every", [5, 100])
def test_params_with_no_held_out_loss_are_not_saved(clock, folder, evaluate_every):
    """Params may be finite, and so large that nothing which they give is."""
    saved = Saved(clock)
    settings = {"save_every": 5, "max_checkpoints": 1, "evaluate_every": evaluate_every}
    held_out = lambda step: 1.0 if step < 8 else math.nan  # noqa: E731
    with pytest.raises(TrainingError, match="The held-out loss after step 10 is NaN or Inf"):
        Loop(clock, saved, folder, 30, held_out=held_out, **settings).to_the_end()
    assert saved.steps == [5]
