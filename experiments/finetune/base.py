"""The small Qwen3 that the study fine-tunes by default, pretrained once and cached.

It is trained on every token of the running Python's standard library.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import cache, corpus
from experiments.finetune import data as rows_of
from experiments.finetune import loop, model, weights
from experiments.finetune.architecture import Architecture
from experiments.finetune.chat import END_OF_TEXT, TOKENIZER, write_tokenizer
from experiments.finetune.config import ArmName, Base, Optimizer, Training
from experiments.finetune.model import Params
from experiments.finetune.packing import Batch
from experiments.finetune.step import State, Trainer
from experiments.json_files import digest
from experiments.language import data, documents, windows
from experiments.language.cell import Metrics, train_in_memory
from experiments.language.mesh import make_mesh
from experiments.language.training_loop import TrainingError

_FORMAT = 2  # of the cache; another one makes all bases be pretrained again
_SAMPLE = 1 << 27  # characters that the tokenizer is trained on at most
_HELD_OUT = 32_768  # tokens
_ARMS: dict[str, ArmName] = {"adamw": "adamw", "muon": "muon_adamw"}

# Takes a description, the amount done, and the total amount. It may raise to stop the work.
OnProgress = Callable[[str, int, int], None]


def prepare(base: Base, on_progress: OnProgress = lambda what, done, total: None) -> Path:
    """The folder of a base, which it makes if the cache has it not whole.

    One process of a host does the work, and others wait for it; a kill leaves nothing that is
    taken for whole. Beside the model it has held-out text, and `manifest.json` with its loss.

    Raises:
        TrainingError: The loss is no longer finite.
        OSError: The cache cannot be written.
    """
    text = corpus.standard_library().sha256
    named = {"hidden": base.width, **dataclasses.asdict(base)}
    del named["width"]  # which _FORMAT 2 calls hidden
    key = digest([_FORMAT, named, text])[:16]
    folder = cache.home("finetune") / f"base-{key}"

    def write(partial: Path) -> dict[str, Any]:
        scratch = partial / "scratch"
        tokenizer, made = scratch / "tokenizer", scratch / "model"
        on_progress("training a tokenizer", 0, 1)
        texts = documents.standard_library().sample(_SAMPLE)
        write_tokenizer(tokenizer, texts, base.vocabulary)
        settings = data.Data(
            tokenizer=str(tokenizer / TOKENIZER),
            vocabulary=base.vocabulary,
            end_of_text=END_OF_TEXT,
            cache=scratch / "tokens",
        )
        tokens = data.prepare(settings, on_progress)
        architecture = architecture_of(base, tokens.vocabulary)
        held_out = windows.held_out(tokens, base.context, _HELD_OUT).windows
        params, found = _pretrain(base, architecture, tokens, held_out, on_progress)
        weights.write(made, architecture, params, tokenizer, dtype="float32")
        for path in made.iterdir():
            path.rename(partial / path.name)
        np.save(partial / rows_of.HELD_OUT, held_out)
        shutil.rmtree(scratch)
        return {"base": dataclasses.asdict(base), "text": tokens.as_json()} | found

    with cache.alone(folder, lambda: on_progress("waiting for another process", 0, 1)):
        if cache.read(folder) is None:
            cache.make(folder, write)
    return folder


def architecture_of(base: Base, vocabulary: int) -> Architecture:
    """Returns the architecture of a small model, whose end token is ChatML's last one."""
    return Architecture(
        layers=base.layers,
        hidden=base.width,
        ffn=base.ffn,
        heads=base.heads,
        kv_heads=base.heads // 2,
        head_dim=base.head_dim,
        vocabulary=vocabulary,
        rope_theta=1e4,
        context=4096,
        family="qwen3" if base.qk_norm else "llama",
        end_token=vocabulary - 1,
        pad_token=0,
    )


def _pretrain(
    base: Base,
    architecture: Architecture,
    tokens: data.Tokens,
    held_out: np.ndarray,
    on_progress: OnProgress,
) -> tuple[Params, dict[str, Any]]:
    on_progress("compiling", 0, base.steps)
    config = Training(
        optimizer=Optimizer(learning_rate=base.learning_rate),
        context=base.context,
        batch=base.batch,
        steps=base.steps,
        warmup=base.steps // 10,
        decay="cosine",
        final_lr_fraction=0.1,
        remat=False,
    )
    # As many devices as divide a batch share it.
    devices = jax.devices()[: math.gcd(jax.device_count(), base.batch)]
    mesh = make_mesh((-1, 1, 1, 1), devices)
    trainer = Trainer(config, _ARMS[base.optimizer], architecture, mesh)
    params = model.init(architecture, jax.random.key(base.seed))
    shuffled = windows.batches(tokens, batch=base.batch, context=base.context, seed=base.seed)
    rows = windows.from_step(shuffled, 0)

    def advance(state: State, first: int, until: int) -> tuple[State, Metrics]:
        for step in range(first, until):
            state, metrics = trainer.advance(state, trainer.place(_every_token(next(rows))))
            if jax.default_backend() == "cpu":
                jax.block_until_ready(state)  # collectives of two steps at once deadlock there
            if step % 10 == 9 or step + 1 == until:
                loss = float(metrics["loss"])
                text = f"pretraining with {base.optimizer}, loss {loss:.3f}"
                on_progress(text, step + 1, base.steps)
        return state, {"train_loss": loss}

    whole = held_out[: len(held_out) // base.batch * base.batch]
    batches = [_every_token(rows) for rows in np.split(whole, len(whole) // base.batch)]
    state, _, outcome = train_in_memory(
        trainer.start(jax.device_put(params, trainer.places)),
        base.steps,
        base.steps,
        advance,
        lambda state: loop.evaluate(trainer, trainer.evaluated(state), batches),
    )
    if outcome["diverged"]:
        raise TrainingError(
            "The loss of the small model is NaN or Inf. Lower --base.learning-rate "
            f"{base.learning_rate:g}."
        )
    told = ("train_loss", "validation_loss", "validation_accuracy")
    facts = {name: outcome[name] for name in told}
    return state.params, facts | {"skipped": int(state.guard.skipped)}


def _every_token(rows: np.ndarray) -> Batch:
    """Returns a batch that trains on every token of windows `(B, T + 1)` of one text each."""
    tokens, targets = (np.asarray(x, np.int32) for x in (rows[:, :-1], rows[:, 1:]))
    return Batch(tokens, targets, np.ones_like(tokens))
