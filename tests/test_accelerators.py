"""Programs for GPUs and TPUs that are not here: hand-counted figures of small ones."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import devices_of
from rich.console import Console

import muon_jax
from experiments.bench import arms
from experiments.bench.cases import EXCHANGED, OPTAX, make_mesh, on_mesh, separate
from experiments.bench.sharding import compile_step
from experiments.compiled import Collective, Kernel, Program, measure, read
from experiments.language.compile_only import Report, print_reports
from experiments.roofline import CHIPS, Chip, dearest, dearest_table, estimate, exchange_text
from experiments.topology import MEMORY, TopologyError, topology_devices
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz

REPLICATED = P()
CHIP = Chip("made up", bandwidth=1e12, flops=1e14, launch=2e-6)


@functools.cache
def mesh_of(name):
    if name == "cpu":
        return make_mesh(jax.devices("cpu"), {"d": 8})
    return make_mesh(devices_of(name), {"d": 8})


def compiled_for(name, function, *shapes, spec=REPLICATED, dtype=jnp.bfloat16):
    """The program, of arguments that lie over eight devices as `spec` says."""
    sharding = NamedSharding(mesh_of(name), spec)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
    return measure(jax.jit(function, out_shardings=sharding).lower(*arguments).compile())


def iterated(x):
    def step(_, x):
        gram = x @ x.T
        return (gram @ x + 0.5 * x).astype(x.dtype)

    return jax.lax.fori_loop(0, 6, step, x)


@pytest.mark.parametrize("spec", [P(), P("d")], ids=["replicated", "sharded"])
@pytest.mark.parametrize("name", ["cpu", "h100:8", "v5e:2x4"])
def test_one_program_has_the_same_flops_on_every_platform(name, spec):
    program = compiled_for(name, iterated, (1024, 2048), spec=spec)
    expected = 6 * 4 * 1024 * 1024 * 2048 // (8 if spec == P("d") else 1)
    assert program.flops == pytest.approx(expected, rel=0.02)


# An optimizer whose forms depend on the platform would be another program on each.
@pytest.mark.parametrize("name", ["h100:8", "v5e:2x4"])
@pytest.mark.parametrize("arm", [OPTAX, EXCHANGED])
def test_an_update_has_the_flops_on_accelerators_that_it_has_on_cpus(name, arm):
    def flops(name):
        shapes = {"up": (8, 256, 512), "square": (256, 256)}
        case = on_mesh("small", mesh_of(name), shapes, ("d", None), dtype=jnp.bfloat16)
        program = measure(compile_step(case, arms.ARMS[arm](case, jnp.bfloat16)))
        assert program.unread == {}
        return program.flops

    assert flops(name) == pytest.approx(flops("cpu"), rel=0.02)


@pytest.mark.parametrize("name", ["h100:8", "v5e:2x4"])
def test_a_training_step_has_the_flops_on_accelerators_that_it_has_on_cpus(name):
    """Layers in a scan with remat, params and batch cut over all devices: loops of collectives."""

    def loss(params, x):
        def layer(x, kernels):
            up, down = kernels
            return x + jnp.tanh(x @ up) @ down, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, params)[0].astype(jnp.float32) ** 2)

    def flops(name):
        mesh = mesh_of(name)

        def array(*shape, spec):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

        up, down = (array(3, *shape, spec=(None, "d")) for shape in ((256, 1024), (1024, 256)))
        x = array(1024, 256, spec=("d",))
        step = jax.jit(jax.grad(loss), out_shardings=(up.sharding, down.sharding))
        program = measure(step.lower((up, down), x).compile())
        assert program.unread == {}
        return program.flops

    # Forward, forward again, and two products for each backward.
    expected = 3 * 2 * (2 * 128 * 256 * 1024) * (1 + 1 + 2)
    assert flops("cpu") == pytest.approx(expected, rel=0.15)  # the last product again is not needed
    assert flops(name) == pytest.approx(flops("cpu"), rel=0.02)


@pytest.mark.parametrize("name", ["h100:8", "h200:8", "b200:8", "h100:2x4"])
def test_gpus_that_are_not_here(name):
    program = compiled_for(name, lambda x: x @ x, (512, 512))
    assert program.flops == 2 * 512**3
    # Reads one operand, which is both, and writes the product.
    assert program.hbm_bytes >= 2 * 512**2 * 2
    mesh = mesh_of(name)
    assert mesh.devices.size == 8 and mesh.devices[0].device_kind in CHIPS
    assert len({device.process_index for device in mesh.devices}) == (2 if "x" in name else 1)


def test_kernels_of_a_gpu_in_a_loop_run_once_a_trip():
    program = compiled_for(
        "h100:8", lambda x: jax.lax.fori_loop(0, 9, lambda _, y: y @ y, x), (1024, 1024)
    )
    products = [kernel for kernel in program.kernels if kernel.flops]
    assert sum(kernel.runs for kernel in products) == 9
    assert program.flops == 9 * 2 * 1024**3
    assert all("test_accelerators.py" in kernel.source for kernel in products)
    assert "dot_general" in products[0].operation


def test_the_compiler_of_tpus_estimates_cycles():
    once = compiled_for("v5e:2x4", lambda x: x @ x, (2048, 2048))
    often = compiled_for("v5e:2x4", lambda x: x @ x @ x @ x @ x, (2048, 2048))
    assert 2 * 2048**3 / 210e3 < once.estimated_cycles < 2 * 2 * 2048**3 / 210e3
    assert 3.5 < often.estimated_cycles / once.estimated_cycles < 5


TRAFFIC = """HloModule traffic

