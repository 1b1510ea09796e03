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
        count: steps taken, int32 scalar.
        mu: momentum, shaped like the params; in int8 or int4 `values` and `scales` of it.
    """

    count: chex.Array
    mu: optax.Updates


class HookedState(NamedTuple):
    """State of `scale_by_muon` and its relatives with hooks that have state.

    Attributes:
        count, mu: as in `MuonState`.
        hooks: the state of each hook that has one, first those before orthogonalisation.
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
    """Momentum, orthogonalised and scaled by shape, for trees whose every leaf is a matrix stack.

    Args:
        beta: decay of the momentum; a number or a schedule.
        nesterov: look one step ahead: `beta * mu + (1 - beta) * g` instead of `mu`.
        momentum: `"ema"` (KellerJordan/Muon, torch.optim.Muon), `"heavy_ball"` (Moonlight's
            `mu = beta * mu + g`), or `"optax"` (the bias correction of optax.contrib.muon).
        orthogonalizer: any `(..., fan_in, fan_out) -> (..., fan_in, fan_out)`; default
            `newton_schulz`.
        scale: `"spectral"`, `"match_rms_adamw"`, `"mup"`, `"none"` or `(fan_in, fan_out) -> float`.
        mu_dtype: dtype of the stored momentum; `None` is each parameter's own, `int8` one byte an
            entry and a scale a row, `int4` half a byte.
        matrix_axes: `MatrixAxes` or optax's `MuonDimensionNumbers` for all leaves, a tree of them
            (or a prefix of one), or a callable from the updates to such a tree; `None` takes the
            last two axes as `(fan_in, fan_out)` and the rest as batch.
        mesh: the devices that share the matrices, each of which is orthogonalised once; `None` is
            the mesh of `jax.set_mesh`, or else of the arrays. Where no mesh is known, XLA shares
            out the work, and repeats much of it on every device.
        shardings: of the params: a tree of `NamedSharding` or `PartitionSpec`, or a prefix of one.
            Explicit axes do not need it. Under Auto axes XLA alone knows the shardings: without
            this argument the updates are first moved to a known one, which costs nothing in the
            usual layouts and more where experts are split over some axes of the mesh and their
            matrices over others. Inside `shard_map` it names the axes that split a leaf; by default
            leaves are whole there.
        chunk_size: how many matrices of a bucket a device holds at once, to bound memory; `None`
            is all.
        before, after: hooks, one or a list: functions of the matrices before and after
            orthogonalisation, such as `equilibrate()` before and `snap_norm()` after it.

    Returns:
        A transformation whose state is `MuonState`, or `HookedState` where a hook has state.

    Raises:
        ValueError: an unknown name, or axes that do not fit a leaf.

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
    """Momentum -> before -> orthogonalise -> after -> shape scale.

    Args:
        stages: the settings, with the hooks before and after.
        own: the class of the state, `(count, mu, state of the hook)`, where one hook has some.
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

    def update(updates, state, params=None):
        if any(hook.products for hook in hooks):
            return over_auto_axes(step, updates, state, params)
        return step(updates, state, params)

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
    """Muon for the hidden matrices, AdamW for the other leaves, in one `optax.multi_transform`.

    Args:
        learning_rate: of the Muon leaves; a number or a schedule.
        beta, nesterov, momentum, scale, before, after: as in `scale_by_muon`.
        ns_coeffs, ns_steps, ns_dtype: `coeffs`, `steps` and `dtype` of `newton_schulz`.
        orthogonalizer: takes the place of `newton_schulz`; then give none of the `ns_` arguments.
        options: those of `hybrid`: weight decay (0.0 by default, where `muonclip` has 0.1), the
            optimizer of the other leaves, routing, placement.

    Returns:
        A transformation that takes (and needs) `params` in `update`.

    Raises:
        ValueError: an unknown name, a number out of its range, an argument that
            `other_optimizer` does not read, a rule that matches no leaf, or a leaf that no rule
            takes.
        TypeError: an unknown argument, or a value of another kind.

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
    """The options of `muon` but the hooks, for type checkers."""

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
    """`hybrid` of a variant of Muon, from the options of `muon`: the stages' go to `scale_by`."""
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
