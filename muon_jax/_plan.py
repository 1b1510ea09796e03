"""What a step of Muon costs, before anything runs: FLOPs, bytes exchanged, memory, time."""

import dataclasses
import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from muon_jax._matrices.parts import split_into_parts
from muon_jax._matrix_axes import MatrixAxes
from muon_jax._orthogonalize.devices import Kernel, device_of
from muon_jax._orthogonalize.forms import Form
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
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
from muon_jax._trees import KeyPath, path_strings

PLATFORMS = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """Leaves that are treated together: a bucket of Muon's, or all of another route.

    Attributes:
        route: `"muon"`, `"other"` or `"frozen"`.
        leaves: their paths.
        matrices: how many, over all devices.
        shape: `(fan_in, fan_out)` of the first; `()` where the route knows no matrices.
        form: of Newton-Schulz, with its restarts.
        placing: how the matrices are spread over the devices.
        standard_flops: what the standard form takes for the matrices, each of them once.
        flops: of all devices together, padding included.
        device_flops: of one device.
        exchanged_bytes: that collectives bring to one device.
        momentum_bytes: optimizer state of one device.
        working_bytes: of one device: tiles before and after, and the square matrices beside them.
        seconds: that one device is predicted to take, momentum, decay and the step included, the
            network not.
    """

    route: str
    leaves: tuple[str, ...]
    matrices: int = 0
    shape: tuple[int, ...] = ()
    form: str = ""
    placing: str = ""
    standard_flops: int = 0
    flops: int = 0
    device_flops: int = 0
    exchanged_bytes: int = 0
    momentum_bytes: int = 0
    working_bytes: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` returns; `print` shows a table, `to_dict` is ready for JSON.

    Attributes:
        rows: of each bucket and each other route.
        devices: of the mesh.
        model_flops: of a training step, 6 × active parameters × tokens; `None` without tokens.
        assumptions: what the time is predicted for, in a sentence.
    """

    rows: tuple[PlanRow, ...]
    devices: int
    model_flops: int | None
    assumptions: str = ""

    def total(self, field: str) -> Any:
        """The sum of a field over rows."""
        if field == "working_bytes":
            warnings.warn(
                'total("working_bytes") is the largest of all rows, and no sum: use peak().',
                DeprecationWarning,
                stacklevel=2,
            )
            return self.peak()
        return sum(getattr(row, field) for row in self.rows)

    def peak(self) -> int:
        """The most working bytes of any row: buckets follow each other."""
        return max((row.working_bytes for row in self.rows), default=0)

    def _totals(self) -> dict[str, Any]:
        fields = [f.name for f in dataclasses.fields(PlanRow) if f.type in (int, float)]
        sums = {name: self.total(name) for name in fields if name != "working_bytes"}
        return sums | {"working_bytes": self.peak()}

    @property
    def overhead(self) -> float | None:
        """Muon's FLOPs as a share of the model's."""
        return self.total("flops") / self.model_flops if self.model_flops else None

    def to_dict(self) -> dict[str, Any]:
        """Rows and totals as plain numbers and strings."""
        return {
            "devices": self.devices,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "total": self._totals(),
            "model_flops": self.model_flops,
            "overhead": self.overhead,
            "assumptions": self.assumptions,
        }

    def __str__(self) -> str:
        memory = ("exchanged", "momentum", "working")

        def figures(of: Callable[[str], Any]) -> list[str]:
            flops = [_count(of(field)) for field in ("flops", "device_flops")]
            held = [_bytes(of(f"{name}_bytes")) for name in memory]
            return [*flops, *held, _duration(of("seconds"))]

        head = ["route", "leaves", "matrices", "form", "placing", "FLOPs", "per device"]
        head += [*memory, "time"]
        lines = [head]
        for row in self.rows:
            shape = " × ".join(map(str, row.shape))
            matrices = f"{row.matrices} × ({shape})" if shape else "-"
            words = [row.route, _leaves(row.leaves), matrices, row.form or "-", row.placing or "-"]
            lines.append(words + figures(functools.partial(getattr, row)))
        devices = f"{self.devices} device{'s' * (self.devices > 1)}"
        total = ["total", "", str(self.total("matrices")), "", devices]
        lines.append(total + figures(self._totals().__getitem__))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        standard = self.total("standard_flops")
        text += ["", self.assumptions]
        if standard:
            share = self.total("flops") / standard
            text.append(
                f"Newton-Schulz: {_count(self.total('flops'))}FLOP a step, {share:.2f} of the "
                f"standard form's {_count(standard)}FLOP"
            )
        if self.overhead is not None:
            text.append(
                f"Muon's overhead: {100 * self.overhead:.2f} % of the model's "
                f"{_count(self.model_flops or 0)}FLOP a step"
            )
        return "\n".join(text)


def plan(
    params: Any,
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
    """What a step of `muon` costs on a mesh, from shapes alone.

    Args:
        params: arrays or `jax.ShapeDtypeStruct`s; their shardings count if `shardings` is None.
        mesh: as in `muon`.
        shardings: as in `muon`, of the params. Under Auto axes, where `muon` has no
            shardings, XLA moves a leaf once for each mesh axis that splits it, in place of once.
        tokens_per_step: of the whole batch; needed for the overhead.
        active_params: parameters that a token passes through; `None` is all of them, where no leaf
            is a stack of experts.
        ns_coeffs, ns_steps, ns_dtype, mu_dtype, nu_dtype, routing, matrix_axes: as in `muon`.
        platform: of the devices: `"cpu"`, `"gpu"` or `"tpu"`, which an `AbstractMesh` may not know;
            `None` is the mesh's, or else that of JAX's default devices. Times are those of two
            CPU cores, an H100 or a TPU v5e.

    Returns:
        A `Plan`: per bucket and in total FLOPs, bytes exchanged, memory and predicted time.

    Raises:
        ValueError: another platform, or an overhead asked for without `active_params` where experts
            are stacked, of which a token passes through a few.

    Example:
        >>> import jax, jax.numpy as jnp, muon_jax
        >>> params = {"mlp": {"kernel": jax.ShapeDtypeStruct((64, 256, 256), jnp.float32)}}
        >>> muon_jax.plan(params).total("standard_flops") == 64 * 5 * (4 + 2) * 256**3
        True
    """
    if platform not in (None, *PLATFORMS):
        raise ValueError(f"platform must be one of {', '.join(PLATFORMS)}; got {platform!r}.")
    newton_schulz = NewtonSchulz(ns_coeffs, ns_steps, ns_dtype)
    routes = route(params, routing, matrix_axes)
    leaves: dict[KeyPath, Any] = dict(jax.tree_util.tree_leaves_with_path(params))
    placing = find_placing(mesh, list(leaves.values()))
    axes = {path: leaf.axes for path, leaf in routes.items()}
    layouts = _layouts(leaves, params, shardings, placing)
    size = dict(placing.sizes)

    def state_bytes(path: KeyPath, moments: int) -> int:
        x = leaves[path]
        *outer, last = (math.prod(size[name] for name in names) for names in layouts[path] or [()])
        width = jnp.dtype(x.dtype).itemsize
        packed = mu_dtype is not None and jnp.dtype(mu_dtype) == jnp.int8
        complex_ = jnp.issubdtype(x.dtype, jnp.complexfloating)
        own = mu_dtype is None or packed or complex_
        first = width if own else jnp.dtype(mu_dtype).itemsize
        second = real_dtype(x.dtype).itemsize if nu_dtype is None else jnp.dtype(nu_dtype).itemsize
        rows = math.prod(x.shape[:-1]) // math.prod(outer)
        here = math.prod(x.shape) // (math.prod(outer) * last)
        if packed and moments == 1:
            return here + 4 * rows  # a float32 scale a row, on each device that has some of it
        return here * (first + second * (moments - 1))

    def elementwise(path: KeyPath) -> float:
        """Seconds of the other optimizer: gradient, moments and parameters, read and written."""
        x = leaves[path]
        split = math.prod(size[name] for names in layouts[path] for name in names)
        return device.seconds([Kernel(0, 7 * math.prod(x.shape) // split)], x.dtype)

    hidden: list[KeyPath] = []  # of each placed array
    placed: list[PlacedArray] = []
    for path, leaf in routes.items():
        x = leaves[path]
        if leaf.label == MUON and x.size:
            for part in split_into_parts(x.shape, axes[path] or MatrixAxes(), layouts[path], size):
                assert part.layout is not None
                hidden.append(path)
                placed.append(PlacedArray(part.shape, jnp.dtype(x.dtype), part.layout, part.axes))
    stacks, buckets = plan_exchange(placed, placing, newton_schulz, platform)
    device = device_of(platform or placing.platform)

    call_of = {bucket: call for call in by_call(buckets) for bucket in call}

    def seconds(bucket: Bucket) -> float:
        """Its share of the call, by FLOPs, beside momentum, and the step with its decay."""
        call = call_of[bucket]
        share = bucket.flops(newton_schulz) / sum(each.flops(newton_schulz) for each in call)
        total = share * call_seconds(call, newton_schulz, device)
        held = []
        for span in bucket.spans:
            stack = stacks[span.stack]
            split = math.prod(size[name] for name in stack.in_axes + stack.out_axes)
            held.append(span.matrices * stack.fan_in * stack.fan_out // split)
        kernels = [*(Kernel(0, 4 * numbers) for numbers in held), Kernel(0, 3 * sum(held))]
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
    for bucket in buckets:  # without a mesh each leaf is a bucket: equal ones share a row
        alike[bucket._replace(spans=(), call=0) if not bucket.axes else bucket].append(bucket)
    rows = [muon_row(group) for group in alike.values()]
    for label, moments in ((OTHER, 2), (FROZEN, 0)):
        others = [path for path, leaf in routes.items() if leaf.label == label]
        if others:
            held = sum(state_bytes(path, moments) for path in others) if moments else 0
            names = tuple(routes[path].path for path in others)
            taken = sum(elementwise(path) for path in others) if moments else 0.0
            rows.append(PlanRow(label, names, momentum_bytes=held, seconds=taken))
    tokens = tokens_per_step
    if tokens is not None:
        stacked = (leaf.path for leaf in routes.values() if EXPERT_STACK in leaf.why)
        if active_params is None and (experts := next(stacked, None)) is not None:
            raise ValueError(
                f"{experts!r} stacks experts, of which a token passes through a few: the model's "
                "FLOPs need active_params=, how many parameters a token passes through."
            )
        active = active_params or sum(math.prod(x.shape) for x in leaves.values())
        tokens = 6 * active * tokens
    return Plan(tuple(rows), placing.devices, tokens, device.assumptions())


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
        return f"whole, {bucket.slots} a device"
    if bucket.width == 1:
        return f"whole, padded to {bucket.lead} × {bucket.other}, {bucket.slots} a device"
    tiles = " or ".join(map(str, sorted({span.tiles for span in bucket.spans})))
    return f"cut in {tiles}, {bucket.slots} a device"


def _working(bucket: Bucket, newton_schulz: NewtonSchulz) -> int:
    """Tiles as they arrive and as they leave, and four square matrices as they accumulate."""
    dtype = newton_schulz.compute_dtype(bucket.dtype)
    tiles = 2 * bucket.lead * bucket.other * max(dtype.itemsize, bucket.dtype.itemsize)
    squares = 4 * min(bucket.lead, bucket.other) ** 2 * max(4, dtype.itemsize)
    return bucket.slots * (tiles + squares)


def _leaves(paths: tuple[str, ...]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _count(x: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(x) < 1000 or unit == "P":
            return f"{x:.3g} {unit}" if unit else f"{x:.0f} "
        x /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds else "-"


def _bytes(x: float) -> str:
    return _count(x) + "B"
