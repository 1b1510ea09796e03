"""Plans the memory and cost of a training from shapes, before anything is allocated.

The memory of params, gradient and optimizer state is exact. The rest of a step is the study's
estimate, until the step is compiled, here or ahead of time, and the compiler reports it.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console

import muon_jax
from experiments import topology
from experiments.language import sharding
from experiments.language.kernels import Shape
from experiments.language.mesh import Mesh, mesh_of_config
from experiments.language.sharding import on_device
from experiments.report.text import readable
from experiments.settings import Positive

_RANK = 16  # of LoRA, where it is advised


@dataclasses.dataclass(frozen=True)
class Planning:
    """Options that print a plan or compile a step instead of training."""

    dry_run: bool = False
    """Print the memory and cost of a step instead of training. It is an error if they exceed the
    device's memory."""
    compile_only: bool = False
    """Compile the step for --topology and print its cost there instead of training."""
    topology: str | None = None
    """Accelerators to compile for; they need not be present. TPUs: for example v5e:16x16 or
    v5p:8x8x8. GPUs: h100:8, h200:8, b200:8, or h100:8x8 for 8 hosts of 8 devices. Requires
    --compile-only and the extra `tpu` or `gpu-compile`."""
    device_memory: Positive | None = None
    """Memory of one device, in gigabytes. By default, the amount that the device reports."""

    def __post_init__(self) -> None:
        if self.compile_only != (self.topology is not None) or (self.dry_run and self.topology):
            raise ValueError(
                "--compile-only and --topology require each other and exclude --dry-run, as in "
                "--compile-only --topology v5p:4x4x4."
            )

    def limit(self, mesh: jax.sharding.Mesh, sharing: int = 1) -> int | None:
        """Returns the bytes available on a device of the mesh; None if unknown.

        For a CPU this is the machine's memory divided by the number of trainings that share it.
        """
        device = mesh.devices.flat[0]
        if self.device_memory is not None:
            return round(self.device_memory * 1e9)
        if self.topology:
            known = topology.MEMORY.get(device.device_kind)
            return None if known is None else round(known * 2**30)
        if device.platform != "cpu":
            stats = device.memory_stats() or {}
            return stats.get("bytes_limit")
        if mesh.size > jax.device_count():  # stand-ins for devices of another machine
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharing


def warn_of_context(context: int, known: int, console: Console) -> None:
    """Warns if sequences are longer than the model's context length."""
    if context > known:
        console.print(
            f"[yellow]warning:[/yellow] --context {context:,} exceeds the model's "
            f"max_position_embeddings {known:,}, so it will see RoPE positions that it was not "
            "trained on.",
            highlight=False,
        )


class Memory(NamedTuple):
    """Bytes on one device, by part.

    Attributes:
        held: The state that is kept from step to step, and the gradient.
        backward: Further memory during the forward and backward passes.
        update: Further memory during the optimizer update.
    """

    held: dict[str, int]
    backward: dict[str, int]
    update: dict[str, int]

    @property
    def total(self) -> int:
        """The peak. The memory of the passes is free again when the update begins."""
        own = max(sum(self.backward.values()), sum(self.update.values()))
        return sum(self.held.values()) + own


