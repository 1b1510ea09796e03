"""Muon: gradients -> momentum -> orthogonalise -> shape scale -> weight decay -> learning rate."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from muon_jax._coefficients import Schedule
from muon_jax._layout import (
    AnyMesh,
    Placing,
    find_placing,
    layouts_by_path,
    whole_shape,
)
from muon_jax._matrix_axes import MatrixAxes, axes_by_path
from muon_jax._momentum import MOMENTA, update_momentum
from muon_jax._newton_schulz import NewtonSchulz, as_newton_schulz
from muon_jax._paths import broadcast_prefix, is_tree_of, map_paths
from muon_jax._placement import orthogonalize_leaves
from muon_jax._routing import ADAMW, FROZEN, MUON, Routing, route
from muon_jax._shape_scale import ShapeScale, as_shape_scale

Orthogonalizer = Callable[[jax.Array], jax.Array]


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
        count: steps taken, int32 scalar.
        mu: momentum, shaped like the params.
    """

    count: chex.Array
    mu: optax.Updates


def scale_by_muon(
    *,
    beta: float | jax.Array = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    orthogonalizer: Orthogonalizer | None = None,
    scale: str | ShapeScale | None = "spectral",
    mu_dtype: jax.typing.DTypeLike | None = None,
    matrix_axes: Any = None,
    mesh: AnyMesh | None = None,
    shardings: Any = None,
    chunk_size: int | None = None,
) -> optax.GradientTransformation:
    """Momentum, orthogonalised and scaled by shape, for trees whose every leaf is a matrix stack.

    Args:
        beta: decay of the momentum.
        nesterov: look one step ahead: `beta * mu + (1 - beta) * g` instead of `mu`.
        momentum: `"ema"` (KellerJordan/Muon, torch.optim.Muon), `"heavy_ball"` (Moonlight's
            `mu = beta * mu + g`), or `"optax"` (the bias correction of optax.contrib.muon).
        orthogonalizer: any `(..., fan_in, fan_out) -> (..., fan_in, fan_out)`; default
            `newton_schulz`.
        scale: `"spectral"`, `"match_rms_adamw"`, `"mup"`, `"none"` or `(fan_in, fan_out) -> float`.
        mu_dtype: dtype of the stored momentum; `None` is each parameter's own.
        matrix_axes: `MatrixAxes` or optax's `MuonDimensionNumbers` for all leaves, a tree of them
            (or a prefix of one), or a callable from the updates to such a tree; `None` takes the
            last two axes as `(fan_in, fan_out)` and the rest as batch.
        mesh: over all of whose devices the matrices are spread, each orthogonalised once; `None` is
            the mesh of `jax.set_mesh`, or else of the arrays. Where none of these tells of a mesh,
            the spreading is left to XLA, which repeats much of the work on every device.
        shardings: a tree of `NamedSharding` or `PartitionSpec` (or a prefix of one), the params'
            own. Explicit axes tell it by themselves. Auto axes do not: without it the updates are
            first moved to where the optimizer knows them, which costs nothing in the usual layouts
            and more where experts lie over some axes of the mesh and their matrices over others.
            Inside `shard_map` it says over which axes a leaf is a part; by default leaves are whole
            there.
        chunk_size: how many matrices of a bucket a device holds at once, to bound memory; `None`
            is all.

    Returns:
        A transformation whose state is `MuonState`.

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
    if momentum not in MOMENTA:
        raise ValueError(f"Unknown momentum {momentum!r}. Known: {', '.join(MOMENTA)}.")
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(f"chunk_size is a number of matrices, at least 1; got {chunk_size!r}.")
    orthogonalizer = as_newton_schulz(orthogonalizer)
    shape_scale = as_shape_scale(scale)

    def orthogonalize(tree: optax.Updates, mu: optax.Updates, placing: Placing) -> optax.Updates:
        axes = axes_by_path(MatrixAxes() if matrix_axes is None else matrix_axes, tree)
        layouts = layouts_by_path(shardings, tree, placing)
        momenta = dict(jax.tree_util.tree_leaves_with_path(mu))
        leaves = {path: u for path, u in jax.tree_util.tree_leaves_with_path(tree) if u.size}
        factors = orthogonalize_leaves(
            list(leaves.values()),
            [axes[path] for path in leaves],
            orthogonalizer,
            placing=placing,
            layouts=[layouts.get(path) for path in leaves],
            like=[momenta[path] for path in leaves],
            chunk_size=chunk_size,
        )
        scaled = {}
        for (path, u), factor in zip(leaves.items(), factors, strict=True):
            shape = whole_shape(u.shape, layouts.get(path, ((),) * u.ndim), placing)
            _, fan_in, fan_out = axes[path].matrix_shape(shape)
            scaled[path] = (shape_scale(fan_in, fan_out) * factor).astype(u.dtype)
        return jax.tree_util.tree_map_with_path(lambda path, u: scaled.get(path, u), tree)

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        used, mu = update_momentum(
            updates, state.mu, beta=beta, nesterov=nesterov, kind=momentum, count=count
        )
        placing = find_placing(mesh, jax.tree.leaves(updates))
        return orthogonalize(used, state.mu, placing), MuonState(count, mu)

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float | jax.Array = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    ns_coeffs: str | Schedule | Any = "jordan",
    ns_steps: int | None = None,
    ns_dtype: jax.typing.DTypeLike | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    scale: str | ShapeScale | None = "spectral",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: float | jax.Array = 0.9,
    adam_b2: float | jax.Array = 0.95,
    adam_eps: float | jax.Array = 1e-8,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    adam_nesterov: bool = False,
    routing: Routing = None,
    matrix_axes: Any = None,
    mesh: AnyMesh | None = None,
    shardings: Any = None,
    chunk_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the hidden matrices, AdamW for the rest, in one `optax.multi_transform`.

    Args:
        learning_rate: of the Muon leaves; a number or a schedule.
        beta, nesterov, momentum, scale, mu_dtype: as in `scale_by_muon`; `mu_dtype` holds for
            AdamW's first moment too.
        ns_coeffs, ns_steps, ns_dtype: `coeffs`, `steps` and `dtype` of `newton_schulz`.
        orthogonalizer: takes the place of `newton_schulz`; then give none of the `ns_` arguments.
        weight_decay: decoupled, `w -= learning_rate * weight_decay * w`: not multiplied by the
            shape scale.
        weight_decay_mask: tree of bools (or a prefix of one), or a callable from the params to
            one; `False` is not decayed. Holds for both optimizers.
        adam_learning_rate: of the AdamW leaves; `None` is `learning_rate`.
        adam_b1, adam_b2, adam_eps: AdamW's own.
        adam_weight_decay: `None` is `weight_decay`.
        adam_nesterov: NAdamW in place of AdamW, which is what optax.contrib.muon runs.
        routing: which leaf goes where, if not by the built-in rules; see `label_params`.
        matrix_axes: axes for the Muon leaves, if not by the built-in rules; as in `scale_by_muon`,
            where `None` in place of axes keeps the built-in choice for that leaf.
        mesh, shardings, chunk_size: as in `scale_by_muon`, for the Muon leaves.

    Returns:
        A transformation that takes (and needs) `params` in `update`.

    Raises:
        ValueError: an unknown name, a rule that matches no leaf, or a leaf that no rule takes.

    References:
        Jordan, 2024, kellerjordan.github.io/posts/muon; Liu et al., 2025, arXiv 2502.16982.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muon(0.02, weight_decay=0.1, adam_learning_rate=3e-4)
        >>> params = {"embed": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 32))}}
        >>> muon_jax.label_params(params)
        {'embed': 'adamw', 'mlp': {'kernel': 'muon'}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    if orthogonalizer is None:
        orthogonalizer = NewtonSchulz(ns_coeffs, ns_steps, ns_dtype)
    elif ns_coeffs != "jordan" or ns_steps is not None or ns_dtype is not None:
        raise ValueError(
            "Give either an orthogonalizer or ns_coeffs, ns_steps and ns_dtype, which configure "
            "the default one; got both."
        )

    def hybrid(tree) -> optax.GradientTransformationExtraArgs:
        """The routed pair for a tree of this structure and these shapes."""
        routes = route(tree, routing)
        axes = {path: leaf.axes for path, leaf in routes.items()}
        if matrix_axes is not None:
            axes |= axes_by_path(matrix_axes, tree, partial=True)
        mask = _decay_mask(weight_decay_mask, tree)
        return optax.multi_transform(
            {
                MUON: optax.chain(
                    scale_by_muon(
                        beta=beta,
                        nesterov=nesterov,
                        momentum=momentum,
                        orthogonalizer=orthogonalizer,
                        scale=scale,
                        mu_dtype=mu_dtype,
                        matrix_axes=functools.partial(map_paths, axes),
                        mesh=mesh,
                        shardings=shardings,
                        chunk_size=chunk_size,
                    ),
                    optax.add_decayed_weights(weight_decay, mask),
                    optax.scale_by_learning_rate(learning_rate),
                ),
                ADAMW: optax.adamw(
                    learning_rate if adam_learning_rate is None else adam_learning_rate,
                    b1=adam_b1,
                    b2=adam_b2,
                    eps=adam_eps,
                    mu_dtype=mu_dtype,
                    weight_decay=weight_decay if adam_weight_decay is None else adam_weight_decay,
                    mask=mask,
                    nesterov=adam_nesterov,
                ),
                FROZEN: optax.set_to_zero(),
            },
            functools.partial(map_paths, {path: leaf.label for path, leaf in routes.items()}),
        )

    # Checked here, not at the first step.
    scale_by_muon(momentum=momentum, scale=scale, chunk_size=chunk_size)

    def init(params):
        return hybrid(params).init(params)

    def update(updates, state, params=None, **extra_args):
        return hybrid(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _decay_mask(mask: Any, tree: Any) -> Callable[[Any], Any] | None:
    """The mask as a callable that also fits a tree whose other leaves are masked."""
    if mask is None:
        return None
    if not is_tree_of(mask, _is_bool):
        mask = mask(tree)
    decayed = broadcast_prefix(mask, tree, what="weight_decay_mask", is_value=_is_bool)
    return functools.partial(map_paths, decayed)


def _is_bool(x: Any) -> bool:
    return isinstance(x, (bool, np.bool_))
