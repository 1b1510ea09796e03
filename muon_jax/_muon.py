"""Muon: gradients -> momentum -> orthogonalise -> shape scale -> weight decay -> learning rate."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._matrices.hooks import Hook, HookState, Step, init_hooks, run_hooks
from muon_jax._matrices.stages import Orthogonalizer, Stages
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.coefficients import Schedule
from muon_jax._orthogonalize.newton_schulz import configured
from muon_jax._partition import HybridOptions, hybrid, partition
from muon_jax._precision import cast_like
from muon_jax._scale import ShapeScale
from muon_jax._sharding.explicit_axes import over_auto_axes
from muon_jax._sharding.layout import AnyMesh

Hooks = Hook | Sequence[Hook] | None


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
        count: The number of steps taken, an int32 scalar.
        mu: The momentum, shaped like the params. With `mu_dtype` int8 or int4 it has the fields
            `values` and `scales`.
    """

    count: chex.Array
    mu: optax.Updates


class HookedState(NamedTuple):
    """State of `scale_by_muon` and its variants if any hook has state of its own.

    Attributes:
        count, mu: As in `MuonState`.
        hooks: The state of each hook that has one. Those that run before orthogonalisation come
            first.
    """

    count: chex.Array
    mu: optax.Updates
    hooks: tuple[HookState, ...]


def scale_by_muon(
    *,
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    orthogonalizer: Orthogonalizer | None = None,
    scale: str | ShapeScale | None = "spectral",
    mu_dtype: jax.typing.DTypeLike | None = None,
    matrix_axes: Any = None,
    mesh: AnyMesh | None = None,
    shardings: Any = None,
    chunk_size: int | None = None,
    before: Hooks = None,
    after: Hooks = None,
) -> optax.GradientTransformation:
    """Orthogonalises the momentum and scales it by shape. Every leaf must be a stack of matrices.

    Args:
        beta: The decay of the momentum, a number or a schedule.
        nesterov: Whether to use Nesterov momentum: `beta * mu + (1 - beta) * g` instead of `mu`.
        momentum: The kind of momentum: `"ema"` (KellerJordan/Muon, torch.optim.Muon),
            `"heavy_ball"` (Moonlight: `mu = beta * mu + g`), or `"optax"` (with the bias
            correction of optax.contrib.muon).
        orthogonalizer: A function `(..., fan_in, fan_out) -> (..., fan_in, fan_out)`. `None` means
            `newton_schulz`.
        scale: The shape scale: `"spectral"`, `"match_rms_adamw"`, `"mup"`, `"none"` or a function
            `(fan_in, fan_out) -> float`.
        mu_dtype: The dtype of the stored momentum. `None` means the dtype of each parameter;
            `int8` stores one byte per entry and one scale per row, `int4` half a byte per entry.
        matrix_axes: `MatrixAxes` or optax's `MuonDimensionNumbers` for all leaves, a tree of them
            (or a prefix of one), or a callable from the updates to such a tree. `None` means that
            the last two axes are `(fan_in, fan_out)` and all others are batch axes.
        mesh: The devices that share the work, so that each matrix is orthogonalised once. `None`
            means the mesh of `jax.set_mesh`, or else the mesh of the arrays. If no mesh is known,
            XLA distributes the work and repeats much of it on every device.
        shardings: The shardings of the params: a tree of `NamedSharding` or `PartitionSpec`, or a
            prefix of one. Explicit axes do not need it. Under Auto axes only XLA knows the
            shardings, so without this argument the updates are first moved to a known sharding.
            That costs nothing in the usual layouts, and more if experts are split over some mesh
            axes and their matrices over others. Inside `shard_map` it names the mesh axes that
            split a leaf; by default leaves are not split there.
        chunk_size: The number of matrices of a bucket that a device holds at once, to bound
            memory. `None` means all.
        before, after: A hook or a list of hooks, which are functions of the matrices before and
            after orthogonalisation, such as `equilibrate()` before and `snap_norm()` after it.

    Returns:
        A transformation whose state is `MuonState`, or `HookedState` if a hook has state.

    Raises:
        ValueError: A name is unknown, or the axes do not fit a leaf.

    Example:
        >>> import jax.numpy as jnp, optax, muon_jax
        >>> tx = optax.chain(muon_jax.scale_by_muon(), optax.scale_by_learning_rate(0.02))
        >>> params = {"kernel": jnp.ones((4, 8))}
        >>> updates, state = tx.update(params, tx.init(params))
        >>> updates["kernel"].shape
        (4, 8)
    """
    return hooked(
        Stages(
            beta=beta,
            nesterov=nesterov,
            momentum=momentum,
            orthogonalizer=orthogonalizer,
            scale=scale,
            mu_dtype=mu_dtype,
            matrix_axes=matrix_axes,
            mesh=mesh,
            shardings=shardings,
            chunk_size=chunk_size,
            before=before,
            after=after,
        )
    )