%slices (p: f32[12,64], i: s32[]) -> f32[1,64] {
  %p = f32[12,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,64]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,64}
  ROOT %sine = f32[1,64]{1,0} sine(%part)
}

%writes (whole: f32[12,64], part: f32[1,64], j: s32[]) -> f32[12,64] {
  %whole = f32[12,64]{1,0} parameter(0)
  %part.1 = f32[1,64]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %new = f32[12,64]{1,0} dynamic-update-slice(%whole, %part.1, %j, %none)
}

ENTRY %main (a: f32[12,64], n: s32[]) -> f32[12,64] {
  %a = f32[12,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = f32[1,64]{1,0} fusion(%a, %n), kind=kLoop, calls=%slices
  %begun = (f32[1,64]{1,0}, f32[1,64]{1,0}) all-reduce-start(%one), to_apply=%add
  %cubed = (f32[12,12]{1,0}, s8[1000]{0}) custom-call(%a, %a), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %ended = f32[1,64]{1,0} all-reduce-done(%begun)
  ROOT %all = f32[12,64]{1,0} fusion(%a, %ended, %n), kind=kLoop, calls=%writes
}
"""  # noqa: E501


def test_bytes_of_slices_updates_and_products_by_hand():
    program = read(TRAFFIC)
    row, whole = 64 * 4, 12 * 64 * 4
    assert [(k.name, k.hbm_bytes, k.flops) for k in program.kernels] == [
        ("one", row + 4 + row, 0),
        ("cubed", whole + 12 * 12 * 4, 2 * 12 * 12 * 64),
        ("all", row + 4 + row, 0),
    ]
    assert program.kernels[1].wide_flops == program.flops
    reduced = program.collectives["all-reduce"]
    assert (reduced.count, reduced.beside) == (1, 1)
    assert program.kernel_count == 3 and program.unread == {}


SLICES = """HloModule slices

ENTRY %main (a: f32[12,64]) -> f32[4,64] {
  %a = f32[12,64]{1,0:T(8,128)} parameter(0)
  %here = ((f32[12,64]{1,0:T(8,128)}), f32[4,64]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:64]}
  %held = f32[4,64]{1,0:T(8,128)S(1)} slice-done(%here)
  %there = ((f32[12,64]{1,0:T(8,128)}), f32[4,64]{1,0:T(8,128)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:64]}
  %kept = f32[4,64]{1,0:T(8,128)} slice-done(%there)
  %moved = (f32[4,64]{1,0:T(8,128)S(1)}, f32[4,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%kept)
  %copied = f32[4,64]{1,0:T(8,128)S(1)} copy-done(%moved)
  ROOT %sum = f32[4,64]{1,0:T(8,128)} add(%held, %copied)
}
"""  # noqa: E501


def test_bytes_of_what_a_tpu_fetches_ahead_by_hand():
    """Into its own memory a slice is read; in HBM it is written, too; its end costs nothing."""
    part, context = 4 * 64 * 4, 4
    assert [(k.name, k.hbm_bytes) for k in read(SLICES).kernels] == [
        ("here", part),
        ("there", 2 * part),
        ("moved", part + context),
        ("sum", part),
    ]


def test_the_roofline_by_hand():
    moves = Kernel("moves", runs=3, hbm_bytes=10**6)  # 2 + 1 µs
    works = Kernel("works", runs=1, flops=10**10, hbm_bytes=10**6)  # 2 + 100 µs
    wide = Kernel("wide", runs=1, flops=10**10, wide_flops=10**10)  # 2 + 200 µs
    program = Program(0, {}, kernels=(moves, works, wide))
    assert CHIP.total(program) == pytest.approx(9e-6 + 102e-6 + 202e-6)
    found = dearest(program, CHIP, count=2)
    assert [kernel.name for kernel, _ in found] == ["wide", "works"]
    assert dearest_table(found).row_count == 2
    assert CHIP.floor(1e10, 1e6) == pytest.approx(1e-4)
    assert "2 µs per launch, 1 TB/s, 100 TFLOP/s" in CHIP.assumptions()


def test_a_program_is_printed_with_all_that_it_takes(monkeypatch):
    kernels = (
        Kernel("works", runs=3, flops=10**9, hbm_bytes=10**6, cycles=500_000, source="a.py:7 f"),
        Kernel("moves", runs=2, hbm_bytes=10**7),
    )
    collectives = {"all-gather": Collective(6, 4, 24_000_000, 3_000_000, beside=5)}
    program = Program(3 * 10**9, collectives, 7_000_000, unread={"other": 2}, kernels=kernels)
    monkeypatch.setitem(CHIPS, "made up", CHIP)
    console = Console(record=True, width=160)
    report = Report(program, 0, 2**20, 10**9, None, 2.0, estimate(program, "made up"))
    print_reports({"muon": report}, 2**33, "made up", console)
    said = " ".join(console.export_text().split())
    for text in (
        "FLOPs 3 GFLOP",
        "kernels 5",
        "HBM traffic 23.00 MB",
        "roofline 0.06 ms",  # 3 × (2 + 10) + 2 × (2 + 10) µs
        "estimated cycles 1.50 M",
        "all-gather 24.00 MB in 6 (4 in loops, 5 overlapped with computation)",
        "temporaries 6.68 MiB",
        "program 1.00 MiB memory 7.68 MiB available 8.00 GiB",
        "FLOPs / model FLOPs 3.00",
        "update: FLOPs / ideal share –",
        "exclude 2 × other",
        "Roofline of made up",
        "a.py:7 f",
    ):
        assert text in said, text


def test_a_cpu_has_no_roofline():
    assert estimate(Program(0, {}), "cpu") is None
    assert exchange_text(None) == "–"
    assert MEMORY.keys() == CHIPS.keys()


@pytest.mark.parametrize("name", ["nope", "h100x8", "v5e", "gpu:8", "H100:8", "v5e:", "cpu:4"])
def test_what_is_no_topology_says_which_there_are(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(TopologyError, match=f"Unknown topology '{name}'") as refused:
        topology_devices(name)
    for text in ("h100:8", "`gpu-compile`", "v5e:4x4", "`tpu`"):
        assert text in str(refused.value)


@pytest.mark.parametrize("name", ["h100:0", "h100:", "h100:8x", "b200:2x2x2"])
def test_sizes_that_no_gpus_have_are_refused(name):
    with pytest.raises(TopologyError, match=r"hosts × devices, as \w+:8x8"):
        topology_devices(name)


def test_gpus_without_the_plugin_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r'pip install -e "\.\[experiments,gpu-compile\]"'):
        topology_devices("h100:8")


SQUARES_AND_MORE = {"query": (256, 256), "out": (256, 256), "up": (256, 512), "down": (512, 256)}

# Three layers, each kernel a leaf of its own, in bfloat16: kernels, and microseconds by the
# roofline or thousands of estimated cycles. With jax 0.10.2 ours take 70, 181 and 368, those of
# optax 0.2.8 315, 839 and 488.
UPDATES = {"h100:1": (72, 190), "v5e:2x2": (None, 380)}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_a_few_kernels_on_stacks(name):
    mesh = make_mesh(devices_of(name), {"d": 1})
    tree = separate(SQUARES_AND_MORE, 3)
    case = on_mesh(name, mesh, tree, (None, None), dtype=jnp.bfloat16)
    tx = muon_jax.muon(0.02, mesh=mesh, ns_dtype=jnp.bfloat16)
    program, rival = (measure(compile_step(case, arm)) for arm in (tx, arms.optax_muon(case, None)))
    assert program.flops == muon_jax.plan(case.params, mesh=mesh, ns_dtype=jnp.bfloat16).total(
        "flops"
    )
    kernels, most = UPDATES[name]
    chip = CHIPS[mesh.devices[0].device_kind]
    ours, optax = (
        1e6 * chip.total(p) if chip.launch else p.estimated_cycles / 1e3 for p in (program, rival)
    )
    assert ours < min(most, optax)
    assert kernels is None or program.kernel_count <= kernels < rival.kernel_count


@pytest.mark.parametrize("name", ["h100:8", "v5e:2x4"])
def test_the_sums_of_norms_are_reduced_in_the_way_that_is_faster(name):
    newton_schulz = NewtonSchulz(steps=1, dtype=jnp.bfloat16)
    platform = mesh_of(name).devices.flat[0].platform
    form = newton_schulz.form(768, 1536, jnp.bfloat16, platform)
    assert form.joint_sums == (name == "h100:8")

    def cost(form):
        def step(*xs):
            momenta = [0.95 * mu + 0.05 * x for x, mu in zip(xs[:2], xs[2:], strict=True)]
            return momenta, newton_schulz.together(momenta, form)

        program = compiled_for(name, step, *2 * ((2, 768, 768), (2, 768, 1536)))
        return program.estimated_cycles or program.kernel_count

    assert cost(form) < cost(form._replace(joint_sums=not form.joint_sums))


def test_one_bucket_is_exchanged_beside_the_iteration_of_another():
    """On a GPU: of two buckets' exchanges, there and back, only one has nothing to run beside."""
    mesh = mesh_of("h100:8")
    where, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    shapes = {"square": (1024, 1024), "up": (1024, 4096)}
    params = {
        f"{name}{i}": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
        for i in range(8)
        for name, shape in shapes.items()
    }
    tx = muon_jax.scale_by_muon(mesh=mesh, shardings=P("d"))
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where if x.ndim else whole),
            jax.eval_shape(tx.init, params),
        )
        program = measure(jax.jit(tx.update).lower(params, state).compile())
    exchange = program.collectives["all-to-all"]
    assert exchange.count == 4 and exchange.beside >= 3
