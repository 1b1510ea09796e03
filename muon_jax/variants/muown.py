"""Muown: Adam updates the norm of every output neuron, and Muon its direction."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_number
from muon_jax._elementwise import scale_by_adam
from muon_jax._matrices.stages import Stages
from muon_jax._muon import muon, scale_by_muon
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.newton_schulz import configured
from muon_jax._partition import partition
from muon_jax._precision import widen

# The length of a neuron of zeros, as in Emerging-Optimizers; its first step gives it a direction.
_LEAST = 1e-12


class MuownState(NamedTuple):
    """State of the hidden matrices under `muown`.

    Attributes:
        norms: The norm g of each output neuron, float32, shaped like the params with fan_in axes of
            size 1.
        lengths: The length |v| of each output neuron, which grows as the direction changes.
        direction: The state of `scale_by_muon` for the gradient of v.
        moments: The state of Adam for the gradient of g.
        decay, rate: The states of the last two links.
    """

    norms: optax.Updates
    lengths: optax.Updates
    direction: optax.OptState
    moments: optax.OptState
    decay: optax.OptState
    rate: optax.OptState


@takes_options_of(
    muon,
    without=("constraint", "cautious_weight_decay"),
    refused={
        "constraint": "the norms of neurons are parameters of their own here, and Adam moves them. "
        "muon takes constraints."
    },
)
def muown(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    nesterov: bool = False,
    ns_coeffs: Any = "jordan",
    ns_steps: int | None = None,
    ns_dtype: jax.typing.DTypeLike | None = None,
    orthogonalizer: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Updates the directions of output neurons with Muon, and their norms with Adam.

    $W = g\,u$ with $u = v / \|v\|$ for each output neuron. The gradients of g and v are
    $G_g = \langle G, u \rangle$ and $G_v = (G - G_g\,u)\,g / \|v\|$. The steps of both have the
    same rate, $v \leftarrow v - \eta\,\mathrm{Muon}(G_v)$ and
    $g \leftarrow g - \eta\,(\mathrm{Adam}(G_g) + \lambda g)$. The decay applies to the norms only.

    Args:
        learning_rate: The learning rate of directions and norms, a number or a schedule.
        b1, b2, eps: The settings of Adam for the norms.
        nesterov, ns_coeffs, ns_steps, ns_dtype, orthogonalizer, options: As in `muon`.

    References:
        Muown, 2026, arXiv 2605.10797, as in NVIDIA Emerging-Optimizers.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.muown(0.02, adam_learning_rate=3e-4)
    """
    check_number("b1", b1, at_least=0, below=1)
    check_number("b2", b2, at_least=0, below=1)
    check_number("eps", eps, at_least=0)
    own = {"beta", "momentum", "scale", "before", "after"} & options.keys()
    direction = functools.partial(
        scale_by_muon,
        nesterov=nesterov,
        orthogonalizer=configured(orthogonalizer, ns_coeffs, ns_steps, ns_dtype),
        **{name: options.pop(name) for name in own},
    )

    def matrix_optimizer(add_decay: Any, scale_by_rate: Any, **settings: Any) -> Any:
        stages = Stages(**settings)
        adam = scale_by_adam(b1, b2, eps)
        return _by_neuron(stages, direction(**settings), adam, add_decay, scale_by_rate)

    return partition(matrix_optimizer, learning_rate, **options)


def _by_neuron(
    stages: Stages, direction: Any, adam: Any, add_decay: Any, scale_by_rate: Any
) -> optax.GradientTransformation:
    def norms(matrices, weights):
        return [jnp.maximum(x, _LEAST) for x in matrices.norms(weights, over="fan_in")]

    def init(params):
        matrices = stages.matrices(params)
        packed = matrices.pack(norms(matrices, matrices.split(params)))
        return MuownState(
            packed,
            jax.tree.map(jnp.copy, packed),
            direction.init(params),
            adam.init(packed),
            add_decay.init(params),
            scale_by_rate.init(params),
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("muown needs the params: call update(updates, state, params).")
        matrices = stages.matrices(updates)
        weights = [widen(w) for w in matrices.split(params)]
        gradients = [widen(g) for g in matrices.split(updates)]
        size, length = matrices.unpack(state.norms), matrices.unpack(state.lengths)
        unit = [w / g for w, g in zip(weights, size, strict=True)]

        def along(arrays):
            pairs = zip(arrays, unit, strict=True)
            return matrices.sum([x * u for x, u in pairs], over="fan_in")

        slopes = along(gradients)
        turning = [
            (g / length) * (dw - u * slope)
            for g, length, dw, u, slope in zip(size, length, gradients, unit, slopes, strict=True)
        ]
        turn, direction_state = direction.update(
            matrices.merge(turning, updates), state.direction, params
        )
        grow, moments = adam.update(matrices.pack(slopes), state.moments)
        decayed, decay = add_decay.update(
            optax.tree.zeros_like(updates, dtype=jnp.float32), state.decay, params
        )
        pairs = zip(matrices.unpack(grow), along(matrices.split(decayed)), strict=True)
        grow = matrices.pack([x + shrunk for x, shrunk in pairs])
        (turn, grow), rate = scale_by_rate.update((turn, grow), state.rate)
        v = [
            u * length + step
            for u, length, step in zip(unit, length, matrices.split(turn), strict=True)
        ]
        size = [g + step for g, step in zip(size, matrices.unpack(grow), strict=True)]
        length = norms(matrices, v)
        moved = [g * x / norm - w for g, x, norm, w in zip(size, v, length, weights, strict=True)]
        state = MuownState(
            matrices.pack(size), matrices.pack(length), direction_state, moments, decay, rate
        )
        wide = jax.tree.map(widen, updates)
        return matrices.merge(moved, wide), state

    return optax.GradientTransformation(init, update)
