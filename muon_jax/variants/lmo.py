"""Steps along linear minimisation oracles, with a ball for each leaf, for Scion and Gluon."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from muon_jax._checks import check_number, check_static
from muon_jax._decay import add_decayed_weights, as_decay_mask, scale_by_learning_rate
from muon_jax._matrices.stages import Orthogonalizer, Stages
from muon_jax._matrix_axes import MatrixAxes, axes_by_path
from muon_jax._momentum import as_array_tree
from muon_jax._muon import scale_by_muon
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.newton_schulz import configured
from muon_jax._partition import fitted
from muon_jax._precision import widen
from muon_jax._routing import rules as _routing
from muon_jax._routing.rules import (
    FROZEN,
    MUON,
    Route,
    Routing,
    match_rules,
    route,
    warn_of_guesses,
)
from muon_jax._sharding.layout import SHARDING, AnyMesh, is_sharding
from muon_jax._trees import KeyPath, broadcast_prefix, map_paths
from muon_jax.variants.oracles import Ball, as_oracle, checked_ball

# The settings of the authors' nanoGPT runs, which have no gains or biases.
HIDDEN, CONV = Ball("spectral", 50.0), Ball("spectral_conv", 50.0)
TABLE, VECTOR = Ball("sign", 3000.0), Ball("bias_rms", 1.0)
DEFAULT_BALLS = (HIDDEN, CONV, TABLE, VECTOR)


class Layer(NamedTuple):
    """The ball of a leaf, and its smoothness constants if the step sizes are Gluon's."""

    ball: Ball
    smoothness: tuple[float, float] | None = None


class LmoState(NamedTuple):
    """State of `scale_by_lmo`.

    Attributes:
        count: The number of steps taken, an int32 scalar.
        mu: The average gradient, shaped like the params.
    """

    count: chex.Array
    mu: optax.Updates


# Options of other optimizers, with the reason why Scion and Gluon do not have them.
REFUSED = {
    "constraint": (
        "the balls are this optimizer's own. scion(constrained=True) keeps every weight in its "
        "ball, whose radius balls= gives; a norm held at another length would contradict it. muon "
        "takes constraints."
    )
}