def hooked(stages: Stages, own: type | None = None) -> optax.GradientTransformation:
    """Returns momentum -> `before` -> orthogonalise -> `after` -> shape scale as a transformation.

    If exactly one hook has state, the state is `own(count, mu, state of the hook)`.
    """
    hooks = (*stages.before, *stages.after)
    stateful = sum(hook.init is not None for hook in hooks)

    def state_of(count, mu, states):
        if not states:
            return MuonState(count, mu)
        if own and stateful == 1:
            return own(count, mu, *states)
        return HookedState(count, mu, tuple(map(HookState, states)))

    def init(params):
        states = init_hooks(hooks, stages.matrices(params), params) if stateful else ()
        return state_of(jnp.zeros([], jnp.int32), stages.init_momentum(params), states)

    def step(updates, state, params=None):
        count = optax.safe_increment(state.count)
        averaged, mu = stages.average(updates, state.mu, count)
        matrices = stages.matrices(updates)
        momentum = matrices.split(averaged)
        seen = Step(matrices, updates, params, momentum, count)
        hooked = isinstance(state, HookedState)
        states = [hook.value for hook in state.hooks] if hooked else state[2:]
        first = sum(hook.init is not None for hook in stages.before)
        x, before = run_hooks(stages.before, momentum, states[:first], seen)
        x = matrices.orthogonalize(map(cast_like, x, momentum), like=state.mu)
        x, after = run_hooks(stages.after, x, states[first:], seen)
        new = state_of(count, mu, [*before, *after])
        return matrices.merge(matrices.scale(x), updates), new

    update = over_auto_axes(step) if any(hook.products for hook in hooks) else step
    return optax.GradientTransformation(init, update)


@takes_options_of(partition)
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    ns_coeffs: str | Schedule | Any = "jordan",
    ns_steps: int | None = None,
    ns_dtype: jax.typing.DTypeLike | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    scale: str | ShapeScale | None = "spectral",
    before: Hooks = None,
    after: Hooks = None,
    **options: Unpack[HybridOptions],
) -> optax.GradientTransformationExtraArgs:
    """Updates the hidden matrices with Muon and all other leaves with AdamW.

    Args:
        learning_rate: The learning rate of the Muon leaves, a number or a schedule.
        beta, nesterov, momentum, scale, before, after: As in `scale_by_muon`.
        ns_coeffs, ns_steps, ns_dtype: The `coeffs`, `steps` and `dtype` of `newton_schulz`.
        orthogonalizer: A function to use instead of `newton_schulz`. The `ns_` arguments must then
            keep their defaults.
        options: The options of `hybrid`: weight decay (0.0 by default; `muonclip` has 0.1), the
            optimizer of the other leaves, routing, and the mesh and shardings.

    Returns:
        A transformation that requires `params` in `update`. Errors are those of `hybrid`.

    References:
        Jordan, 2024, kellerjordan.github.io/posts/muon; Liu et al., 2025, arXiv 2502.16982.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muon(0.02, weight_decay=0.1, adam_learning_rate=3e-4)
        >>> params = {"embed": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 32))}}
        >>> muon_jax.label_params(params)
        {'embed': 'other', 'mlp': {'kernel': 'muon'}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    orthogonalizer = configured(orthogonalizer, ns_coeffs, ns_steps, ns_dtype)

    def matrix_optimizer(add_decay: Any, scale_by_rate: Any, **settings: Any) -> Any:
        return optax.chain(
            scale_by_muon(  # momentum -> orthogonalise -> shape scale
                beta=beta,
                nesterov=nesterov,
                momentum=momentum,
                orthogonalizer=orthogonalizer,
                scale=scale,
                before=before,
                after=after,
                **settings,
            ),
            add_decay,
            scale_by_rate,
        )

    return partition(matrix_optimizer, learning_rate, **options)


class StageOptions(HybridOptions, total=False):
    """The options of `muon` without the hooks, for type checkers."""

    beta: optax.ScalarOrSchedule
    nesterov: bool
    momentum: str
    ns_coeffs: str | Schedule | Any
    ns_steps: int | None
    ns_dtype: jax.typing.DTypeLike | None
    orthogonalizer: Orthogonalizer | None
    scale: str | ShapeScale | None


class MuonOptions(StageOptions, total=False):
    """The options of `muon`, for type checkers; a test compares them with its signature."""

    before: Hooks
    after: Hooks


def hybrid_muon(
    scale_by: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Calls `hybrid` with the options of `muon`; those of the stages are passed to `scale_by`."""
    orthogonalizer = configured(
        options.pop("orthogonalizer", None),
        options.pop("ns_coeffs", "jordan"),
        options.pop("ns_steps", None),
        options.pop("ns_dtype", None),
    )
    names = {"beta", "nesterov", "momentum", "scale", "before", "after"}
    stages = names & options.keys()
    settings = {name: options.pop(name) for name in stages} | {"orthogonalizer": orthogonalizer}
    return hybrid(functools.partial(scale_by, **settings), learning_rate, **options)
