"""A matrix optimizer for the hidden matrices and another one for the rest, routed leaf by leaf."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._decay import add_decayed_weights, as_decay_mask
from muon_jax._layout import AnyMesh
from muon_jax._paths import map_paths, only_updated
from muon_jax._routing import ADAMW, FROZEN, MUON, Routing, route

RESTS = ("adamw", "sgd", "lion", "sign", "frozen")


def hybrid(
    scale_by: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    cautious_weight_decay: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    rest: str | optax.GradientTransformation = "adamw",
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
    """`scale_by`, decay and rate for the hidden matrices, AdamW for the rest.

    Every optimizer of the family is this function with its own `scale_by`, and takes its options.

    Args:
        scale_by: called with `mu_dtype`, `matrix_axes`, `mesh`, `shardings` and `chunk_size`, gives
            the transformation of the Muon leaves, as `scale_by_muon` does.
        learning_rate: of the Muon leaves; a number or a schedule.
        weight_decay: decoupled, `w -= learning_rate * weight_decay * w`: not multiplied by the
            shape scale; a number or a schedule.
        weight_decay_mask: what is decayed; `None` is every leaf, norms, biases and embeddings too.
            `"matrices"` decays the leaves that the matrix optimizer takes, and no other. Or a tree
            of bools (or a prefix of one), a callable from the params to such a tree, or `(regex,
            bool)` pairs as in `routing`, which leave a leaf without a match decayed. Holds for
            both optimizers.
        cautious_weight_decay: decay an entry only where its update shrinks it too (arXiv
            2510.12402). Holds for both optimizers.
        mu_dtype: dtype of the stored momentum, for AdamW's first moment too; `None` is each
            parameter's own. `jnp.int8` stores Muon's in one byte and a scale a row, each entry
            within 1/254 of the largest of its row, and leaves AdamW's as it is.
        rest: what takes the other leaves: `"adamw"`, `"sgd"` (heavy-ball momentum `adam_b1`),
            `"lion"` (`adam_b1` and 0.99), `"sign"` (0.001 of the sign of the momentum, decay
            `adam_b1`), `"frozen"`, or any Optax optimizer with its own rate.
        adam_learning_rate: of the other leaves; `None` is `learning_rate`.
        adam_b1, adam_b2, adam_eps: AdamW's own.
        adam_weight_decay: of the other leaves; `None` is `weight_decay`.
        adam_nesterov: NAdamW in place of AdamW, which is what optax.contrib.muon runs.
        routing: which leaf goes where, if not by the built-in rules; see `label_params`.
        matrix_axes: axes for the Muon leaves, if not by the built-in rules; as in `scale_by_muon`,
            where `None` in place of axes keeps the built-in choice for that leaf.
        mesh, shardings, chunk_size: as in `scale_by_muon`, for the Muon leaves.

    Returns:
        A transformation that takes (and needs) `params` in `update`.

    Raises:
        ValueError: an unknown name, a rule that matches no leaf, or a leaf that no rule takes.

    Example:
        >>> import functools, jax.numpy as jnp, muon_jax
        >>> scale_by = functools.partial(muon_jax.scale_by_muon, nesterov=False, scale="mup")
        >>> tx = muon_jax.hybrid(scale_by, 0.02, rest="sgd", adam_learning_rate=0.1)
        >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    if isinstance(rest, str) and rest not in RESTS:
        raise ValueError(
            f"rest must be one of {', '.join(RESTS)}, or an Optax optimizer; got {rest!r}."
        )
    if not isinstance(rest, str) and (adam_learning_rate, adam_weight_decay) != (None, None):
        raise ValueError(
            "rest is an optimizer with a rate and a decay of its own; adam_learning_rate and "
            "adam_weight_decay belong to the named ones. Give either."
        )
    packed = mu_dtype is not None and jnp.dtype(mu_dtype) == jnp.int8

    def rest_of(mask: Any) -> optax.GradientTransformation:
        if not isinstance(rest, str):
            return rest
        if rest == "frozen":
            return optax.set_to_zero()
        dtype = None if packed else mu_dtype
        rate = learning_rate if adam_learning_rate is None else adam_learning_rate
        decay = weight_decay if adam_weight_decay is None else adam_weight_decay
        first = {
            "adamw": lambda: optax.scale_by_adam(
                adam_b1, adam_b2, adam_eps, mu_dtype=dtype, nesterov=adam_nesterov
            ),
            "sgd": lambda: optax.trace(adam_b1, accumulator_dtype=dtype),
            "lion": lambda: optax.scale_by_lion(adam_b1, 0.99, mu_dtype=dtype),
            "sign": lambda: optax.chain(
                optax.ema(adam_b1, debias=False, accumulator_dtype=dtype),
                optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates)),
                optax.scale(0.001),
            ),
        }[rest]()
        return optax.chain(
            first,
            add_decayed_weights(decay, mask, cautious_weight_decay),
            optax.scale_by_learning_rate(rate),
        )

    def routed(tree) -> optax.GradientTransformationExtraArgs:
        """The pair for a tree of this structure and these shapes."""
        routes = route(tree, routing, matrix_axes)
        axes = {path: leaf.axes for path, leaf in routes.items()}
        mask = as_decay_mask(weight_decay_mask, tree, routes)
        return optax.multi_transform(
            {
                MUON: optax.chain(
                    scale_by(
                        mu_dtype=mu_dtype,
                        matrix_axes=functools.partial(map_paths, axes),
                        mesh=mesh,
                        shardings=shardings,
                        chunk_size=chunk_size,
                    ),
                    add_decayed_weights(weight_decay, mask, cautious_weight_decay),
                    optax.scale_by_learning_rate(learning_rate),
                ),
                ADAMW: rest_of(mask),
                FROZEN: optax.set_to_zero(),
            },
            functools.partial(map_paths, {path: leaf.label for path, leaf in routes.items()}),
        )

    # Checked here, not at the first step.
    scale_by(mu_dtype=mu_dtype, matrix_axes=None, mesh=None, shardings=None, chunk_size=chunk_size)

    def init(params):
        return routed(params).init(params)

    def update(updates, state, params=None, **extra_args):
        params = only_updated(params, updates)
        return routed(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
