"""`python -m experiments.pretrain.speed`: both loops train one model, from one start."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from pretraining import DENSE, SMALL, VOCABULARY, one_device, training

from experiments.pretrain import costs, speed
from experiments.pretrain.model import LanguageModel
from experiments.pretrain.step import Trainer


@pytest.mark.parametrize("model", [SMALL, DENSE], ids=["experts", "dense"])
def test_our_loop_and_that_of_pytorch_begin_with_the_same_loss(model, monkeypatch):
    torch = pytest.importorskip("torch", reason="the rival is PyTorch")
    pytest.importorskip("transformers", reason="the rival is Hugging Face's model")
    config = training(model, batch=4, accumulate=2)
    cross_entropy, theirs = torch.nn.functional.cross_entropy, []

    def noted(*arguments):
        theirs.append(cross_entropy(*arguments))
        return theirs[-1]

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", noted)
    for loop in speed.torch_loops(config).values():
        theirs.clear()
        loop(2)
        losses = np.reshape([loss.item() for loss in theirs], (2, 2)).mean(axis=1)
        trainer = Trainer(config, "adamw", one_device(), VOCABULARY)
        windows = speed.tokens(config).reshape(2, 2, -1)
        _, metrics = trainer.advance(trainer.start(config.seed), windows)
        np.testing.assert_allclose(losses[0], metrics["loss"], rtol=1e-5)
        assert losses[1] < losses[0]


def test_the_rival_has_the_precision_that_is_timed():
    torch = pytest.importorskip("torch", reason="the rival is PyTorch")
    pytest.importorskip("transformers", reason="the rival is Hugging Face's model")
    seen = []
    product = torch.nn.functional.linear

    def noted(x, *weights):
        y = product(x, *weights)
        seen.append(y.dtype)
        return y

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.nn.functional, "linear", noted)
    for dtype in ("float32", "bfloat16"):
        seen.clear()
        model = dataclasses.replace(DENSE, layers=1, dense_layers=1, dtype=dtype)
        (loop,) = speed.torch_loops(training(model, batch=2)).values()
        loop(1)
        assert set(seen) == {getattr(torch, dtype)}
    patch.undo()


def test_neither_the_first_turn_counts_nor_the_first_step_of_any(monkeypatch):
    now = 0.0
    calls = []

    def loop(steps):
        nonlocal now
        calls.append(steps)
        now += 100.0 if steps == 1 or len(calls) <= 2 else 3.0 * steps

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    monkeypatch.setattr(speed.time, "sleep", lambda _: None)
    assert speed.median_seconds({"ours": loop}, steps=2, rounds=3) == {"ours": 3.0}
    assert calls == [1, 2] * 4


def test_a_peak_is_of_one_kind_of_device_exactly(monkeypatch):
    def costs_on(kind):
        device = types.SimpleNamespace(device_kind=kind, platform="gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        return costs.step_costs(training(model=DENSE), "adamw", params)

    params = LanguageModel(DENSE, VOCABULARY).init(jax.random.key(0))
    count = jax.device_count()
    for kind, peak in [("80GB HBM3", 989e12), ("NVL", 835e12), ("PCIe", 756e12)]:
        assert costs_on(f"NVIDIA H100 {kind}").peak_flops_per_second == peak * count
        assert costs.unknown_peak() is None
    unknown = costs_on("NVIDIA H200 MIG 1g.18gb")
    assert unknown.peak_flops_per_second is None and "mfu" not in unknown.rates(1.0)
    assert "NVIDIA H200 MIG 1g.18gb" in costs.unknown_peak()
