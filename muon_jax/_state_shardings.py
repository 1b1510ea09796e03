"""The sharding of an optimizer's state, from that of the params."""

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
    """The sharding of every leaf of `tx.init(params)`, for `jax.jit` and for checkpoints.

    Under Auto axes `jax.jit(tx.init)` puts the state on one device, and the state has leaves that
    the params' own shardings do not fit: scales of int8 momentum, sums over rows, factors of low
    rank. A leaf of the state that belongs to a parameter is split as that parameter is, along each
    axis that has the parameter's size; other axes, other leaves and counters are replicated.

    Give the same to the step, as its `out_shardings`: of reduced leaves XLA may choose otherwise.

    Args:
        tx: any Optax transformation, also one with an optimizer of this package inside.
        params: arrays or `jax.ShapeDtypeStruct`s.
        shardings: a tree of `NamedSharding`, or a prefix of one; `None` is the params' own.

    Returns:
        A tree of `NamedSharding` like the state.

    Raises:
        ValueError: a parameter without a sharding.

    Example:
        >>> import jax, jax.numpy as jnp, muon_jax
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        >>> params = jax.device_put({"mlp": {"kernel": jnp.ones((8, 32))}}, sharding)
        >>> tx = muon_jax.muon(0.02, mu_dtype=jnp.int8)
        >>> where = muon_jax.state_shardings(tx, params, sharding)
        >>> state = jax.jit(tx.init, out_shardings=where)(params)

        Restored by Orbax, each leaf comes where it belongs:

        >>> like = jax.tree.map(
        ...     lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, where
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
        raise ValueError("state_shardings needs params with leaves: their shardings name the mesh.")
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
    """The path of the parameter that a leaf of the state belongs to, which is part of its own.

    Before it are the states around; behind it may be the parts of a leaf. Of several such parts the
    one counts that a state's field holds, then the longest, then the last.
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
