"""The optimizers that the studies compare, each a word on the command line."""

import dataclasses
from typing import Any, Literal, get_args

import optax

import muon_jax

OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW for all parameters; in the Muon arm, for those that are no hidden matrices."""

    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon for the hidden matrices."""

    learning_rate: float = 0.02
    weight_decay: float = 0.1
    beta: float = 0.95
    nesterov: bool = True
    ns_coeffs: str = "jordan"
    scale: str = "spectral"


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
