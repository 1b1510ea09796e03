"""One run: from its folder's newest checkpoint, or from the start, to its last step."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from etils import epath

from experiments.checkpoints import Checkpoints, params_sha256
from experiments.optimizers import OptimizerName
from experiments.pretrain import costs, data, sharding, windows
from experiments.pretrain.config import Running, Training, as_json, from_json
from experiments.pretrain.log import Log
from experiments.pretrain.processes import Agreement
from experiments.pretrain.sample import DIVIDER, write_texts
from experiments.pretrain.step import State, Trainer
from experiments.runs import RunError, machine, write_json

TOKENIZER = "tokenizer.json"


class TrainingError(Exception):
    """A run that cannot go on; the message says why and what to do."""


class Progress(NamedTuple):
    """What a run shows of itself: `bits` a byte, or nats a token where bytes are unknown."""

    step: int
    loss: float
    validation: float | None
    tokens_per_second: float | None


OnStep = Callable[[Progress], None]
OnMessage = Callable[[str], None]


def train(
    config: Training,
    optimizer: OptimizerName,
    running: Running,
    tokens: data.Tokens,
    folder: epath.Path,
    stop: threading.Event,
    on_step: OnStep = lambda progress: None,
    on_message: OnMessage = lambda text: None,
) -> bool:
    """Trains to the end, or until `stop` is set; then the state of the last step is saved.

    Args:
        config: what to train.
        optimizer: with which arm.
        running: what is saved, evaluated and logged when.
        tokens: of `data.prepare`.
        folder: the run's, which this process has claimed.
        stop: asks for an early end; with several processes, that of any of them.
        on_step, on_message: called as it goes.

    Returns:
        Whether the run is finished.

    Raises:
        TrainingError: too many steps in a row without a finite loss.
        ValueError: the checkpoints are of another text, or a size that the mesh does not divide.
        OSError: a checkpoint could not be written; those before are whole.
    """
    if tokens.vocabulary > config.data.vocabulary:
        raise ValueError(
            f"The text has {tokens.vocabulary} tokens, the model {config.data.vocabulary}: give "
            f"--data.vocabulary {tokens.vocabulary} or more."
        )
    mesh = sharding.make_mesh(config.mesh.sizes)
    trainer = Trainer(config, optimizer, mesh, config.data.vocabulary)
    with contextlib.closing(Checkpoints(folder / "checkpoints", keep=running.keep)) as checkpoints:
        run = _Run(trainer, running, tokens, folder, checkpoints, stop, on_step, on_message)
        return run.to_the_end()


class _Run:
    def __init__(self, trainer, running, tokens, folder, checkpoints, stop, on_step, on_message):
        self.trainer: Trainer = trainer
        self.config: Training = trainer.config
        self.running: Running = running
        self.tokens: data.Tokens = tokens
        self.folder: epath.Path = folder
        self.checkpoints: Checkpoints = checkpoints
        self.stop: threading.Event = stop
        self.on_step: OnStep = on_step
        self.on_message: OnMessage = on_message
        self.first = jax.process_index() == 0
        config = self.config
        self.batches = windows.batches(
            tokens,
            batch=config.batch,
            context=config.context,
            seed=config.seed,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        self.held_out = windows.held_out(tokens, config.context, running.evaluation_tokens)
        self.costs = costs.step_costs(config, trainer.optimizer, trainer.abstract.params)

    def to_the_end(self) -> bool:
        state = self._begin()
        step = int(state.step)
        self.log = Log(self.folder, step) if self.first else None
        trained = [r for r in self.log.records if "loss" in r] if self.log else []
        self.seconds = trained[-1]["seconds"] if trained else 0.0
        self.validation: float | None = None
        agreement = Agreement(self.trainer.mesh)
        batches = windows.from_step(self.batches, step)
        since, saved, stopping = (step, time.perf_counter()), step, False
        metrics: Any = None
        try:
            if step == 0:
                self._evaluate(state)
            while step < self.config.steps and not stopping:
                self._profile(step)
                batch = self._place(next(batches))
                state, newest = self.trainer.advance(state, batch)
                # The step before this one is read while this one runs.
                self._refuse_to_diverge(metrics)
                metrics, step = newest, step + 1
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(state)  # collectives of two steps at once deadlock there
                stopping = agreement.any(self.stop.is_set())
                if step % self.running.log_every == 0 or step == self.config.steps or stopping:
                    since = self._tell(step, metrics, since)
                if step % self.running.evaluate_every == 0 or step == self.config.steps:
                    self._evaluate(state)
                    since = step, time.perf_counter()
                if step % self.running.save_every == 0 or step == self.config.steps or stopping:
                    self._refuse_to_diverge(metrics)
                    self._save(state, step)
                    saved, since = step, (step, time.perf_counter())
            self.checkpoints.wait()
            finished = step == self.config.steps
            if finished:
                self._write_samples(state)
                self._summarize(state)
            return finished
        except OSError as error:
            raise OSError(
                f"{error}. The checkpoint of step {saved} or the one before is whole"
            ) from error
        finally:
            if self.log:
                self.log.close()

    def _begin(self) -> State:
        if self.first and self.tokens.tokenizer is not None:
            (self.folder / TOKENIZER).write_text(self.tokens.tokenizer.to_str())
        restored = self.checkpoints.restore(self.trainer.abstract)
        if restored is None:
            return self.trainer.start(self.config.seed)
        for damage in restored.damaged:
            self.on_message(f"[yellow]passed over a damaged checkpoint:[/yellow] {damage}")
        if restored.meta["data_sha256"] != self.tokens.sha256:
            raise ValueError(
                f"The checkpoints in {self.folder} are of another text: its digest was "
                f"{restored.meta['data_sha256'][:12]}…, now it is {self.tokens.sha256[:12]}…. Give "
                "the same --data, or another --out."
            )
        self.on_message(f"going on from step {restored.step}")
        return restored.state

    def _place(self, rows: np.ndarray) -> jax.Array:
        """This process's `(B / processes, T + 1)` as a part of `(microbatches, B, T + 1)`."""
        local = rows.reshape(self.config.accumulate, -1, rows.shape[1])
        return jax.make_array_from_process_local_data(self.trainer.windows, local)

    def _refuse_to_diverge(self, metrics: dict[str, Any] | None) -> None:
        patience = self.config.patience
        if metrics is not None and int(metrics["nonfinite_in_a_row"]) >= patience:
            raise TrainingError(
                f"{patience} steps in a row had no finite loss and gradient; they changed nothing. "
                "Look at the text they read, or lower the learning rates; the checkpoints are from "
                "before or are as good."
            )

    def _tell(self, step: int, metrics: dict[str, Any], since: tuple[int, float]) -> Any:
        found = jax.device_get(metrics)
        now = time.perf_counter()
        steps, seconds = step - since[0], now - since[1]
        self.seconds += seconds
        speed = steps * self.config.tokens_per_step / seconds if steps else None
        if self.log:
            values = jax.tree.map(lambda x: x.tolist(), found) | {"seconds": self.seconds}
            if speed is not None:
                values |= {"tokens_per_second": speed} | self.costs.rates(seconds / steps)
            self.log.add(step, **values)
        self.on_step(Progress(step, float(found["loss"]), self.validation, speed))
        return step, now

    def _evaluate(self, state: State) -> None:
        values = evaluate(self.trainer, state, self.held_out)
        self.validation = values.get("bits_per_byte", values["validation_loss"])
        if self.log:
            self.log.add(int(state.step), **values)

    def _save(self, state: State, step: int) -> None:
        if self.log:
            self.log.flush()
        meta = {
            "optimizer": self.trainer.optimizer,
            "config": as_json(self.config),
            "data_sha256": self.tokens.sha256,
            "data_position": step,
        }
        self.checkpoints.save(step, state, meta)

    def _profile(self, step: int) -> None:
        begin, end = self.running.profile or (None, None)
        if step == begin:
            jax.profiler.start_trace(str(self.folder / "profile"))
        elif step == end:
            jax.profiler.stop_trace()

    def _write_samples(self, state: State) -> None:
        if not self.running.samples or self.tokens.tokenizer is None:
            return
        count = self.running.samples
        texts = write_texts(self.trainer, state, self.tokens.tokenizer, "", count=count)
        if self.first:
            (self.folder / "samples.txt").write_text(DIVIDER.join(texts) + "\n")

    def _summarize(self, state: State) -> None:
        digest = params_sha256(state.params)
        if not self.log:
            return
        records = self.log.records
        trained = [r for r in records if "loss" in r]
        evaluated = [r for r in records if "validation_loss" in r]
        steps = len(trained[1:]) and trained[-1]["step"] - trained[0]["step"]
        seconds = trained[-1]["seconds"] - trained[0]["seconds"]
        config = self.config
        write_json(
            self.folder / "summary.json",
            {
                "optimizer": self.trainer.optimizer,
                "steps": config.steps,
                "tokens": config.steps * config.tokens_per_step,
                "train_loss": trained[-1]["loss"],
                "validation_loss": evaluated[-1]["validation_loss"],
                "bits_per_byte": evaluated[-1].get("bits_per_byte"),
                "skipped_steps": trained[-1]["skipped"],
                "seconds": self.seconds,
                # Without the first steps, which compile.
                "tokens_per_second": steps * config.tokens_per_step / seconds if steps else None,
                "costs": self.costs.as_json(),
                "params_sha256": digest,
                "data": self.tokens.as_json(),
                "machine": machine(),
            },
        )


