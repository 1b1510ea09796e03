"""QK-clip: scales down the query and key weights of heads whose attention logits are too large.

After the optimizer's step, each head whose largest logit S in that step's forward pass is above the
threshold is scaled: gamma = threshold / S, `W_q *= gamma ** alpha`, `W_k *= gamma ** (1 - alpha)`.
If each query head has its own key head, this multiplies that head's logits by gamma and changes no
other head. The factor of a key head that several query heads read is their smallest gamma, so the
logits of all of them shrink.

Logits are not bounded: S belongs to the params before the step. Gamma scales S back to the
threshold, but the step itself and the clipping of earlier layers change the next logits as well.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from muon_jax._checks import check_number
from muon_jax._precision import widen
from muon_jax._trees import path_strings, some
from muon_jax.variants.attention_specs import AttentionSpec, Names

Specs = AttentionSpec | Sequence[AttentionSpec]

_MISSING: Any = object()


def qk_clip(
    specs: Specs, *, threshold: float | jax.Array = 100.0, alpha: float | jax.Array = 0.5
) -> optax.GradientTransformationExtraArgs:
    """Changes updates, as the last link of a chain, such that the new params are clipped.

    `update(updates, state, params, max_logits=...)` takes the largest attention logits of the
    forward pass that computed the gradients. They are a tree with the paths of the attention
    modules, such as `{"blocks/0/attention": x}` or the same nested, where `x` has the shape
    `(heads,)`, or `(layers, heads)` if the params are stacked as `(layers, ...)`. They must be the
    maxima over the whole batch of the step, that is, over its shards and its microbatches;
    `optax.MultiSteps` passes on only those of the last microbatch. A head whose largest logit is
    not finite, or not above the threshold, keeps its update. `max_logits` is required; `None`
    leaves all updates unchanged. Inside `shard_map` the heads are the device's own.

    The threshold does not bound the next forward pass, which may exceed it by the effect of one
    step on the logits: the growth of W_q and W_k themselves, and different inputs from earlier
    layers. In 400 steps of `muonclip` on a transformer of two layers and width 64, with thresholds
    of 2 and 5, it was exceeded by up to 6 % at a learning rate of 0.001 and 30 % at 0.01. If logits
    have a hard limit, choose a threshold that much lower.

    If params are also kept in low precision, clip the float32 master weights: in bfloat16 a factor
    within 0.2 % of 1 is rounded to 1, so that with alpha = 0.5 logits up to 0.4 % above the
    threshold are not clipped.

    Args:
        specs: `GroupedQuery` or `MultiHeadLatent`, or a list of them. Each applies to all modules
            that have its leaves.
        threshold: The largest logit that is not clipped, greater than 0. Infinity disables
            clipping.
        alpha: The exponent of gamma for the queries, from 0 to 1; for the keys it is `1 - alpha`.

    Raises:
        TypeError: `update` is called without `max_logits`, or `specs` is of another type.
        ValueError: A spec fits no module, `max_logits` has no module or a module has no
            `max_logits`, shapes do not fit, or a norm follows the projections. Norms and specs
            without a module are errors of `init`.

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
            raise ValueError("qk_clip needs the params: call update(updates, state, params, ...).")
        factors = _find_factors(updates, max_logits, specs, threshold, alpha)
        before = dict(jax.tree_util.tree_leaves_with_path(params))
        names = _names(updates)

        def clip(path, u):
            factor = factors.get(names[path])
            if factor is None:
                return u
            # This is (params + u) * factor - params, in an order that gives exactly u for factor 1.
            clipped = widen(u) * factor + widen(before[path]) * (factor - 1)
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
    """Clips params like `qk_clip`, but as a function, for master weights outside of Optax.

    The params after the optimizer's step, and the largest logits of the forward pass before it,
    make params in the same dtypes. They are scaled in float32 or wider. The other arguments and the
    errors are those of `qk_clip`.

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
        return x if factor is None else (widen(x) * factor).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(clip, params)


def _check_arguments(specs: Specs, threshold: Any, alpha: Any) -> tuple[AttentionSpec, ...]:
    check_number("threshold", threshold, above=0, finite=False)
    check_number("alpha", alpha, at_least=0, at_most=1)
    listed = tuple(specs) if isinstance(specs, (tuple, list)) else (specs,)
    if not listed or not all(hasattr(spec, "factors") for spec in listed):
        raise TypeError(
            "specs must be GroupedQuery(...), MultiHeadLatent(...) or a list of them, which "
            f"describe the attention heads; got {specs!r}."
        )
    return listed


def _find_factors(
    tree: Any, max_logits: Any, specs: Sequence[AttentionSpec], threshold: Any, alpha: Any
) -> dict[str, jax.Array]:
    """Returns the factors of the leaves of attention modules, by name, in broadcastable shapes."""
    shapes = {name: jnp.shape(x) for name, x in _by_name(tree).items()}
    given = _by_name(max_logits)
    modules = _find_modules(list(shapes), specs)
    if unknown := given.keys() - {module for module, _ in modules}:
        raise ValueError(
            f"max_logits has {_some(unknown)}, where no spec finds an attention module. Its paths "
            f"must be those of the modules: {_some(module for module, _ in modules)}."
        )
    factors: dict[str, jax.Array] = {}
    for module, spec in modules:
        if module not in given:
            raise ValueError(
                f"max_logits has no entry for {module!r}, only for {_some(given)}. Pass an entry "
                "for every module that a spec finds; zeros disable clipping."
            )
        gamma = _gamma(given[module], threshold, spec, module)
        head_dims = {}
        for parts, factor in zip(spec.scaled, spec.factors(gamma, alpha), strict=True):
            leaves = [n for n in shapes for part in _each(parts) if _module_of(n, part) == module]
            for name in leaves:
                if name in factors:
                    raise ValueError(
                        f"{name!r} would be scaled twice, the second time by {spec}. Queries and "
                        "keys must be different leaves, and a module must have only one spec."
                    )
                factors[name] = _fit(factor, shapes[name], spec, name)
                if factor.shape[-2] > 1:
                    head_dims[name] = factors[name].size // factor.size
        if len(set(head_dims.values())) > 1:
            raise ValueError(
                "Queries and keys must have heads of one size, but along "
                f"head_axis={spec.head_axis} their sizes are {head_dims}. Correct the axis or the "
                f"numbers of heads in {spec}."
            )
    return factors


def _find_modules(
    names: Sequence[str], specs: Sequence[AttentionSpec]
) -> list[tuple[str, AttentionSpec]]:
    """Returns the attention modules, which are those with all the leaves that a spec names."""
    found = []
    for spec in specs:
        wanted = [part for parts in spec.scaled for part in _each(parts)]
        holders = [{_module_of(name, part) for name in names} for part in wanted]
        modules = sorted(m for m in set.intersection(*holders) if m is not None)
        # A tree without leaves is the placeholder for params of optax.tree_map_params.
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
    """Returns the factor of the logits of every head, which is 1 if it is not clipped."""
    max_logits = jnp.asarray(max_logits, jnp.float32)
    if max_logits.shape[-1:] != (spec.heads,):
        raise ValueError(
            f"max_logits must have one number per head, ({spec.heads},), or (layers, {spec.heads}) "
            f"for stacked layers; at {module!r} it has the shape {max_logits.shape}. Take the "
            f"maximum over other axes, or correct heads in {spec}."
        )
    if any((sharding := jax.typeof(max_logits).sharding).spec):
        max_logits = jax.reshard(max_logits, NamedSharding(sharding.mesh, PartitionSpec()))
    over = jnp.isfinite(max_logits) & (max_logits > threshold)
    return jnp.where(over, threshold / jnp.where(over, max_logits, 1), 1).astype(jnp.float32)


def _fit(factor: jax.Array, shape: tuple[int, ...], spec: AttentionSpec, name: str) -> jax.Array:
    """Reshapes factors `(*layers, heads, columns)` such that they broadcast to a leaf."""
    *layers, heads, columns = factor.shape
    one = shape[len(layers) :]
    if shape[: len(layers)] != tuple(layers):
        raise ValueError(
            "The leading axes of max_logits must be those of the stacked leaves; got "
            f"{tuple(layers)} for {name!r} of shape {shape}."
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
        f"{name!r} has the shape {one} in each layer, but head_axis={spec.head_axis} must have the "
        f"size {heads}, with at most {spec.most_axes} axes, or {heads} × "
        f"{columns if columns > 1 else 'head_dim'}, with at most 2 axes. Correct {spec}, or pass "
        "max_logits of shape (layers, heads) if layers are stacked."
    )


def _names(tree: Any) -> dict[Any, str]:
    """Returns the name of each leaf by key path; keys such as `model.layers.0` are split too."""
    return {path: string.replace(".", "/") for path, string in path_strings(tree).items()}


def _by_name(tree: Any) -> dict[str, Any]:
    names = _names(tree)
    return {names[path]: x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _each(names: Names) -> tuple[str, ...]:
    return tuple(name.replace(".", "/") for name in ([names] if isinstance(names, str) else names))


def _module_of(name: str, part: str) -> str | None:
    """Returns the path above `part` in a leaf's name: `attn` for `query` in `attn/query/kernel`."""
    module, found, _ = f"/{name}/".rpartition(f"/{part}/")
    return module[1:] if found else None


def _some(names: Iterable[str]) -> str:
    return some(map(repr, sorted(names)))
