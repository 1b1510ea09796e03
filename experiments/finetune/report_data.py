"""Fine-tunings read back: a run's folder, or a suite's cell, as one kind of record."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.finetune.arms import ARMS
from experiments.finetune.config import ArmName
from experiments.finetune.loop import steadiness
from experiments.language import log
from experiments.runs import RunError, holds_run, known_settings, read_json

EARLY, LATE = 0.25, 0.75  # of the steps: until when, and from when on

Series = dict[str, tuple[np.ndarray, np.ndarray]]


class Trained(NamedTuple):
    """One training of one arm, which may be unfinished.

    Attributes:
        series: steps and values by name, NaN where one is not finite; of a group of params it is
            "gradient_norms/GROUP" and "update_rms/GROUP".
        steps: of the whole training.
        warmup: steps of it.
        noisy: whether an accuracy is of one step, and not a mean of several.
    """

    arm: ArmName
    seed: int
    series: Series
    steps: int
    warmup: int
    noisy: bool

    @property
    def done(self) -> int:
        """Steps that its records tell of."""
        return int(max((steps[-1] for steps, _ in self.series.values() if len(steps)), default=0))

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    def last(self, name: str) -> float:
        """The newest value, NaN without one."""
        _, values = self.series.get(name, _NOTHING)
        return float(values[-1]) if len(values) else math.nan

    def values(self) -> dict[str, float]:
        """What the claims are about, by the key of `claims.MEASURES`, NaN where it is not known."""
        whole = self.finished
        steps, accuracy = self.series.get("mean_token_accuracy", _NOTHING)
        early = accuracy[steps <= EARLY * self.steps]
        late = accuracy[steps > LATE * self.steps]
        norm_steps, norms = self.series.get("gradient_norm", _NOTHING)
        _, spread = steadiness([float(x) for x in norms[norm_steps > self.warmup]])
        return {
            "early_accuracy": _mean(early),
            "late_accuracy": _mean(late) if whole else math.nan,
            "gradient_norm_spread": math.nan if spread is None or not whole else spread,
            "validation_loss": self.last("validation_loss") if whole else math.nan,
            "validation_accuracy": self.last("validation_accuracy") if whole else math.nan,
        }


_NOTHING = (np.empty(0), np.empty(0))


class Run(NamedTuple):
    """The folder of one arm.

    Attributes:
        summary: empty until the run is finished.
        tokens_per_second: median of the records; None without one.
        skipped: steps that changed nothing.
        damage: what is wrong with its log, in words.
    """

    arm: ArmName
    settings: dict[str, Any]
    trained: Trained
    summary: dict[str, Any]
    tokens_per_second: float | None
    skipped: int
    damage: tuple[str, ...] = ()


def load_run(folder: epath.Path) -> Run:
    """Reads the folder of one arm.

    Raises:
        RunError: it holds no run.
        ValueError: a file is damaged; the message names it.
    """
    settings = known_settings(folder)
    try:
        arm, seed = settings["arm"], settings["seed"]
        steps, warmup = settings["steps"], settings["warmup"]
        if arm not in ARMS:
            raise ValueError(f"no arm is named {arm!r}")
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is of no run of this study ({type(error).__name__}: "
            f"{error}). Name the folder above the arms of python -m experiments.finetune."
        ) from None
    records, damage = log.read(folder)
    trained = [record for record in records if "loss" in record]
    evaluated = [record for record in records if "validation_loss" in record]
    series = {name: _series(trained, name) for name in _SCALARS}
    for name in _GROUPED:
        for group in trained[-1][name] if trained else ():
            series[f"{name}/{group}"] = _series(trained, name, group)
    series |= {name: _series(evaluated, name) for name in _HELD_OUT}
    rates = [record["tokens_per_second"] for record in trained if record.get("tokens_per_second")]
    summary = folder / "summary.json"
    return Run(
        arm,
        settings,
        Trained(arm, seed, series, steps, warmup, noisy=True),
        read_json(summary) if summary.exists() else {},
        float(np.median(rates)) if rates else None,
        trained[-1]["skipped"] if trained else 0,
        tuple(damage),
    )


_SCALARS = ("loss", "mean_token_accuracy", "gradient_norm", "max_logit")
_GROUPED = ("gradient_norms", "update_rms")
_HELD_OUT = ("validation_loss", "validation_accuracy")


def found_arms(folder: epath.Path) -> tuple[ArmName, ...]:
    """Whose runs a folder has, each in a folder of its own.

    Raises:
        RunError: none.
    """
    found = tuple(name for name in ARMS if holds_run(folder / name))
    if not found:
        raise RunError(
            f"{folder} holds no run: no folder of an arm in it ({', '.join(ARMS)}) has a "
            "config.json."
        )
    return found


def of_cell(
    arm: ArmName, seed: int, history: Sequence[Mapping[str, Any]], steps: int, warmup: int
) -> Trained:
    """From the evaluations of a suite's cell, as its log has them."""
    after = [e for e in history if e["step"]]
    every = np.arange(1, 1 + sum(len(e["losses"]) for e in after))
    series = {name: _series(history, name) for name in _HELD_OUT}
    series |= {name: _series(after, name) for name in ("mean_token_accuracy", "max_logit")}
    series["loss"] = every, _array(x for e in after for x in e["losses"])
    series["gradient_norm"] = every, _array(x for e in after for x in e["gradient_norms"])
    for group in after[0]["group_norms"] if after else ():
        norms = _array(x for e in after for x in e["group_norms"][group])
        series[f"gradient_norms/{group}"] = every, norms
        series[f"update_rms/{group}"] = _series(after, "update_rms", group)
    return Trained(arm, seed, series, steps, warmup, noisy=False)


def mean_series(trainings: Iterable[Trained], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all trainings have of a series, and the mean of their values there."""
    found = [of.series[name] for of in trainings if name in of.series]
    if not found:
        return _NOTHING
    rows = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in found]
    steps = sorted(set.intersection(*map(set, rows)))
    return np.array(steps), np.array([np.mean([row[step] for row in rows]) for step in steps])


def idle_clip(trainings: Iterable[Trained], optimizer: Mapping[str, Any]) -> str | None:
    """That MuonClip never clipped, where that is so.

    Args:
        trainings: of any arms.
        optimizer: settings of `config.Optimizer`.
    """
    logits = [of.series["max_logit"][1] for of in trainings if of.arm == "muonclip"]
    known = np.concatenate(logits or [_NOTHING[0]])
    known = known[np.isfinite(known)]
    if not len(known) or "no_clip" in optimizer["quirks"]:
        return None
    threshold = optimizer["clip_threshold"]
    if known.max() > threshold:
        return None
    return (
        f"MuonClip never clips here, as no attention logit comes to its threshold, {threshold:g}: "
        f"the largest is {known.max():.3g}."
    )


def differing(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of settings in which runs differ, other than the arm."""
    first, *others = ({k: v for k, v in own.items() if k != "arm"} for own in settings)
    names = dict.fromkeys(name for own in (first, *others) for name in own)
    return [name for name in names if any(own.get(name) != first.get(name) for own in others)]


def _series(records: Sequence[Mapping[str, Any]], *path: str) -> tuple[np.ndarray, np.ndarray]:
    def value(record: Any) -> float | None:
        for key in path:
            record = record.get(key) if record else None
        return record

    return np.array([record["step"] for record in records]), _array(map(value, records))


def _array(values: Iterable[float | None]) -> np.ndarray:
    return np.array([math.nan if x is None else x for x in values], float)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.mean(known)) if len(known) else math.nan
