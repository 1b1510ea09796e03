"""Scion: every layer steps towards the steepest point of its own ball."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from muon_jax._options import takes_options_of
from muon_jax.variants.lmo import DEFAULT_BALLS, REFUSED, Layer, balls_of, by_layer, check_pairs
from muon_jax.variants.oracles import Ball, checked_ball


@takes_options_of(by_layer, refused=REFUSED)
def scion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    balls: Sequence[tuple[str, Ball]] = (),
    constrained: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps towards the steepest point of each leaf's ball, with one state and rate and no AdamW.

    $w \leftarrow w - \gamma \rho L(d)$, or, if `constrained`,
    $w \leftarrow (1-\gamma) w - \gamma \rho L(d)$, which keeps $w$ in its ball. Hidden matrices
    have `Ball("spectral", 50)` (`"spectral_conv"` for convolutions), embeddings and heads
    `Ball("sign", 3000)`, and vectors `Ball("bias_rms", 1)`.

    Args:
        learning_rate: The learning rate $\gamma$, a number or a schedule; about 2^-12 with these
            balls.
        balls: `(regex, Ball)` pairs that override these balls. The first regex that is found in a
            leaf's path decides, and each must match some leaf.
        constrained: Whether to keep weights in their balls, instead of a weight decay.
        weight_decay: As in `hybrid`.
        options: `alpha`, the weight of the new gradient in the average; `routing`, whose labels
            only choose the ball here, except for `"frozen"`; and options as in `muon`.

    References:
        Pethick et al., 2025, arXiv 2502.07529, algorithms 1 and 2.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.scion(2**-12, balls=[("embed", muon_jax.Ball("col_norm", 1.0))])
    """
    traced = isinstance(weight_decay, jax.core.Tracer)
    if constrained and not traced and (callable(weight_decay) or weight_decay != 0):
        raise ValueError(
            "constrained=True shrinks the weights by the learning rate itself, so weight_decay "
            f"must be 0; got {weight_decay!r}."
        )
    pairs = check_pairs("balls", "Ball", balls)
    rules = [(regex, checked_ball(ball)) for regex, ball in pairs]

    layers = [Layer(ball) for ball in (*(ball for _, ball in rules), *DEFAULT_BALLS)]

    def layers_of(tree, routes):
        return {path: Layer(ball) for path, ball in balls_of(tree, routes, rules).items()}

    decay = 1.0 if constrained else weight_decay
    return by_layer(learning_rate, layers_of, layers, weight_decay=decay, **options)
