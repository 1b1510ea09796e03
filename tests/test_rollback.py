"""Runs that go back to their last checkpoint after a spike of the loss, without its batches."""

import dataclasses
import functools
import itertools
import json
import math
import threading

import jax
import numpy as np
import pytest
from etils import epath
from finetuning import NORMED, initial, prepared
from finetuning import trainer_of as trainer_of_finetuning
from finetuning import training as finetuning
from pretraining import DENSE, VOCABULARY, mesh_of, records, summary_of, training

from experiments.finetune import model
from experiments.finetune.config import Lora
from experiments.finetune.config import Running as FinetuneRunning
from experiments.finetune.loop import FineTuning, Start
from experiments.language.data import Tokens
from experiments.language.rollback import Rollback, SpikeError, Watch
from experiments.pretrain import loop
from experiments.pretrain.config import Running
from experiments.pretrain.step import Trainer

RULE = Rollback(above=1.4, steps=2, limit=2)
RUNNING = Running(
    save_every=4, evaluate_every=50, evaluation_tokens=32, log_every=1, samples=0, max_checkpoints=1
)
EASY = np.resize([1, 2, 3, 4], 4096).astype(np.uint16)
TEXT = Tokens("easy", (EASY,), (EASY[:64],), VOCABULARY, None, None, None, "0" * 64)


class Kill(Exception):
    pass


class Spiked(loop.Pretraining):
    """Batches of these numbers are noise; those of `hole` do not exist."""

    spikes, hole = (), ()

    def batches(self, step):
        numbers = (n for n in itertools.count() if n not in self.hole)
        for number in itertools.islice(numbers, step, None):
            batch = self.windows[number]
            if number in self.spikes:
                batch = np.random.default_rng(number).integers(5, VOCABULARY, batch.shape, np.int32)
            yield self.trainer.share.place(batch)


@functools.cache
def trainer_of(config, *others):
    return Trainer(config, *others)


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda sizes: mesh_of(1, 1, 1, 1))
        patch.setattr(loop, "Trainer", trainer_of)
        yield


def train(folder, spikes=(), hole=(), rule=RULE, kill=None, stop=None, running=RUNNING, kind=None):
    """The loop of a run that ended, with what it said; killed or stopped at its n-th record."""
    stopping, said, calls = threading.Event(), [], itertools.count(1)

    def on_step(progress):
        call = next(calls)
        if call == kill:
            raise Kill
        if call == stop:
            stopping.set()

    folder.mkdir(exist_ok=True)
    config = training(DENSE, steps=18, rollback=rule)
    config = dataclasses.replace(
        config, adamw=dataclasses.replace(config.adamw, learning_rate=0.02)
    )
    run = (kind or Spiked)(
        config, "adamw", running, TEXT, epath.Path(folder), stopping, on_step=on_step,
        on_message=said.append,
    )  # fmt: skip
    run.spikes, run.hole = spikes, hole
    run.ended, run.said = run.to_the_end(), said
    return run


def ended(folder):
    found = summary_of(folder)
    return found["params_sha256"], found.get("rollbacks")


SPIKES = (9, 10)  # its second is step 11, after the checkpoint of step 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, SPIKES)


def test_a_run_goes_back_and_leaves_the_batches_out(whole, tmp_path):
    folder, run = whole
    losses = {record["step"]: record["loss"] for record in records(folder) if "loss" in record}
    assert list(losses) == list(range(1, 19))
    assert max(losses[step] for step in range(8, 19)) < losses[8] * 1.4
    assert "back to step 8" in run.said[0] and "1 of 2 times" in run.said[0]
    assert records(folder)[-1].get("rollbacks", 1) == 1
    digest, rollbacks = ended(folder)
    assert rollbacks == [{"from_step": 11, "to_step": 8}]
    # As if the text had never had these batches.
    train(tmp_path / "without", hole=range(8, 11), rule=Rollback())
    assert ended(tmp_path / "without") == (digest, None)
    train(tmp_path / "with", SPIKES, rule=Rollback())
    assert ended(tmp_path / "with")[0] != digest


@pytest.mark.parametrize(
    "ends",
    [
        [("kill", 11)],
        [("kill", 14)],
        [("stop", 8), ("stop", 1)],  # saves step 9, which nobody goes back to
        [("stop", 9), ("stop", 3)],  # saves step 10, the first of the spike
    ],
)
def test_a_run_that_ends_in_the_middle_comes_to_the_same(whole, tmp_path, ends):
    """Before the rule holds, behind the way back, and with checkpoints of a spike's own steps."""
    for how, when in ends:
        if how == "kill":
            with pytest.raises(Kill):
                train(tmp_path, SPIKES, kill=when)
        else:
            assert not train(tmp_path, SPIKES, stop=when).ended
    assert train(tmp_path, SPIKES).ended
    assert ended(tmp_path) == ended(whole[0])
    assert records(tmp_path) == records(whole[0])


