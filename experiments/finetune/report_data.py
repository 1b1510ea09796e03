"""Reads fine-tunings for reports: runs' folders and suites' cells, as the same type."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.finetune.arms import ARMS
from experiments.finetune.claims import mean
from experiments.finetune.config import ArmName, Training
from experiments.finetune.loop import steadiness
from experiments.report import records
from experiments.report.figures import optimizer_label
from experiments.report.series import Series, array, series
from experiments.runs import RunError, holds_run, with_defaults
from experiments.spikes import spikes

EARLY, LATE = 0.25, 0.75  # fractions of the steps: end of "early", beginning of "late"
_GROUPED = ("gradient_norms", "update_rms")
_HELD_OUT = ("validation_loss", "validation_accuracy")
_EVALUATED = (*_HELD_OUT, "pretraining_loss")


class Trained(NamedTuple):
    """One training of one arm, which may be unfinished."""

    arm: ArmName
    seed: int
    # By name; those of a group of params are "gradient_norms/GROUP" and "update_rms/GROUP".
    series: dict[str, Series]
    steps: int  # of the whole training
    warmup: int
    noisy: bool  # whether each accuracy is of a single step, not a mean of several

    @property
    def done(self) -> int:
        """The number of steps done, according to the records."""
        return int(max((steps[-1] for steps, _ in self.series.values() if len(steps)), default=0))

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    def last(self, name: str) -> float:
        """Returns the newest value of a series; NaN if it is empty."""
        _, values = self.series[name]
        return float(values[-1]) if len(values) else math.nan

    @property
    def forgot(self) -> float:
        """How much the loss on the pretraining text has risen, NaN where it is not known."""
        steps, losses = self.series["pretraining_loss"]
        return float(losses[-1] - losses[0]) if len(steps) and not steps[0] else math.nan

    def steadiness(self) -> tuple[float | None, float | None]:
        """Returns median and relative spread of the gradient norm after warm-up."""
        steps, norms = self.series["gradient_norm"]
        return steadiness(norms[steps > self.warmup].tolist())

    def spikes(self) -> int:
        """Returns the number of steps with a spike of the gradient norm."""
        _, norms = self.series["gradient_norm"]
        return int(spikes(norms[np.isfinite(norms)].tolist())["spikes"])

    def values(self) -> dict[str, float]:
        """Returns the measures of the claims, by the keys of `claims.MEASURES`; NaN if unknown."""
        steps, accuracy = self.series["mean_token_accuracy"]
        _, spread = self.steadiness()
        early = {"early_accuracy": mean(accuracy[steps <= EARLY * self.steps])}
        late = {
            "late_accuracy": mean(accuracy[steps > LATE * self.steps]),
            "gradient_norm_spread": math.nan if spread is None else spread,
            **{name: self.last(name) for name in _HELD_OUT},
        }
        return early | (late if self.finished else dict.fromkeys(late, math.nan))


class Run(NamedTuple):
    """The run of one arm."""

    arm: ArmName
    records: records.Records
    trained: Trained

    @property
    def label(self) -> str:
        return optimizer_label(self.arm)

    @property
    def summary(self) -> dict[str, Any]:
        return self.records.summary

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the records; None without records."""
        found = [x for r in self.records.trained if (x := r.get("tokens_per_second"))]
        return float(np.median(found)) if found else None

    @property
    def skipped(self) -> int:
        """The number of skipped steps."""
        return self.records.trained[-1]["skipped"] if self.records.trained else 0


def load_run(folder: epath.Path) -> Run:
    """Reads the folder of one arm.

    Raises:
        RunError: If it contains no run.
        ValueError: If a file is damaged. The message names it.
    """
    found = records.read(folder)
    # Earlier versions left some settings out where they had their defaults.
    found = found._replace(settings=with_defaults(found.settings, Training().as_json()))
    try:
        arm, seed, steps, warmup = (found.settings[k] for k in ("arm", "seed", "steps", "warmup"))
        if arm not in ARMS:
            raise ValueError(f"unknown optimizer {arm!r}")
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not of a run of this study ({type(error).__name__}: "
            f"{error}). Give a folder that python -m experiments.finetune wrote with --out."
        ) from None
    trained = found.trained
    scalars = ("loss", "mean_token_accuracy", "gradient_norm", "max_logit")
    own = {name: series(trained, name) for name in scalars}
    for name in _GROUPED:
        for group in trained[-1][name] if trained else ():
            own[f"{name}/{group}"] = series(trained, name, group)
    own |= {name: series(found.evaluated, name) for name in _EVALUATED}
    return Run(arm, found, Trained(arm, seed, own, steps, warmup, noisy=True))


def found_arms(folder: epath.Path) -> tuple[ArmName, ...]:
    """Returns the arms whose runs are in sub-folders of a folder.

    Raises:
        RunError: If there are none.
    """
    found = tuple(name for name in ARMS if holds_run(folder / name))
    if not found:
        raise RunError(
            f"{folder} holds no run: no optimizer's folder in it ({', '.join(ARMS)}) has a "
            "config.json."
        )
    return found


def of_cell(
    arm: ArmName, seed: int, history: Sequence[Mapping[str, Any]], steps: int, warmup: int
) -> Trained:
    """Returns the training of a suite's cell from the evaluations in its log."""
    after = [e for e in history if e["step"]]
    every = np.arange(1, 1 + sum(len(e["losses"]) for e in after))
    own = {name: series(history, name) for name in _EVALUATED}
    own |= {name: series(after, name) for name in ("mean_token_accuracy", "max_logit")}
    own["loss"] = every, array(x for e in after for x in e["losses"])
    own["gradient_norm"] = every, array(x for e in after for x in e["gradient_norms"])
    for group in after[0]["group_norms"] if after else ():
        norms = array(x for e in after for x in e["group_norms"][group])
        own[f"gradient_norms/{group}"] = every, norms
        own[f"update_rms/{group}"] = series(after, "update_rms", group)
    return Trained(arm, seed, own, steps, warmup, noisy=False)


def idle_clip(trainings: Iterable[Trained], optimizer: Mapping[str, Any]) -> list[str]:
    """Returns a sentence if MuonClip never clipped, given the settings of `config.Optimizer`."""
    clipped = (of.series["max_logit"][1] for of in trainings if of.arm == "muonclip")
    largest = max((x for logits in clipped for x in logits if math.isfinite(x)), default=math.inf)
    threshold = optimizer["clip_threshold"]
    if "no_clip" in optimizer["quirks"] or largest > threshold:
        return []
    return [
        f"MuonClip never clips here: the largest attention logit is {largest:.3g}, and its "
        f"threshold {threshold:g}."
    ]
