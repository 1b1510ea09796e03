"""Muon: gradients -> momentum -> orthogonalise -> shape scale -> weight decay -> learning rate."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from muon_jax._matrices.stages import Orthogonalizer, Stages
from muon_jax._options import takes_options_of
from muon_jax._orthogonalize.coefficients import Schedule
from muon_jax._orthogonalize.newton_schulz import configured
from muon_jax._partition import hybrid
from muon_jax._scale import ShapeScale
from muon_jax._sharding.layout import AnyMesh


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
        count: steps taken, int32 scalar.
        mu: momentum, shaped like the params; under `mu_dtype=int8` `values` and `scales` of it.
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
        mu_dtype: dtype of the stored momentum; `None` is each parameter's own, `int8` one byte an
            entry and a scale a row.
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
    stages = Stages(
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
    )

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), stages.init_momentum(params))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        used, mu = stages.average(updates, state.mu, count)
        matrices = stages.matrices(updates)
        factors = matrices.orthogonalize(matrices.take(used), like=state.mu)
        return matrices.give(matrices.scale(factors), updates), MuonState(count, mu)

    return optax.GradientTransformation(init, update)


@takes_options_of(hybrid)
def hybrid_muon(
    scale_by: Callable[..., optax.GradientTransformation],
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
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`hybrid` of a variant that has Muon's stages."""
    orthogonalizer = configured(orthogonalizer, ns_coeffs, ns_steps, ns_dtype)
    stages = {"beta": beta, "nesterov": nesterov, "momentum": momentum, "scale": scale}
    scale_by = functools.partial(scale_by, orthogonalizer=orthogonalizer, **stages)
    return hybrid(scale_by, learning_rate, **options)


@takes_options_of(hybrid_muon)
def muon(
    learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Muon for the hidden matrices, AdamW for the other leaves, in one `optax.multi_transform`.

    Args:
        learning_rate: of the Muon leaves; a number or a schedule.
        beta, nesterov, momentum, scale: as in `scale_by_muon`.
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
    return hybrid_muon(scale_by_muon, learning_rate, **options)
