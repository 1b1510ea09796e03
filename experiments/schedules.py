"""Schedules of a training: learning rates, momentum and weight decay."""

import dataclasses
import types
from typing import Any, Literal

import optax

import muon_jax
from experiments.commands import option
from experiments.settings import Average, Count, Decay, Part, Share

DecayName = Literal["linear", "cosine", "constant", "wsd"]
# Arms whose momentum or decay has another meaning, or that have an average of their own.
_CANNOT = {
    "beta": ("dion", "dion2", "dion3", "splus", "splus_adamw", "scion", "gluon", "optax_muon"),
    "weight_decay": (
        *("muon_sgd", "muon_lion", "muon_equal_shrink", "splus", "scion", "gluon"),
        *("adamw_tuned", "orthogonal_gradient"),
    ),
    "average": ("splus", "splus_adamw"),
}


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Schedules beside the learning rate's, and the average of the params that is evaluated."""

    wsd_share: Part = 0.2
    """--decay wsd: fraction of the steps after warm-up, at their end, in which the learning rate
    falls; until then it stays."""
    beta: tuple[Average, Average] | None = None
    """Muon's momentum: first and last value of a linear course, such as 0.85 0.95. By default it is
    --muon.beta, or --optimizer.beta, all the time."""
    beta_steps: Count = 300
    """Steps that this course takes."""
    weight_decay: tuple[Decay, Decay] | None = None
    """Factor of all weight decays: at the first and behind the last step, linear in between, such
    as 1 0. By default they stay."""
    average: Average | None = None
    """Decay rate of a moving average of the parameters, such as 0.99, which is evaluated, sampled
    and exported in their place. It takes as much memory as they do. By default there is none."""

    def check(self, arm: str) -> None:
        """Checks that an arm can use these schedules."""
        for field, arms in _CANNOT.items():
            if getattr(self, field) is not None and arm in arms:
                raise ValueError(
                    f"{option('schedules', field)} cannot be used with {', '.join(arms)}; got "
                    f"{arm}. Remove one of them."
                )

    def of(self, settings: Any, steps: int) -> Any:
        """Returns the settings of arms with schedules over `steps` in place of numbers."""
        if self.beta is None and self.weight_decay is None:
            return settings
        adamw, muon = settings.adamw, settings.muon
        decays = (self.decay(group.weight_decay, steps) for group in (adamw, muon))
        return types.SimpleNamespace(
            adamw=dataclasses.replace(adamw, weight_decay=next(decays)),
            muon=dataclasses.replace(
                muon, weight_decay=next(decays), beta=self.momentum(muon.beta)
            ),
            variants=settings.variants,
            attention_spec=settings.attention_spec,
        )

    def averaged(
        self, tx: optax.GradientTransformationExtraArgs
    ) -> optax.GradientTransformationExtraArgs:
        """Adds the average of the params to a transformation, if one is evaluated."""
        if self.average is None:
            return tx
        return optax.chain(tx, muon_jax.evaluation_average(self.average))

    def momentum(self, beta: float) -> optax.ScalarOrSchedule:
        """Returns the momentum of Muon: `beta`, or a schedule of it."""
        return optax.linear_schedule(*self.beta, self.beta_steps) if self.beta else beta

    def decay(self, weight_decay: float, steps: int) -> optax.ScalarOrSchedule:
        """Returns a weight decay, or its schedule over `steps`."""
        if self.weight_decay is None:
            return weight_decay
        begin, end = self.weight_decay
        return optax.linear_schedule(begin * weight_decay, end * weight_decay, steps)


def warmup(steps: int) -> optax.Schedule:
    """Returns a factor that rises linearly to 1 over `steps` steps. The first one is not 0."""
    return optax.linear_schedule(1 / max(steps, 1), 1.0, max(steps - 1, 0))


def warmup_then_decay(
    warmup_steps: int,
    steps: int,
    decay: DecayName,
    final: Share = 0.0,
    cooldown: int = 0,
    wsd_share: float = Schedules.wsd_share,
) -> optax.Schedule:
    """Returns `warmup` followed by a decay that would reach `final` one step after its last.

    `constant` does not decay. `wsd` decays linearly in the last `wsd_share` of the steps (Hu et
    al., 2404.06395). The last `cooldown` steps decay linearly from there, and would reach 0 at
    `steps`.
    """
    falling = steps - warmup_steps - cooldown
    falls = max(round(wsd_share * falling), 1)
    courses = {
        "linear": lambda: optax.linear_schedule(1.0, final, falling),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, falling, final),
        "constant": lambda: optax.constant_schedule(1.0),
        "wsd": lambda: optax.linear_schedule(1.0, final, falls, falling - falls),
    }
    phases, ends = [warmup(warmup_steps), courses[decay]()], [warmup_steps]
    if cooldown:
        last = 1.0 if decay == "constant" else final
        phases.append(optax.linear_schedule(last, 0.0, cooldown))
        ends.append(steps - cooldown)
    return optax.join_schedules(phases, ends)
