"""Fine-tunes a model: as a run with checkpoints, or as a cell of a suite in memory."""

import dataclasses
import functools
import itertools
import math
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from experiments.finetune import arms
from experiments.finetune.architecture import Architecture
from experiments.finetune.config import ArmName, Running, Training
from experiments.finetune.data import Prepared
from experiments.finetune.model import Params
from experiments.finetune.packing import Batch, Batches, Rows, in_order
from experiments.finetune.step import State, Trainer
from experiments.language import model_card
from experiments.language.cell import train_in_memory
from experiments.language.mesh import one_device
from experiments.language.training_loop import Metrics, TrainingLoop
from experiments.report.figures import optimizer_label


class Start(NamedTuple):
    """The initial model of a fine-tuning."""

    name: str  # for records
    architecture: Architecture
    # Reads the params, sharded over a mesh. It is called if there is no checkpoint.
    load: Callable[[jax.sharding.Mesh], Params]
    text: Rows | None = None  # like that of its pretraining, to see what is forgotten


class Model(NamedTuple):
    """The initial model of a suite's cells, its rows, and text like that of its pretraining.

    The params are NumPy arrays, which are not changed.
    """

    name: str
    architecture: Architecture
    params: Params
    rows: Prepared
    text: Rows | None = None


def settings_of(trainer: Trainer, start: Start, rows: Prepared) -> dict[str, Any]:
    """Returns the settings that identify a run, as JSON values."""
    named = {"arm": trainer.name, "model": start.name, "data": rows.report.sha256}
    return named | trainer.config.as_json()


class FineTuning(TrainingLoop):
    """The training loop of a fine-tuning run.

    Args:
        trainer: The trainer of the run's config, arm and mesh.
        running: The settings of checkpoints, evaluations and logs.
        rows: The examples, from `data.prepare`.
        model: The initial model.
        folder, stop, callbacks: As for `TrainingLoop`.
        on_finish: Called with the final params, before `summary.json` marks the run as finished.
    """

    trainer: Trainer
    config: Training
    keeping: Running

    def __init__(
        self,
        trainer: Trainer,
        running: Running,
        rows: Prepared,
        model: Start,
        folder: epath.Path,
        stop: threading.Event,
        on_finish: Callable[[Params], None] = lambda params: None,
        **callbacks: Any,
    ):
        super().__init__(trainer, running, folder, stop, **callbacks)
        self.rows, self.model, self.on_finish = rows, model, on_finish
        self.packed = batches(rows.train, self.config, self.config.seed, trainer.share.rows)
        self.windows = evaluated_windows(rows, model.text, self.config, running)

    def start(self) -> State:
        return self.trainer.start(self.model.load(self.trainer.mesh))

    def kept(self, state: State) -> State:
        """Without what is frozen, which the model's folder has."""
        return state._replace(frozen={})

    def completed(self, state: State) -> State:
        return state._replace(frozen=self.start().frozen if self.trainer.abstract.frozen else {})

    def batches(self, step: int) -> Iterator[Any]:
        for number in itertools.count(step):
            yield self.trainer.place(self.packed[number])

    def told(self, window: list[Metrics]) -> Metrics:
        return window[-1] | {"mean_token_accuracy": np.mean(_column(window, "mean_token_accuracy"))}

    def evaluate(self, state: State) -> tuple[Metrics, float]:
        values = evaluate(self.trainer, self.trainer.evaluated(state), *self.windows)
        return values, values["validation_loss"]

    def remedy(self) -> str:
        optimizer = self.config.optimizer
        return (
            f"lower --optimizer.learning-rate {optimizer.learning_rate:g} or raise "
            f"--optimizer.eps {optimizer.eps:g}"
        )

    def meta(self, step: int) -> dict[str, Any]:
        return {
            "config": settings_of(self.trainer, self.model, self.rows),
            "data_sha256": self.rows.report.sha256,
        }

    def finish(self, state: State) -> None:
        self.on_finish(self.trainer.exported(state))
        super().finish(state)

    def write_card(self, folder: Path) -> None:
        """What the exported model is, for those who find it."""
        config, report, arm = self.config, self.rows.report, self.trainer.name
        settings, lora, quirks = config.optimizer, config.lora, config.optimizer.quirks
        base, digest = self.model.name.split()[0], self.model.name.split()[-1]

        def change(name: str) -> str | None:
            known = [f"{record[name]:.4f}" for record in self.log.records if name in record]
            return f"{known[0]} before, {known[-1]} after" if known else None

        facts = {
            "Base model": f"{base}, digest {digest}",
            "Data": f"{report.name}: {len(self.rows.train.lengths):,} examples to train on, "
            f"{report.held_out_rows:,} held out",
            "Digest of the data's tokens": report.sha256,
            "Optimizer": arms.ARMS[arm] + "; here of LoRA's factors alone" * bool(lora.rank),
            "Learning rate": f"{settings.learning_rate:g}, after {config.warmup} steps of warm-up, "
            f"then {config.decay} decay to {config.final_lr_fraction:g} of it",
            "Weight decay": settings.weight_decay,
            "Adam": {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps},
            "Muon": {"momentum": settings.beta, "coefficients": settings.ns_coeffs},
            "Reproduces errors of published code": ", ".join(quirks) or None,
            "LoRA, merged": {"rank": lora.rank, "alpha": lora.alpha, "of": " ".join(lora.targets)},
            "Steps": f"{config.steps:,} of {config.batch} sequences of {config.context:,} tokens",
            "Precision": f"{config.dtype}, params and optimizer float32",
            "Held-out loss, nats per token": change("validation_loss"),
            "On text like the pretraining's": change("pretraining_loss"),
        }
        if arm == "adamw":
            del facts["Muon"]
        if not lora.rank:
            del facts["LoRA, merged"]
        summary = f"{base}, fine-tuned with {optimizer_label(arm)} by muon_jax."
        model_card.write(folder, f"{base}, fine-tuned", summary, facts, base=base)

    def summary(self, trained: Metrics, evaluated: Metrics) -> Metrics:
        steps = [record for record in self.log.records if "loss" in record] if self.log else []
        norms = [r["gradient_norm"] for r in steps if r["step"] > self.config.warmup]
        return {
            "arm": self.trainer.name,
            "windows_per_epoch": self.packed.windows,
            "mean_token_accuracy": trained["mean_token_accuracy"],
            "validation_accuracy": evaluated["validation_accuracy"],
            "pretraining_loss": evaluated.get("pretraining_loss"),
            **_observed(norms, [r["max_logit"] for r in steps]),
            "model": self.model.name,
            "architecture": dataclasses.asdict(self.trainer.architecture),
            "data": self.rows.report._asdict(),
        }


