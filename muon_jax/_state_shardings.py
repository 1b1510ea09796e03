"""The sharding of an optimizer's state, derived from the sharding of the params."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from muon_jax._trees import KeyPath, broadcast_prefix


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> Any:
    """Returns the sharding of every leaf of `tx.init(params)`, for `jax.jit` and for checkpoints.

    Under Auto axes `jax.jit(tx.init)` puts the state on one device, and some leaves of the state
    do not have the shape of a parameter: the scales of int8 momentum, sums over rows, low-rank
    factors. A leaf of the state that belongs to a parameter is sharded like the parameter along
    each axis of the same size. Its other axes, all other leaves and counters are replicated.

    Pass the result to the step as `out_shardings` too, because XLA may otherwise choose a different
    sharding for the reduced leaves.

    Args:
        tx: Any Optax transformation, which may contain an optimizer of this package.
        params: Arrays or `jax.ShapeDtypeStruct`s, each with a sharding here or in `shardings`.
        shardings: The shardings of the params: a tree of `NamedSharding` or a prefix of one. `None`
            means the shardings of the arrays themselves.

    Returns:
        A tree of `NamedSharding` with the structure of the state.

    Example:
        >>> import jax, jax.numpy as jnp, muon_jax
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        >>> params = jax.device_put({"mlp": {"kernel": jnp.ones((8, 32))}}, sharding)
        >>> tx = muon_jax.muon(0.02, mu_dtype=jnp.int8)
        >>> where = muon_jax.state_shardings(tx, params, sharding)
        >>> state = jax.jit(tx.init, out_shardings=where)(params)

        Orbax restores each leaf with this sharding from such a tree:

        >>> like = jax.tree.map(
        ...     lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
        ... )  # for orbax.checkpoint.v1.load(path, like)
    """
    leaves = dict(jax.tree_util.tree_leaves_with_path(params))
    shapes = {path: jnp.shape(x) for path, x in leaves.items()}
    if shardings is None:
        shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    given = broadcast_prefix(
        shardings, params, what="shardings", kind="a NamedSharding", is_value=_is_named
    )
    if not given:
        raise ValueError("state_shardings takes the mesh from params, but params has no leaves.")
    replicated = NamedSharding(next(iter(given.values())).mesh, PartitionSpec())

    def sharding_of(path: KeyPath, x: jax.ShapeDtypeStruct) -> NamedSharding:
        owner = _parameter_of(path, shapes)
        if owner is None or len(x.shape) != len(shapes[owner]):
            return replicated
        like, shape = given[owner], shapes[owner]
        names = (*like.spec, *(None,) * (len(shape) - len(like.spec)))
        kept = [
            name if size == whole else None
            for name, size, whole in zip(names, x.shape, shape, strict=True)
        ]
        while kept and kept[-1] is None:
            kept.pop()
        return NamedSharding(like.mesh, PartitionSpec(*kept), memory_kind=like.memory_kind)

    return jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(tx.init, params))


def _parameter_of(path: KeyPath, shapes: Mapping[KeyPath, Any]) -> KeyPath | None:
    """Returns the path of the parameter that a leaf of the state belongs to, or None.

    That path is a section of `path`, preceded by the keys of the states around it and possibly
    followed by keys within a leaf. If several sections match, one that follows a field of a state
    is preferred, then the longest, then the last.
    """
    candidates = [
        (start == 0 or isinstance(path[start - 1], GetAttrKey), end - start, start)
        for start in range(len(path) + 1)
        for end in range(start, len(path) + 1)
        if path[start:end] in shapes
    ]
    if not candidates:
        return None
    _, length, start = max(candidates)
    return path[start : start + length]


def _is_named(x: Any) -> bool:
    return isinstance(x, NamedSharding)
