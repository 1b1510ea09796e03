"""One run: from its folder's newest checkpoint, or from the start, to its last step."""

import abc
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from experiments.language.checkpoints import Checkpoints
from experiments.language.log import Log
from experiments.language.processes import Agreement
from experiments.runs import RunError

Metrics = dict[str, Any]


class TrainingError(RunError):
    """A run that cannot go on; the message says why and what to do."""

    exit_code = 1


class Progress(NamedTuple):
    """What a run shows of itself; `held_out` is what `TrainingLoop.evaluate` shows."""

    step: int
    loss: float
    held_out: float | None
    tokens_per_second: float | None


OnStep = Callable[[Progress], None]
OnMessage = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Keeping:
    """How a run is kept and watched, which changes nothing of what it trains."""

    save_every: int = 100
    """Steps from one checkpoint to the next."""
    keep: int = 3
    """Checkpoints that are kept."""
    evaluate_every: int = 50
    """Steps from one evaluation to the next."""
    evaluation_tokens: int = 32_768
    """Held-out tokens that it is evaluated on, always the same."""
    log_every: int = 10
    """Steps from one record of metrics.jsonl to the next."""
    profile: tuple[int, int] | None = None
    """First step that the profiler watches, and the first that it does not."""

    def __post_init__(self) -> None:
        for name in ("save_every", "keep", "evaluate_every", "evaluation_tokens", "log_every"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is at least 1, got {getattr(self, name)}.")
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(f"--profile is FIRST END with FIRST < END, got {self.profile}.")


class TrainingLoop(abc.ABC):
    """Trains, evaluates, logs and saves; what a study has of its own are its methods.

    Args:
        trainer: has `config` (`steps`, `patience`, `tokens_per_step`), the `mesh`, the state as
            shapes with shardings, `abstract`, and `advance(state, batch) -> (state, metrics)`.
        keeping: what is saved, evaluated and logged when.
        folder: the run's, which this process has claimed.
        checkpoints: of the folder.
        stop: asks for an early end; with several processes, that of any of them.
        on_step, on_message: called as it goes.

    Attributes:
        first: whether this process is the one that writes.
        log: of the process that writes; None in others.
        seconds: of training alone, over all parts of the run.
    """

    def __init__(
        self,
        trainer: Any,
        keeping: Keeping,
        folder: epath.Path,
        checkpoints: Checkpoints,
        stop: threading.Event,
        on_step: OnStep,
        on_message: OnMessage,
    ):
        self.trainer, self.config, self.keeping = trainer, trainer.config, keeping
        self.folder, self.checkpoints, self.stop = folder, checkpoints, stop
        self.on_step, self.on_message = on_step, on_message
        self.first = jax.process_index() == 0

    @abc.abstractmethod
    def start(self) -> Any:
        """The state before the first step."""

    @abc.abstractmethod
    def batches(self, step: int) -> Iterator[Any]:
        """What `trainer.advance` takes, from a step on."""

    @abc.abstractmethod
    def evaluate(self, state: Any) -> tuple[Metrics, float]:
        """What is logged of the held-out text, and which figure of it is shown."""

    @abc.abstractmethod
    def meta(self, step: int) -> dict[str, Any]:
        """What is saved beside the state of that step; the seals of the log have its `config`."""

    @abc.abstractmethod
    def check(self, meta: dict[str, Any]) -> None:
        """Raises ValueError where a checkpoint is of another training."""

    @abc.abstractmethod
    def finish(self, state: Any) -> None:
        """Called once after the last step is saved."""

    def told(self, window: list[Metrics]) -> Metrics:
        """What is logged of the steps since the last record; by default of the last one."""
        return window[-1]

    def rates(self, seconds: float) -> dict[str, float]:
        """What is logged of a step that takes so long, beside tokens a second."""
        return {}

    def to_the_end(self) -> bool:
        """Trains to the end, or until `stop` is set; then the state of the last step is saved.

        Returns:
            Whether the run is finished.

        Raises:
            TrainingError: too many steps in a row without a finite loss.
            ValueError: the checkpoints are of another training.
            OSError: a checkpoint could not be written; those before are whole.
        """
        keeping, steps = self.keeping, self.config.steps
        state = self._begin()
        step = int(state.step)
        # At the start nothing is kept: all of it comes again.
        config = self.meta(step).get("config")
        self.log = Log(self.folder, step or -1, config) if self.first else None
        for damage in self.log.damage if self.log else ():
            self.on_message(f"[yellow]metrics.jsonl is damaged:[/yellow] {damage}")
        trains = step < steps
        if not trains and (self.folder / "summary.json").exists():
            if self.log:
                self.log.close()
            return True  # it was finished before
        trained = [r for r in self.log.records if "loss" in r] if self.log else []
        self.seconds = trained[-1]["seconds"] if trained else 0.0
        self._shown: float | None = None
        self._window: list[Metrics] = []
        agreement = Agreement(self.trainer.mesh)
        batches = self.batches(step)
        since, saved, stopping = (step, time.perf_counter()), step, False
        metrics: Metrics | None = None
        try:
            if step == 0:
                self._evaluate(state)
            while step < steps and not stopping:
                self._profile(step)
                state, newest = self.trainer.advance(state, next(batches))
                # The step before this one is read while this one runs.
                self._refuse_to_diverge(metrics)
                metrics, step = newest, step + 1
                self._window.append(newest)
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(state)  # collectives of two steps at once deadlock there
                stopping = agreement.any(self.stop.is_set())
                if step % keeping.log_every == 0 or step == steps or stopping:
                    since = self._tell(step, since)
                if step % keeping.evaluate_every == 0 or step == steps:
                    self._evaluate(state)
                    since = step, time.perf_counter()
                if step % keeping.save_every == 0 or step == steps or stopping:
                    self._refuse_to_diverge(metrics)
                    self._save(state, step)
                    saved, since = step, (step, time.perf_counter())
            self.checkpoints.wait()
            finished = step == steps
            if finished:
                if not trains:  # else the records are of this part
                    self._check_log()
                self.finish(state)
            return finished
        except OSError as error:
            raise OSError(
                f"{error}. The checkpoint of step {saved} or the one before is whole"
            ) from error
        finally:
            if self.log:
                self.log.close()

    def _begin(self) -> Any:
        restored = self.checkpoints.restore(self.trainer.abstract)
        if restored is None:
            return self.start()
        for damage in restored.damaged:
            self.on_message(f"[yellow]passed over a damaged checkpoint:[/yellow] {damage}")
        self.check(restored.meta)
        self.on_message(f"going on from step {restored.step}")
        return restored.state

    def _check_log(self) -> None:
        """Raises a TrainingError where the log has lost what a summary tells."""
        for key in ("loss", "validation_loss"):
            if self.log and not any(key in record for record in self.log.records):
                raise TrainingError(
                    f"{self.folder / 'metrics.jsonl'} has lost its records of {key}, so that no "
                    "summary can be made. Bring it back from a copy, or train in another folder; "
                    "the checkpoints are whole."
                )

    def _refuse_to_diverge(self, metrics: Metrics | None) -> None:
        patience = self.config.patience
        if metrics is not None and int(metrics["nonfinite_in_a_row"]) >= patience:
            raise TrainingError(
                f"{patience} steps in a row had no finite loss and gradient; they changed nothing. "
                "Look at the text they read, or lower the learning rates; the checkpoints are from "
                "before or are as good."
            )

    def _tell(self, step: int, since: tuple[int, float]) -> tuple[int, float]:
        found = self.told(jax.device_get(self._window))
        self._window = []
        now = time.perf_counter()
        steps, seconds = step - since[0], now - since[1]
        self.seconds += seconds
        speed = steps * self.config.tokens_per_step / seconds if steps else None
        if self.log:
            values = jax.tree.map(lambda x: x.tolist(), found) | {"seconds": self.seconds}
            if speed is not None:
                values |= {"tokens_per_second": speed} | self.rates(seconds / steps)
            self.log.add(step, **values)
        self.on_step(Progress(step, float(found["loss"]), self._shown, speed))
        return step, now

    def _evaluate(self, state: Any) -> None:
        values, self._shown = self.evaluate(state)
        if self.log:
            self.log.add(int(state.step), **values)

    def _save(self, state: Any, step: int) -> None:
        if self.log:
            self.log.flush()
        self.checkpoints.save(step, state, self.meta(step))

    def _profile(self, step: int) -> None:
        begin, end = self.keeping.profile or (None, None)
        if step == begin:
            jax.profiler.start_trace(str(self.folder / "profile"))
        elif step == end:
            jax.profiler.stop_trace()


def speed(log: Log, tokens_per_step: int) -> float | None:
    """Tokens a second of a run, without its first record, whose steps compile."""
    trained = [r for r in log.records if "loss" in r]
    steps = trained[-1]["step"] - trained[0]["step"]
    seconds = trained[-1]["seconds"] - trained[0]["seconds"]
    return steps * tokens_per_step / seconds if steps else None
