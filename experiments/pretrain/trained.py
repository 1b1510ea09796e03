"""Loads the trained model of a run's folder."""

import contextlib
import hashlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import tokenizers
from etils import epath

from experiments.commands import print_warning
from experiments.language.checkpoints import Checkpoints
from experiments.language.mesh import make_mesh, one_device
from experiments.language.sharding import named_leaves
from experiments.language.tokenizer import read as read_tokenizer
from experiments.optimizers import ARMS, OptimizerName
from experiments.pretrain.config import Training, as_json, from_json
from experiments.pretrain.step import State, Trainer
from experiments.runs import RunError, known_settings

TOKENIZER = "tokenizer.json"


class Loaded(NamedTuple):
    """A run with the state of its newest complete checkpoint."""

    config: Training
    optimizer: OptimizerName
    trainer: Trainer
    state: State
    tokenizer: tokenizers.Tokenizer | None


def settings_of(optimizer: OptimizerName, config: Training) -> dict[str, Any]:
    """Returns the settings that identify a run, as JSON values."""
    return {"optimizer": optimizer} | as_json(config)


def told_by(folder: epath.Path, settings: dict[str, Any]) -> tuple[OptimizerName, Training]:
    """Inverts `settings_of`: returns the optimizer and the config.

    Raises:
        ValueError: If the settings are not those of a run of this study.
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


def load_run(folder: epath.PathLike) -> Loaded:
    """Reads a run's folder, on the run's mesh if it fits this machine, else on the first device.

    Damaged checkpoints are skipped, with a warning.

    Raises:
        RunError: If the folder has no run, no complete checkpoint, or params that are not finite,
            or its settings or tokenizer have changed.
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
        print_warning(
            f"A damaged checkpoint of {folder} was skipped, and that of step {restored.step} is "
            f"used: {damage}"
        )
    _check_finite(folder, restored.step, restored.state)
    tokenizer = _tokenizer(folder / TOKENIZER, restored.meta.get("tokenizer_sha256"))
    return Loaded(config, optimizer, trainer, restored.state, tokenizer)


def digest_of(tokenizer: str) -> str:
    """Returns the digest of a `tokenizer.json`."""
    return hashlib.sha256(tokenizer.encode()).hexdigest()


def _check_finite(folder: epath.Path, step: int, state: State) -> None:
    params = named_leaves({"params": state.params, "bias": state.bias})
    broken = [name for name, leaf in params if not bool(jnp.all(jnp.isfinite(leaf)))]
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
