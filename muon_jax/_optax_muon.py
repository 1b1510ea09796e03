"""`optax.contrib.muon` by its own arguments, with the placement and the speed of this package."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muon_jax._checks import check_integer, check_number, check_static
from muon_jax._decay import add_decayed_weights, scale_by_learning_rate
from muon_jax._elementwise import scale_by_adam
from muon_jax._matrices.stages import Stages
from muon_jax._matrix_axes import MatrixAxes, as_matrix_axes, is_matrix_axes
from muon_jax._momentum import is_packed
from muon_jax._muon import MuonState
from muon_jax._orthogonalize.coefficients import NORMALIZATIONS, SCHEDULES, Row, Schedule
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._partition import fitted, hybrid
from muon_jax._routing.rules import OTHER
from muon_jax._trees import broadcast_prefix, map_paths

_JORDAN = (3.4445, -4.7750, 2.0315)
_PRESETS: dict[str, Any] = {"standard": _JORDAN, "muon": _JORDAN, "dion": SCHEDULES["you"].rows}


def optax_muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: str | Row | Sequence[Row] = _JORDAN,
    ns_steps: int = 5,
    beta: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: float | jax.Array = 0.9,
    adam_b2: float | jax.Array = 0.999,
    adam_eps_root: float | jax.Array = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.muon`: the same arguments and numbers, on any mesh each matrix once.

    In place of `optax.contrib.muon` nothing else changes in a program, but that `ns_coeffs` are not
    in the state. What differs, and why:

    - All leaves with two axes are orthogonalised, as there; `muon` routes by name, so that
      embeddings and heads are not.
    - Arithmetic on low-precision gradients and state is in float32, with coefficients in float32,
      and an update has its gradient's dtype.
    - The preset `"muon"`, which Optax documents and refuses, is its `"standard"`, and `ns_steps` is
      ignored where there is a row a step, which Optax documents and refuses for fewer steps.
    - `"aol"` and `"schatten"` do not depend on the size of the gradients. Optax has a floor there
      that shrinks the update of matrices with a norm below about 1e-4.

    Args:
        learning_rate: of the matrices; a number or a schedule.
        ns_coeffs: `"standard"`, `"dion"`, `(a, b, c)`, or one such row a step.
        ns_steps: how often one `(a, b, c)` is applied.
        beta: decay of the momentum, which is corrected for its start.
        eps: added to the norm of the matrices, and in Adam to the root.
        weight_decay: of the matrices; a number or a schedule.
        weight_decay_mask: as in `hybrid`; the matrices' alone.
        mu_dtype: dtype of the stored momentum and of Adam's first moment.
        nesterov: of the matrices, and in Adam.
        adaptive: scale each leaf's factor by its inner product with the momentum, the dual norm.
        preconditioning: how singular values are brought into (0, 1]: `"frobenius"`, `"spectral"`,
            `"aol"` or `"schatten"`.
        adam_b1, adam_b2, adam_eps_root, adam_weight_decay: of the other leaves.
        adam_learning_rate: of the other leaves; `None` is `learning_rate`.
        muon_weight_dimension_numbers: a tree (or a prefix of one) of `MuonDimensionNumbers`, or of
            `MatrixAxes`, with `None` for what goes to Adam, or a callable from the params to one;
            `None` is all leaves with two axes.
        consistent_rms: updates are scaled by this times `sqrt(max(fan_in, fan_out))`; `None` is
            `sqrt(max(1, fan_out / fan_in))`.

    Returns:
        A transformation that takes (and needs) `params` in `update`.

    Raises:
        ValueError: an unknown name, a number out of its range, or axes that do not fit a leaf.

    References:
        Jordan, 2024, kellerjordan.github.io/posts/muon, as in optax.contrib.muon of Optax 0.2.8.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.optax_muon(0.02, "dion", weight_decay=0.1, adam_learning_rate=3e-4)
        >>> params = {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    check_number("eps", eps, at_least=0)
    for name, decay in (("adam_b1", adam_b1), ("adam_b2", adam_b2)):
        check_number(name, decay, at_least=0, below=1)
    check_number("adam_eps_root", adam_eps_root, at_least=0)
    check_number("adam_weight_decay", adam_weight_decay, at_least=0, schedule=True)
    check_number("adam_learning_rate", adam_learning_rate, at_least=0, schedule=True, optional=True)
    check_number("consistent_rms", consistent_rms, at_least=0, optional=True)
    check_static("adaptive", adaptive)
    if preconditioning not in NORMALIZATIONS:
        raise ValueError(
            f"preconditioning must be one of {', '.join(NORMALIZATIONS)}; got {preconditioning!r}."
        )
    schedule = Schedule(_rows(ns_coeffs, ns_steps), normalization=preconditioning)  # type: ignore[arg-type]
    uses_eps = preconditioning in ("frobenius", "spectral")
    scale_by = functools.partial(
        _scale_by_muon,
        beta=beta,
        nesterov=nesterov,
        adaptive=adaptive,
        orthogonalizer=NewtonSchulz(schedule, absolute_eps=eps if uses_eps else None),
        scale="spectral" if consistent_rms is None else _consistent(consistent_rms),
    )
    first = scale_by_adam(
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype=None if is_packed(mu_dtype) else mu_dtype,
        nesterov=nesterov,
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    adam = optax.chain(first, add_decayed_weights(adam_weight_decay), scale_by_learning_rate(rate))

    def build(routing: Any) -> optax.GradientTransformationExtraArgs:
        return hybrid(
            scale_by,
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            mu_dtype=mu_dtype,
            other_optimizer=adam,
            routing=routing,
        )

    build(None)  # checked here, not at the first step
    return fitted(lambda tree: build(_choices(muon_weight_dimension_numbers, tree)))


def _scale_by_muon(
    *, beta: Any, nesterov: bool, adaptive: bool, orthogonalizer: Any, scale: Any, **placed: Any
) -> optax.GradientTransformation:
    """`scale_by_muon` with Optax's momentum, and adaptive if asked for."""
    stages = Stages(beta, nesterov, "optax", orthogonalizer, scale, **placed)

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), stages.init_momentum(params))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        averaged, mu = stages.average(updates, state.mu, count)
        matrices = stages.matrices(updates)
        before = matrices.split(averaged)
        factors = matrices.orthogonalize(before, like=state.mu)
        if adaptive:
            products = [jnp.conj(x) * y for x, y in zip(before, factors, strict=True)]
            norms = [jnp.sum(total) for total in matrices.sum(products, over="matrix")]
            factors = [norm * y for norm, y in zip(norms, factors, strict=True)]
        return matrices.merge(matrices.scale(factors), updates), MuonState(count, mu)

    return optax.GradientTransformation(init, update)


