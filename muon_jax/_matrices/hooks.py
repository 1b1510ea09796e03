"""Hooks: functions of matrices that run at certain places of Muon's chain and can be combined.

The arguments `before` and `after` of `scale_by_muon` are hooks around orthogonalisation. A
`Constraint` has one hook for the update and one for the weights, and works with every optimizer
that `hybrid` makes.
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
    """The values of the current step that a hook may read.

    Attributes:
        matrices: Methods for norms and sums of each matrix, on any mesh.
        updates: The input tree: the gradients, or in a constraint the updates.
        params: The weights before the step; None if `update` was called without params.
        momentum: The average to orthogonalise, before any hook; empty in a constraint.
        count: The number of steps including this one, an int32 scalar; None in a constraint.
    """

    matrices: "Matrices"
    updates: Any
    params: Any
    momentum: Sequence[jax.Array] = ()
    count: Any = None

    def gradients(self) -> Arrays:
        """Returns the parts of `updates` in float32 or wider."""
        return [widen(g) for g in self.matrices.split(self.updates)]

    def weights(self, name: str) -> Arrays:
        """Returns the parts of `params` in float32 or wider; `name` is the hook's, for an error."""
        if self.params is None:
            raise ValueError(f"{name} needs the params: call update(updates, state, params).")
        return [widen(w) for w in self.matrices.split(self.params)]


class HookState(NamedTuple):
    """State of a hook.

    Attributes:
        value: A tree like the params, with the state of each of their matrices.
    """

    value: Any


class Hook(NamedTuple):
    """A function of matrices, with or without state.

    Attributes:
        update: A function `(arrays, state, step) -> (arrays, state)`. Arrays are in float32 or
            wider, and the state is a list with a tree of arrays for each part.
        init: A function `(matrices, params) -> state`; None if the hook has no state.
        entrywise: Whether the state is a float32 number for each entry, initially zero and sharded
            like the leaf. `init` is then not called.
        products: Whether the hook multiplies matrices. XLA then chooses how to distribute the
            products over the mesh, even with Explicit axes.

    Example:
        This hook clips every orthogonal factor at nine tenths of its largest entry:

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
    """Returns a hook without state from a function `(arrays, step) -> arrays`."""
    return Hook(lambda arrays, state, step: (function(arrays, step), state))


def entrywise(update: Callable[[Arrays, Arrays, Step], tuple[Arrays, Arrays]]) -> Hook:
    """Returns a hook whose state is one number per entry, initially zero, such as an average."""
    return Hook(update, lambda matrices, params: [], entrywise=True)


def as_hooks(name: str, given: Any) -> tuple[Hook, ...]:
    """Converts None, one hook or several hooks to a tuple."""
    return as_several(
        given, Hook, name, "a hook, such as muon_jax.equilibrate(), or a list of hooks"
    )


def as_several(given: Any, kind: type, name: str, rule: str) -> tuple:
    """Converts None, one instance of `kind` or several to a tuple; errors name the argument."""
    if given is None or isinstance(given, kind):
        return () if given is None else (given,)
    several = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for each in several:
        if not isinstance(each, kind):
            made = f" Call this function to make a {kind.__name__.lower()}." * callable(each)
            got = getattr(each, "__name__", repr(each))
            raise TypeError(f"{name} must be {rule}; got {got}.{made}")
    return several


def init_hooks(hooks: Sequence[Hook], matrices: "Matrices", params: Any) -> list[Any]:
    """Returns the states of the hooks that have one, each a tree like the params."""

    def init(hook: Hook) -> Any:
        if hook.entrywise:
            return optax.tree.zeros_like(params, dtype=jnp.float32)
        assert hook.init is not None
        return matrices.pack(hook.init(matrices, matrices.split(params)))

    return [init(hook) for hook in hooks if hook.init is not None]


def run_hooks(
    hooks: Sequence[Hook], arrays: Arrays, states: Sequence[Any], step: Step
) -> tuple[Arrays, list[Any]]:
    """Applies all hooks in order and returns the arrays and the new states.

    `states` has an entry for each hook with state, as in `init_hooks`. The arrays are widened to at
    least float32 if there is a hook.
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
