"""The optimizer of `optax.contrib.muon` with the same arguments, implemented by this package."""

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
from muon_jax._matrices.hooks import Arrays, Step, stateless
from muon_jax._matrix_axes import MatrixAxes, as_matrix_axes, is_matrix_axes
from muon_jax._momentum import is_packed
from muon_jax._muon import scale_by_muon
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
    """Returns `optax.contrib.muon`, but on a mesh each matrix is orthogonalised only once.

    Arguments and results are those of Optax, with these exceptions:

    - `ns_coeffs` are not in the state.
    - All arithmetic on low-precision gradients and state is in float32, with float32 coefficients,
      and an update keeps its gradient's dtype.
    - The preset `"muon"`, which Optax documents but rejects, is the same as `"standard"`.
      `ns_steps` is ignored if `ns_coeffs` has one row per step; Optax documents that too, but
      rejects fewer steps than rows.
    - `"aol"` and `"schatten"` do not depend on the size of the gradients. Optax has a floor there
      that shrinks the update of matrices with a norm below about 1e-4.

    As in Optax, all leaves with two axes are orthogonalised, including embeddings and heads, which
    `muon` recognises by name and excludes.

    Args:
        learning_rate, beta, weight_decay, nesterov: The settings of the matrices, of which
            `nesterov` applies to Adam as well. The momentum has a bias correction.
        ns_coeffs: `"standard"`, `"dion"`, `(a, b, c)`, or one such row per step.
        ns_steps: The number of steps if there is a single `(a, b, c)`.
        eps: A number added to the norm of the matrices, and in Adam to the square root.
        weight_decay_mask: As in `hybrid`, but it applies to the matrices only.
        mu_dtype: The dtype of the stored momentum and of Adam's first moment.
        adaptive: Whether to scale each leaf's orthogonal factor by its inner product with the
            momentum, the dual norm.
        preconditioning: How singular values are scaled into (0, 1]: `"frobenius"`, `"spectral"`,
            `"aol"` or `"schatten"`.
        adam_b1, adam_b2, adam_eps_root, adam_weight_decay, adam_learning_rate: The settings of
            Adam, whose learning rate is that of the matrices by default.
        muon_weight_dimension_numbers: A tree (or a prefix of one) of `MuonDimensionNumbers` or
            `MatrixAxes`, with `None` for leaves that go to Adam, or a callable from the params to
            such a tree. `None` means all leaves with two axes.
        consistent_rms: A factor of the shape scale `consistent_rms * sqrt(max(fan_in, fan_out))`.
            `None` means the shape scale `sqrt(max(1, fan_out / fan_in))`.

    Raises:
        ValueError: A name is unknown, a number is out of range, or the axes do not fit a leaf.

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
        scale_by_muon,
        beta=beta,
        nesterov=nesterov,
        momentum="optax",
        after=stateless(_times_dual_norm) if adaptive else None,
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

    build(None)  # errors in the settings are raised here rather than at the first step
    return fitted(lambda tree: build(_choices(muon_weight_dimension_numbers, tree)))


def _times_dual_norm(factors: Arrays, step: Step) -> Arrays:
    """Multiplies the factors of each leaf by their inner product with the momentum."""
    products = [jnp.conj(m) * o for m, o in zip(step.momentum, factors, strict=True)]
    norms = [jnp.sum(total) for total in step.matrices.sum(products, over="matrix")]
    return [norm * o for norm, o in zip(norms, factors, strict=True)]


def _rows(ns_coeffs: Any, ns_steps: int) -> tuple[Row, ...]:
    check_integer("ns_steps", ns_steps, at_least=1)
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in _PRESETS:
            raise ValueError(f"ns_coeffs must be one of {', '.join(_PRESETS)}; got {ns_coeffs!r}.")
        ns_coeffs = _PRESETS[ns_coeffs]
    rows = np.asarray(ns_coeffs, np.float64)
    if rows.shape[-1:] != (3,) or rows.ndim > 2 or not len(rows) or not np.isfinite(rows).all():
        raise ValueError(
            "ns_coeffs must be the name of a preset, three finite numbers (a, b, c), or one such "
            f"row per step; got {ns_coeffs!r}."
        )
    rows = np.tile(rows, (ns_steps, 1)) if rows.ndim == 1 else rows
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


def _consistent(factor: Any) -> Any:
    return lambda fan_in, fan_out: math.sqrt(max(fan_in, fan_out)) * factor


def _choices(dimension_numbers: Any, tree: Any) -> Any:
    """Returns the routing of `tree`: matrix axes for the matrices, the label of Adam otherwise."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    if not paths:  # optax.tree.map_params calls `init` with a placeholder instead of params
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
