"""A matrix optimizer for the hidden matrices and another one for the other leaves."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import optax

from muon_jax._checks import check_dtype, check_mesh, check_number, check_static
from muon_jax._constraint import Constraints, as_constraints, constrained
from muon_jax._decay import add_decayed_weights, as_decay_mask, scale_by_learning_rate
from muon_jax._elementwise import scale_by_adam, scale_by_lion, sign_of_momentum, trace
from muon_jax._momentum import is_packed
from muon_jax._options import takes_options_of
from muon_jax._precision import cast_like
from muon_jax._routing.rules import FROZEN, MUON, OTHER, Routing, route, warn_of_guesses
from muon_jax._sharding.layout import AnyMesh
from muon_jax._trees import map_paths, only_updated

# The named optimizers for the other leaves, and the arguments that each reads.
OTHERS = {
    "adamw": (
        *("adam_learning_rate", "adam_b1", "adam_b2", "adam_eps", "adam_eps_root"),
        *("adam_weight_decay", "adam_nesterov", "nu_dtype"),
    ),
    "sgd": ("other_learning_rate", "other_b1", "other_weight_decay"),
    "lion": ("other_learning_rate", "other_b1", "other_weight_decay"),
    "sign": ("other_learning_rate", "other_b1", "other_weight_decay"),
    "frozen": (),
}


class HybridOptions(TypedDict, total=False):
    """The options of `hybrid`, for type checkers; a test compares them with its signature."""

    weight_decay: optax.ScalarOrSchedule
    weight_decay_mask: Any
    cautious_weight_decay: bool
    constraint: Constraints
    mu_dtype: jax.typing.DTypeLike | None
    nu_dtype: jax.typing.DTypeLike | None
    other_optimizer: str | optax.GradientTransformation
    other_learning_rate: optax.ScalarOrSchedule | None
    other_b1: float | jax.Array | None
    other_weight_decay: optax.ScalarOrSchedule | None
    adam_learning_rate: optax.ScalarOrSchedule | None
    adam_b1: float | jax.Array | None
    adam_b2: float | jax.Array | None
    adam_eps: float | jax.Array | None
    adam_eps_root: float | jax.Array | None
    adam_weight_decay: optax.ScalarOrSchedule | None
    adam_nesterov: bool | None
    routing: Routing
    matrix_axes: Any
    mesh: AnyMesh | None
    shardings: Any
    chunk_size: int | None


def partition(
    matrix_optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    cautious_weight_decay: bool = False,
    constraint: Constraints = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    other_optimizer: str | optax.GradientTransformation = "adamw",
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    other_b1: float | jax.Array | None = None,
    other_weight_decay: optax.ScalarOrSchedule | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: float | jax.Array | None = None,
    adam_b2: float | jax.Array | None = None,
    adam_eps: float | jax.Array | None = None,
    adam_eps_root: float | jax.Array | None = None,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    adam_nesterov: bool | None = None,
    routing: Routing = None,
    matrix_axes: Any = None,
    mesh: AnyMesh | None = None,
    shardings: Any = None,
    chunk_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`matrix_optimizer` for the hidden matrices, another optimizer for the other leaves.

    Args:
        matrix_optimizer: makes the transformation of the hidden matrices; called with the two last
            links of its chain, which add the decay and scale by the rate, and with `mu_dtype`,
            `matrix_axes`, `mesh`, `shardings` and `chunk_size`. All else is as in `hybrid`.
    """
    check_number("learning_rate", learning_rate, at_least=0, schedule=True)
    check_number("weight_decay", weight_decay, at_least=0, schedule=True)
    check_dtype("mu_dtype", mu_dtype, or_packed=True)
    check_dtype("nu_dtype", nu_dtype)
    check_mesh(mesh)
    check_static("cautious_weight_decay", cautious_weight_decay)
    other = {
        "other_learning_rate": other_learning_rate,
        "other_b1": other_b1,
        "other_weight_decay": other_weight_decay,
        "adam_learning_rate": adam_learning_rate,
        "adam_b1": adam_b1,
        "adam_b2": adam_b2,
        "adam_eps": adam_eps,
        "adam_eps_root": adam_eps_root,
        "adam_weight_decay": adam_weight_decay,
        "adam_nesterov": adam_nesterov,
        "nu_dtype": nu_dtype,
    }
    other = _by_new_names(other_optimizer, other)
    _check_other(other_optimizer, [name for name, value in other.items() if value is not None])
    for name, value in other.items():
        if name.endswith(("learning_rate", "weight_decay")):
            check_number(name, value, at_least=0, optional=True, schedule=True)
        elif name.endswith(("b1", "b2")):
            check_number(name, value, at_least=0, below=1, optional=True)
        elif "eps" in name:
            check_number(name, value, at_least=0, optional=True)
    check_static("adam_nesterov", adam_nesterov)

    def of_other(name: str, default: Any) -> Any:
        whose = "adam" if other_optimizer == "adamw" else "other"
        return _or(other[f"{whose}_{name}"], default)

    def other_of(mask: Any) -> optax.GradientTransformation:
        if not isinstance(other_optimizer, str):
            return other_optimizer
        if other_optimizer == "frozen":
            return optax.set_to_zero()
        dtype = None if is_packed(mu_dtype) else mu_dtype
        b1 = of_other("b1", 0.9)
        first = {
            "adamw": lambda: scale_by_adam(
                b1,
                _or(adam_b2, 0.95),
                _or(adam_eps, 1e-8),
                _or(adam_eps_root, 0.0),
                mu_dtype=dtype,
                nu_dtype=nu_dtype,
                nesterov=bool(adam_nesterov),
            ),
            "sgd": lambda: trace(b1, mu_dtype=dtype),
            "lion": lambda: scale_by_lion(b1, mu_dtype=dtype),
            "sign": lambda: sign_of_momentum(b1, mu_dtype=dtype),
        }[other_optimizer]()
        decay = of_other("weight_decay", weight_decay)
        return optax.chain(first, *last(decay, mask, of_other("learning_rate", learning_rate)))

    def last(decay: Any, mask: Any, rate: Any) -> Any:
        """The last two links of both chains."""
        add_decay = add_decayed_weights(decay, mask, cautious_weight_decay)
        return add_decay, scale_by_learning_rate(rate)

    def routed(tree) -> optax.GradientTransformationExtraArgs:
        """The pair for a tree of this structure and these shapes."""
        routes = route(tree, routing, matrix_axes)
        axes = {path: leaf.axes for path, leaf in routes.items()}
        mask = as_decay_mask(weight_decay_mask, tree, routes)
        links = last(weight_decay, mask, learning_rate)
        where = {"matrix_axes": functools.partial(map_paths, axes), "shardings": shardings}
        if constraints:
            links = constrained(constraints, links, where | settings)
        return optax.multi_transform(
            {
                MUON: matrix_optimizer(*links, **where, **settings),
                OTHER: other_of(mask),
                FROZEN: optax.set_to_zero(),
            },
            functools.partial(map_paths, {path: leaf.label for path, leaf in routes.items()}),
        )

    constraints = as_constraints(constraint)
    settings = {"mu_dtype": mu_dtype, "mesh": mesh, "chunk_size": chunk_size}
    # Checked here, not at the first step.
    links = last(weight_decay, None, learning_rate)
    matrix_optimizer(*links, matrix_axes=None, shardings=None, **settings)
    return fitted(routed, lambda params: warn_of_guesses(route(params, routing, matrix_axes)))


