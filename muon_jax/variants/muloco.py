"""MuLoCo: workers take many steps independently, and an outer Nesterov step combines them."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_integer, check_number
from muon_jax._precision import widen
from muon_jax._trees import only_updated


class MulocoState(NamedTuple):
    """State of `muloco`.

    Attributes:
        count: The number of steps taken, an int32 scalar.
        inner: The state of the inner optimizer.
        anchor: The params after the last outer step, in float32 or wider.
        velocity: The momentum of the outer steps, in float32 or wider.
    """

    count: chex.Array
    inner: optax.OptState
    anchor: optax.Params
    velocity: optax.Updates


def muloco(
    inner: optax.GradientTransformation,
    *,
    every: int = 30,
    learning_rate: float | jax.Array = 0.5,
    momentum: float | jax.Array = 0.5,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies Nesterov SGD to the average of several workers after every `every` inner steps.

    After `every` steps, $\delta = a - \mathrm{mean}(w)$ from the last anchor a; $v \leftarrow
    \mu v + \alpha \delta$; $a \leftarrow a - \mu v - \alpha \delta$. All workers continue from a.
    Between outer steps they exchange nothing: the params cross the slow axis of a mesh once in
    `every` steps, whereas with data parallelism the gradients cross it in every step.

    Args:
        inner: The optimizer of the workers, such as `muon(...)`. Each worker has its own state.
        every: The number of inner steps per outer step.
        learning_rate, momentum: The settings of the outer steps.
        axis_name: The name of the axis of workers, each of which has its own params. It is an axis
            of `jax.vmap`, or the slow axis of a mesh, with
            `jax.shard_map(..., axis_names={"pod"})` around the training step; the axes within a pod
            are then still XLA's. `None` means a single worker.

    References:
        Thérien et al., 2025, MuLoCo, arXiv 2505.23725, algorithm 1; the defaults are those of
        KellerJordan/modded-nanogpt, track 3, 2026-05-04.

    Example:
        >>> import jax, jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muloco(muon_jax.muon(0.02), every=2, axis_name="workers")
        >>> params = {"kernel": jnp.ones((4, 8, 16))}  # of four workers
        >>> state = jax.vmap(tx.init)(params)
        >>> step = jax.vmap(tx.update, axis_name="workers")
        >>> updates, state = step(params, state, params)
    """
    check_integer("every", every, at_least=1)
    check_number("learning_rate", learning_rate, at_least=0)
    check_number("momentum", momentum, at_least=0, below=1)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        anchor = jax.tree.map(lambda w: jnp.array(widen(w), copy=True), params)
        zeros = jax.tree.map(jnp.zeros_like, anchor)
        return MulocoState(jnp.zeros([], jnp.int32), inner.init(params), anchor, zeros)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("muloco needs the params: call update(updates, state, params).")
        moves, inner_state = inner.update(updates, state.inner, params, **extra_args)
        params = only_updated(params, moves)
        count = optax.safe_increment(state.count)

        def alone():
            return moves, state.anchor, state.velocity

        def together():
            after = jax.tree.map(lambda w, u: widen(w) + widen(u), params, moves)
            mean = after if axis_name is None else jax.lax.pmean(after, axis_name)
            steps = jax.tree.map(lambda a, w: learning_rate * (a - w), state.anchor, mean)
            velocity = jax.tree.map(lambda v, s: momentum * v + s, state.velocity, steps)
            anchor = jax.tree.map(
                lambda a, v, s: a - momentum * v - s, state.anchor, velocity, steps
            )
            moved = jax.tree.map(
                lambda a, w, u: (a - widen(w)).astype(u.dtype), anchor, params, moves
            )
            return moved, anchor, velocity

        moves, anchor, velocity = jax.lax.cond(count % every == 0, together, alone)
        return moves, MulocoState(count, inner_state, anchor, velocity)

    return optax.GradientTransformationExtraArgs(init, update)
