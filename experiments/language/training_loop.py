"""The training loop of a run, from the newest checkpoint or the start to the last step."""

import abc
import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from experiments.language.checkpoints import Checkpoints, Restored, params_sha256
from experiments.language.clocks import Clock, Profiler, looks
from experiments.language.log import Log
from experiments.language.processes import Agreement, check_same
from experiments.language.rollback import Watch
from experiments.language.trainer import Metrics, Trainer
from experiments.runs import RunError, flat, machine, write_json
from experiments.settings import Count, Positive, check


class TrainingError(RunError):
    """Raised if a run cannot continue. The message has the reason and the remedy."""

    exit_code = 1


class Progress(NamedTuple):
    """The progress of a run; `held_out` is the value that `TrainingLoop.evaluate` shows."""

    step: int
    loss: float
    held_out: float | None
    tokens_per_second: float | None


OnStep = Callable[[Progress], None]
OnMessage = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Settings of checkpoints, evaluations and logs, which do not affect the training."""

    save_every: Count = 100
    """Number of steps between checkpoints."""
    max_checkpoints: Count = 3
    """Number of checkpoints to keep; older ones are deleted."""
    evaluate_every: Count = 50
    """Number of steps between evaluations."""
    evaluation_tokens: Count = 32_768
    """Number of held-out tokens to evaluate on, the same ones every time."""
    log_every: Count = 10
    """Number of steps between records in metrics.jsonl."""
    hours: Positive | None = None
    """Hours after which the command saves and exits with status 75, so that a queue can start it
    again; the same command continues from there. Leave some minutes of the queue's limit for the
    step at hand, its evaluation and its checkpoint. By default it trains to the end."""
    profile: tuple[int, int] | None = None
    """Steps to profile, as FIRST END: from FIRST to the step before END. By default none."""

    def __post_init__(self) -> None:
        check(self)
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(
                "--profile must be FIRST END with 0 <= FIRST < END; got "
                f"{self.profile[0]} {self.profile[1]}."
            )


class TrainingLoop(abc.ABC):
    """Trains, evaluates, logs and saves. Each study implements the abstract methods.

    Args:
        trainer: its `config` has `steps`, `max_nonfinite_steps`, `rollback` and
            `tokens_per_step`, too.
        keeping: The settings of checkpoints, evaluations and logs.
        folder: The run's folder, which this process has claimed.
        stop: Set, in any process, to request an early end.
        on_step, on_message: Called during training with progress and messages.

    Attributes:
        first: Whether this is the process that writes.
        log: The log, in the process that writes; None in others.
    """

    def __init__(
        self,
        trainer: Trainer,
        keeping: Keeping,
        folder: epath.Path,
        stop: threading.Event,
        on_step: OnStep = lambda progress: None,
        on_message: OnMessage = lambda text: None,
    ):
        self.trainer, self.config, self.keeping = trainer, trainer.config, keeping
        self.folder, self.stop = folder, stop
        self.on_step, self.on_message = on_step, on_message
        self.first = jax.process_index() == 0

    @abc.abstractmethod
    def start(self) -> Any:
        """Returns the state before the first step."""

    def kept(self, state: Any) -> Any:
        """What a checkpoint has of a state; by default all."""
        return state

    def completed(self, state: Any) -> Any:
        """The state of which `kept` has kept a part."""
        return state

    @abc.abstractmethod
    def batches(self, step: int) -> Iterator[Any]:
        """What `trainer.advance` takes, from the batch of that number on, without an end."""

    @abc.abstractmethod
    def evaluate(self, state: Any) -> tuple[Metrics, float]:
        """Returns the held-out metrics to log, and the one to show."""

    @abc.abstractmethod
    def meta(self, step: int) -> dict[str, Any]:
        """Returns the JSON to save beside the state of a step; the log's seals have its `config`.

        A checkpoint with another `data_sha256` belongs to another training.
        """

    @abc.abstractmethod
    def remedy(self) -> str:
        """Returns advice on what to change if an update is not finite, with current values."""

    def summary(self, trained: Metrics, evaluated: Metrics) -> Metrics:
        """Returns more values for `summary.json`, from the last training and held-out records."""
        return {}

    def finish(self, state: Any) -> None:
        """Writes `summary.json`. It is called once, after the last step is saved."""
        digest = params_sha256(state.params)
        if self.log is None:
            return
        trained, evaluated = (
            next(record for record in reversed(self.log.records) if key in record)
            for key in ("loss", "validation_loss")
        )
        config = self.config
        summary = {
            "steps": config.steps,
            "tokens": config.steps * config.tokens_per_step,
            "train_loss": trained["loss"],
            "validation_loss": evaluated["validation_loss"],
            "skipped_steps": trained["skipped"],
            **self._watch.summary(),
            "seconds": self.seconds,
            "tokens_per_second": speed(self.log, config.tokens_per_step),
            "params_sha256": digest,
            "machine": machine(),
        }
        write_json(self.folder / "summary.json", summary | self.summary(trained, evaluated))

    def told(self, window: list[Metrics]) -> Metrics:
        """Returns the metrics to log for the steps since the last record, by default the last's."""
        return window[-1]

    def rates(self, seconds: float) -> dict[str, float]:
        """Returns rates to log beside tokens per second, for steps of this duration."""
        return {}

    @property
    def seconds(self) -> float:
        """Seconds of training alone, over all parts of the run."""
        return self._clock.seconds

    def to_the_end(self) -> bool:
        """Trains to the last step, or until `stop` is set, and saves the state.

        Only states with finite params and a finite held-out loss are saved, so that no good
        checkpoint is replaced by a bad one.

        Returns:
            Whether the run is finished.

        Raises:
            TrainingError: If too many consecutive steps have NaN or Inf in their loss or gradient,
                or the params or the held-out loss are not finite.
            ValueError: If the checkpoints are of another training.
            OSError: If a checkpoint could not be written. Earlier ones are complete.
        """
        keep = self.keeping.max_checkpoints
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=keep)
        with contextlib.closing(self.checkpoints):
            return self._to_the_end()

    def _to_the_end(self) -> bool:
        keeping, steps = self.keeping, self.config.steps
        if keeping.profile and keeping.profile[0] >= steps:
            raise ValueError(
                f"--profile FIRST must be less than --steps {steps}; got {keeping.profile[0]}. "
                "Give an earlier step."
            )
        when = {f.name: getattr(keeping, f.name) for f in dataclasses.fields(Keeping)}
        check_same(flat(self.meta(0) | when))
        state = self._begin()
        step = self._saved = int(state.step)
        self._open_log(step)
        trains = step < steps
        if not trains and (self.folder / "summary.json").exists():
            if self.log:
                self.log.close()
            return True  # it was finished before
        trained = [r for r in self.log.records if "loss" in r] if self.log else []
        self._clock = Clock(trained[-1]["seconds"] if trained else 0.0)
        self._told = step, self.seconds
        self._shown: float | None = None
        self._window: list[Metrics] = []
        self._judged = step
        agreement = Agreement(self.trainer.mesh)
        batches = self.batches(step + self._watch.left_out)
        profiler = Profiler(keeping.profile, self.folder / "profile")
        if keeping.profile and step >= keeping.profile[1]:
            self.on_message(f"--profile has no effect: the run is already at step {step}")
        stopping = looked = False
        metrics: Metrics | None = None
        try:
            self.trainer.program  # noqa: B018 - compiles now, before the clock runs
            if step == 0:
                self._evaluate(state)
            self._clock.go()
            while step < steps and not stopping:
                look = looks(step + 1, keeping.log_every)
                if look and not looked:
                    self._clock.stand()
                    self.trainer.looking  # noqa: B018 - compiles now, if that is another program
                    self._clock.go()
                    looked = True
                profiler.before(step)
                state, newest = self.trainer.advance(state, next(batches), look=look)
                # Reads the metrics of the previous step while this one runs.
                if self._is_to_go_back(metrics, step):
                    state, step, batches = self._go_back(state, step)
                    metrics = None
                    continue
                metrics, step = newest, step + 1
                self._window.append(newest)
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(state)  # collectives of two steps at once deadlock there
                stopping = agreement.any(self.stop.is_set())
                saves = step % keeping.save_every == 0 or step == steps or stopping
                # Logs before each checkpoint, so that a resumed run logs the same records.
                if step % keeping.log_every == 0 or saves:
                    self._tell(step)
                evaluates = step % keeping.evaluate_every == 0 or step == steps
                if evaluates or saves:
                    jax.block_until_ready(metrics)
                    self._clock.stand()
                    goes_back = self._is_to_go_back(metrics, step)
                    if not goes_back:
                        held_out = self._evaluate(state, log=evaluates)
                        goes_back = saves and self._watch.loses(held_out)
                    if goes_back:
                        state, step, batches = self._go_back(state, step)
                        metrics = None
                    elif saves:
                        self._save(state, step, held_out)
                    self._clock.go()
            profiler.stop(wait_for=state)
            self._clock.stand()
            self.checkpoints.wait()
            finished = step == steps
            if finished:
                if not trains:  # otherwise this process wrote the records
                    self._check_log()
                self.finish(state)
            return finished
        except OSError as error:
            raise OSError(
                f"{error}. The checkpoint of step {self._saved} or the one before it is complete"
            ) from error
        finally:
            profiler.stop()
            if self.log:
                self.log.close()

    def _restore(self, step: int | None = None) -> Restored | None:
        """A checkpoint with its whole state, by default the newest one."""
        restored = self.checkpoints.restore(self.kept(self.trainer.abstract), step=step)
        return restored and restored._replace(state=self.completed(restored.state))

    def _begin(self) -> Any:
        restored = self._restore()
        told = restored.meta.get("rollback") if restored else None
        self._watch = Watch(self.config.rollback, told)
        self.checkpoints.spared = self._watch.target
        if restored is None:
            return self.start()
        for damage in restored.damaged:
            self.on_message(f"[yellow]skipped a damaged checkpoint:[/yellow] {damage}")
        there, here = (meta.get("data_sha256") for meta in (restored.meta, self.meta(0)))
        if there != here:
            raise ValueError(
                f"The checkpoints in {self.folder} were trained on other data (digest "
                f"{there[:12]}…; that of this command is {here[:12]}…). Give the same --data and "
                "--context, or another --out."
            )
        self.on_message(f"continuing from step {restored.step}")
        return restored.state

    def _open_log(self, step: int) -> None:
        """With the records until a step. At the start nothing is kept: all of it comes again."""
        config = self.meta(step).get("config")
        self.log = Log(self.folder, step or -1, config) if self.first else None
        for damage in self.log.damage if self.log else ():
            self.on_message(f"[yellow]metrics.jsonl is damaged:[/yellow] {damage}")

    def _is_to_go_back(self, metrics: Metrics | None, step: int) -> bool:
        """Judges a step, once; where that is not for the rule of `rollback`, it may raise."""
        if metrics is None or step <= self._judged:
            return False
        self._judged = step
        if self._watch.rule.above is not None:
            rms = [float(x) for x in metrics["update_rms"].values()]
            if self._watch.judge(float(metrics["loss"]), is_lost=not np.isfinite(rms).all()):
                return True
        self._refuse_to_diverge(metrics)
        return False

    def _go_back(self, state: Any, step: int) -> tuple[Any, int, Iterator[Any]]:
        """The state of the rule's checkpoint, its step, and batches behind those until `step`.

        The state at hand is deleted first: there may be no room for both.
        """
        self.checkpoints.wait()
        for leaf in jax.tree.leaves(jax.block_until_ready(state)):
            leaf.delete()
        self._watch.go_back(step, self.on_message, f"{self.remedy()}. {self._what_is_safe()}")
        step = self._saved = self._judged = self._watch.target or 0
        self.checkpoints.remove_later(step)
        restored = self._restore(step) if step else None
        state = restored.state if restored else self.start()
        if self.log:
            self.log.close()
        self._open_log(step)
        self._told, self._window = (step, self.seconds), []
        if step == 0:
            self._evaluate(state)
        return state, step, self.batches(step + self._watch.left_out)

    def _check_log(self) -> None:
        """Checks that the log has the records that the summary needs."""
        for key in ("loss", "validation_loss"):
            if self.log and not any(key in record for record in self.log.records):
                raise TrainingError(
                    f"{self.folder / 'metrics.jsonl'} has no records of {key}, so the summary "
                    "cannot be written. Restore the file from a backup, or train in another "
                    "folder. The checkpoints are complete."
                )

    def _refuse_to_diverge(self, metrics: Metrics) -> None:
        most = self.config.max_nonfinite_steps
        if int(metrics["nonfinite_in_a_row"]) >= most:
            raise TrainingError(
                f"{most} consecutive steps had NaN or Inf in their loss or gradient, and were "
                f"skipped. Check the training data, or {self.remedy()}. {self._what_is_safe()}"
            )
        # The guard checks the loss and gradient only. To check the update as well, it would have to
        # keep the old params in memory. Instead, params with a bad update are discarded here. If
        # the update's root mean square is finite, so are the update and the params.
        if not np.isfinite([float(x) for x in metrics["update_rms"].values()]).all():
            raise TrainingError(
                "The update contains NaN or Inf; parameters were discarded, not saved. To "
                f"continue, {self.remedy()}. {self._what_is_safe()}"
            )

    def _what_is_safe(self) -> str:
        saved = (
            f"The checkpoint of step {self._saved} is valid"
            if self._saved
            else "No checkpoint was saved"
        )
        return f"{saved}; other settings require another --out."

    def _tell(self, step: int) -> None:
        found = self.told(jax.device_get(self._window))
        self._window = []
        steps, seconds = step - self._told[0], self.seconds - self._told[1]
        self._told = step, self.seconds
        speed = steps * self.config.tokens_per_step / seconds
        if self.log:
            values = jax.tree.map(lambda x: x.tolist(), found)
            values |= {"seconds": self.seconds, "tokens_per_second": speed}
            values |= self._watch.record()
            self.log.add(step, **values | self.rates(seconds / steps))
        self.on_step(Progress(step, float(found["loss"]), self._shown, speed))

    def _evaluate(self, state: Any, log: bool = True) -> float:
        """Evaluates and logs; returns the value to show."""
        values, shown = self.evaluate(state)
        if log:
            self._shown = shown
            if self.log:
                self.log.add(int(state.step), **values)
        return shown

    def _save(self, state: Any, step: int, held_out: float) -> None:
        if not math.isfinite(held_out):
            raise TrainingError(
                f"The held-out loss after step {step} is NaN or Inf; parameters were discarded, "
                f"not saved. To continue, {self.remedy()}. {self._what_is_safe()}"
            )
        if self.log:
            self.log.flush()
        meta = self.meta(step)
        if self._watch.rule.above is not None:
            self._watch.saves(step, periodic=step % self.keeping.save_every == 0)
            self.checkpoints.spared = self._watch.target
            meta |= {"rollback": self._watch.as_json()}
        self.checkpoints.save(step, self.kept(state), meta)
        self._saved = step


def speed(log: Log, tokens_per_step: int) -> float | None:
    """Returns the tokens per second of a run, over all of its steps."""
    last = next((r for r in reversed(log.records) if "loss" in r), None)
    return last["step"] * tokens_per_step / last["seconds"] if last else None