@takes_options_of(partition)
def hybrid(
    scale_by: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    **options: Unpack[HybridOptions],
) -> optax.GradientTransformationExtraArgs:
    """`scale_by`, decay and rate for the hidden matrices, AdamW for the other leaves.

    Every optimizer of the family is this function with its own `scale_by`, and takes its options.

    Updates have their gradients' dtypes. Decay and rate act in float32, and are rounded once.

    Args:
        scale_by: called with `mu_dtype`, `matrix_axes`, `mesh`, `shardings` and `chunk_size`, gives
            the transformation of the Muon leaves, as `scale_by_muon` does.
        learning_rate: of the Muon leaves; a number or a schedule.
        weight_decay: decoupled, `w -= learning_rate * weight_decay * w`: not multiplied by the
            shape scale; a number or a schedule. With an Optax optimizer as `other_optimizer`,
            which has a decay of its own, it is that of the Muon leaves alone, as are the mask and
            the caution.
        weight_decay_mask: what is decayed; `None` is every leaf, norms, biases and embeddings too.
            `"matrices"` decays the leaves that the matrix optimizer takes, and no other. Or a tree
            of bools (or a prefix of one), a callable from the params to such a tree, or `(regex,
            bool)` pairs as in `routing`, which leave a leaf without a match decayed. Holds for
            both optimizers.
        cautious_weight_decay: decay an entry only where its update shrinks it too (arXiv
            2510.12402). Holds for both optimizers.
        constraint: of the norms of the Muon leaves, such as `hyperball()`; one, or a list of which
            each sees what the one before has done.
        mu_dtype: dtype of the stored momentum, for AdamW's first moment too; `None` is each
            parameter's own. `jnp.int8` stores Muon's in one byte and a scale a row, `jnp.int4` in
            half a byte, and both leave AdamW's as it is. Rounding noise is at most 1.3 % of a row's
            largest entry in int8 at a beta of 0.95, and 23 % in int4.
        nu_dtype: dtype of AdamW's stored second moment; `None` is each parameter's own. In bfloat16
            an average of squares with `adam_b2=0.999` does not move any more: ask for float32.
        other_optimizer: what takes the other leaves: `"adamw"`, `"sgd"` (heavy-ball momentum
            `other_b1`), `"lion"` (`other_b1` and 0.99), `"sign"` (0.001 of the sign of the
            momentum, decay `other_b1`), `"frozen"`, or any Optax optimizer with its own rate. All
            arithmetic is in float32. So that one gradient never stops a leaf for good, a finite
            gradient that the state cannot hold is bounded first: AdamW's at half the root of the
            largest number of `nu_dtype` (9e18, in float16 128), the others' at half the largest of
            `mu_dtype`.
        other_learning_rate, other_b1, other_weight_decay: of SGD, Lion or the sign; `None` is
            `learning_rate`, 0.9 and `weight_decay`.
        adam_learning_rate: of AdamW; `None` is `learning_rate`.
        adam_b1, adam_b2, adam_eps, adam_eps_root: AdamW's own; `None` is 0.9, 0.95, 1e-8 and 0.
        adam_weight_decay: of AdamW; `None` is `weight_decay`.
        adam_nesterov: NAdamW in place of AdamW, which is what optax.contrib.muon runs; `None` is
            `False`.
        routing: which leaf goes where, if not by the built-in rules; see `label_params`.
        matrix_axes: axes for the Muon leaves, if not by the built-in rules; as in `scale_by_muon`,
            where `None` in place of axes keeps the built-in choice for that leaf.
        mesh, shardings, chunk_size: as in `scale_by_muon`, for the Muon leaves.

    Returns:
        A transformation that takes (and needs) `params` in `update`.

    Raises:
        ValueError: an unknown name, a number out of its range, an argument that
            `other_optimizer` does not read, a rule that matches no leaf, or a leaf that no rule
            takes.
        TypeError: a transformation where a function is meant that makes one, or the reverse.

    Example:
        >>> import functools, jax.numpy as jnp, muon_jax
        >>> scale_by = functools.partial(muon_jax.scale_by_muon, nesterov=False, scale="mup")
        >>> tx = muon_jax.hybrid(scale_by, 0.02, other_optimizer="sgd", other_learning_rate=0.1)
        >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    _check_scale_by(scale_by)

    def matrix_optimizer(add_decay: Any, scale_by_rate: Any, **settings: Any) -> Any:
        return optax.chain(scale_by(**settings), add_decay, scale_by_rate)

    return partition(matrix_optimizer, learning_rate, **options)


def fitted(
    build: Callable[[Any], optax.GradientTransformationExtraArgs],
    at_init: Callable[[Any], None] = lambda params: None,
) -> optax.GradientTransformationExtraArgs:
    """One transformation from `build(tree)`, which makes one for trees of a structure.

    Its updates end in their gradients' dtypes, however wide the links before were.
    """

    def init(params):
        at_init(params)
        return build(params).init(params)

    def update(updates, state, params=None, **extra_args):
        params = only_updated(params, updates)
        new, state = build(updates).update(updates, state, params, **extra_args)
        return jax.tree.map(cast_like, new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _by_new_names(other_optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What was called Adam's where SGD or Lion reads it, by its own name."""
    reads = OTHERS.get(other_optimizer, ()) if isinstance(other_optimizer, str) else ()
    for new in reads:
        old = new.replace("other_", "adam_")
        if new != old and given[old] is not None and given[new] is None:
            warnings.warn(
                f"With other_optimizer={other_optimizer!r} {old!r} is now called {new!r}; the old "
                "name will go in the next release.",
                DeprecationWarning,
                stacklevel=4,
            )
            given |= {new: given[old], old: None}
    return given


