"""Settings of the suites: variants of a fine-tuning, each with several optimizers."""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

from experiments.finetune.arms import AS_PUBLISHED, QUIRKS
from experiments.finetune.config import ArmName, Base, Training
from experiments.settings import Rule
from experiments.sweep import Seeded, Sweep

SuiteName = Literal["as_published", "controlled", "mismatch", "qk"]

BASELINE: ArmName = "adamw"
CONTROLLED, PUBLISHED = "controlled", "as published"
PRETRAINED = {"adamw": "AdamW base", "muon": "Muon base"}  # by the optimizer that did
QK_NORM, NO_QK_NORM = "QK-norm", "no QK-norm"
UNCLIPPED, PROJECTIONS, GAINS = "no clip", "W_q and W_k clipped", "gains clipped"

_CLIPPED = Rule(
    "greater than 0 and less than 1, so that something is clipped", lambda value: 0 < value < 1
)


@dataclasses.dataclass(frozen=True)
class Suite(Seeded):
    """Settings of a study of many small trainings. Its folder keeps the finished ones."""

    suite: SuiteName | None = None
    """Named study to run; explicit options override its settings.
    as_published: reproduce the peculiarities of the published study's code. controlled: compare
    all optimizers on equal terms, each at its best learning rate. mismatch: fine-tune models
    pretrained with AdamW and with Muon. qk: QK-clip with and without QK-norm."""
    clip_share: Annotated[float, _CLIPPED] = 0.5
    """--suite qk: clipping threshold, as a fraction of the model's largest attention logit."""


class Cell(NamedTuple):
    """One training of a suite."""

    variant: str
    arm: ArmName
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.variant} · {self.arm} · rate {self.rate:g} · seed {self.seed}"


class Variant(NamedTuple):
    """One training setup of a suite, which several arms share."""

    base: Base | None  # the model to fine-tune; None means --model
    training: Training  # without the number of steps
    arms: tuple[ArmName, ...]  # to train, in order


def variants(command: Any) -> dict[str, Variant]:
    """Returns the variants of a command's `suite` by name."""
    which, training, arms = command.suite, command.training(), tuple(command.optimizers)
    base = None if command.model else command.base
    if which == "controlled":
        return {CONTROLLED: Variant(base, training, arms)}
    if which == "as_published":
        quirks = training.optimizer.quirks
        without = {
            f"without {quirk}": Variant(
                base,
                _with(training, quirks=tuple(other for other in quirks if other != quirk)),
                tuple(arm for arm in arms if arm in QUIRKS[quirk].arms),
            )
            for quirk in quirks
        }
        without = {name: variant for name, variant in without.items() if variant.arms}
        return {PUBLISHED: Variant(base, training, arms)} | without
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
    """Returns the settings with another clipping threshold of MuonClip."""
    return _with(training, clip_threshold=threshold)


# A single learning rate, since these suites do not ask which rate is best.
_ONE_RATE = Sweep(reach=0, limit=0)


def defaults(which: SuiteName) -> dict[str, Any]:
    """Returns the suite's own default settings of the command."""
    own: dict[str, Any] = {"suite": which, "out": f"runs/finetune/{which}"}
    if which == "as_published":
        own |= {"optimizer": AS_PUBLISHED, "sweep": _ONE_RATE}
    elif which == "qk":
        own["sweep"] = _ONE_RATE
    return own
