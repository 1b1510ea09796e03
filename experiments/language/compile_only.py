"""`--compile-only`: compiles the step ahead of time for other devices, and prints its cost there.

Every figure is read from the compiled program, except the FLOPs of the model and those of attention
kernels on TPUs, which the program does not contain.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.compiled import Collective, Program, measure
from experiments.language import sharding
from experiments.language.dry_run import show_memory, table_of
from experiments.language.kernels import with_attention
from experiments.language.mesh import Mesh, make_mesh, one_device
from experiments.language.planning import Case, Planning, TooLarge, check, remedies
from experiments.report.figures import optimizer_label
from experiments.report.text import flop, form
from experiments.roofline import Estimate, estimate, exchange_text, print_estimates, unread_text
from experiments.topology import topology_devices

_GIB = 2**30


class NewtonSchulzShare(NamedTuple):
    """The cost of the optimizer's update, compiled by itself.

    Attributes:
        flops: FLOPs per device.
        ideal_flops: FLOPs per device if each matrix were orthogonalised once, and devices shared
            this work equally.
        collectives: The collectives of the whole update.
        expert_collectives: The collectives of the routed experts' update, compiled by itself.
    """

    flops: int
    ideal_flops: int
    collectives: dict[str, Collective]
    expert_collectives: dict[str, Collective]

    @property
    def ratio(self) -> float:
        """FLOPs over ideal FLOPs: 1 if nothing is computed twice and no device waits."""
        return self.flops / self.ideal_flops


class Report(NamedTuple):
    """The cost of one step on one device.

    Attributes:
        program: The compiled program. Recomputation counts, and branches count as taken.
        kept_bytes: Bytes of outputs that do not reuse a donated argument.
        code_bytes: Bytes of the program itself.
        model_flops: FLOPs of the model alone.
        newton_schulz: The cost of the update; None for an optimizer without Newton-Schulz.
        seconds: The time to compile the step.
        estimate: The least time of the step by the roofline; None for unknown devices.
    """

    program: Program
    kept_bytes: int
    code_bytes: int
    model_flops: int
    newton_schulz: NewtonSchulzShare | None
    seconds: float
    estimate: Estimate | None = None

    @property
    def total_bytes(self) -> int:
        program = self.program
        own = program.argument_bytes + program.temp_bytes
        return own + self.kept_bytes + self.code_bytes


def compile_only(
    planning: Planning,
    mesh: Mesh,
    cases_on: Callable[[jax.sharding.Mesh], Sequence[Case]],
    console: Console,
) -> None:
    """Compiles the step with each optimizer, and prints its cost.

    Args:
        planning: The options, with a topology.
        mesh: The sizes of the mesh axes.
        cases_on: Returns the trainings on a mesh.
        console: The console to print to.

    Raises:
        TopologyError: If the compiler is missing, or does not support the topology.
        TooLarge: If a step does not fit, by its plan or after compilation.
        ValueError: If the mesh does not divide an axis.
    """
    devices = topology_devices(planning.topology or "")
    placed = make_mesh(mesh.sizes, devices)
    limit, cases = planning.limit(placed), cases_on(placed)
    sizes = " × ".join(f"{axis} {size}" for axis, size in placed.shape.items())
    kind = devices[0].device_kind
    where = f"{placed.size} devices of {planning.topology} ({kind}), {sizes}"
    show_memory(cases, limit, console, where)
    reports, refused = {}, []
    for case in cases:
        with console.status(f"{case.name}: compiling for {planning.topology} (takes minutes)"):
            try:
                check(case, limit)
                reports[case.name] = compile_case(case)
                check(case, limit, reports[case.name].total_bytes)
            except TooLarge as error:
                refused.append(error)
    if reports:
        print_reports(reports, limit, kind, console)
    if refused:
        raise TooLarge(" ".join(map(str, refused)))


def compile_case(case: Case) -> Report:
    """Compiles a step for the devices of its mesh.

    Raises:
        TooLarge: If the compiler reports that the step does not fit.
    """
    began = time.perf_counter()
    try:
        compiled = case.trainer.program
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = str(error).removeprefix("RESOURCE_EXHAUSTED: ").splitlines()[0]
        advice = remedies(case, case.memory.total - 1)
        raise TooLarge(f"The step of {case.name} does not fit: {message} {advice}") from None
    seconds = time.perf_counter() - began
    program = with_attention(measure(compiled), case.attention)
    memory = compiled.memory_analysis()
    return Report(
        program,
        program.output_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        case.flops // case.mesh.size,
        None if case.muon is None else newton_schulz_share(case),
        seconds,
        estimate(program, case.mesh.devices.flat[0].device_kind),
    )


def newton_schulz_share(case: Case) -> NewtonSchulzShare:
    """Returns the cost of the optimizer's update on a device."""
    plan = case.newton_schulz(mesh=one_device(case.mesh.devices.flat[0]))
    whole, *experts = (_update_alone(case, *update) for update in case.updates())
    of_experts = experts[0].collectives if experts else {}
    ideal = plan.total("flops") // case.mesh.size
    return NewtonSchulzShare(whole.flops, ideal, whole.collectives, of_experts)