def _rows(ns_coeffs: Any, ns_steps: int) -> tuple[Row, ...]:
    check_integer("ns_steps", ns_steps, at_least=1)
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in _PRESETS:
            raise ValueError(f"ns_coeffs must be one of {', '.join(_PRESETS)}; got {ns_coeffs!r}.")
        ns_coeffs = _PRESETS[ns_coeffs]
    rows = np.asarray(ns_coeffs, np.float64)
    if rows.shape[-1:] != (3,) or rows.ndim > 2 or not len(rows) or not np.isfinite(rows).all():
        raise ValueError(
            "ns_coeffs must be a preset's name, three finite numbers (a, b, c), or one such row a "
            f"step; got {ns_coeffs!r}."
        )
    rows = np.tile(rows, (ns_steps, 1)) if rows.ndim == 1 else rows
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


def _consistent(factor: Any) -> Any:
    return lambda fan_in, fan_out: math.sqrt(max(fan_in, fan_out)) * factor


def _choices(dimension_numbers: Any, tree: Any) -> Any:
    """The routing of `tree`: axes for the matrices, Adam for the others."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    if not paths:  # the stand-in for params with which optax.tree.map_params calls `init`
        return None
    if dimension_numbers is None:
        chosen = {path: MatrixAxes(0, 1) for path, x in paths if jnp.ndim(x) == 2}
    else:
        if callable(dimension_numbers):
            dimension_numbers = dimension_numbers(tree)
        given = broadcast_prefix(
            dimension_numbers,
            tree,
            what="muon_weight_dimension_numbers",
            kind="MuonDimensionNumbers, MatrixAxes or None",
            is_value=is_matrix_axes,
            partial=True,
        )
        chosen = {path: as_matrix_axes(axes) for path, axes in given.items()}
    return map_paths({path: chosen.get(path, OTHER) for path, _ in paths}, tree)
