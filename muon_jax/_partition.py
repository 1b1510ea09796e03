"""One optimizer for the hidden matrices and another for all other leaves."""

import functools
import warnings
from collections.abc import Callable, Iterable
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

# The named optimizers for the other leaves, and the arguments that each one reads.
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
    """Updates the hidden matrices with `matrix_optimizer` and all other leaves with another one.

    `matrix_optimizer` makes the transformation of the hidden matrices. It is called with the last
    two links of its chain, which add the decay and scale by the rate, and with `mu_dtype`,
    `matrix_axes`, `mesh`, `shardings` and `chunk_size`. All other arguments are as in `hybrid`.
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
    given = {name: value for name, value in other.items() if value is not None}
    given = _by_new_names(other_optimizer, given)
    _check_other(other_optimizer, given)
    for name, value in given.items():
        if name.endswith(("learning_rate", "weight_decay")):
            check_number(name, value, at_least=0, optional=True, schedule=True)
        elif name.endswith(("b1", "b2")):
            check_number(name, value, at_least=0, below=1, optional=True)
        elif "eps" in name:
            check_number(name, value, at_least=0, optional=True)
    check_static("adam_nesterov", adam_nesterov)

    def other_of(mask: Any) -> optax.GradientTransformation:
        if not isinstance(other_optimizer, str):
            return other_optimizer
        if other_optimizer == "frozen":
            return optax.set_to_zero()
        dtype = None if is_packed(mu_dtype) else mu_dtype
        whose = "adam" if other_optimizer == "adamw" else "other"
        b1 = given.get(f"{whose}_b1", 0.9)
        if other_optimizer == "adamw":
            first = scale_by_adam(
                b1,
                given.get("adam_b2", 0.95),
                given.get("adam_eps", 1e-8),
                given.get("adam_eps_root", 0.0),
                mu_dtype=dtype,
                nu_dtype=nu_dtype,
                nesterov=bool(adam_nesterov),
            )
        else:
            others: Any = {"sgd": trace, "lion": scale_by_lion, "sign": sign_of_momentum}
            first = others[other_optimizer](b1, mu_dtype=dtype)
        decay = given.get(f"{whose}_weight_decay", weight_decay)
        rate = given.get(f"{whose}_learning_rate", learning_rate)
        return optax.chain(first, *last(decay, mask, rate))

    def last(decay: Any, mask: Any, rate: Any) -> Any:
        """Returns the last two links of both chains."""
        add_decay = add_decayed_weights(decay, mask, cautious_weight_decay)
        return add_decay, scale_by_learning_rate(rate)

    def routed(tree) -> optax.GradientTransformationExtraArgs:
        """Returns both optimizers for a tree of this structure and these shapes."""
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
    # Errors in the settings are raised here rather than at the first step.
    links = last(weight_decay, None, learning_rate)
    matrix_optimizer(*links, matrix_axes=None, shardings=None, **settings)
    return fitted(routed, lambda params: warn_of_guesses(route(params, routing, matrix_axes)))


@takes_options_of(partition)
def hybrid(
    scale_by: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    **options: Unpack[HybridOptions],
) -> optax.GradientTransformationExtraArgs:
    """Updates the hidden matrices with `scale_by`, decay and rate, and all other leaves with AdamW.

    Most optimizers of this package are this function with their own `scale_by`, and take its
    options.

    Updates keep their gradients' dtypes. Decay and rate are applied in float32 and rounded once.

    Args:
        scale_by: A function that returns the transformation of the Muon leaves, such as
            `scale_by_muon`. It is called with `mu_dtype`, `matrix_axes`, `mesh`, `shardings` and
            `chunk_size`.
        learning_rate: The learning rate of the Muon leaves, a number or a schedule.
        weight_decay: The decoupled weight decay, `w -= learning_rate * weight_decay * w`, a number
            or a schedule. It is not multiplied by the shape scale. If `other_optimizer` is an
            Optax optimizer, which has a decay of its own, then this argument,
            `weight_decay_mask` and `cautious_weight_decay` apply to the Muon leaves only.
        weight_decay_mask: The leaves to decay. `None` means every leaf, including norms, biases
            and embeddings; `"matrices"` means only the leaves that the matrix optimizer takes. It
            may also be a tree of bools (or a prefix of one), a callable from the params to such a
            tree, or `(regex, bool)` pairs as in `routing`; leaves without a match are decayed.
            Applies to both optimizers.
        cautious_weight_decay: Whether to decay an entry only if its update shrinks it as well
            (arXiv 2510.12402). Applies to both optimizers.
        constraint: A constraint on the norms of the Muon leaves, such as `hyperball()`, or a list
            of constraints, applied in order.
        mu_dtype: The dtype of the stored momentum and of AdamW's first moment. `None` means the
            dtype of each parameter. `jnp.int8` stores Muon's momentum as one byte per entry and
            one scale per row, `jnp.int4` as half a byte per entry; AdamW's first moment then has
            the dtype of each parameter. The rounding noise is at most 1.3 % of a row's largest
            entry in int8 at a beta of 0.95, and 23 % in int4.
        nu_dtype: The dtype of AdamW's stored second moment. `None` means the dtype of each
            parameter. In bfloat16 an average of squares with `adam_b2=0.999` stops changing:
            choose float32 for it.
        other_optimizer: The optimizer of the other leaves: `"adamw"`, `"sgd"` (heavy-ball momentum
            `other_b1`), `"lion"` (`other_b1` and 0.99), `"sign"` (0.001 times the sign of the
            momentum, whose decay is `other_b1`), `"frozen"`, or any Optax optimizer with its own
            rate. The named ones compute in float32. So that no single gradient stops a leaf
            permanently, they clip finite gradients that the state cannot hold: AdamW at half the
            square root of the largest number of `nu_dtype` (9e18, or 128 in float16), the others
            at half the largest number of `mu_dtype`.
        other_learning_rate, other_b1, other_weight_decay: The settings of `"sgd"`, `"lion"` and
            `"sign"`. `None` means `learning_rate`, 0.9 and `weight_decay`.
        adam_learning_rate: The learning rate of AdamW. `None` means `learning_rate`.
        adam_b1, adam_b2, adam_eps, adam_eps_root: As in `optax.adamw`. `None` means 0.9, 0.95,
            1e-8 and 0.
        adam_weight_decay: The weight decay of AdamW. `None` means `weight_decay`.
        adam_nesterov: Whether to use NAdamW instead of AdamW, as optax.contrib.muon does. `None`
            means `False`.
        routing: The optimizer of each leaf, in place of the built-in rules; see `label_params`.
        matrix_axes: The matrix axes of the Muon leaves, in place of the built-in rules, in the
            forms that `scale_by_muon` accepts. `None` for a leaf keeps the built-in choice.
        mesh, shardings, chunk_size: As in `scale_by_muon`, for the Muon leaves.

    Returns:
        A transformation that requires `params` in `update`.

    Raises:
        ValueError: A name is unknown, a number is out of range, `other_optimizer` does not read
            an argument, a rule matches no leaf, or no rule matches a leaf.
        TypeError: A transformation was given instead of a function that makes one, or vice versa.

    Example:
        >>> import functools, jax.numpy as jnp, muon_jax
        >>> scale_by = functools.partial(muon_jax.scale_by_muon, nesterov=False, scale="mup")
        >>> tx = muon_jax.hybrid(scale_by, 0.02, other_optimizer="sgd", other_learning_rate=0.1)
        >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    if isinstance(scale_by, optax.GradientTransformation) or not callable(scale_by):
        raise TypeError(
            "scale_by must be a function that makes the transformation, such as "
            "muon_jax.scale_by_muon or a functools.partial of it with settings; got "
            f"{type(scale_by).__name__}. Pass the function itself, not its result."
        )

    def matrix_optimizer(add_decay: Any, scale_by_rate: Any, **settings: Any) -> Any:
        return optax.chain(scale_by(**settings), add_decay, scale_by_rate)

    return partition(matrix_optimizer, learning_rate, **options)