def _update_alone(case: Case, tx: Any, params: Any, specs: Any) -> Program:
    """Compiles an optimizer's update of some params with their sharding."""
    mesh = case.mesh
    state = jax.eval_shape(tx.init, params)
    shardings = sharding.shardings(sharding.state_specs(state, params, specs), mesh)
    state = sharding.placed(state, shardings)
    # Replicated arguments need a sharding on the mesh, too; GPUs reject them otherwise.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    max_logits = {
        f"{name}/attention": jax.ShapeDtypeStruct(
            (stack["attention_norm"]["scale"].shape[0], case.heads[0]), jnp.float32, sharding=whole
        )
        for name, stack in case.params.items()
        if "attention" in stack
    }

    def update(gradient, state, params, max_logits):
        return tx.update(gradient, state, params, max_logits=max_logits)

    out = sharding.shardings(specs, mesh), shardings
    jitted = jax.jit(update, out_shardings=out, donate_argnums=(0, 1))
    with jax.set_mesh(mesh):
        return measure(jitted.lower(params, state, params, max_logits).compile())


def print_reports(
    reports: Mapping[str, Report], limit: int | None, kind: str, console: Console
) -> None:
    """Prints a table with a column for each optimizer, then the costliest kernels of each.

    Args:
        reports: The reports by optimizer, all of one kind of device.
        limit: Bytes available on a device; None if unknown.
        kind: The kind of device.
        console: The console to print to.
    """
    table = table_of(reports, "per device")
    kinds = sorted({kind for report in reports.values() for kind in report.program.collectives})
    columns = [_column(report, limit, kinds) for report in reports.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    for name, report in reports.items():
        if report.program.unread:
            unread = f"{optimizer_label(name)}: {unread_text(report.program.unread)}"
            console.print(unread, highlight=False, soft_wrap=True)
    estimates = {optimizer_label(name): r.estimate for name, r in reports.items() if r.estimate}
    if estimates:
        print_estimates(estimates, kind, console)


def _column(report: Report, limit: int | None, kinds: Sequence[str]) -> dict[str, str]:
    program, alone = report.program, report.newton_schulz
    return {
        "params, state, batch": _memory(program.argument_bytes),
        "other outputs": _memory(report.kept_bytes),
        "temporaries": _memory(program.temp_bytes),
        "program": _memory(report.code_bytes),
        "memory": _memory(report.total_bytes),
        "available": "unknown" if limit is None else _memory(limit),
        "FLOPs": flop(program.flops),
        "FLOPs / model FLOPs": f"{program.flops / report.model_flops:.2f}",
        **(report.estimate.figures() if report.estimate else {}),
        **{kind: exchange_text(program.collectives.get(kind)) for kind in kinds},
        "update: FLOPs": flop(alone and alone.flops),
        "update: FLOPs / ideal share": form(alone and alone.ratio, ".2f"),
        "update: collectives": _count(alone and alone.collectives),
        "update of experts: collectives": _count(alone and alone.expert_collectives),
        "seconds to compile": f"{report.seconds:.0f}",
    }


def _count(collectives: dict[str, Collective] | None) -> str:
    if collectives is None:
        return "–"
    return ", ".join(f"{c.count} {kind}" for kind, c in collectives.items()) or "none"


def _memory(count: float) -> str:
    unit, size = ("GiB", _GIB) if count >= _GIB / 10 else ("MiB", 2**20)
    return f"{count / size:.2f} {unit}"
