"""Hooks: functions of matrices at a place of Muon's chain, which combine.

`before` and `after` orthogonalisation they are arguments of `scale_by_muon`; a `Constraint` has one
of the update and one of the weights, and goes with every optimizer of the family.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muon_jax._precision import cast_like, widen

if TYPE_CHECKING:
    from muon_jax._matrices.stages import Matrices

Arrays = list[jax.Array]


class Step(NamedTuple):
    """What a hook may read.

    Attributes:
        matrices: norms and sums of each matrix, on any mesh.
        updates: the tree that came in: gradients, or in a constraint what is made of them.
        params: the weights before the step; None where `update` was called without.
        momentum: the average to orthogonalise, before any hook; in a constraint empty.
        count: steps taken with this one, int32; in a constraint None.
    """

    matrices: "Matrices"
    updates: Any
    params: Any
    momentum: Sequence[jax.Array] = ()
    count: Any = None

    def gradients(self) -> Arrays:
        """In float32 or wider."""
        return [widen(g) for g in self.matrices.split(self.updates)]

    def weights(self, name: str) -> Arrays:
        """The params in float32 or wider.

        Raises:
            ValueError: `update` was called without them; the message has the hook's name.
        """
        if self.params is None:
            raise ValueError(f"{name} needs the params: call update(updates, state, params).")
        return [widen(w) for w in self.matrices.split(self.params)]


class HookState(NamedTuple):
    """State of a hook.

    Attributes:
        value: a tree like the params, with what is kept for each of their matrices.
    """

    value: Any


class Hook(NamedTuple):
    """A function of matrices, with or without state.

    Attributes:
        update: `(arrays, state, step) -> (arrays, state)`; arrays are in float32 or wider, and the
            state is a list with a tree of arrays for each matrix part.
        init: `(matrices, params) -> state`; None where there is none.
        entrywise: the state is a float32 number for each entry, zero at first, and stored as the
            leaf is; `init` is then not called.
        products: it multiplies matrices, which XLA may spread over the mesh as it likes, also one
            with Explicit axes.

    Example:
        Every orthogonal factor clipped at its largest entry but a tenth:

        >>> import jax.numpy as jnp, muon_jax
        >>> def clip(factors, state, step):
        ...     sizes = step.matrices.largest(factors)
        ...     return [jnp.clip(x, -0.9 * s, 0.9 * s) for x, s in zip(factors, sizes)], state
        >>> tx = muon_jax.muon(0.02, after=muon_jax.Hook(clip))
        >>> params = {"mlp": {"kernel": jnp.eye(8, 32)}}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """

    update: Callable[[Arrays, list[Any], Step], tuple[Arrays, list[Any]]]
    init: Callable[["Matrices", Arrays], list[Any]] | None = None
    entrywise: bool = False
    products: bool = False


def stateless(function: Callable[[Arrays, Step], Arrays]) -> Hook:
    """A hook from a function of the arrays alone."""
    return Hook(lambda arrays, state, step: (function(arrays, step), state))


def entrywise(update: Callable[[Arrays, Arrays, Step], tuple[Arrays, Arrays]]) -> Hook:
    """A hook whose state is a number for each entry, zero at first, such as an average."""
    return Hook(update, lambda matrices, params: [], entrywise=True)


def as_hooks(name: str, given: Any) -> tuple[Hook, ...]:
    """None, one hook or several as a tuple.

    Raises:
        TypeError: something else; the message names the argument.
    """
    if given is None or isinstance(given, Hook):
        return () if given is None else (given,)
    hooks = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for hook in hooks:
        if not isinstance(hook, Hook):
            called = " It makes a hook: call it." if callable(hook) else ""
            raise TypeError(
                f"{name} must be a hook, such as muon_jax.equilibrate(), or a list of hooks; got "
                f"{getattr(hook, '__name__', repr(hook))}.{called}"
            )
    return hooks


def init_hooks(hooks: Sequence[Hook], matrices: "Matrices", params: Any) -> list[Any]:
    """The states of those that have one, each a tree like the params."""

    def init(hook: Hook) -> Any:
        if hook.entrywise:
            return optax.tree.zeros_like(params, dtype=jnp.float32)
        assert hook.init is not None
        return matrices.pack(hook.init(matrices, matrices.split(params)))

    return [init(hook) for hook in hooks if hook.init is not None]


def run_hooks(
    hooks: Sequence[Hook], arrays: Arrays, states: Sequence[Any], step: Step
) -> tuple[Arrays, list[Any]]:
    """The arrays after all hooks, in float32 or wider where there are any, and the new states.

    `states` are those of `init_hooks`, for the hooks that have one.
    """
    if not hooks:
        return arrays, []
    arrays, remaining, kept = [widen(x) for x in arrays], iter(states), []
    matrices = step.matrices
    for hook in hooks:
        if hook.init is None:
            arrays, _ = hook.update(arrays, [], step)
            continue
        packed = next(remaining)
        state = matrices.split(packed) if hook.entrywise else matrices.unpack(packed)
        arrays, new = hook.update(arrays, state, step)
        new = [jax.tree.map(cast_like, *pair) for pair in zip(new, state, strict=True)]
        kept.append(matrices.merge(new, packed) if hook.entrywise else matrices.pack(new))
    return arrays, kept
