"""The training loop of a pretraining run."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.commands import option
from experiments.language import data, windows
from experiments.language.mesh import make_mesh
from experiments.language.processes import place_whole
from experiments.language.training_loop import Metrics, TrainingLoop
from experiments.optimizers import OptimizerName
from experiments.pretrain import costs
from experiments.pretrain.config import Running, Training
from experiments.pretrain.sample import DIVIDER, write_texts
from experiments.pretrain.step import State, Trainer
from experiments.pretrain.trained import TOKENIZER, digest_of, settings_of
from experiments.runs import write_text


class Pretraining(TrainingLoop):
    """The training loop of a pretraining run.

    Args:
        config, optimizer: The settings of the training, and the name of the optimizer.
        running: The settings of checkpoints, evaluations, logs and samples.
        tokens: The text, from `data.prepare`.
        folder, stop, callbacks: As for `TrainingLoop`.
        begin: Returns the state before the first step. None initialises it from the seed.

    Raises:
        ValueError: If the text has more tokens than the model, the mesh does not divide a size, or
            documents are to be kept apart and the token that ends them is unknown.
    """

    trainer: Trainer
    config: Training
    keeping: Running

    def __init__(
        self,
        config: Training,
        optimizer: OptimizerName,
        running: Running,
        tokens: data.Tokens,
        folder: epath.Path,
        stop: threading.Event,
        begin: Callable[[Trainer], State] | None = None,
        **callbacks: Any,
    ):
        if tokens.vocabulary > config.data.vocabulary:
            raise ValueError(
                f"--data.vocabulary must be at least {tokens.vocabulary}, the vocabulary size of "
                f"the text; got {config.data.vocabulary}."
            )
        if config.isolate_documents and tokens.end_of_text is None:
            raise ValueError(
                "--isolate-documents requires to know the token that ends a document. Give the "
                "--data.tokenizer of the tokens in --data.files, or remove it."
            )
        mesh = make_mesh(config.mesh.sizes)
        trainer = Trainer(config, optimizer, mesh, config.data.vocabulary, tokens.end_of_text)
        super().__init__(trainer, running, folder, stop, **callbacks)
        self.begin = begin
        self.tokens = tokens
        self.windows = windows.batches(
            tokens,
            batch=config.batch,
            context=config.context,
            seed=config.seed,
            rows=trainer.share.rows,
        )
        limit = max(running.evaluation_tokens // max(len(tokens.parts), 1), config.context)
        self.held_out = {
            name: (weight, windows.held_out(source, config.context, limit))
            for name, weight, source in tokens.parts or (("", 1.0, tokens),)
        }
        self.costs = costs.step_costs(config, optimizer, trainer.abstract.params)
        if unknown := costs.unknown_peak():
            self.on_message(unknown)
        self.tokenizer = tokens.tokenizer and tokens.tokenizer.to_str()
        if self.first and self.tokenizer is not None:
            write_text(folder / TOKENIZER, self.tokenizer)

    def start(self) -> State:
        return self.begin(self.trainer) if self.begin else self.trainer.start(self.config.seed)

    def batches(self, step: int) -> Iterator[jax.Array]:
        return map(self.trainer.share.place, windows.from_step(self.windows, step))

    def evaluate(self, state: State) -> tuple[dict[str, float], float]:
        each = {n: evaluate(self.trainer, state, text) for n, (_, text) in self.held_out.items()}
        values = next(iter(each.values()))
        if self.tokens.parts:
            weights = np.array([weight for weight, _ in self.held_out.values()])
            values = {
                key: float(np.average([of[key] for of in each.values()], weights=weights))
                for key in values
                if all(key in of for of in each.values())
            }
            values["sources"] = each
        return values, values.get("bits_per_byte", values["validation_loss"])

    def meta(self, step: int) -> dict[str, Any]:
        return {
            "config": settings_of(self.trainer.optimizer, self.config),
            "data_sha256": self.tokens.sha256,
            "tokenizer_sha256": self.tokenizer and digest_of(self.tokenizer),
        }

    def remedy(self) -> str:
        name, config = self.trainer.optimizer, self.config
        own = option(*(("rates", name) if hasattr(config.rates, name) else (name, "learning_rate")))
        rate = f"{own} {config.rate(name):g}"
        if name != "adamw":
            rate += f" or --adamw.learning-rate {config.adamw.learning_rate:g}"
        return f"lower {rate}, or raise --adamw.eps {config.adamw.eps:g}"

    def rates(self, seconds: float) -> dict[str, float]:
        return self.costs.rates(seconds)

    def finish(self, state: State) -> None:
        self._write_samples(state)
        super().finish(state)

    def _write_samples(self, state: State) -> None:
        if not self.keeping.samples or self.tokens.tokenizer is None:
            return
        count = self.keeping.samples
        texts = write_texts(self.trainer, state, self.tokens.tokenizer, "", count=count)
        if self.first:
            (self.folder / "samples.txt").write_text(DIVIDER.join(texts) + "\n")

    def summary(self, trained: Metrics, evaluated: Metrics) -> Metrics:
        return {
            "optimizer": self.trainer.optimizer,
            "bits_per_byte": evaluated.get("bits_per_byte"),
            "costs": self.costs.as_json(),
            "data": self.tokens.as_json(),
            **({"sources": evaluated["sources"]} if self.tokens.parts else {}),
        }


def evaluate(trainer: Trainer, state: State, held_out: windows.HeldOut) -> dict[str, float]:
    """Returns `validation_loss` in nats per token and, if bytes are known, `bits_per_byte`."""
    rows = held_out.windows
    loss = float(summed_losses(trainer, state, rows).sum()) / rows[:, 1:].size
    bits = held_out.bits_per_byte(loss)
    return {"validation_loss": loss} | ({} if bits is None else {"bits_per_byte": bits})


def summed_losses(trainer: Trainer, state: State, rows: np.ndarray) -> np.ndarray:
    """Of windows `(windows, T + 1)` the summed loss of each, in nats, at the params to evaluate."""
    size = trainer.config.microbatch
    # Repeated windows, which do not count, pad the last chunk.
    index = np.arange(-(-len(rows) // size) * size) % len(rows)
    chunks = rows[index].reshape(-1, size, rows.shape[1])
    placed = place_whole(chunks, trainer.windows)
    with jax.set_mesh(trainer.mesh):
        sums = trainer.evaluate(state, placed)
    return np.asarray(sums, np.float64).ravel()[: len(rows)]