def test_without_a_checkpoint_a_run_begins_again_and_its_number_is_bounded(tmp_path):
    seldom = dataclasses.replace(RUNNING, save_every=50)
    third = [9, 10, 20, 21, 31, 32]  # 11 batches are left out each time
    with pytest.raises(SpikeError, match=r"gone back 2 times, which.*lower --adamw"):
        train(tmp_path, third, running=seldom)


@pytest.mark.parametrize(
    ("losses", "lost", "goes_back"),
    [
        ([1.0] * 8 + [2.0, 2.0], False, [9]),
        ([1.0] * 8 + [2.0, 1.0, 2.0, 1.0], False, []),  # it passes
        ([1.0] * 8 + [math.nan, math.inf], False, [9]),
        ([1.0] * 3 + [9.0, 9.0], False, []),  # no median yet
        ([math.inf, math.inf, 1.0], False, [1]),
        ([1.0], True, [0]),
    ],
)
def test_the_rule(losses, lost, goes_back):
    watch = Watch(RULE)
    found = [i for i, loss in enumerate(losses) if watch.judge(loss, is_lost=lost)]
    assert found == goes_back
    again = Watch(RULE, json.loads(json.dumps(watch.as_json())))
    assert again.as_json() == watch.as_json()


def test_going_back_is_to_the_losses_of_then():
    watch = Watch(RULE)
    for _ in range(8):
        watch.judge(1.0)
    watch.saves(8, periodic=True)
    then = watch.as_json()
    assert [watch.judge(loss) for loss in (1.1, 9.0)] == [False, False]
    watch.saves(10, periodic=True)  # in the spike
    assert watch.judge(9.0)
    watch.go_back(11, lambda text: None, "")
    assert watch.as_json() == then | {"done": [[8, 11]]} and watch.left_out == 3


@pytest.mark.parametrize("spoilt", ["update", "held out"])
def test_params_that_are_lost_are_gone_back_from(tmp_path, spoilt):
    """At once, and not for ever."""
    left = [spoilt]

    class Spoilt(Spiked):
        def evaluate(self, state):
            if left == ["held out"] and int(state.step) == 8:
                left.pop()
                return {"validation_loss": math.nan}, math.nan
            return super().evaluate(state)

        def _must_go_back(self):
            if left == ["update"] and self._step == 9:
                left.pop()
                self._unjudged = self._unjudged | {"update_rms": {"all": math.inf}}
            return super()._must_go_back()

    run = train(tmp_path, kind=Spoilt)
    assert run.ended and not left
    assert "back to step " + {"update": "8", "held out": "4"}[spoilt] in run.said[0]


class Lost(FineTuning):
    """The update after the batch of number 9 is not finite."""

    def _must_go_back(self):
        if self._unjudged is not None and self._step + self._watch.left_out == 10:
            self._unjudged = self._unjudged | {"update_rms": {"all": math.inf}}
        return super()._must_go_back()


def test_fine_tuning_goes_back_with_what_is_frozen(tmp_path):
    config = finetuning(lora=Lora(rank=2), rollback=RULE)
    trainer, running = trainer_of_finetuning(config), FinetuneRunning(save_every=4, log_every=1)
    load = lambda mesh: jax.device_put(initial(), model.shardings(NORMED, mesh), may_alias=False)  # noqa: E731
    merged, digests = [], []
    for name, stops in (("whole", ()), ("parts", (8, 10))):
        for stop in (*stops, None):
            (tmp_path / name).mkdir(exist_ok=True)
            stopping, said = threading.Event(), []
            run = Lost(
                trainer, running, prepared(), Start("counting", NORMED, load),
                epath.Path(tmp_path / name), stopping, merged.append,
                on_step=lambda told, s=stopping, at=stop: told.step == at and s.set(),
                on_message=said.append,
            )  # fmt: skip
            assert run.to_the_end() == (stop is None)
        digests.append(ended(tmp_path / name))
        assert any("back to step 8" in text for text in said) == (name == "whole")
    assert digests[0] == digests[1] and digests[0][1] == [{"from_step": 10, "to_step": 8}]
    jax.tree.map(np.testing.assert_array_equal, *merged)
