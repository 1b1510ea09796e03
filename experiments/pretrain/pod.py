"""`--compile-only`: the step compiled for devices that are not here, and what it takes there.

Every figure is read from the compiled program, but for the FLOPs of attention's kernels on TPUs,
which do not tell theirs, and those of the model.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import muon_jax
from experiments import optimizers
from experiments.compiled import Collective, Program, measure
from experiments.language import sharding
from experiments.language.kernels import Shape, with_attention
from experiments.language.mesh import make_mesh, one_device
from experiments.optimizers import OptimizerName
from experiments.pretrain.config import Training
from experiments.pretrain.costs import step_costs
from experiments.pretrain.step import Trainer
from experiments.report.figures import optimizer_label
from experiments.report.text import flop
from experiments.roofline import Estimate, estimate, exchange_text, print_estimates, unread_text
from experiments.topology import MEMORY, topology_devices

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class NewtonSchulzShare:
    """The optimizer's update, compiled alone.

    Attributes:
        flops: of a device.
        ideal_flops: of a device, if each matrix were orthogonalised once, as on a device alone, and
            all devices did the same share.
        collectives: of the whole update.
        expert_collectives: of the routed experts' update, compiled alone.
    """

    flops: int
    ideal_flops: int
    collectives: dict[str, Collective]
    expert_collectives: dict[str, Collective]

    @property
    def ratio(self) -> float:
        """1 where nothing is computed twice and no device waits."""
        return self.flops / self.ideal_flops


@dataclasses.dataclass(frozen=True)
class PodReport:
    """What one step takes of one device; `dataclasses.asdict` is ready for JSON.

    Attributes:
        optimizer: of the step.
        topology: as v5p:4x4x4.
        device_kind: of its devices.
        mesh: sizes by axis.
        argument_bytes: params, optimizer state and batch.
        output_bytes: of outputs that take no argument's place.
        temp_bytes: of all that the step holds beside.
        code_bytes: of the program.
        memory_bytes: of the device; None where it is not known.
        flops: of the program; what it computes twice counts twice, a branch as if it were taken.
        model_flops: as `costs` counts them.
        collectives: by kind.
        unread: kernels whose FLOPs are in no figure.
        newton_schulz: None for an optimizer without.
        compile_seconds: of the whole step.
        estimate: how long the step takes at best; None for devices of a kind that is not known.
    """

    optimizer: OptimizerName
    topology: str
    device_kind: str
    mesh: dict[str, int]
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    code_bytes: int
    memory_bytes: int | None
    flops: int
    model_flops: int
    collectives: dict[str, Collective]
    unread: dict[str, int]
    newton_schulz: NewtonSchulzShare | None
    compile_seconds: float
    estimate: Estimate | None = None

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.output_bytes + self.temp_bytes + self.code_bytes

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is not known."""
        return None if self.memory_bytes is None else self.total_bytes <= self.memory_bytes


class DoesNotFitError(Exception):
    """The compiler refuses a step, for which a device has too little memory; it says how much."""


def compile_only(
    config: Training, names: Sequence[OptimizerName], topology: str, console: Console
) -> int:
    """Compiles the step with each optimizer, and prints what they take.

    Returns:
        The command's exit code: 1 if a step does not fit.

    Raises:
        TopologyError: the compiler is missing, or knows no such topology.
        ValueError: an axis that the mesh does not divide.
    """
    devices = topology_devices(topology)
    reports = []
    for name in names:
        with console.status(f"{name}: compiling for {topology} (takes minutes)"):
            try:
                reports.append(compile_for(config, name, devices, topology))
            except DoesNotFitError as error:
                console.print(f"{optimizer_label(name)} does not fit: {error}", soft_wrap=True)
    if reports:
        print_reports(reports, console)
    return 0 if len(reports) == len(names) and all(r.fits is not False for r in reports) else 1


