"""Settings of the suites: their defaults, and the ladder of model sizes."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

from experiments.language.data import Data
from experiments.optimizers import AdamW, Muon, OptimizerName, Rates
from experiments.pretrain import costs
from experiments.pretrain.config import Model, Training
from experiments.pretrain.model import LanguageModel, Params
from experiments.settings import Count, Positive, check_different
from experiments.sweep import Seeded

SuiteName = Literal["optimizers", "scaling"]

BASELINE: OptimizerName = "adamw"


@dataclasses.dataclass(frozen=True)
class Suite(Seeded):
    """Settings of a study of many small trainings. Its folder keeps the finished ones."""

    suite: SuiteName | None = None
    """Named study to run; explicit options override its settings.
    optimizers: compare all optimizers, each at its best learning rate. scaling: compare AdamW and
    Muon at several model sizes."""
    widths: tuple[Count, ...] = (32, 48, 64, 80)
    """Model widths to compare. For --suite scaling; the other sizes grow with the width."""
    tokens_per_param: Positive = 10.0
    """--suite scaling: number of training tokens per active parameter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_different(self, "widths")


class Cell(NamedTuple):
    """One training of a suite."""

    optimizer: OptimizerName
    width: int
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer} · width {self.width} · rate {self.rate:g} · seed {self.seed}"


def sized(config: Training, width: int, tokens_per_param: float) -> Training:
    """Returns the training of a model of another width, for `tokens_per_param` tokens a parameter.

    Heads keep their size; the numbers of heads, layers and experts grow with the width. The warm-up
    keeps its fraction of the steps.

    Raises:
        ValueError: If the width is not a multiple of the head size.
    """
    model = config.model
    factor = width / model.width
    if (heads := model.heads * factor) != int(heads):
        raise ValueError(
            "--widths must be multiples of the head size, --model.width / --model.heads = "
            f"{model.width} / {model.heads}; got {width}."
        )
    names = ("latent", "hidden", "expert_hidden")
    sizes = {name: max(1, round(getattr(model, name) * factor)) for name in names}
    model = dataclasses.replace(model, width=width, heads=int(heads), **sizes)
    config = dataclasses.replace(config, model=model)
    tokens = tokens_per_param * active_params(config)
    steps = max(math.ceil(tokens / config.tokens_per_step), 2)
    warmup = min(round(steps * config.warmup / config.steps), steps - 1)
    return dataclasses.replace(config, steps=steps, warmup=warmup, cooldown=0)


@functools.cache
def active_params(config: Training) -> int:
    """Returns how many parameters a token uses, without the output head or inactive experts."""
    head = config.model.width * config.data.vocabulary
    return costs.active_entries(config.model, _shapes(config)) - head


@functools.cache
def model_flops(config: Training) -> int:
    """Returns the FLOPs of a step's forward and backward pass, including the output head."""
    return costs.step_costs(config, BASELINE, _shapes(config)).model_flops


def _shapes(config: Training) -> Params:
    return LanguageModel(config.model, config.data.vocabulary).shapes


# Optimizers without settings of their own start their sweep at Muon's learning rate, since their
# updates have the same size.
_LIKE_MUON = ("muon_sgd", "muon_lion", "muon_cautious", "muon_bf16", "normuon", "muonclip")

_MIXTURE = Training(
    model=Model(
        width=64,
        latent=32,
        nope=16,
        rope=8,
        value=16,
        hidden=192,
        expert_hidden=48,
        bias_rate=0.02,
        dtype="float32",
    ),
    data=Data(vocabulary=512),
    context=128,
    batch=8,
    steps=300,
    warmup=30,
    adamw=AdamW(learning_rate=8e-3, weight_decay=0.1, b2=0.95),
    muon=Muon(learning_rate=8e-3, scale="match_rms_adamw"),
)
_DENSE = dataclasses.replace(
    _MIXTURE,
    model=Model(
        layers=4,
        dense_layers=4,
        width=64,
        heads=4,
        attention="multi-head",
        hidden=192,
        dtype="float32",
    ),
)


def defaults(which: SuiteName, preset: Training | None = None) -> dict[str, Any]:
    """Returns the command's default settings for a suite.

    Args:
        which: The suite.
        preset: Settings to train with, in place of the small model that suits two CPU cores.
    """
    own: dict[str, Any] = {"suite": which}
    if which == "optimizers":
        own["optimizers"] = (BASELINE, "muon", *_LIKE_MUON, "splus", "splus_adamw", "scion")
    else:
        own |= {"optimizers": (BASELINE, "muon"), "evaluate_every": 200}
    training = preset or (_MIXTURE if which == "optimizers" else _DENSE)
    rates = Rates(scion=1e-3, splus=0.4, splus_adamw=0.4)
    training = dataclasses.replace(training, rates=rates)
    fields = dataclasses.fields(Training)
    return {field.name: getattr(training, field.name) for field in fields} | own
