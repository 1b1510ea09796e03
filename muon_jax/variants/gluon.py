"""Gluon: Scion's oracles, with step sizes from layer-wise smoothness constants."""

import itertools
from collections.abc import Sequence
from typing import Any

import optax

from muon_jax._options import takes_options_of
from muon_jax._routing.rules import match_rules
from muon_jax.variants.lmo import (
    DEFAULT_BALLS,
    REFUSED,
    Layer,
    balls_of,
    by_layer,
    check_pairs,
    check_smoothness,
)
from muon_jax.variants.oracles import Ball, Oracle, checked_ball


@takes_options_of(by_layer, refused=REFUSED)
def gluon(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    smoothness: tuple[float, float] | Sequence[tuple[str, tuple[float, float]]],
    oracles: Sequence[tuple[str, str | Oracle]] = (),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Updates each leaf along Scion's oracle with a step size from its smoothness constants.

    The step size is $t = \|d\|_* / (L_0 + L_1 \|d\|_*)$, where
    $\|\nabla f(w) - \nabla f(v)\|_* \le (L_0 + L_1 \|\nabla f(w)\|_*) \|w - v\|$. With $L_0 = 0$
    this is Scion with radius $1 / L_1$. No step is longer than $1 / L_1$; with $L_1 = 0$ the step
    is proportional to the norm of the gradient, without a limit.

    Args:
        learning_rate: A factor of all steps, a number or a schedule.
        smoothness: $(L_0, L_1)$ of all layers, or `(regex, (L0, L1))` pairs that cover every leaf.
        oracles: `(regex, oracle)` pairs that override Scion's oracles.
        options: The options of `scion`.

    References:
        Riabinin et al., 2025, Gluon, arXiv 2505.13416, theorem 1, which is for full gradients
        without momentum. With `alpha` below 1 the norm is that of the average.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.gluon(smoothness=[("embed", (0.1, 1.0)), ("", (0.0, 70.0))])
    """
    chosen_oracles = check_pairs("oracles", "oracle", oracles)
    rules = [(regex, checked_ball(Ball(oracle))) for regex, oracle in chosen_oracles]
    given: Any = smoothness
    if isinstance(given, (tuple, list)) and not any(isinstance(x, (tuple, list)) for x in given):
        given = [("", smoothness)]
    for _, pair in (given := check_pairs("smoothness", "(L0, L1)", given)):
        check_smoothness(pair)
    pairs = [(regex, tuple(pair)) for regex, pair in given]
    balls = (*(ball for _, ball in rules), *DEFAULT_BALLS)
    layers = [Layer(ball, pair) for ball, (_, pair) in itertools.product(balls, pairs)]

    def layers_of(tree, routes):
        smooth = match_rules(pairs, tree, routes)
        chosen = {}
        for path, ball in balls_of(tree, routes, rules).items():
            if path not in smooth:
                raise ValueError(
                    f"smoothness has no rule for {routes[path].path!r}. Add a rule for it, or "
                    '("", (L0, L1)) at the end for all other leaves.'
                )
            chosen[path] = Layer(ball, smooth[path][0])
        return chosen

    return by_layer(learning_rate, layers_of, layers, **options)