def fitted(
    build: Callable[[Any], optax.GradientTransformationExtraArgs],
    at_init: Callable[[Any], None] = lambda params: None,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that calls `build(tree)` for the tree it is given, at every call.

    Updates are cast to their gradients' dtypes at the end, whatever dtype the links compute in.
    """

    def init(params):
        at_init(params)
        return build(params).init(params)

    def update(updates, state, params=None, **extra_args):
        params = only_updated(params, updates)
        new, state = build(updates).update(updates, state, params, **extra_args)
        return jax.tree.map(cast_like, new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _by_new_names(other_optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Renames `adam_` arguments to `other_` if SGD, Lion or sign reads them, with a warning."""
    reads = OTHERS.get(other_optimizer, ()) if isinstance(other_optimizer, str) else ()
    for new in reads:
        old = new.replace("other_", "adam_")
        if new != old and old in given and new not in given:
            warnings.warn(
                f"With other_optimizer={other_optimizer!r}, {old!r} is now called {new!r}; the old "
                "name will be removed in the next release.",
                DeprecationWarning,
                stacklevel=4,
            )
            given[new] = given.pop(old)
    return given


def _check_other(other: Any, given: Iterable[str]) -> None:
    """Checks that `other_optimizer` is valid and that it reads every argument in `given`."""
    known = f"one of {', '.join(OTHERS)}, or an Optax optimizer"
    if isinstance(other, str) and other not in OTHERS:
        raise ValueError(f"other_optimizer must be {known}; got {other!r}.")
    if not isinstance(other, (str, optax.GradientTransformation)):
        hint = " Call this function with its learning rate." if callable(other) else ""
        name = getattr(other, "__name__", repr(other))
        raise TypeError(
            f"other_optimizer must be {known}, such as optax.adamw(1e-3); got {name}.{hint}"
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
            "an Optax optimizer as other_optimizer has its own settings, such as its learning rate "
            "and weight decay; the other_ and adam_ arguments and nu_dtype apply only to the named "
            "optimizers"
        )
    raise ValueError(f"{reason}. Remove {', '.join(unread)}, or choose another other_optimizer.")
