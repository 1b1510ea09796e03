"""`--from FOLDER`: continues pretraining a Hugging Face model, with a fresh optimizer state."""

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
    """Returns default settings with the sizes, vocabulary and tokenizer of a folder's model.

    Raises:
        ValueError: If the folder is damaged, or its model is not supported.
        OSError: If it cannot be read.
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
    """Checks, from a folder's config and headers, that training can continue from its model.

    Raises:
        ValueError: If the settings or the tensors are of another model, or the folder has no
            tokenizer for the text.
        OSError: If a file is missing or cannot be read.
    """
    model, vocabulary = export_config.read(folder / CONFIG)
    ours = export_config.to_json(config.model, config.data.vocabulary)
    for name, theirs in export_config.to_json(model, vocabulary).items():
        if ours.get(name) != theirs:
            raise ValueError(
                f"{name} must be {theirs!r}, as in the model of --from {folder}; got "
                f"{ours.get(name)!r}. Remove the --model or --data.vocabulary option that sets it."
            )
    if config.data.tokenizer is None and not all(
        file.endswith(shards.SUFFIXES) for file in config.data.files or ("",)
    ):
        raise ValueError(
            f"{folder} has no {TOKENIZER}, which is required to tokenise text. Give it as "
            "--data.tokenizer, or give --data.files that contain the model's tokens."
        )
    export.check(folder)
    known = read_json(folder / CONFIG).get("max_position_embeddings")
    if isinstance(known, int):
        warn_of_context(config.context, known, console)


def begin(trainer: Trainer, folder: Path) -> State:
    """Returns the state before the first step: the folder's params and a fresh optimizer state.

    Raises:
        ValueError, OSError: As for `export.read`.
    """
    _, _, params, bias = export.read(folder, trainer.mesh)

    def start(params: Params, bias: jax.Array) -> State:
        zero = jnp.zeros([], jnp.int32)
        return State(zero, params, trainer.tx.init(params), bias, guard.begin())

    with jax.set_mesh(trainer.mesh):
        return jax.jit(start, out_shardings=trainer.shardings, donate_argnums=0)(params, bias)