def compile_for(
    config: Training, optimizer: OptimizerName, devices: Sequence[Any], topology: str
) -> PodReport:
    """The step compiled for these devices, all of them.

    Raises:
        DoesNotFitError: the compiler refuses it for its memory.
        ValueError: an axis that the mesh does not divide.
    """
    mesh = make_mesh(config.mesh.sizes, devices)
    trainer = Trainer(config, optimizer, mesh, config.data.vocabulary)
    windows = jax.ShapeDtypeStruct(
        (config.accumulate, config.batch // config.accumulate, config.context + 1),
        jnp.int32,
        sharding=trainer.windows,
    )
    rate = _everywhere(mesh, ())
    began = time.perf_counter()
    compiled = _compile(trainer.step, mesh, trainer.abstract, windows, rate)
    seconds = time.perf_counter() - began
    program = with_attention(measure(compiled), attention_shape(config, mesh))
    memory, available = compiled.memory_analysis(), MEMORY.get(devices[0].device_kind)
    costs = step_costs(config, optimizer, trainer.abstract.params)
    return PodReport(
        optimizer=optimizer,
        topology=topology,
        device_kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        argument_bytes=program.argument_bytes,
        output_bytes=program.output_bytes - memory.alias_size_in_bytes,
        temp_bytes=program.temp_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        memory_bytes=None if available is None else round(available * _GIB),
        flops=program.flops,
        model_flops=costs.model_flops // mesh.size,
        collectives=program.collectives,
        unread=program.unread,
        newton_schulz=newton_schulz_share(trainer) if costs.newton_schulz_flops else None,
        compile_seconds=seconds,
        estimate=estimate(program, devices[0].device_kind),
    )


def newton_schulz_share(trainer: Trainer) -> NewtonSchulzShare:
    """What the update of this trainer's optimizer takes of a device."""
    muon, mesh, params = trainer.config.muon, trainer.mesh, trainer.abstract.params
    alone = one_device(mesh.devices.flat[0])
    plan = muon_jax.plan(
        params,
        mesh=alone,
        routing=trainer.routing,
        ns_coeffs=muon.ns_coeffs,
        ns_dtype=muon.ns_dtype,
    )
    whole = update_alone(trainer, trainer.optimizer, params, trainer.specs)
    experts: dict[str, Collective] = {}
    if "moe_layers" in params:
        part, specs = (
            {
                "moe_layers": {
                    "feed_forward": {"experts": tree["moe_layers"]["feed_forward"]["experts"]}
                }
            }
            for tree in (params, trainer.specs)
        )
        experts = update_alone(trainer, "muon", part, specs).collectives
    ideal = plan.total("flops") // mesh.size
    return NewtonSchulzShare(whole.flops, ideal, whole.collectives, experts)


def update_alone(trainer: Trainer, optimizer: OptimizerName, params: Any, specs: Any) -> Program:
    """The optimizer's update of some params, compiled where they lie."""
    mesh = trainer.mesh
    placed = {"mesh": mesh, "shardings": specs, "routing": trainer.routing}
    tx = optimizers.build(optimizer, trainer.config, trainer.schedule, **placed)
    state = jax.eval_shape(tx.init, params)
    shardings = sharding.shardings(sharding.state_specs(state, params, specs), mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )

    def update(gradient, state, params, max_logits):
        return tx.update(gradient, state, params, max_logits=max_logits)

    out = sharding.shardings(specs, mesh), shardings
    jitted = jax.jit(update, out_shardings=out, donate_argnums=(0, 1))
    model = trainer.config.model
    max_logits = {
        f"{name}/attention": _everywhere(mesh, (layers, model.heads))
        for name, (layers, _) in trainer.model.stacks.items()
    }
    return measure(_compile(jitted, mesh, params, state, params, max_logits))


def _everywhere(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """An argument that every device has whole: without a place on the mesh GPUs refuse it."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)


def _compile(function: Any, mesh: jax.sharding.Mesh, *arguments: Any) -> Any:
    with jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = str(error).removeprefix("RESOURCE_EXHAUSTED: ").splitlines()[0]
            raise DoesNotFitError(message) from None


def kernel_flops(
    unread: dict[str, int], config: Training, mesh: jax.sharding.Mesh
) -> tuple[int, dict[str, int]]:
    """Of attention's kernels on one device, and which others there are and how many run."""
    program = with_attention(Program(0, {}, unread=unread), attention_shape(config, mesh))
    return program.flops, program.unread


def attention_shape(config: Training, mesh: jax.sharding.Mesh) -> Shape:
    """What a kernel of attention has to do on one device."""
    model = config.model
    latent = model.attention == "latent"
    ways = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    return Shape(
        sequences=config.batch // config.accumulate // ways,
        heads=model.heads // mesh.shape["tensor"],
        length=config.context,
        key=model.key_columns,
        value=model.value if latent else model.width // model.heads,
    )


def print_reports(reports: Sequence[PodReport], console: Console) -> None:
    """One column a report; all of one topology."""
    first = reports[0]
    table = Table("of a device", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for report in reports:
        table.add_column(optimizer_label(report.optimizer), justify="right")
    for name, values in _rows(reports).items():
        table.add_row(name, *values)
    mesh = " × ".join(f"{axis} {size}" for axis, size in first.mesh.items())
    console.print(
        f"{first.topology}: {math.prod(first.mesh.values())} devices ({first.device_kind}), {mesh}",
        highlight=False,
    )
    console.print(table)
    for report in reports:
        console.print(_verdict(report), highlight=False, soft_wrap=True)
    estimates = {optimizer_label(r.optimizer): r.estimate for r in reports if r.estimate}
    if estimates:
        print_estimates(estimates, first.device_kind, console)


def _rows(reports: Sequence[PodReport]) -> dict[str, list[str]]:
    def of(value: Any) -> list[str]:
        return [value(report) for report in reports]

    def share(value: Any) -> list[str]:
        return of(lambda r: value(r.newton_schulz) if r.newton_schulz else "–")

    kinds = sorted({kind for report in reports for kind in report.collectives})
    estimated = reports[0].estimate.figures() if reports[0].estimate else {}
    return {
        "params, state, batch": of(lambda r: _memory(r.argument_bytes)),
        "outputs beside them": of(lambda r: _memory(r.output_bytes)),
        "temporaries": of(lambda r: _memory(r.temp_bytes)),
        "program": of(lambda r: _memory(r.code_bytes)),
        "memory": of(lambda r: _memory(r.total_bytes)),
        "available": of(lambda r: "unknown" if r.memory_bytes is None else _memory(r.memory_bytes)),
        "FLOPs": of(lambda r: flop(r.flops)),
        "FLOPs ÷ the model's": of(lambda r: f"{r.flops / r.model_flops:.2f}"),
        **{name: of(lambda r, n=name: r.estimate.figures()[n]) for name in estimated},
        **{kind: of(lambda r, k=kind: exchange_text(r.collectives.get(k))) for kind in kinds},
        "the update's FLOPs": share(lambda s: flop(s.flops)),
        "÷ ideal share": share(lambda s: f"{s.ratio:.2f}"),
        "the update's collectives": share(lambda s: _count(s.collectives)),
        "of these the experts'": share(lambda s: _count(s.expert_collectives)),
        "seconds to compile": of(lambda r: f"{r.compile_seconds:.0f}"),
    }


def _verdict(report: PodReport) -> str:
    label = optimizer_label(report.optimizer)
    if report.memory_bytes is None:
        text = f"{label}: the memory of {report.device_kind} is unknown."
    else:
        verb = "fits" if report.fits else "does not fit"
        text = (
            f"{label}: the step {verb}: {_memory(report.total_bytes)} of "
            f"{_memory(report.memory_bytes)} on each device."
        )
        if not report.fits:
            text += " More devices, a larger --accumulate or --model.remat full reduce it."
    return text + (f" {unread_text(report.unread)}" if report.unread else "")


def _count(collectives: dict[str, Collective]) -> str:
    return ", ".join(f"{c.count} {kind}" for kind, c in collectives.items()) or "none"


def _memory(count: float) -> str:
    unit, size = ("GiB", _GIB) if count >= _GIB / 10 else ("MiB", 2**20)
    return f"{count / size:.2f} {unit}"
