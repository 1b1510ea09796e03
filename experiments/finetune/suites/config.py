"""What the suites train: variants of a fine-tuning, each with several arms."""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

from experiments.finetune.arms import AS_PUBLISHED
from experiments.finetune.config import ArmName, Base, QuirkName, Training
from experiments.settings import Count, Rule, check
from experiments.sweep import Sweep, check_sweep_seeds

SuiteName = Literal["as_published", "controlled", "mismatch", "qk"]

BASELINE: ArmName = "adamw"
CONTROLLED, PUBLISHED = "controlled", "as published"
PRETRAINED = {"adamw": "AdamW base", "muon": "Muon base"}  # by the optimizer that did
QK_NORM, NO_QK_NORM = "QK-norm", "no QK-norm"
UNCLIPPED, PROJECTIONS, GAINS = "no clip", "W_q and W_k clipped", "gains clipped"

# Which arms each quirk changes beside the others; SGD's params do not decay in any case.
_CONCERNS: dict[QuirkName, tuple[ArmName, ...]] = {
    "warmup_of_muonclip_alone": ("adamw", "muon_frozen1d", "muon_adamw"),
    "decay_apart": ("adamw", "muon_frozen1d", "muon_adamw"),
    "spectral_scale": ("muon_frozen1d", "muon_adamw"),
    "scale_in_root": ("muonclip",),
    "sgd_of_gains": ("muonclip",),
    "no_clip": ("muonclip",),
    "frozen_in_norm": ("muon_frozen1d",),
    "muon_of_tables": ("muon_frozen1d", "muon_adamw", "muonclip"),
}
_CLIPPED = Rule("above 0 and below 1, so that something is clipped", lambda value: 0 < value < 1)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A study of many small trainings; its folder keeps those that are finished."""

    suite: SuiteName | None = None
    """The released code's quirks; all arms on equal terms, with a sweep of learning rates; models
    pretrained by AdamW and by Muon; or QK-clip with QK-norm and without."""
    seeds: Count = 3
    """Of a suite: seeds at each arm's best rate, of the order of the rows."""
    sweep_seeds: Count = 1
    """Of a suite: how many of the seeds choose that rate."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Of a suite: which learning rates an arm is tried at."""
    clip_share: Annotated[float, _CLIPPED] = 0.5
    """Of --suite qk: the threshold, as a share of the model's largest attention logit."""

    def __post_init__(self) -> None:
        check(self)
        check_sweep_seeds(self.seeds, self.sweep_seeds)


class Cell(NamedTuple):
    """One training."""

    variant: str
    arm: ArmName
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.variant} · {self.arm} · rate {self.rate:g} · seed {self.seed}"


class Variant(NamedTuple):
    """What arms train in a suite, besides their rates.

    Attributes:
        base: the model; None is --model.
        training: without its number of steps.
        arms: in their order.
    """

    base: Base | None
    training: Training
    arms: tuple[ArmName, ...]


def variants(command: Any, which: SuiteName) -> dict[str, Variant]:
    """Those of a suite, by name.

    Args:
        command: a `Training` with `arms`, `base` and `model`.
        which: suite.

    Raises:
        ValueError: a `model` where the suite pretrains its own.
    """
    training, arms = command.training(), tuple(command.arms)
    base = None if command.model else command.base
    if which == "controlled":
        return {CONTROLLED: Variant(base, training, arms)}
    if which == "as_published":
        quirks = training.optimizer.quirks
        without = {
            f"without {quirk}": Variant(
                base,
                _with(training, quirks=tuple(other for other in quirks if other != quirk)),
                tuple(arm for arm in arms if arm in _CONCERNS[quirk]),
            )
            for quirk in quirks
        }
        without = {name: variant for name, variant in without.items() if variant.arms}
        return {PUBLISHED: Variant(base, training, arms)} | without
    if command.model:
        raise ValueError(
            f"--suite {which} pretrains the models that it compares; leave --model {command.model} "
            "out."
        )
    if which == "mismatch":
        return {
            name: Variant(dataclasses.replace(command.base, optimizer=optimizer), training, arms)
            for optimizer, name in PRETRAINED.items()
        }
    kinds: dict[str, tuple[Training, ArmName]] = {
        UNCLIPPED: (training, "muon_adamw"),
        PROJECTIONS: (_with(training, clip_projections=True), "muonclip"),
        GAINS: (training, "muonclip"),
    }
    found = {}
    for norm in (QK_NORM, NO_QK_NORM):
        base = dataclasses.replace(command.base, qk_norm=norm == QK_NORM)
        for clip, (of, arm) in kinds.items():
            if norm == QK_NORM or clip != GAINS:
                found[f"{norm}, {clip}"] = Variant(base, of, (arm,))
    return found


def _with(training: Training, **changes: Any) -> Training:
    optimizer = dataclasses.replace(training.optimizer, **changes)
    return dataclasses.replace(training, optimizer=optimizer)


def with_threshold(training: Training, threshold: float) -> Training:
    """The same training, whose MuonClip clips above so much."""
    return _with(training, clip_threshold=threshold)


# One rate: what is asked is not which is best.
_ONE_RATE = Sweep(reach=0, limit=0)


def defaults(which: SuiteName) -> dict[str, Any]:
    """The command's settings where nothing else is said, those that are a suite's own."""
    own: dict[str, Any] = {"suite": which, "out": f"runs/finetune/{which}"}
    if which == "as_published":
        own |= {"optimizer": AS_PUBLISHED, "sweep": _ONE_RATE}
    elif which == "qk":
        own["sweep"] = _ONE_RATE
    return own
