"""What changes on the way of a training: learning rates, momentum and weight decay."""

import dataclasses
from typing import Annotated, Literal

import optax

from experiments.settings import Average, Count, Decay, Rule, Share

DecayName = Literal["linear", "cosine", "constant", "wsd"]
_NOT_NONE = Rule("greater than 0 and at most 1", lambda value: 0 < value <= 1)


@dataclasses.dataclass(frozen=True)
class Schedules:
    """What changes beside the learning rate, and the average that is evaluated."""

    wsd_share: Annotated[float, _NOT_NONE] = 0.2
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

    def momentum(self, beta: float) -> optax.ScalarOrSchedule:
        """Muon's, which is `beta` where nothing else is asked for."""
        return optax.linear_schedule(*self.beta, self.beta_steps) if self.beta else beta

    def decay(self, weight_decay: float, steps: int) -> optax.ScalarOrSchedule:
        """A weight decay over so many steps."""
        if self.weight_decay is None:
            return weight_decay
        begin, end = self.weight_decay
        return optax.linear_schedule(begin * weight_decay, end * weight_decay, steps)


def warmup(steps: int) -> optax.Schedule:
    """A factor that rises linearly to 1 over `steps` steps; the first step is not lost to 0."""
    return optax.linear_schedule(1 / max(steps, 1), 1.0, max(steps - 1, 0))


def warmup_then_decay(
    warmup_steps: int,
    steps: int,
    decay: DecayName,
    final: Share = 0.0,
    cooldown: int = 0,
    wsd_share: float = Schedules.wsd_share,
) -> optax.Schedule:
    """`warmup`, then a course that would reach `final` one step after its last.

    `constant` stays; `wsd` stays too, but for a linear fall in the last `wsd_share` of the course
    (Hu et al., 2404.06395). The last `cooldown` steps fall linearly from there, and would reach 0
    at `steps`.
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


def course_text(decay: DecayName, final: float, schedules: Schedules) -> str:
    """What follows the warm-up, in words."""
    if decay == "constant":
        return "constant"
    if decay == "wsd":
        return f"constant, and linear to {final:g} in the last {schedules.wsd_share:.0%}"
    return f"{decay} to {final:g}"
