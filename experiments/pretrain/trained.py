"""A run's folder as the model that it has trained."""

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
from etils import epath

from experiments.commands import print_warning
from experiments.language.checkpoints import Checkpoints
from experiments.language.mesh import make_mesh, one_device
from experiments.language.tokenizer import read as read_tokenizer
from experiments.optimizers import ARMS, OptimizerName
from experiments.pretrain.config import Training, as_json, from_json
from experiments.pretrain.step import State, Trainer
from experiments.runs import RunError, known_settings

TOKENIZER = "tokenizer.json"


class Loaded(NamedTuple):
    """A run as its folder holds it: the newest whole checkpoint."""

    config: Training
    optimizer: OptimizerName
    trainer: Trainer
    state: State
    tokenizer: tokenizers.Tokenizer | None


def settings_of(optimizer: OptimizerName, config: Training) -> dict[str, Any]:
    """What says which run it is, as JSON."""
    return {"optimizer": optimizer} | as_json(config)


def told_by(folder: epath.Path, settings: dict[str, Any]) -> tuple[OptimizerName, Training]:
    """What `settings_of` made settings of.

    Raises:
        ValueError: they are of no run of this study.
    """
    try:
        own = {key: value for key, value in settings.items() if key != "optimizer"}
        optimizer, config = settings["optimizer"], from_json(Training, own)
        if optimizer not in ARMS:
            raise ValueError(f"unknown optimizer {optimizer!r}")
        config.rate(optimizer)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not of a run of this study ({type(error).__name__}: "
            f"{error}). Give the folder of a run of python -m experiments.pretrain."
        ) from None
    return optimizer, config


def load_run(folder: epath.PathLike, on_message: Callable[[str], None] = print_warning) -> Loaded:
    """Reads a run's folder: on its own mesh where these are as many devices, or on the first one.

    Args:
        folder: of the run.
        on_message: told which checkpoint was passed over, and why; by default on stderr.

    Raises:
        RunError: the folder has no run, no checkpoint that is whole, or one whose params are not
            finite; or its settings or its tokenizer are not those that were saved.
    """
    folder = epath.Path(folder)
    optimizer, config = told_by(folder, known_settings(folder))
    end_of_text = None
    if config.isolate_documents and (path := folder / TOKENIZER).exists():
        found = read_tokenizer(path.read_bytes(), str(path))
        end_of_text = found.token_to_id(config.data.end_of_text)
    trained = config, optimizer
    try:
        mesh = make_mesh(config.mesh.sizes)
        trainer = Trainer(*trained, mesh, config.data.vocabulary, end_of_text)
    except ValueError:
        trainer = Trainer(*trained, one_device(), config.data.vocabulary, end_of_text)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(trainer.abstract)
    if restored is None:
        raise RunError(f"{folder} has no checkpoint yet; wait until the first one is saved.")
    for damage in restored.damaged:
        on_message(
            f"A damaged checkpoint of {folder} was skipped, and that of step {restored.step} is "
            f"used: {damage}"
        )
    _check_finite(folder, restored.step, restored.state)
    tokenizer = _tokenizer(folder / TOKENIZER, restored.meta.get("tokenizer_sha256"))
    return Loaded(config, optimizer, trainer, restored.state, tokenizer)


def digest_of(tokenizer: str) -> str:
    """Of a `tokenizer.json`."""
    return hashlib.sha256(tokenizer.encode()).hexdigest()


def _check_finite(folder: epath.Path, step: int, state: State) -> None:
    params = jax.tree_util.tree_leaves_with_path({"params": state.params, "bias": state.bias})
    broken = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in params
        if not bool(jnp.all(jnp.isfinite(leaf)))
    ]
    if broken:
        raise RunError(
            f"The checkpoint of step {step} in {folder} has NaN or Inf in {len(broken)} "
            f"parameters, the first being {broken[0]}: the training had diverged. Remove that "
            "checkpoint to use the previous one, or train with lower learning rates."
        )


def _tokenizer(path: epath.Path, digest: str | None) -> tokenizers.Tokenizer | None:
    if not path.exists():
        if digest is None:
            return None
        raise RunError(
            f"{path} is missing, but the run was trained on its tokens. Restore it from a backup."
        )
    source = path.read_bytes()
    if digest is not None and hashlib.sha256(source).hexdigest() != digest:
        raise RunError(
            f"{path} is not the tokenizer that the run was trained with: its digest differs. "
            "Restore it from a backup."
        )
    return read_tokenizer(source, str(path))
