"""A step's batch is a function of the seed and the step; held-out windows are fixed."""

import numpy as np
import pytest

from experiments.language import data
from experiments.language.windows import batches, from_step, held_out


def counted(*sizes, validation=100):
    """Tokens 0, 1, 2, ... in shards of these sizes."""
    count = np.arange(sum(sizes), dtype=np.uint32)
    train = tuple(np.split(count, np.cumsum(sizes)[:-1]))
    held = (np.arange(validation, dtype=np.uint32),)
    return data.Tokens("", train, held, 2**20, None, None, None, "")


def test_windows_cover_the_text_over_all_shards_every_epoch_in_another_order():
    tokens = counted(50, 3, 1, 107)  # 161 tokens: 40 windows of 4 targets
    steps = batches(tokens, batch=5, context=4, seed=0)
    epochs = [np.concatenate([steps[8 * epoch + i] for i in range(8)]) for epoch in range(3)]
    for windows in epochs:
        assert windows.dtype == np.int32
        assert (np.diff(windows) == 1).all()
        assert sorted(windows[:, 0]) == list(range(0, 160, 4))
    orders = [tuple(windows[:, 0]) for windows in epochs]
    assert len({*orders, tuple(range(0, 160, 4))}) == 4


def test_seeds_have_other_orders_in_every_epoch_the_same_with_every_version_of_the_libraries():
    orders = set()
    for seed in range(4):
        steps = batches(counted(161), batch=40, context=4, seed=seed)
        orders |= {tuple(steps[epoch][:, 0]) for epoch in range(4)}
    assert len(orders) == 16
    steps = batches(counted(161), batch=8, context=4, seed=7)
    assert steps[0][:, 0].tolist() == [12, 32, 144, 88, 64, 16, 120, 20]
    assert steps[1000][:, 0].tolist() == [16, 68, 116, 104, 12, 156, 72, 84]


@pytest.mark.parametrize("rows", [[0], [2, 5], [1, 2, 3, 4]])
def test_processes_load_rows_of_the_same_batch(rows):
    settings = {"tokens": counted(203), "batch": 6, "context": 4, "seed": 3}
    whole, part = batches(**settings), batches(**settings, rows=rows)
    for step in (0, 7, 8, 9, 1_000_003):  # 50 windows an epoch: step 8 has windows of two
        assert (part[step] == whole[step][rows]).all()
        assert whole[step].shape == (6, 5)


def test_a_run_goes_on_from_any_step_with_the_same_batches():
    steps = batches(counted(203), batch=6, context=4, seed=3, rows=[1, 3])
    run = from_step(steps, 0)
    first = [next(run) for _ in range(30)]
    run.close()
    resumed = from_step(steps, 13)
    for step in range(13, 30):
        assert (next(resumed) == first[step]).all() and (steps[step] == first[step]).all()
    resumed.close()


def test_batches_that_cannot_be_are_refused():
    settings = {"batch": 6, "context": 4, "seed": 0}
    with pytest.raises(ValueError, match=r"at least 5 tokens to train on \(one sequence\); got 4"):
        batches(counted(2, 2), **settings)
    with pytest.raises(ValueError, match="--seed must be at least 0"):
        batches(counted(99), **settings | {"seed": -1})
    assert batches(counted(5), **settings)[9].shape == (6, 5)


def test_held_out_windows_are_fixed_and_spread_and_know_their_bytes():
    rng = np.random.default_rng(0)
    shards, sizes = tuple(rng.integers(0, 300, n) for n in (70, 50)), np.arange(300)
    tokens = counted(99)._replace(validation=shards, bytes_per_token=sizes)
    every, targets = held_out(tokens, 8, 10**9), np.concatenate(shards)[1:113]
    assert every.windows.shape == (14, 9) and every.windows.dtype == np.int32
    assert (every.windows[:, 1:].ravel() == targets).all()
    assert every.bytes == targets.sum()
    assert every.bits_per_byte(0.5) == pytest.approx(0.5 * 112 / np.log(2) / every.bytes)
    some = held_out(counted(99, validation=1_001), 10, 59)
    assert some.windows[:, 0].tolist() == [0, 200, 400, 600, 800]


def test_held_out_text_must_hold_a_window():
    with pytest.raises(ValueError, match=r"at least 5 tokens held out \(one sequence\); got 3"):
        held_out(counted(99, validation=3), 4, 100)
    with pytest.raises(ValueError, match="--evaluation-tokens must be at least --context 4; got 3"):
        held_out(counted(99), 4, 3)
    assert held_out(counted(99), 4, 4).bytes is None
