"""`--from FOLDER`: a training that goes on from a Hugging Face model, with a fresh optimizer."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.json_files import read_json
from experiments.language import guard, shards
from experiments.language.hugging_face import CONFIG
from experiments.language.planning import warn_of_context
from experiments.language.tokenizer import read as read_tokenizer
from experiments.pretrain import export, export_config
from experiments.pretrain.config import Training
from experiments.pretrain.model import Params
from experiments.pretrain.step import State, Trainer
from experiments.pretrain.trained import TOKENIZER


def fitted(default: Training, folder: Path) -> Training:
    """Defaults of a training that goes on from a folder: its sizes, vocabulary and tokenizer.

    Raises:
        ValueError: the folder is damaged, or holds a model that is none of ours.
        OSError: it cannot be read.
    """
    model, vocabulary = export_config.read(folder / CONFIG)
    kept = ("bias_rate", "balance_loss", "remat", "exchange")
    model = dataclasses.replace(model, **{name: getattr(default.model, name) for name in kept})
    data = dataclasses.replace(default.data, vocabulary=vocabulary)
    if (path := folder / TOKENIZER).exists():
        tokenizer = read_tokenizer(path.read_bytes(), str(path))
        end = read_json(folder / CONFIG).get("eos_token_id")
        end = end[0] if isinstance(end, list) and end else end
        text = tokenizer.id_to_token(end) if isinstance(end, int) else None
        data = dataclasses.replace(data, tokenizer=str(path), end_of_text=text or data.end_of_text)
    return dataclasses.replace(default, model=model, data=data)


def check(config: Training, folder: Path, console: Console) -> None:
    """Refuses a training that cannot go on from a folder; reads its config and headers alone.

    Raises:
        ValueError: the training is of another model, tensors are not those of the model, or the
            text would be tokenised otherwise than the model's.
        OSError: a file is missing, or cannot be read.
    """
    model, vocabulary = export_config.read(folder / CONFIG)
    ours = export_config.to_json(config.model, config.data.vocabulary)
    for name, theirs in export_config.to_json(model, vocabulary).items():
        if ours.get(name) != theirs:
            raise ValueError(
                f"--from {folder} is a model whose {name} is {theirs!r}; got {ours.get(name)!r}. "
                "Remove the option of --model or --data.vocabulary that changes it."
            )
    if config.data.tokenizer is None and not all(
        file.endswith(shards.SUFFIXES) for file in config.data.files or ("",)
    ):
        raise ValueError(
            f"{folder} has no {TOKENIZER}, so its tokens cannot be told. Give it as "
            "--data.tokenizer, or --data.files that hold its tokens."
        )
    export.check(folder)
    known = read_json(folder / CONFIG).get("max_position_embeddings")
    if isinstance(known, int):
        warn_of_context(config.context, known, console)


def begin(trainer: Trainer, folder: Path) -> State:
    """The state before the first step: the folder's params, and a fresh optimizer.

    Raises:
        ValueError, OSError: as `export.read`.
    """
    _, _, params, bias = export.read(folder, trainer.mesh)

    def start(params: Params, bias: jax.Array) -> State:
        zero = jnp.zeros([], jnp.int32)
        return State(zero, params, trainer.tx.init(params), bias, guard.begin())

    with jax.set_mesh(trainer.mesh):
        return jax.jit(start, out_shardings=trainer.shardings, donate_argnums=0)(params, bias)
