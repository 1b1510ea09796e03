"""A run's folder as the model that it has trained."""

import contextlib
import json
from typing import NamedTuple

import tokenizers
from etils import epath

from experiments.language.checkpoints import Checkpoints
from experiments.language.mesh import make_mesh, one_device
from experiments.optimizers import OptimizerName
from experiments.pretrain.config import Training, from_json
from experiments.pretrain.step import State, Trainer
from experiments.runs import RunError

TOKENIZER = "tokenizer.json"


class Loaded(NamedTuple):
    """A run as its folder holds it: the newest whole checkpoint."""

    config: Training
    optimizer: OptimizerName
    trainer: Trainer
    state: State
    tokenizer: tokenizers.Tokenizer | None


def load_run(folder: epath.PathLike) -> Loaded:
    """Reads a run's folder: on its own mesh where these are as many devices, or on the first one.

    Raises:
        RunError: the folder has no run, or no checkpoint that is whole.
    """
    folder = epath.Path(folder)
    path = folder / "config.json"
    if not path.exists():
        raise RunError(f"{folder} holds no run: it has no config.json.")
    settings = json.loads(path.read_text())
    optimizer = settings.pop("optimizer")
    config = from_json(Training, settings)
    try:
        mesh = make_mesh(config.mesh.sizes)
        trainer = Trainer(config, optimizer, mesh, config.data.vocabulary)
    except ValueError:
        mesh = one_device()
        trainer = Trainer(config, optimizer, mesh, config.data.vocabulary)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(trainer.abstract)
    if restored is None:
        raise RunError(f"{folder} has no checkpoint yet. Wait for its first save.")
    path, tokenizer = folder / TOKENIZER, None
    if path.exists():
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text())
    return Loaded(config, optimizer, trainer, restored.state, tokenizer)