def _check_scale_by(scale_by: Any) -> None:
    if isinstance(scale_by, optax.GradientTransformation) or not callable(scale_by):
        raise TypeError(
            "scale_by must be a function that makes the transformation, such as "
            "muon_jax.scale_by_muon or a functools.partial of it with settings; got "
            f"{type(scale_by).__name__}. Give the function, not what it returns."
        )


def _check_other(other: Any, given: list[str]) -> None:
    """Refuses what `other_optimizer` may not be, and the arguments that it does not read."""
    known = f"one of {', '.join(OTHERS)}, or an Optax optimizer"
    if isinstance(other, str) and other not in OTHERS:
        raise ValueError(f"other_optimizer must be {known}; got {other!r}.")
    if not isinstance(other, (str, optax.GradientTransformation)):
        made = " It makes an optimizer: call it with its rate." if callable(other) else ""
        name = getattr(other, "__name__", repr(other))
        raise TypeError(
            f"other_optimizer must be {known}, such as optax.adamw(1e-3); got {name}.{made}"
        )
    reads: tuple[str, ...] = OTHERS[other] if isinstance(other, str) else ()
    unread = [name for name in given if name not in reads]
    if not unread:
        return
    if isinstance(other, str):
        names = ", ".join(reads) or "none of the other_ and adam_ arguments"
        reason = f"other_optimizer={other!r} reads {names}"
    else:
        reason = (
            "other_optimizer has settings of its own, a rate and a decay among them; the "
            "other_ and adam_ arguments and nu_dtype belong to the named ones"
        )
    raise ValueError(f"{reason}: leave {', '.join(unread)} out, or choose another optimizer.")
