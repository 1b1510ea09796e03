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
from experiments.language.processes import Agreement, check_same
from experiments.language.rollback import Watch
from experiments.language.trainer import Metrics, Trainer
from experiments.log import Log
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
        on_message: Callable[[str], None] = lambda text: None,
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
        config, (trained, evaluated) = self.config, self._summarised()
        summary = {
            "steps": config.steps,
            "tokens": config.steps * config.tokens_per_step,
            "train_loss": trained["loss"],
            "validation_loss": evaluated["validation_loss"],
            "skipped_steps": trained["skipped"],
            **self._watch.summary(),
            "seconds": self.seconds,
            "tokens_per_second": trained["step"] * config.tokens_per_step / trained["seconds"],
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
        keeping, steps = self.keeping, self.config.steps
        if keeping.profile and keeping.profile[0] >= steps:
            raise ValueError(
                f"--profile FIRST must be less than --steps {steps}; got {keeping.profile[0]}. "
                "Give an earlier step."
            )
        folder = self.folder / "checkpoints"
        self.checkpoints = Checkpoints(folder, keep=keeping.max_checkpoints)
        with contextlib.closing(self.checkpoints):
            when = {f.name: getattr(keeping, f.name) for f in dataclasses.fields(Keeping)}
            check_same(flat(self.meta(0) | when))
            self._begin()
            try:
                if self._step == steps and (self.folder / "summary.json").exists():
                    return True  # it was finished before
                self._train()
                self.checkpoints.wait()
                if self._step == steps:
                    self._summarised()  # before more is written
                    self.finish(self._state)
                return self._step == steps
            except OSError as error:
                raise OSError(
                    f"{error}. The checkpoint of step {self._saved} or the one before it is "
                    "complete"
                ) from error
            finally:
                if self.log:
                    self.log.close()

    def _begin(self) -> None:
        restored = self._restore()
        self._watch = Watch(self.config.rollback, restored and restored.meta.get("rollback"))
        if restored:
            for damage in restored.damaged:
                self.on_message(f"[yellow]skipped a damaged checkpoint:[/yellow] {damage}")
            there, here = (meta.get("data_sha256") for meta in (restored.meta, self.meta(0)))
            if there != here:
                raise ValueError(
                    f"The checkpoints in {self.folder} were trained on other data (digest "
                    f"{there[:12]}…; that of this command is {here[:12]}…). Give the same --data "
                    "and --context, or another --out."
                )
            self.on_message(f"continuing from step {restored.step}")
        self._shown: float | None = None
        self._continue(restored)
        trained = [record for record in self.log.records if "loss" in record] if self.log else []
        self._clock = Clock(trained[-1]["seconds"] if trained else 0.0)
        self._told = self._step, self.seconds

    def _restore(self, step: int | None = None) -> Restored | None:
        restored = self.checkpoints.restore(self.kept(self.trainer.abstract), step=step)
        return restored and restored._replace(state=self.completed(restored.state))

    def _continue(self, restored: Restored | None) -> None:
        """Continues from a checkpoint, or from the start, with the log until its step."""
        self._state = restored.state if restored else self.start()
        self._step = self._saved = restored.step if restored else 0
        self._batches = self.batches(self._step + self._watch.left_out)
        self._window: list[Metrics] = []
        self._unjudged: Metrics | None = None
        config = self.meta(self._step).get("config")
        # A run that starts computes all records, that of step 0 as well.
        self.log = Log(self.folder, self._step or -1, config) if self.first else None
        for damage in self.log.damage if self.log else ():
            self.on_message(f"[yellow]metrics.jsonl is damaged:[/yellow] {damage}")

    def _train(self) -> None:
        """Trains to the last step, or until a process is asked to stop."""
        keeping, steps = self.keeping, self.config.steps
        agreement = Agreement(self.trainer.mesh)
        stopping = False
        if keeping.profile and self._step >= keeping.profile[1]:
            self.on_message(f"--profile has no effect: the run is already at step {self._step}")
        with contextlib.closing(Profiler(keeping.profile, self.folder / "profile")) as profiler:
            self.trainer.program  # noqa: B018 - compiles now, before the clock runs
            self._clock.go()
            while self._step < steps and not stopping:
                if self._step == 0:
                    with self._clock.standing():
                        self._evaluate()
                look = looks(self._step + 1, keeping.log_every)
                if look:
                    with self._clock.standing():
                        self.trainer.looking  # noqa: B018 - compiles the first time
                profiler.before(self._step)
                self._state, newest = self.trainer.advance(
                    self._state, next(self._batches), look=look
                )
                # Reads the metrics of the previous step while this one runs.
                if self._must_go_back():
                    self._go_back()
                    continue
                self._step, self._unjudged = self._step + 1, newest
                self._window.append(newest)
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(self._state)  # collectives of two steps deadlock there
                stopping = agreement.any(self.stop.is_set())
                is_last = self._step == steps
                saves = is_last or stopping or self._step % keeping.save_every == 0
                evaluates = is_last or self._step % keeping.evaluate_every == 0
                # Logs before each checkpoint, so that a resumed run logs the same records.
                if saves or self._step % keeping.log_every == 0:
                    self._tell()
                if saves or evaluates:
                    jax.block_until_ready(newest)
                    with self._clock.standing():
                        self._evaluate_and_save(evaluates, saves)
            jax.block_until_ready(self._state)
            self._clock.stand()

    def _evaluate_and_save(self, evaluates: bool, saves: bool) -> None:
        goes_back = self._must_go_back()
        if not goes_back:
            held_out = self._evaluate(log=evaluates)
            goes_back = saves and self._watch.loses(held_out)
        if goes_back:
            self._go_back()
        elif saves:
            self._save(held_out)

    def _must_go_back(self) -> bool:
        """Judges the newest step, once. Without a rule to go back, a bad step raises an error."""
        metrics, self._unjudged = self._unjudged, None
        if metrics is None:
            return False
        is_finite = np.isfinite([float(rms) for rms in metrics["update_rms"].values()]).all()
        if self._watch.judge(float(metrics["loss"]), is_lost=not is_finite):
            return True
        most = self.config.max_nonfinite_steps
        if int(metrics["nonfinite_in_a_row"]) >= most:
            raise TrainingError(
                f"{most} consecutive steps had NaN or Inf in their loss or gradient, and were "
                f"skipped. Check the training data, or {self._advice()}"
            )
        # The guard checks the loss and gradient only. To check the update as well, it would have to
        # keep the old params in memory. Instead, params with a bad update are discarded here. If
        # the update's root mean square is finite, so are the update and the params.
        if not is_finite:
            raise TrainingError(
                "The update contains NaN or Inf; parameters were discarded, not saved. To "
                f"continue, {self._advice()}"
            )
        return False

    def _go_back(self) -> None:
        """Continues from the rule's checkpoint, without the batches from there to this step."""
        with self._clock.standing():
            self.checkpoints.wait()
            # There may be no room for two states.
            for leaf in jax.tree.leaves(jax.block_until_ready(self._state)):
                leaf.delete()
            self._watch.go_back(self._step, self.on_message, self._advice())
            target = self._watch.target or 0
            self.checkpoints.remove_later(target)
            if self.log:
                self.log.close()
            self._continue(self._restore(target) if target else None)
            self._told = self._step, self.seconds

    def _summarised(self) -> list[Metrics]:
        """Returns the last record with a loss and that with a held-out loss, for the summary."""
        found = []
        for key in ("loss", "validation_loss") if self.log else ():
            record = next((r for r in reversed(self.log.records) if key in r), None)
            if record is None:
                raise TrainingError(
                    f"{self.folder / 'metrics.jsonl'} has no records of {key}, so the summary "
                    "cannot be written. Restore the file from a backup, or train in another "
                    "folder. The checkpoints are complete."
                )
            found.append(record)
        return found

    def _advice(self) -> str:
        step = self._saved
        saved = f"The checkpoint of step {step} is valid" if step else "No checkpoint was saved"
        return f"{self.remedy()}. {saved}; other settings require another --out."

    def _tell(self) -> None:
        metrics = self.told(jax.device_get(self._window))
        self._window = []
        steps, seconds = self._step - self._told[0], self.seconds - self._told[1]
        self._told = self._step, self.seconds
        speed = steps * self.config.tokens_per_step / seconds
        if self.log:
            values = jax.tree.map(lambda x: x.tolist(), metrics)
            values |= {"seconds": self.seconds, "tokens_per_second": speed}
            values |= self._watch.record()
            self.log.add(self._step, **values | self.rates(seconds / steps))
        self.on_step(Progress(self._step, float(metrics["loss"]), self._shown, speed))

    def _evaluate(self, log: bool = True) -> float:
        """Evaluates and logs; returns the value to show."""
        values, shown = self.evaluate(self._state)
        if log:
            self._shown = shown
            if self.log:
                self.log.add(self._step, **values)
        return shown

    def _save(self, held_out: float) -> None:
        step = self._step
        if not math.isfinite(held_out):
            raise TrainingError(
                f"The held-out loss after step {step} is NaN or Inf; parameters were discarded, "
                f"not saved. To continue, {self._advice()}"
            )
        if self.log:
            self.log.flush()
        periodic = step % self.keeping.save_every == 0
        meta = self.meta(step) | self._watch.saves(step, periodic)
        self.checkpoints.save(step, self.kept(self._state), meta, spare=self._watch.target)
        self._saved = step