class TooLarge(ValueError):
    """Raised for a training that exceeds the device's memory. The message has the remedies."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A training with one optimizer, as shapes. Its devices need not be present.

    Attributes:
        config: The settings of the training.
        name: The name of the optimizer.
        trainer: The study's trainer.
        again: Returns the case of another config, optimizer and mesh. It raises ValueError if the
            mesh does not divide an axis.
        muon: The settings `ns_coeffs` and `ns_dtype`; None for optimizers without Newton-Schulz.
        routing, labels: The routing of the params, as for `muon_jax.muon`, and their labels.
        heads: The number of query heads, and the columns of their keys and values.
        flops: FLOPs of the model in a step over all devices, without recomputation.
        arithmetic: The precision and rematerialisation, as text.
        passes: Bytes on one device that the passes need beside the state, by part.
        savings: Settings that would take less memory, as text.
        optimizers: Optimizers that may be recommended in place of this one.
        updates: Returns the optimizer, params and specs of the update, and those of the update of
            the routed experts alone if there are any.
        idle: The number of parameters that a token does not use.
        frozen: Params that are held but not trained, as shapes with shardings.
    """

    config: Any
    name: Any
    trainer: Any
    again: Callable[[Any, Any, jax.sharding.Mesh], "Case"]
    muon: Any
    routing: Any
    labels: Any
    heads: tuple[int, int, int]
    flops: int
    arithmetic: str
    passes: dict[str, int]
    savings: Sequence[str]
    optimizers: Sequence[str]
    updates: Callable[[], Sequence[tuple[Any, Any, Any]]]
    idle: int = 0
    frozen: Any = dataclasses.field(default_factory=dict)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.trainer.mesh

    @property
    def params(self) -> Any:
        return self.trainer.abstract.params

    @property
    def microbatch(self) -> int:
        return self.config.batch // self.config.accumulate

    @property
    def attention(self) -> Shape:
        """The shape of the attention kernels on one device."""
        heads, key, value = self.heads
        ways = math.prod(self.mesh.shape[axis] for axis in sharding.RULES["batch"])
        own = heads // self.mesh.shape["tensor"]
        return Shape(self.microbatch // ways, own, self.config.context, key, value)

    def newton_schulz(self, **where: Any) -> muon_jax.Plan:
        """Returns the plan of Newton-Schulz, by default on one device."""
        coeffs, dtype = self.muon.ns_coeffs, self.muon.ns_dtype
        return muon_jax.plan(
            self.params, routing=self.routing, ns_coeffs=coeffs, ns_dtype=dtype, **where
        )

    @functools.cached_property
    def memory(self) -> Memory:
        """The memory on one device."""
        state = self.trainer.abstract
        held = {
            "params, float32": on_device(state.params),
            "gradient, float32": on_device(state.params),
            "optimizer state, float32": on_device(state.opt_state),
        }
        if self.frozen:
            held[f"frozen params, {self.config.dtype}"] = on_device(self.frozen)
        if self.muon is None:
            return Memory(held, self.passes, {})
        leaves = map(jax.tree.leaves, (state.params, self.labels))
        matrices = [leaf for leaf, label in zip(*leaves, strict=True) if label == "muon"]
        plan = self.newton_schulz(mesh=self.mesh, shardings=self.trainer.specs)
        update = {
            "Newton-Schulz": plan.peak(),
            "updates of the matrices, float32": on_device(matrices),
        }
        return Memory(held, self.passes, update)


def compiled_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled step needs per device, with arguments, outputs and code."""
    found: Any = program.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def check(
    case: Case,
    limit: int | None,
    needed: int | None = None,
    choice: Sequence[str] | None = None,
    shared: bool = True,
) -> None:
    """Checks that a training fits the device's memory.

    Args:
        case: The training.
        limit: Bytes available on a device; None if unknown.
        needed: Bytes that the compiler reported. By default, those of the plan.
        choice: Other optimizers that may be recommended. By default, all of the study.
        shared: Whether more devices may be recommended.

    Raises:
        TooLarge: If it does not fit.
    """
    planned = case.memory.total
    total = planned if needed is None else needed
    if limit is None or total <= limit:
        return
    what = "The compiled step" if needed is not None else "The planned step"
    raise TooLarge(
        f"{what} of {case.name} requires {readable(total)} of memory, and the device has "
        f"{readable(limit)}. " + remedies(case, limit - max(total - planned, 0), choice, shared)
        # The compiler's excess over the plan is assumed to stay the same after a change.
    )


def remedies(
    case: Case, limit: int, choice: Sequence[str] | None = None, shared: bool = True
) -> str:
    """Returns the changes that would make a plan fit. Sizes are named only if they would."""
    config, mesh = case.config, case.mesh

    def fits(name: Any = case.name, mesh: Any = mesh, **changes: Any) -> bool:
        changed = dataclasses.replace(config, **changes)
        try:
            return case.again(changed, name, mesh).memory.total <= limit
        except ValueError:  # the mesh does not divide an axis
            return False

    found = []
    held = sum(case.memory.held.values())
    if held > limit:
        found.append(
            f"Parameters, gradient and optimizer state alone take {readable(held)}, so a shorter "
            "context does not help"
        )
    else:
        sizes = _divisors(config.batch)
        accumulate = next((n for n in sizes if n > config.accumulate and fits(accumulate=n)), None)
        batch = next((n for n in sizes[-2::-1] if fits(batch=n, accumulate=1)), None)
        if config.accumulate > 1 and fits(accumulate=1):
            found.append("use --accumulate 1, which stores no sum of gradients")
        elif accumulate:
            found.append(f"use --accumulate {accumulate}")
        elif batch:
            found.append(f"use --batch {batch}")
        found += [f"shorten --context {config.context}", *case.savings]
    lora = getattr(config, "lora", None)
    if lora and not lora.rank and fits(lora=dataclasses.replace(lora, rank=_RANK)):
        found.append(f"use --lora.rank {_RANK}, which trains adapters alone and would fit")
    others = [name for name in choice or case.optimizers if name != case.name]
    if fitting := [name for name in others if fits(name=name)]:
        found.append(f"use --optimizers {' '.join(fitting)}, which would fit")
    if shared:
        found.append(_sharing(case, fits))
    found.append("use a smaller model")
    if mesh.abstract_mesh.abstract_device.platform == "gpu":
        found.append("raise XLA_PYTHON_CLIENT_MEM_FRACTION, by default 0.75 of a GPU's memory")
    return f"{'; '.join(found)}."


def _sharing(case: Case, fits: Callable[..., bool]) -> str:
    """Returns the advice to use the least --mesh.fsdp that fits, or that none does."""
    sizes = dict(case.mesh.shape)
    others = case.mesh.size // sizes["fsdp"]
    for fsdp in _divisors(case.microbatch):
        if fsdp > sizes["fsdp"] and fits(mesh=mesh_of_config(Mesh(**sizes | {"fsdp": fsdp}))):
            return f"shard it over {fsdp * others} devices with --mesh.fsdp {fsdp}"
    return (
        f"no --mesh.fsdp that divides a microbatch (--batch / --accumulate = {case.microbatch} "
        "sequences) and the model's axes suffices"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
