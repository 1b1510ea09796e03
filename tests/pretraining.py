"""A model that compiles fast, texts for it, and what its runs leave."""

import dataclasses
import json

import jax
import numpy as np
from etils import epath

from experiments import log
from experiments.language.data import Data
from experiments.language.mesh import Mesh, make_mesh
from experiments.pretrain.config import Model, Training

VOCABULARY = 64
SMALL = Model(
    layers=3,
    dense_layers=1,
    width=32,
    heads=4,
    latent=16,
    nope=8,
    rope=4,
    value=8,
    hidden=64,
    experts=8,
    active=2,
    shared=1,
    expert_hidden=16,
    init_std=0.2,
    dtype="float32",
)
DENSE = dataclasses.replace(SMALL, layers=2, dense_layers=2, attention="multi-head", tied=True)


def training(model=SMALL, **changes):
    settings = {"context": 16, "batch": 8, "steps": 12, "warmup": 2, "mesh": Mesh(fsdp=1)}
    settings |= {"data": Data(vocabulary=VOCABULARY)} | changes
    return Training(model=model, **settings)


def mesh_of(*sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(sizes))])


def one_device():
    return mesh_of(1, 1, 1, 1)


def text_file(folder, words=6000, seed=0):
    """Words that a small model can learn a little of."""
    rng = np.random.default_rng(seed)
    lines = (" ".join(rng.choice(["to", "be", "or", "not"], 8)) for _ in range(words // 8))
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("\n".join(lines) + f"\n{name}\n" + "to be\n" * 400)
    return str(folder / "*.txt")


def text_of(folder, **sizes):
    """The settings of such a text as data."""
    data = {"vocabulary": VOCABULARY + 256, "cache": folder / "cache"}
    return Data(files=(text_file(folder, **sizes),), **data)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def records(folder):
    """The log of a run, which is whole, without its times."""
    timed = ("seconds", "tokens_per_second", "flops_per_second", "mfu")
    found, damage = log.read(epath.Path(folder))
    assert not damage
    return [{k: v for k, v in record.items() if k not in timed} for record in found]
