"""One of the processes that train together: `python -m tests.training_pair PORT INDEX FOLDER`.

Each trains over every axis of the mesh, and writes the losses to `FOLDER/INDEX.json`.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent))

import dataclasses
import json
import threading

import jax
import numpy as np
from etils import epath
from finetuning import NORMED, initial, prepared
from finetuning import training as finetuning
from pretraining import SMALL, training

from experiments.finetune import loop as finetune_loop
from experiments.finetune import model
from experiments.finetune.config import Running as FinetuneRunning
from experiments.finetune.step import Trainer as FinetuneTrainer
from experiments.language import mesh
from experiments.language.data import Tokens
from experiments.language.processes import place_whole
from experiments.pretrain import loop
from experiments.pretrain.config import Running

# As small as has each kind of layer: each mesh compiles them anew.
MODEL = dataclasses.replace(SMALL, layers=2, width=16, attention="multi-head", heads=2, experts=2)
QWEN = dataclasses.replace(NORMED, layers=1)

MESHES = {axis: mesh.Mesh(**{"fsdp": 1} | {axis: 2}) for axis in mesh.MESH_AXES}
_WATCHED = {"log_every": 1, "evaluate_every": 2, "save_every": 9, "evaluation_tokens": 256}


def pretrained(over, folder):
    """Losses of three steps, and of held-out text."""
    rng = np.random.default_rng(0)
    train, held_out = (rng.integers(0, 64, size).astype(np.uint16) for size in (4000, 800))
    tokens = Tokens("", (train,), (held_out,), 64, None, None, None, "")
    config = training(MODEL, mesh=over, steps=3, warmup=1, accumulate=2)
    running = Running(**_WATCHED, samples=0)
    folder.mkdir(parents=True, exist_ok=True)
    given = running, tokens, epath.Path(folder), threading.Event()
    loop.Pretraining(config, "adamw", *given).to_the_end()
    return losses(folder)


def finetuned(over, folder):
    """The same of fine-tuning."""
    config = finetuning(mesh=over, steps=3, warmup=1, accumulate=2)
    trainer = FinetuneTrainer(config, "adamw", QWEN, mesh.make_mesh(over.sizes))

    def load(at):
        return jax.tree.map(place_whole, initial(QWEN), model.shardings(QWEN, at))

    start = finetune_loop.Start("counting", QWEN, load)
    running = FinetuneRunning(**_WATCHED)
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    given = running, prepared(), start, epath.Path(folder), stop
    finetune_loop.FineTuning(trainer, *given).to_the_end()
    return losses(folder)


def losses(folder):
    if jax.process_index():
        return None
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {
        name: [record[name] for record in records if name in record]
        for name in ("loss", "validation_loss")
    }


def differing(folder, index):
    """What a run says whose processes have other seeds."""
    config = training(MODEL, mesh=MESHES["data"], steps=3, warmup=1, seed=index)
    tokens = Tokens("", (np.arange(64),) * 9, (np.arange(64),), 64, None, None, None, "")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        given = Running(), tokens, epath.Path(folder), threading.Event()
        loop.Pretraining(config, "adamw", *given).to_the_end()
    except ValueError as error:
        return str(error)


def main(port, index, folder):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    out = folder / "runs"  # theirs together
    found = {
        "pretrained": {a: pretrained(m, out / f"pretrain-{a}") for a, m in MESHES.items()},
        "finetuned": {a: finetuned(m, out / f"finetune-{a}") for a, m in MESHES.items()},
        "differing": differing(out / "differing", index),
    }
    (folder / f"{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
