"""The routes that the studies' programs trace are those that the names of their leaves give."""

import dataclasses

import jax
import pretraining
import pytest
from test_trace_routing import read

import muon_jax
from experiments.family import config as family_config
from experiments.family import train as family_train
from experiments.finetune import architecture, arms
from experiments.finetune import config as finetune_config
from experiments.grok import config as grok_config
from experiments.grok import train as grok_train
from experiments.pretrain import step
from muon_jax._routing.rules import route

HEADS_AND_EXPERTS = dataclasses.replace(pretraining.SMALL, attention="multi-head")


def grok():
    config = grok_config.Config(width=32, layers=2)
    cell = grok_config.Cell("mul", "softmax", "muon", 0)
    grok_train.compile_arm(config, cell, 1, jax.local_devices()[0])


def pretrain(model):
    config = pretraining.training(model)
    step.Trainer(config, "muon", pretraining.one_device(), pretraining.VOCABULARY)


def finetune(**changes):
    sizes = {"layers": 2, "hidden": 64, "ffn": 176, "heads": 4, "kv_heads": 2, "head_dim": 32}
    model = architecture.Architecture(vocabulary=256, **sizes | changes)
    settings = finetune_config.Optimizer(), finetune_config.Lora()
    arms.routing.__wrapped__("muon_adamw", *settings, model)


PROGRAMS = {
    "grok": grok,
    "family": lambda: family_train.language_model.__wrapped__(family_config.Training()),
    "pretrain": lambda: pretrain(pretraining.SMALL),
    "pretrain, dense": lambda: pretrain(pretraining.DENSE),
    "pretrain, heads and experts": lambda: pretrain(HEADS_AND_EXPERTS),
    "finetune": finetune,
    "finetune, biases": lambda: finetune(family="qwen2"),
    "finetune, untied": lambda: finetune(tied=False, layers=9, family="llama"),
}


class Traced(Exception):
    pass


@pytest.mark.parametrize("study", PROGRAMS)
def test_use_and_names_agree_in_the_programs_of_the_studies(study, monkeypatch):
    trace, found = muon_jax.trace_routing, {}

    def spy(function, params, *args, **options):
        found.update(by_use=route(params, trace(function, params, *args, **options)))
        found.update(by_name=route(params))
        raise Traced

    monkeypatch.setattr(muon_jax, "trace_routing", spy)
    with pytest.raises(Traced):
        PROGRAMS[study]()
    assert read(found["by_use"]) == read(found["by_name"])
    assert not any("?" in roles for roles in read(found["by_use"]).values())
