"""The predicted cost of a step: FLOPs, bytes exchanged, memory and time."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._matrices.parts import split_into_parts
from muon_jax._matrix_axes import MatrixAxes
from muon_jax._momentum import is_packed
from muon_jax._orthogonalize.devices import Device, Kernel, device_of
from muon_jax._orthogonalize.forms import Form
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._plan_rows import Plan, PlanRow
from muon_jax._precision import real_dtype
from muon_jax._routing.axes import EXPERT_STACK
from muon_jax._routing.rules import FROZEN, MUON, OTHER, Routing, route
from muon_jax._sharding.buckets import Bucket, Stack, by_call, call_seconds
from muon_jax._sharding.layout import (
    AnyMesh,
    Layout,
    PlacedArray,
    Placing,
    find_placing,
    is_sharding,
    layout_from_sharding,
    layouts_by_path,
)
from muon_jax._sharding.placement import plan_exchange
from muon_jax._state_shardings import state_shardings
from muon_jax._trees import KeyPath, path_strings
from muon_jax._work import Done, work_of

PLATFORMS = ("cpu", "gpu", "tpu")


def plan(
    params: Any,
    optimizer: optax.GradientTransformation | None = None,
    *,
    mesh: AnyMesh | None = None,
    shardings: Any = None,
    tokens_per_step: int | None = None,
    active_params: int | None = None,
    ns_coeffs: Any = "jordan",
    ns_steps: int | None = None,
    ns_dtype: jax.typing.DTypeLike | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    routing: Routing = None,
    matrix_axes: Any = None,
    platform: str | None = None,
) -> Plan:
    """Predicts the cost of a step of `muon`, or of another optimizer, from the params' shapes.

    Args:
        params: Arrays or `jax.ShapeDtypeStruct`s. Their own shardings are used if `shardings` is
            None.
        optimizer: An optimizer to plan instead of `muon`: any variant with its hooks and
            constraints, or any Optax transformation. Its `update` is traced but not run. The plan
            has one row with its products, decompositions, collectives and state. If a counter
            decides a branch, such as the renewal of SOAP's bases, the branch counts as often as it
            is taken in the first thousand steps; of other branches the most expensive one counts.
            Work outside a `shard_map` is assumed to be distributed evenly over the devices, without
            exchange. The arguments from `ns_coeffs` to `matrix_axes` are then settings of the
            optimizer, and the shardings are those of the params.
        mesh: As in `muon`.
        shardings: The shardings of the params, as in `muon`. If `muon` runs under Auto axes without
            shardings, XLA moves a leaf once for each mesh axis that splits it rather than once.
        tokens_per_step: The number of tokens of the whole batch; needed for the overhead.
        active_params: The number of parameters that are used for a token. `None` means all of them,
            which is only allowed if no leaf is a stack of experts.
        ns_coeffs, ns_steps, ns_dtype, mu_dtype, nu_dtype, routing, matrix_axes: As in `muon`.
        platform: The platform of the devices, `"cpu"`, `"gpu"` or `"tpu"`, which an `AbstractMesh`
            may not know. `None` means the platform of the mesh, or else of JAX's default devices.
            Times are predicted for two CPU cores, an H100 or a TPU v5e.

    Returns:
        A `Plan`: FLOPs, bytes exchanged, memory and predicted time, per bucket and in total.

    Raises:
        ValueError: The platform is unknown, an optimizer is combined with settings of `muon`, or
            the params have stacked experts and `tokens_per_step` is given without `active_params`.

    Example:
        >>> import jax, jax.numpy as jnp, muon_jax
        >>> params = {"mlp": {"kernel": jax.ShapeDtypeStruct((64, 256, 256), jnp.float32)}}
        >>> muon_jax.plan(params).total("standard_flops") == 64 * 5 * (4 + 2) * 256**3
        True
        >>> layer = {"mlp": {"kernel": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}}
        >>> soap = muon_jax.plan(layer, muon_jax.soap_muon(0.02))
        >>> soap.total("flops") > muon_jax.plan(layer).total("flops")
        True
    """
    if platform not in (None, *PLATFORMS):
        raise ValueError(f"platform must be one of {', '.join(PLATFORMS)}; got {platform!r}.")
    newton_schulz = NewtonSchulz(ns_coeffs, ns_steps, ns_dtype)
    routes = route(params, routing, matrix_axes)
    leaves: dict[KeyPath, Any] = dict(jax.tree_util.tree_leaves_with_path(params))
    placing = find_placing(mesh, list(leaves.values()))
    device = device_of(platform or placing.platform)
    model_flops = _model_flops(tokens_per_step, active_params, routes, leaves)
    if optimizer is not None:
        settings = (shardings, ns_steps, ns_dtype, mu_dtype, nu_dtype, routing, matrix_axes)
        default = isinstance(ns_coeffs, str) and ns_coeffs == "jordan"
        if not default or any(x is not None for x in settings):
            raise ValueError(
                "plan takes an optimizer or the settings of Muon, but got both. Pass the settings "
                "to the optimizer, and the shardings with the params."
            )
        row = _traced_row(optimizer, params, placing.devices, device, platform or placing.platform)
        return Plan((row,), placing.devices, model_flops, device.assumptions())
    axes = {path: leaf.axes for path, leaf in routes.items()}
    layouts = _layouts(leaves, params, shardings, placing)

    def state_bytes(path: KeyPath, moments: int) -> int:
        x = leaves[path]
        *outer, last = map(placing.ways, layouts[path] or [()])
        width = jnp.dtype(x.dtype).itemsize
        packed = is_packed(mu_dtype)
        complex_ = jnp.issubdtype(x.dtype, jnp.complexfloating)
        own = mu_dtype is None or packed or complex_
        first = width if own else jnp.dtype(mu_dtype).itemsize
        second = real_dtype(x.dtype).itemsize if nu_dtype is None else jnp.dtype(nu_dtype).itemsize
        rows = math.prod(x.shape[:-1]) // math.prod(outer)
        here = math.prod(x.shape) // (math.prod(outer) * last)
        if packed and moments == 1:
            values = (here * jnp.iinfo(mu_dtype).bits + 7) // 8
            return values + 4 * rows  # one float32 scale per row, on each device with a part of it
        return here * (first + second * (moments - 1))

    def elementwise(path: KeyPath) -> float:
        """Returns the time of the other optimizer, which reads and writes 7 numbers per entry."""
        x = leaves[path]
        split = math.prod(map(placing.ways, layouts[path]))
        return device.seconds([Kernel(0, 7 * math.prod(x.shape) // split)], x.dtype)

    hidden: list[KeyPath] = []  # of each placed array
    placed: list[PlacedArray] = []
    for path, leaf in routes.items():
        x = leaves[path]
        if leaf.label == MUON and x.size:
            own = split_into_parts(x.shape, axes[path] or MatrixAxes(), layouts[path], placing.ways)
            for part in own:
                assert part.layout is not None
                hidden.append(path)
                placed.append(PlacedArray(part.shape, jnp.dtype(x.dtype), part.layout, part.axes))
    stacks, buckets = plan_exchange(placed, placing, newton_schulz, platform)

    call_of = {bucket: call for call in by_call(buckets) for bucket in call}

    def seconds(bucket: Bucket) -> float:
        """Returns its share of the call, by FLOPs, and the time of momentum, decay and step."""
        call = call_of[bucket]
        share = bucket.flops(newton_schulz) / sum(each.flops(newton_schulz) for each in call)
        total = share * call_seconds(call, newton_schulz, device)
        held = []
        for span in bucket.spans:
            stack = stacks[span.stack]
            split = placing.ways(stack.in_axes + stack.out_axes)
            held.append(span.matrices * stack.fan_in * stack.fan_out // split)
        held = held if device.on_chip else [sum(held)]  # leaves of one shape share a GPU's kernel
        # Updates that stay in on-chip memory are not written, and the step is fused with a product.
        stays = device.on_chip and not bucket.axes
        kernels = [Kernel(0, (3 if stays else 4) * numbers) for numbers in held]
        kernels += [] if stays else [Kernel(0, 3 * sum(held))]
        return total + device.seconds(kernels, placed[bucket.spans[0].stack].dtype)

    def muon_row(group: list[Bucket]) -> PlanRow:
        spans = [span for bucket in group for span in bucket.spans]
        copies = placing.devices // group[0].devices
        flops = sum(bucket.flops(newton_schulz) for bucket in group)
        momentum = sum(
            state_bytes(hidden[span.stack], 1)
            * math.prod(placed[span.stack].shape)
            // leaves[hidden[span.stack]].size
            * span.matrices
            // stacks[span.stack].matrices
            for span in spans
        )
        first = stacks[spans[0].stack]
        return PlanRow(
            route=MUON,
            leaves=tuple(dict.fromkeys(routes[hidden[span.stack]].path for span in spans)),
            matrices=copies * sum(bucket.matrices for bucket in group),
            shape=(first.fan_in, first.fan_out),
            form=_form(group[0].form),
            placing=_placing(group[0]),
            standard_flops=copies
            * sum(p.matrices * _standard(stacks[p.stack], newton_schulz) for p in spans),
            flops=flops * placing.devices,
            device_flops=flops,
            exchanged_bytes=sum(bucket.exchanged_bytes(placing.sizes) for bucket in group),
            momentum_bytes=momentum,
            working_bytes=max(
                sum(_working(each, newton_schulz) for each in call_of[bucket]) for bucket in group
            ),
            seconds=sum(map(seconds, group)),
        )

    alike: dict[Any, list[Bucket]] = defaultdict(list)
    for bucket in buckets:  # without a mesh each leaf is a bucket, and equal buckets share a row
        alike[bucket._replace(spans=(), call=0) if not bucket.axes else bucket].append(bucket)
    rows = [muon_row(group) for group in alike.values()]
    for label, moments in ((OTHER, 2), (FROZEN, 0)):
        others = [path for path, leaf in routes.items() if leaf.label == label]
        if others:
            held = sum(state_bytes(path, moments) for path in others) if moments else 0
            names = tuple(routes[path].path for path in others)
            taken = sum(elementwise(path) for path in others) if moments else 0.0
            rows.append(PlanRow(label, names, momentum_bytes=held, seconds=taken))
    return Plan(tuple(rows), placing.devices, model_flops, device.assumptions())


def _traced_row(
    tx: optax.GradientTransformation, params: Any, devices: int, device: Device, platform: str
) -> PlanRow:
    """Returns the row of an optimizer from its traced update and its state."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        params,
    )
    state = jax.eval_shape(tx.init, shapes)
    leaves = jax.tree.leaves(shapes)
    if leaves and all(is_sharding(x.sharding) for x in leaves):
        state = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            state,
            state_shardings(tx, params),
        )
    read = jax.tree.leaves((shapes, state, shapes))
    counters = [x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) for x in read]
    done = work_of(jax.make_jaxpr(tx.update)(shapes, state, shapes), counters, platform)

    def on_one(amount: Callable[[Done], float]) -> float:
        return sum(x.times * amount(x) / (1 if x.everywhere else devices) for x in done)

    def held(x: Any) -> int:
        size = math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
        return (size + 1) // 2 if x.dtype == jnp.int4 else size * x.dtype.itemsize

    def seconds(x: Done) -> float:
        if x.decomposes:
            return x.kernel.flops / device.decomposing
        return device.seconds([x.kernel], x.dtype, launches=bool(x.kernel.flops))

    flops = on_one(lambda x: 0 if x.decomposes else x.kernel.flops)
    entrywise = Kernel(0, 2 * sum(x.size for x in read) // devices)
    return PlanRow(
        route="all",
        leaves=tuple(path_strings(params).values()),
        form="as traced",
        placing="as traced",
        flops=round(devices * flops),
        device_flops=round(flops),
        decomposition_flops=round(on_one(lambda x: x.decomposes * x.kernel.flops)),
        exchanged_bytes=round(sum(x.times * x.bytes for x in done)),
        momentum_bytes=sum(map(held, jax.tree.leaves(state))),
        seconds=on_one(seconds) + device.seconds([entrywise], jnp.float32),
    )


def _model_flops(
    tokens: int | None, active_params: int | None, routes: dict, leaves: dict[KeyPath, Any]
) -> int | None:
    """Returns the model's FLOPs of a training step, or None without tokens."""
    if tokens is None:
        return None
    stacked = (leaf.path for leaf in routes.values() if EXPERT_STACK in leaf.why)
    if active_params is None and (experts := next(stacked, None)) is not None:
        raise ValueError(
            f"{experts!r} is a stack of experts, and a token uses only a few of them. Pass "
            "active_params=, the number of parameters that are used for a token."
        )
    active = active_params or sum(math.prod(x.shape) for x in leaves.values())
    return 6 * active * tokens


def _layouts(leaves: dict[KeyPath, Any], tree: Any, shardings: Any, placing: Placing):
    given = layouts_by_path(shardings, tree, placing)
    strings = path_strings(tree)
    layouts: dict[KeyPath, Layout] = {}
    for path, x in leaves.items():
        sharding = getattr(x, "sharding", None)
        if path in given:
            layouts[path] = given[path]
        elif placing.mesh is not None and is_sharding(sharding):
            layouts[path] = layout_from_sharding(sharding, x.shape, placing, strings[path])
        else:
            layouts[path] = ((),) * len(x.shape)
    return layouts


def _standard(stack: Stack, newton_schulz: NewtonSchulz) -> int:
    short, long = sorted((stack.fan_in, stack.fan_out))
    return len(newton_schulz.rows(stack.dtype)) * (4 * long * short**2 + 2 * short**3)


def _form(form: Form | None) -> str:
    assert form is not None
    text = form.method
    if form.restarts:
        text += f", restart after {', '.join(map(str, form.restarts))}"
    return text + (f", {form.panels} panels" if form.panels > 1 else "")


def _placing(bucket: Bucket) -> str:
    if not bucket.axes:
        return "local, not moved"
    if not bucket.cut:
        return f"whole, {bucket.slots} per device"
    if bucket.width == 1:
        return f"whole, padded to {bucket.lead} × {bucket.other}, {bucket.slots} per device"
    tiles = " or ".join(map(str, sorted({span.tiles for span in bucket.spans})))
    return f"split into {tiles} tiles, {bucket.slots} per device"


def _working(bucket: Bucket, newton_schulz: NewtonSchulz) -> int:
    """Returns the bytes of the tiles before and after, and of four square matrices, per device."""
    dtype = newton_schulz.compute_dtype(bucket.dtype)
    tiles = 2 * bucket.lead * bucket.other * max(dtype.itemsize, bucket.dtype.itemsize)
    squares = 4 * min(bucket.lead, bucket.other) ** 2 * max(4, dtype.itemsize)
    return bucket.slots * (tiles + squares)