@takes_options_of(
    scale_by_muon, without=("beta", "nesterov", "momentum", "scale", "before", "after")
)
def scale_by_lmo(
    ball: Ball = HIDDEN,
    *,
    alpha: float | jax.Array = 0.1,
    smoothness: tuple[float, float] | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    r"""Applies a ball's oracle to the average gradient, for trees whose leaves share one ball.

    $d \leftarrow (1-\alpha) d + \alpha g$; the update is $\rho L(d)$ with the ball's oracle $L$ and
    radius $\rho$.

    Args:
        ball: The oracle and the radius.
        alpha: The weight of the new gradient, greater than 0 and at most 1.
        smoothness: Gluon's $(L_0, L_1)$. The update is then $t L(d)$ with
            $t = \|d\|_* / (L_0 + L_1 \|d\|_*)$, where $\|d\|_* = \langle d, L(d)\rangle$.
        orthogonalizer: The orthogonalizer of the spectral oracles. `None` means `newton_schulz`.
        mu_dtype, mesh, shardings, chunk_size: As in `scale_by_muon`.
        matrix_axes: As in `scale_by_muon`. It is not used for `"bias_rms"`, whose leaves are
            vectors along their last axis.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.scale_by_lmo(muon_jax.Ball("sign", radius=2.0))
        >>> params = {"kernel": jnp.ones((4, 8))}
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> print(updates["kernel"][0, 0])
        0.5
    """
    ball = checked_ball(ball)
    oracle = as_oracle(ball.oracle)
    check_number("alpha", alpha, above=0, at_most=1)
    if smoothness is not None:
        check_smoothness(smoothness)
    vectors = ball.oracle == "bias_rms"
    shardings = options.get("shardings")
    if vectors:
        options |= {"matrix_axes": None, "shardings": None}
    stages = Stages(beta=1 - alpha, nesterov=False, orthogonalizer=orthogonalizer, **options)

    def init(params):
        return LmoState(jnp.zeros([], jnp.int32), stages.init_momentum(params))

    def lengths(matrices, steps, d):
        """Returns Gluon's step size for each matrix."""
        assert smoothness is not None
        l0, l1 = smoothness
        sizes = []
        # The dual norm is divided by the largest entry of d, since the norm itself may overflow.
        shares, largest = matrices.relative(d), matrices.largest(d)
        products = [x * y for x, y in zip(steps, shares, strict=True)]
        for total, size in zip(matrices.sum(products, over="matrix"), largest, strict=True):
            norm = jnp.maximum(total, 0)
            sizes.append(norm / jnp.where(norm == 0, 1, l0 / size + l1 * norm))
        return sizes

    def direct(averaged, mu):
        own = stages
        if vectors:
            averaged, mu = jax.tree.map(_as_row, averaged), jax.tree.map(_as_row, as_array_tree(mu))
            own = dataclasses.replace(stages, shardings=_row_shardings(shardings, averaged))
        matrices = own.matrices(averaged)
        d = matrices.split(averaged)
        steps = oracle(matrices, d, mu)
        sizes = [ball.radius] * len(d) if smoothness is None else lengths(matrices, steps, d)
        return matrices.merge([t * widen(x) for t, x in zip(sizes, steps, strict=True)], averaged)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        averaged, mu = stages.average(updates, state.mu, count)
        steps = direct(averaged, state.mu)
        if vectors:
            steps = jax.tree.map(lambda x, like: x.reshape(like.shape), steps, updates)
        return steps, LmoState(count, mu)

    return optax.GradientTransformation(init, update)


def check_smoothness(pair: Any) -> None:
    """Checks that `pair` is a valid (L0, L1)."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"smoothness must be (L0, L1); got {pair!r}.")
    for name, value in zip(("L0", "L1"), pair, strict=True):
        check_static(f"{name} of smoothness", value)
        check_number(f"{name} of smoothness", value, at_least=0)
    if not any(pair):
        raise ValueError(f"L0 or L1 of smoothness must be greater than 0; got {pair!r}.")


def check_pairs(name: str, what: str, pairs: Any) -> list[tuple[str, Any]]:
    """Checks and returns a list of `(regex, value)` pairs; `what` names the values in messages."""
    rule = f"{name} must be a list of (regex, {what}) pairs, of which the first match decides"
    if isinstance(pairs, (str, Mapping)) or not isinstance(pairs, Iterable):
        remedy = " Pass list(rules.items())." if isinstance(pairs, Mapping) else ""
        raise TypeError(f"{rule}; got {pairs!r}.{remedy}")
    for pair in (pairs := list(pairs)):
        plain = isinstance(pair, (tuple, list)) and not hasattr(pair, "_fields")
        if not plain or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"{rule}; got {pair!r} as a pair.")
    return pairs


def _as_row(x: jax.Array) -> jax.Array:
    return x.reshape(1, 1) if x.ndim == 0 else x[..., None, :]


def _row_shardings(shardings: Any, rows: Any) -> Any:
    """Converts the shardings of vectors to those of the rows that `_as_row` returns."""
    if shardings is None:
        return None
    given = broadcast_prefix(
        shardings, rows, what="shardings", kind=SHARDING, is_value=is_sharding, partial=True
    )

    def of_row(path, x):
        sharding = given.get(path, PartitionSpec())
        spec = getattr(sharding, "spec", sharding)
        names = [*spec, *(None,) * (x.ndim - 1 - len(spec))]
        return PartitionSpec(*names[:-1], None, *names[-1:])

    return jax.tree_util.tree_map_with_path(of_row, rows)


def by_layer(
    learning_rate: optax.ScalarOrSchedule,
    layers_of: Callable[[Any, dict[KeyPath, Route]], dict[KeyPath, Layer]],
    layers: Sequence[Layer],
    *,
    alpha: float | jax.Array = 0.1,
    ns_coeffs: Any = "jordan",
    ns_steps: int | None = None,
    ns_dtype: jax.typing.DTypeLike | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    cautious_weight_decay: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    routing: Routing = None,
    matrix_axes: Any = None,
    mesh: AnyMesh | None = None,
    shardings: Any = None,
    chunk_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Updates every leaf with `scale_by_lmo`, decay and rate, and its own ball from `layers_of`.

    `layers` lists all possible layers, since the state has a part for each, whatever the tree.
    """
    names = {
        layer: f"{n} {getattr(layer.ball.oracle, '__name__', layer.ball.oracle)}"
        for n, layer in enumerate(dict.fromkeys(layers))
    }
    orthogonalizer = configured(orthogonalizer, ns_coeffs, ns_steps, ns_dtype)
    check_number("learning_rate", learning_rate, at_least=0, schedule=True)
    check_number("weight_decay", weight_decay, at_least=0, schedule=True)
    for layer in names:  # errors are raised here rather than at the first step
        scale_by_lmo(layer.ball, alpha=alpha, smoothness=layer.smoothness, mu_dtype=mu_dtype)

    def routed(tree):
        routes = route(tree, routing)
        axes = {path: _axes_of(leaf) for path, leaf in routes.items()}
        if matrix_axes is not None:
            axes |= axes_by_path(matrix_axes, tree, partial=True)
        chosen = layers_of(tree, routes)
        mask = as_decay_mask(weight_decay_mask, tree, routes)

        def optimizer(layer: Layer) -> optax.GradientTransformation:
            return optax.chain(
                scale_by_lmo(
                    layer.ball,
                    alpha=alpha,
                    smoothness=layer.smoothness,
                    orthogonalizer=orthogonalizer,
                    mu_dtype=mu_dtype,
                    matrix_axes=functools.partial(map_paths, axes),
                    mesh=mesh,
                    shardings=shardings,
                    chunk_size=chunk_size,
                ),
                add_decayed_weights(weight_decay, mask, cautious_weight_decay),
                scale_by_learning_rate(learning_rate),
            )

        optimizers = {name: optimizer(layer) for layer, name in names.items()}
        labels = {path: names[chosen[path]] if path in chosen else FROZEN for path in routes}
        return optax.multi_transform(
            optimizers | {FROZEN: optax.set_to_zero()}, functools.partial(map_paths, labels)
        )

    return fitted(routed, lambda params: warn_of_guesses(route(params, routing, matrix_axes)))


def balls_of(
    tree: Any, routes: dict[KeyPath, Route], rules: Sequence[tuple[str, Ball]]
) -> dict[KeyPath, Ball]:
    chosen = match_rules(rules, tree, routes)
    return {
        path: chosen[path][0] if path in chosen else _ball_of(leaf)
        for path, leaf in routes.items()
        if leaf.label != FROZEN
    }


def _ball_of(leaf: Route) -> Ball:
    if leaf.label == MUON:
        return CONV if leaf.kind == _routing.CONV else HIDDEN
    return VECTOR if leaf.kind == _routing.VECTOR else TABLE


def _axes_of(leaf: Route) -> MatrixAxes:
    """Returns the matrix axes; the fan_in of an embedding is its last axis, the model's width."""
    if leaf.axes is not None:
        return leaf.axes
    return MatrixAxes(-1, -2) if leaf.kind == _routing.EMBEDDING else MatrixAxes()