def evaluate(trainer: Trainer, state: State, held_out: windows.HeldOut) -> dict[str, float]:
    """`validation_loss` in nats a token and, where bytes are known, `bits_per_byte`."""
    rows = held_out.windows
    size = trainer.config.batch // trainer.config.accumulate
    # The last chunk is filled up with windows that do not count.
    index = np.arange(-(-len(rows) // size) * size) % len(rows)
    chunks = rows[index].reshape(-1, size, rows.shape[1])
    placed = jax.make_array_from_callback(chunks.shape, trainer.windows, lambda at: chunks[at])
    with jax.set_mesh(trainer.mesh):
        sums = np.asarray(trainer.evaluate(state, placed), np.float64).ravel()[: len(rows)]
    loss = float(sums.sum()) / rows[:, 1:].size
    bits = held_out.bits_per_byte(loss)
    return {"validation_loss": loss} | ({} if bits is None else {"bits_per_byte": bits})


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
        mesh = sharding.make_mesh(config.mesh.sizes)
        trainer = Trainer(config, optimizer, mesh, config.data.vocabulary)
    except ValueError:
        mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
        trainer = Trainer(config, optimizer, mesh, config.data.vocabulary)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(trainer.abstract)
    if restored is None:
        raise RunError(f"{folder} has no checkpoint yet. Wait for its first save.")
    path, tokenizer = folder / TOKENIZER, None
    if path.exists():
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text())
    return Loaded(config, optimizer, trainer, restored.state, tokenizer)