def batches(
    rows: Rows, config: Training, seed: int, places: Sequence[int] | None = None
) -> Batches:
    """Returns the batches of the steps; `places` are the rows that this process makes."""
    return Batches(rows, batch=config.batch, context=config.context, seed=seed, places=places)


def held_out(rows: Rows, config: Training, limit: int) -> list[Batch]:
    """Returns windows of held-out rows, evenly spaced if they have more tokens than `limit`."""
    lengths = rows.lengths
    count = min(len(lengths), max(int(limit / lengths.mean()), 1))
    spread = [i * len(lengths) // count for i in range(count)]
    chosen = [slice(rows.starts[i], rows.starts[i + 1]) for i in spread]
    return in_order(
        Rows.of([(rows.tokens[row], rows.learnt[row]) for row in chosen]),
        batch=config.microbatch,
        context=config.context,
    )


def evaluated_windows(
    rows: Prepared, text: Rows | None, config: Training, running: Running
) -> tuple[list[Batch], list[Batch]]:
    """Returns windows of the held-out rows, and half as many tokens of the pretraining text."""
    limit = running.evaluation_tokens
    windows = held_out(rows.held_out, config, limit)
    return windows, held_out(text, config, limit // 2) if text else []


def evaluate(
    trainer: Trainer, params: Params, windows: Sequence[Batch], text: Sequence[Batch] = ()
) -> dict[str, float]:
    """`validation_loss` in nats and `validation_accuracy`, of all learnt tokens alike.

    And `pretraining_loss` of a text, if there is one.
    """

    def means(windows: Sequence[Batch]) -> tuple[float, float]:
        sums = {"loss": 0.0, "correct": 0.0, "learnt": 0.0}
        for batch in windows:
            found = jax.device_get(trainer.evaluate(params, trainer.place_whole(batch)))
            sums = {name: sums[name] + float(np.sum(x, dtype=float)) for name, x in found.items()}
        return sums["loss"] / sums["learnt"], sums["correct"] / sums["learnt"]

    loss, accuracy = means(windows)
    found = {"validation_loss": loss, "validation_accuracy": accuracy}
    return found | ({"pretraining_loss": means(text)[0]} if text else {})


def steadiness(norms: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Returns the median of gradient norms, and their interquartile range over the median."""
    known = [norm for norm in norms if norm is not None and math.isfinite(norm)]
    if len(known) < 2:
        return (known[0] if known else None), None
    low, median, high = statistics.quantiles(known, n=4, method="inclusive")
    return median, (high - low) / median if median else None


@functools.cache
def cell_trainer(
    config: Training, arm: ArmName, architecture: Architecture, device: jax.Device
) -> Trainer:
    """Returns a trainer with a compiled step, for all rates, seeds and params of an arm."""
    trainer = Trainer(config, arm, architecture, one_device(device))
    trainer.program  # noqa: B018 - compiles now, before a clock runs
    return trainer


def train_cell(
    config: Training,
    model: Model,
    arm: ArmName,
    rate: float,
    seed: int,
    running: Running,
    device: jax.Device,
    on_evaluation: Callable[[Metrics], None] = lambda evaluation: None,
) -> tuple[list[Metrics], Metrics]:
    """Trains a cell to its last step; returns the evaluations and the outcome of `train_in_memory`.

    Args:
        config: The settings, with known `steps`. Their learning rate and seed are ignored.
        model: The initial model and its rows.
        arm: The name of the optimizer.
        rate: The learning rate after warm-up.
        seed: The seed of the rows' order.
        running: The settings of evaluations.
        device: The device to train on. Threads may train on different ones.
        on_evaluation: Called after each evaluation. It may raise to stop the cell.
    """
    config = dataclasses.replace(
        config, seed=0, optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0)
    )
    trainer = cell_trainer(config, arm, model.architecture, device)
    packed = batches(model.rows.train, config, seed)
    windows = evaluated_windows(model.rows, model.text, config, running)

    def advance(state: State, first: int, until: int) -> tuple[State, Metrics]:
        seen = []
        for step in range(first, until):
            state, metrics = trainer.advance(state, trainer.place(packed[step]), rate)
            seen.append(metrics)
        return state, _since_last(jax.device_get(seen))

    state, history, outcome = train_in_memory(
        trainer.start(jax.device_put(model.params, trainer.places, may_alias=False)),
        config.steps,
        running.evaluate_every,
        advance,
        lambda state: evaluate(trainer, trainer.evaluated(state), *windows),
        on_evaluation,
        first=True,
    )
    norms = [norm for evaluation in history for norm in evaluation["gradient_norms"]]
    observed = _observed(norms[config.warmup :], [e["max_logit"] for e in history])
    return history, outcome | observed | {"skipped": int(state.guard.skipped)}


def _observed(norms: Sequence[float | None], logits: Sequence[float | None]) -> Metrics:
    median, spread = steadiness(norms)
    return {
        "gradient_norm_median": median,
        "gradient_norm_spread": spread,
        "max_logit": max((logit for logit in logits if logit is not None), default=None),
    }


def _since_last(window: Sequence[Metrics]) -> Metrics:
    """Returns the metrics of the steps since the last evaluation, if there are any.

    Losses are in nats per trained-on token, and the mean token accuracy is as in trl.
    """
    losses, accuracies = (_column(window, name) for name in ("loss", "mean_token_accuracy"))
    norms = [metrics["gradient_norms"] for metrics in window]
    logits = [logit for logit in _column(window, "max_logit") if math.isfinite(logit)]
    return {
        "train_loss": float(np.mean(losses)) if window else None,
        "mean_token_accuracy": float(np.mean(accuracies)) if window else None,
        "losses": losses,
        "gradient_norms": _column(window, "gradient_norm"),
        "group_norms": {group: _column(norms, group) for group in (norms[0] if norms else ())},
        "update_rms": jax.tree.map(float, window[-1]["update_rms"]) if window else {},
        "max_logit": max(logits, default=None),
    }


def _column(window: Sequence[Metrics], name: str) -> list[float]:
    return [float(metrics[name]) for metrics in window]
