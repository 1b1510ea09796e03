"""The optimizers that the studies compare, each a word on the command line."""

import dataclasses
from typing import Any, Literal

import optax

import muon_jax

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal[
    "jordan", "you", "polar_express", "polar_express_1.02", "cans", "aol", "deepseek_v4", "exact"
]
ScaleName = Literal["spectral", "match_rms_adamw", "mup", "none"]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW for all parameters; in the Muon arm, for those that are no hidden matrices."""

    learning_rate: float = 1e-3
    """After warm-up."""
    weight_decay: float = 1.0
    """Decoupled: a step shrinks weights by learning rate × this."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon for the hidden matrices."""

    learning_rate: float = 0.02
    """After warm-up."""
    weight_decay: float = 0.1
    """Decoupled, as AdamW's."""
    beta: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look one step ahead."""
    ns_coeffs: ScheduleName = "jordan"
    """Newton-Schulz schedule."""
    scale: ScaleName = "spectral"
    """Size of the update by fan_in and fan_out."""


def build(
    name: OptimizerName, adamw: AdamW, muon: Muon, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of that name.

    Args:
        name: `"adamw"`, or `"muon"` with AdamW for what is no hidden matrix.
        adamw: its settings, the same in both.
        muon: settings of the Muon part.
        schedule: factor of the learning rates, from the step.
    """

    def scheduled(learning_rate: float) -> optax.Schedule:
        return lambda step: learning_rate * schedule(step)

    shared: dict[str, Any] = {"b1": adamw.b1, "b2": adamw.b2, "eps": adamw.eps}
    if name == "adamw":
        return optax.adamw(
            scheduled(adamw.learning_rate), weight_decay=adamw.weight_decay, **shared
        )
    return muon_jax.muon(
        scheduled(muon.learning_rate),
        beta=muon.beta,
        nesterov=muon.nesterov,
        ns_coeffs=muon.ns_coeffs,
        scale=muon.scale,
        weight_decay=muon.weight_decay,
        adam_learning_rate=scheduled(adamw.learning_rate),
        adam_weight_decay=adamw.weight_decay,
        **{f"adam_{key}": value for key, value in shared.items()},
    )


def warmup(steps: int) -> optax.Schedule:
    """A factor that rises linearly to 1 over `steps` steps; the first step is not lost to 0."""
    return optax.linear_schedule(1 / max(steps, 1), 1.0, max(steps - 1, 0))
