"""QK-clip: the query and key weights of a head shrink where its attention logits grew too large.

After the optimizer's step, for a head whose largest logit S of that step's forward pass is above
the threshold: gamma = threshold / S, `W_q *= gamma ** alpha`, `W_k *= gamma ** (1 - alpha)`. Where
each query head has a key head of its own, that head's logits are then gamma times what they would
be, and no other head changes. A key head that several query heads read takes the smallest gamma of
theirs, so the logits of all of them shrink.

No logit is cut off: S is of the params before the step, gamma brings it back to the threshold, and
what the step itself and the clips of the layers below add to the next forward pass comes on top.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from muon_jax._checks import check_number
from muon_jax._trees import path_strings
from muon_jax.variants.attention_specs import AttentionSpec, Names

Specs = AttentionSpec | Sequence[AttentionSpec]

_MISSING: Any = object()


def qk_clip(
    specs: Specs, *, threshold: float | jax.Array = 100.0, alpha: float | jax.Array = 0.5
) -> optax.GradientTransformationExtraArgs:
    """The last link of a chain: changes the updates so that the new params are clipped.

    `update(updates, state, params, max_logits=...)` takes the largest attention logits of the
    forward pass that made the gradients: a tree whose paths are those of the attention modules, as
    in `{"blocks/0/attention": x}` or the same nested, with `x` of `(heads,)`, or `(layers, heads)`
    where the params are stacked `(layers, ...)`. They are the maxima over all of the step's batch:
    over its shards, and over its microbatches, of which `optax.MultiSteps` hands on the last one's
    only. A head whose largest logit is not finite, or not above the threshold, keeps its update.
    `max_logits` must be given; `None` leaves the updates as they are. Inside `shard_map` heads are
    the device's own.

    The threshold is no bound of the next forward pass, which exceeds it by what one step adds to
    the logits: the growth of W_q and W_k themselves, and other inputs from the layers below, which
    have moved and been clipped too. Measured in 400 steps of `muonclip` on a transformer of two
    layers and width 64, with thresholds of 2 and 5: by up to 6 % at a rate of 0.001 and 30 % at
    0.01. Where a logit has a hard limit, set the threshold that much lower.

    Where params are kept in low precision too, the float32 master weights are what to clip: in
    bfloat16 a factor within 0.2 % of 1 is rounded away, so that with alpha = 0.5 logits up to 0.4 %
    above the threshold are not clipped.

    Args:
        specs: `GroupedQuery` or `MultiHeadLatent`, or several; each holds for all modules that
            have its leaves.
        threshold: largest logit that is left alone; greater than 0, and infinity never clips.
        alpha: the queries' share of the factor, in its exponent, from 0 to 1; the keys' is
            `1 - alpha`.

    Returns:
        A stateless transformation that takes (and needs) `params` and `max_logits` in `update`.

    Raises:
        TypeError: `update` without `max_logits`, specs that are none, or a number of another type.
        ValueError: a number out of range, a spec that fits no module, `max_logits` for no module, a
            module without `max_logits`, shapes that do not fit, or a norm after the projections.
            Norms, and specs that fit nothing, are noticed in `init`.

    References:
        Kimi Team, 2025, "Kimi K2", arXiv 2507.20534, algorithm 1.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from muon_jax.variants.attention_specs import GroupedQuery
        >>> params = {"attention": {"query": jnp.ones((4, 6)), "key": jnp.ones((4, 6))}}
        >>> tx = optax.chain(optax.sgd(0.0), qk_clip(GroupedQuery(heads=2)))
        >>> max_logits = {"attention": jnp.array([50.0, 400.0])}
        >>> updates, _ = tx.update(params, tx.init(params), params, max_logits=max_logits)
        >>> optax.apply_updates(params, updates)["attention"]["key"][0]
        Array([1. , 1. , 1. , 0.5, 0.5, 0.5], dtype=float32)
    """
    specs = _check_arguments(specs, threshold, alpha)

    def init(params):
        _find_modules(list(_by_name(params)), specs)
        return optax.EmptyState()

    def update(updates, state, params=None, *, max_logits=_MISSING, **extra_args):
        if max_logits is _MISSING:
            others = f"; got {', '.join(map(repr, sorted(extra_args)))}" * bool(extra_args)
            raise TypeError(
                "qk_clip's update must be given max_logits=, the largest attention logits by "
                f"module{others}. Pass max_logits=None for a step without a clip."
            )
        if max_logits is None:
            return updates, state
        if params is None:
            raise ValueError("qk_clip clips params + updates: give update the params.")
        factors = _find_factors(updates, max_logits, specs, threshold, alpha)
        before = dict(jax.tree_util.tree_leaves_with_path(params))
        names = _names(updates)

        def clip(path, u):
            factor = factors.get(names[path])
            if factor is None:
                return u
            # (params + u) * factor - params, in the order that is u itself where the factor is 1.
            clipped = _widen(u) * factor + _widen(before[path]) * (factor - 1)
            return clipped.astype(u.dtype)

        return jax.tree_util.tree_map_with_path(clip, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def clip_qk(
    params: optax.Params,
    max_logits: Any,
    specs: Specs,
    *,
    threshold: float | jax.Array = 100.0,
    alpha: float | jax.Array = 0.5,
) -> optax.Params:
    """What `qk_clip` does, as a function of params; for master weights that Optax does not hold.

    Args:
        params: after the optimizer's step.
        max_logits: of the forward pass before it, by attention module, as in `qk_clip`.
        specs, threshold, alpha: as in `qk_clip`.

    Returns:
        The params, scaled in float32 or better and rounded to their own dtype.

    Raises:
        ValueError: as `qk_clip` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from muon_jax.variants.attention_specs import GroupedQuery
        >>> params = {"query": jnp.ones((4, 6)), "key": jnp.ones((4, 3))}
        >>> clipped = clip_qk(params, jnp.array([50.0, 400.0]), GroupedQuery(heads=2, kv_heads=1))
        >>> clipped["query"][0]
        Array([1. , 1. , 1. , 0.5, 0.5, 0.5], dtype=float32)
        >>> clipped["key"][0]
        Array([0.5, 0.5, 0.5], dtype=float32)
    """
    specs = _check_arguments(specs, threshold, alpha)
    factors = _find_factors(params, max_logits, specs, threshold, alpha)

    names = _names(params)

    def clip(path, x):
        factor = factors.get(names[path])
        return x if factor is None else (_widen(x) * factor).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(clip, params)


def _check_arguments(specs: Specs, threshold: Any, alpha: Any) -> tuple[AttentionSpec, ...]:
    check_number("threshold", threshold, above=0, finite=False)
    check_number("alpha", alpha, at_least=0, at_most=1)
    listed = tuple(specs) if isinstance(specs, (tuple, list)) else (specs,)
    if not listed or not all(hasattr(spec, "factors") for spec in listed):
        raise TypeError(
            "specs must be GroupedQuery(...), MultiHeadLatent(...) or a list of them, which say "
            f"where the heads are; got {specs!r}."
        )
    return listed


def _find_factors(
    tree: Any, max_logits: Any, specs: Sequence[AttentionSpec], threshold: Any, alpha: Any
) -> dict[str, jax.Array]:
    """What the leaves of attention modules are multiplied by, by name, broadcastable to them."""
    shapes = {name: jnp.shape(x) for name, x in _by_name(tree).items()}
    given = _by_name(max_logits)
    modules = _find_modules(list(shapes), specs)
    if unknown := given.keys() - {module for module, _ in modules}:
        raise ValueError(
            f"max_logits has {_some(unknown)}, where no spec finds an attention module. Its paths "
            f"are the modules': {_some(module for module, _ in modules)}."
        )
    found: dict[str, jax.Array] = {}
    for module, spec in modules:
        if module not in given:
            raise ValueError(
                f"max_logits has no entry for {module!r}, only for {_some(given)}. Give it for "
                "every module that a spec finds; zeros never clip."
            )
        gamma = _gamma(given[module], threshold, spec, module)
        head_dims = {}
        for parts, factor in zip(spec.scaled, spec.factors(gamma, alpha), strict=True):
            leaves = [n for n in shapes for part in _each(parts) if _module_of(n, part) == module]
            for name in leaves:
                if name in found:
                    raise ValueError(
                        f"{name!r} would be scaled twice, the second time by {spec}. Queries and "
                        "keys are leaves of their own, and a module has one spec."
                    )
                found[name] = _fit(factor, shapes[name], spec, name)
                if factor.shape[-2] > 1:
                    head_dims[name] = found[name].size // factor.size
        if len(set(head_dims.values())) > 1:
            raise ValueError(
                f"Queries and keys have heads of one size; along head_axis={spec.head_axis} these "
                f"have {head_dims}. Correct the axis or the numbers of heads in {spec}."
            )
    return found


def _find_modules(
    names: Sequence[str], specs: Sequence[AttentionSpec]
) -> list[tuple[str, AttentionSpec]]:
    """The attention modules: whatever has all the leaves that a spec names."""
    found = []
    for spec in specs:
        wanted = [part for parts in spec.scaled for part in _each(parts)]
        holders = [{_module_of(name, part) for name in names} for part in wanted]
        modules = sorted(m for m in set.intersection(*holders) if m is not None)
        # Without leaves it is the stand-in for params of optax.tree_map_params.
        if names and not modules:
            raise ValueError(
                f"{spec} fits no attention module: none has all of {_some(wanted)}. The leaves "
                f"are {_some(names)}."
            )
        for module in modules:
            below = f"{module}/" if module else ""
            spec.check(module, [name[len(below) :] for name in names if name.startswith(below)])
            found.append((module, spec))
    return found


def _gamma(max_logits: Any, threshold: Any, spec: AttentionSpec, module: str) -> jax.Array:
    """By how much the logits of every head shrink; 1 where nothing is to be clipped."""
    max_logits = jnp.asarray(max_logits, jnp.float32)
    if max_logits.shape[-1:] != (spec.heads,):
        raise ValueError(
            f"max_logits has one number a head, ({spec.heads},), or (layers, {spec.heads}) for "
            f"stacked layers; at {module!r} it has the shape {max_logits.shape}. Reduce it, or "
            f"correct heads in {spec}."
        )
    if any((sharding := jax.typeof(max_logits).sharding).spec):
        max_logits = jax.reshard(max_logits, NamedSharding(sharding.mesh, PartitionSpec()))
    over = jnp.isfinite(max_logits) & (max_logits > threshold)
    return jnp.where(over, threshold / jnp.where(over, max_logits, 1), 1).astype(jnp.float32)


def _fit(factor: jax.Array, shape: tuple[int, ...], spec: AttentionSpec, name: str) -> jax.Array:
    """Factors `(*layers, heads, columns)` along the axes of a leaf, broadcastable to it."""
    *layers, heads, columns = factor.shape
    one = shape[len(layers) :]
    if shape[: len(layers)] != tuple(layers):
        raise ValueError(
            f"The leading axes of max_logits are those of stacked leaves; got {tuple(layers)} for "
            f"{name!r} of shape {shape}."
        )
    if heads == columns == 1 and len(one) <= spec.most_axes:
        return factor.reshape(*layers, *(1,) * len(one))
    axis = spec.head_axis + len(one) * (spec.head_axis < 0)
    size, rest = (one[axis], one[axis + 1 :]) if 0 <= axis < len(one) else (0, ())
    if size == heads and columns in (1, *rest[:1]) and len(one) <= spec.most_axes:
        tail = (columns, *(1,) * len(rest))[: len(rest)]
        return factor.reshape(*layers, *(1,) * axis, heads, *tail)
    most = min(2, spec.most_axes)
    if size and size % heads == 0 and columns in (1, size // heads) and len(one) <= most:
        merged = jnp.broadcast_to(factor, (*layers, heads, size // heads))
        return merged.reshape(*layers, *(1,) * axis, size, *(1,) * len(rest))
    raise ValueError(
        f"{name!r} has the shape {one} in each layer; head_axis={spec.head_axis} of at most "
        f"{spec.most_axes} axes is to hold {heads} heads, or of at most 2 axes {heads} × "
        f"{columns if columns > 1 else 'head_dim'}. Correct {spec}, or give max_logits of shape "
        "(layers, heads) if layers are stacked."
    )


def _names(tree: Any) -> dict[Any, str]:
    """The name of each leaf by key path; keys such as `model.layers.0` are paths too."""
    return {path: string.replace(".", "/") for path, string in path_strings(tree).items()}


def _by_name(tree: Any) -> dict[str, Any]:
    names = _names(tree)
    return {names[path]: x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _each(names: Names) -> tuple[str, ...]:
    return tuple(name.replace(".", "/") for name in ([names] if isinstance(names, str) else names))


def _module_of(name: str, part: str) -> str | None:
    """The path above `part` in a leaf's name: `attn` for `query` in `attn/query/kernel`."""
    module, found, _ = f"/{name}/".rpartition(f"/{part}/")
    return module[1:] if found else None


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _some(names: Iterable[str], limit: int = 12) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" * (len(listed) > limit)
    return ", ".join(map(repr, listed[:limit])) + more
