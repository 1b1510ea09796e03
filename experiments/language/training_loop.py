"""One run: from its folder's newest checkpoint, or from the start, to its last step."""

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
    """Steps between records in metrics.jsonl."""
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
                "--profile must be FIRST END, steps from 0 on with FIRST < END; got "
                f"{self.profile[0]} {self.profile[1]}."
            )


class TrainingLoop(abc.ABC):
    """Trains, evaluates, logs and saves; what a study has of its own are its methods.

    Args:
        trainer: its `config` has `steps`, `max_nonfinite_steps`, `rollback` and
            `tokens_per_step`, too.
        keeping: what is saved, evaluated and logged when.
        folder: the run's, which this process has claimed.
        stop: asks for an early end; with several processes, that of any of them.
        on_step, on_message: called as it goes.

    Attributes:
        first: whether this process is the one that writes.
        log: of the process that writes; None in others.
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
        """The state before the first step."""

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
        """What is logged of the held-out text, and which figure of it is shown."""

    @abc.abstractmethod
    def meta(self, step: int) -> dict[str, Any]:
        """What is saved beside the state of that step; the seals of the log have its `config`.

        A checkpoint with another `data_sha256` is of another training.
        """

    @abc.abstractmethod
    def remedy(self) -> str:
        """What to change where an update is not finite: options, and their values now."""

    def summary(self, trained: Metrics, evaluated: Metrics) -> Metrics:
        """What `summary.json` has, by the last records of training and of held-out text."""
        return {}

    def finish(self, state: Any) -> None:
        """Called once after the last step is saved; writes `summary.json`."""
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
        """What is logged of the steps since the last record; by default of the last one."""
        return window[-1]

    def rates(self, seconds: float) -> dict[str, float]:
        """What is logged of a step that takes so long, beside tokens per second."""
        return {}

    @property
    def seconds(self) -> float:
        """Of training alone, over all parts of the run."""
        return self._clock.seconds

    def to_the_end(self) -> bool:
        """Trains to the end, or until `stop` is set; then the state of the last step is saved.

        What is saved has finite params and a finite held-out loss, so that no good checkpoint ever
        makes room for one that is not.

        Returns:
            Whether the run is finished.

        Raises:
            TrainingError: too many steps in a row without a finite loss, or params that are lost.
            ValueError: the checkpoints are of another training.
            OSError: a checkpoint could not be written; those before are whole.
        """
        keep = self.keeping.max_checkpoints
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=keep)
        with contextlib.closing(self.checkpoints):
            return self._to_the_end()

    def _to_the_end(self) -> bool:
        keeping, steps = self.keeping, self.config.steps
        if keeping.profile and keeping.profile[0] >= steps:
            raise ValueError(
                f"--profile starts at step {keeping.profile[0]}, but the last one of --steps "
                f"{steps} is {steps - 1}. Give an earlier FIRST."
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
                # The step before this one is read while this one runs.
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
                # What is saved is told, so that what comes after a restart is told as it was.
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
                if not trains:  # else the records are of this part
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
                f"The checkpoints in {self.folder} were trained on other data: the digest was "
                f"{there[:12]}…, now it is {here[:12]}…. Give the same --data and --context, or "
                "another --out."
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
        """Raises a TrainingError where the log has lost what a summary tells."""
        for key in ("loss", "validation_loss"):
            if self.log and not any(key in record for record in self.log.records):
                raise TrainingError(
                    f"{self.folder / 'metrics.jsonl'} has lost its records of {key}, so no "
                    "summary can be made. Restore it from a backup, or train in another folder; "
                    "the checkpoints are complete."
                )

    def _refuse_to_diverge(self, metrics: Metrics) -> None:
        most = self.config.max_nonfinite_steps
        if int(metrics["nonfinite_in_a_row"]) >= most:
            raise TrainingError(
                f"{most} consecutive steps had NaN or Inf in their loss or gradient, and were "
                f"skipped. Check the training data, or {self.remedy()}. {self._what_is_safe()}"
            )
        # The guard knows loss and gradient. To judge the update too it would have to hold the old
        # params beside the new; so these are given up, and are not saved. An update whose root mean
        # square is finite is itself, and so are the params that it is added to.
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
        """The figure that is shown."""
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
    """Tokens a second of a run, over all its steps."""
    last = next((r for r in reversed(log.records) if "loss" in r), None)
    return last["step"] * tokens_per_step / last["seconds"] if last else None
