"""The time that `plan` predicts: by hand, and against programs compiled for an H100 and a v5e."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import muon_jax
from experiments.bench.accelerators import CUBLAS, OPTIONS
from experiments.bench.cases import layer, make_mesh, on_mesh, separate, stacked
from experiments.bench.sharding import compile_step
from experiments.compiled import measure
from experiments.roofline import CHIPS
from experiments.topology import TopologyError, topology_devices
from muon_jax._orthogonalize.devices import DEVICES, Device, Kernel
from muon_jax._orthogonalize.forms import Form
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._orthogonalize.symmetric import symmetric_kernels
from muon_jax._sharding.assignment import plan_buckets
from muon_jax._sharding.buckets import Stack, by_call

BY_HAND = Device("made up", launch=1e-3, bandwidth=1e6, flops=1e6, wide_flops=5e5)


def test_seconds_by_hand():
    moves, works = Kernel(0, 1000), Kernel(6000, 1000)
    assert BY_HAND.seconds([moves, works], jnp.bfloat16) == pytest.approx(3e-3 + 7e-3)
    assert BY_HAND.seconds([moves, works], jnp.float32) == pytest.approx(5e-3 + 13e-3)
    assert BY_HAND.seconds([moves], jnp.int8, launches=False) == pytest.approx(1e-3)
    tpu = BY_HAND._replace(narrowest=4, on_chip=True)
    assert tpu.seconds([moves, works], jnp.bfloat16) == pytest.approx(5e-3 + 7e-3)
    filling = tpu._replace(fill=1e-3)
    assert filling.seconds([moves, works], jnp.bfloat16) == pytest.approx(6e-3 + 7e-3)
    assert "1000 µs per kernel, 1e-06 TB/s, 1e-06 TFLOP/s" in BY_HAND.assumptions()
    assert "products alone, at 0.75 TFLOP/s" in DEVICES["cpu"].assumptions()


def test_kernels_of_the_standard_form_by_hand():
    """Three 4 × 8 matrices, two steps: squares are 48 numbers, matrices 96."""
    norm = [Kernel(0, 0), Kernel(0, 0), Kernel(0, 96), *[Kernel(0, 0)] * 3, Kernel(0, 192)]
    gram, square = Kernel(3 * 2 * 16 * 8, 96 + 48), Kernel(3 * 2 * 64, 48 + 48)
    step = [gram, square, Kernel(0, 3 * 48), Kernel(3 * 2 * 16 * 8, 48 + 2 * 96)]
    rows = ((1, 2, 3),) * 2
    form = Form("standard")
    assert form.kernels(4, [(3, 8)], rows, BY_HAND) == norm + 2 * step
    fused = [*[Kernel(0, 0)] * 6, Kernel(0, 192), *(k for k in 2 * step if k.flops)]
    assert form.kernels(4, [(3, 8)], rows, BY_HAND._replace(on_chip=True)) == fused
    assert form.flops(4, 8, rows) == 2 * (2 * 2 * 16 * 8 + 2 * 64)


def test_kernels_of_the_gram_form_by_hand():
    """Three 4 × 8 and one 4 × 12 with a restart between two steps: all squares are 64 numbers."""
    grams = [Kernel(3 * 2 * 16 * 8, 96 + 48), Kernel(2 * 16 * 12, 48 + 16), Kernel(0, 2 * 64)]
    polynomial = [Kernel(4 * 2 * 64, 2 * 64), Kernel(0, 3 * 64)]
    applied = [Kernel(0, 2 * 48), Kernel(3 * 2 * 16 * 8, 48 + 2 * 96)]
    applied += [Kernel(0, 2 * 16), Kernel(2 * 16 * 12, 16 + 2 * 48)]
    kernels = Form("gram", (1,)).kernels(4, [(3, 8), (1, 12)], ((1, 2, 3),) * 2, BY_HAND)
    assert kernels[12:] == 2 * (grams + polynomial + applied)
    # Without it: P is formed twice, R and Q once more.
    kernels = Form("gram").kernels(4, [(4, 8)], ((1, 2, 3),) * 2, BY_HAND)[7:]
    symmetric = [Kernel(4 * 2 * 64, 3 * 64)]
    assert kernels == [
        Kernel(4 * 2 * 16 * 8, 128 + 64),
        *polynomial,
        *2 * symmetric,
        *polynomial,
        *symmetric,
        Kernel(4 * 2 * 16 * 8, 64 + 2 * 128),
    ]


def test_kernels_of_panels_by_hand():
    """Rows 0:16 of 32 times the first 16, and 16:32 times all; mirrored in three more kernels."""
    first, second, *copies = symmetric_kernels(2, 32, 10, 640, 2)
    assert first == Kernel(2 * 2 * 16 * 16 * 10, (640 + 2048) // 2)
    assert second == Kernel(2 * 2 * 16 * 32 * 10, (640 + 2048) // 2)
    assert copies == [Kernel(0, 5 * 2048 // 3)] * 3


def test_a_plan_tells_its_time_by_hand(monkeypatch):
    """Momentum reads and writes four arrays of all leaves, the step three, AdamW seven."""
    monkeypatch.setitem(DEVICES, "gpu", BY_HAND)
    shapes = {"a/kernel": (4, 8), "b/kernel": (4, 8), "scale": (10,)}
    params = {name: jax.ShapeDtypeStruct(x, jnp.bfloat16) for name, x in shapes.items()}
    plan = muon_jax.plan(params, ns_steps=1, platform="gpu", mesh=AbstractMesh((1,), ("d",)))
    muon, other = plan.rows
    kernels = Form("standard").kernels(4, [(2, 8)], ((1, 2, 3),), BY_HAND)
    ends = [Kernel(0, 4 * 64), Kernel(0, 3 * 64)]
    assert muon.seconds == pytest.approx(BY_HAND.seconds(kernels + ends, jnp.bfloat16))
    assert other.seconds == pytest.approx(1e-3 + 7 * 10 * 2e-6)
    assert (
        plan.total("seconds") == plan.to_dict()["total"]["seconds"] == muon.seconds + other.seconds
    )
    # Where what comes next is on the chip still, and products take the step along.
    chip = BY_HAND._replace(on_chip=True)
    monkeypatch.setitem(DEVICES, "gpu", chip)
    fused = muon_jax.plan(params, ns_steps=1, platform="gpu", mesh=AbstractMesh((1,), ("d",)))
    kernels = Form("standard").kernels(4, [(2, 8)], ((1, 2, 3),), chip)
    kernels += [Kernel(0, 3 * 32)] * 2
    assert fused.rows[0].seconds == pytest.approx(chip.seconds(kernels, jnp.bfloat16))
    text = str(plan)
    assert f"{1e3 * plan.total('seconds'):.3g} ms" in text and "predicted for made up" in text


def test_the_peak_is_no_sum():
    params = {name: jax.ShapeDtypeStruct((8, n), jnp.float32) for name, n in (("a", 8), ("b", 64))}
    plan = muon_jax.plan(params, platform="cpu")
    assert plan.peak() == max(row.working_bytes for row in plan.rows) > 0
    assert plan.to_dict()["total"]["working_bytes"] == plan.peak()
    with pytest.warns(DeprecationWarning, match=r"Use peak\(\)"):
        assert plan.total("working_bytes") == plan.peak()


def test_a_form_is_chosen_by_time():
    """Small matrices are traffic to a GPU, of which the standard form has less."""
    newton_schulz = NewtonSchulz(dtype=jnp.bfloat16)

    def methods(platform):
        shapes = ((384, 768), (384, 1152), (2048, 4096))
        return [newton_schulz.form(*shape, jnp.float32, platform).method for shape in shapes]

    assert methods("gpu") == ["standard", "gram", "gram"]
    assert methods("cpu") == methods("tpu") == ["gram"] * 3
    cut = [newton_schulz.cut_form(768, jnp.float32, p, False).panels for p in ("gpu", "cpu", "tpu")]
    assert cut == [1, 2, 2]


def test_few_matrices_share_a_call_and_many_have_less_traffic():
    def calls(platform, count):
        shapes = ((256, 512), (512, 256), (256, 256))
        stacks = tuple(Stack(count, *x, (), (), (), jnp.dtype(jnp.bfloat16)) for x in shapes)
        buckets = plan_buckets(stacks, (), NewtonSchulz(dtype=jnp.bfloat16), platform)
        return [[bucket.form.method for bucket in call] for call in by_call(buckets)]

    assert calls("tpu", 3) == [["gram", "gram"], ["standard"]]
    assert calls("gpu", 3) == [["standard"] * 3]
    assert calls("gpu", 100) == [["standard"]] * 3
    assert calls("cpu", 100) == [["gram"], ["gram"], ["standard"]]


# Topology, tree, devices; by how much the prediction may err.
COMPILED = {
    "12 of 768, separate": ("h100:1", separate(layer(4, 768, 3072), 12), 1, 0.1),
    "12 of 768, stacked": ("h100:1", stacked(layer(4, 768, 3072), 12), 1, 0.1),
    "4 of 2048": ("h100:1", separate(layer(4, 2048, 8192), 4), 1, 0.1),
    "3 of 256": ("h100:1", separate(layer(2, 256, 512), 3), 1, 0.1),
    "16 of 384": ("h100:1", separate(layer(2, 384, 768), 16), 1, 0.1),
    "8 of 768, fsdp 8": ("h100:8", separate(layer(2, 768, 3072), 8), 8, 0.1),
    "2 of 768, fsdp 8, cut": ("h100:8", stacked(layer(3, 768, 3072), 2), 8, 0.1),
    "v5e, 2 of 768": ("v5e:2x2", stacked(layer(4, 768, 3072), 2), 1, 0.1),
    "v5e, 3 of 256": ("v5e:2x2", separate(layer(2, 256, 512), 3), 1, 0.1),
    "v5e, 8 of 768, fsdp 8": ("v5e:2x4", stacked(layer(2, 768, 3072), 8), 8, 0.1),
    "v5e, 2 of 768, fsdp 8, cut": ("v5e:2x4", stacked(layer(3, 768, 3072), 2), 8, 0.1),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_plan_tells_the_time_of_the_compiled_program(name, monkeypatch):
    """By the roofline, with cuBLAS products: XLA's own may be split in two. TPUs: by its cycles."""
    topology, tree, devices, most = COMPILED[name]
    try:
        found = topology_devices(topology)
    except TopologyError as error:
        pytest.skip(str(error))
    mesh = make_mesh(found, {"d": devices})
    spec = ("d" if devices > 1 else None, None)
    case = on_mesh(name, mesh, tree, spec, dtype=jnp.bfloat16)
    settings = {"mesh": mesh, "shardings": case.shardings, "ns_dtype": jnp.bfloat16}
    is_gpu = found[0].platform != "tpu"
    tx = muon_jax.muon(0.02, **settings)
    program = measure(compile_step(case, tx, OPTIONS[CUBLAS] if is_gpu else {}))
    predicted = muon_jax.plan(case.params, **settings).total("seconds")
    if not is_gpu:
        assert predicted == pytest.approx(program.estimated_cycles / 1.5e9, rel=most)
        return
    assert predicted == pytest.approx(CHIPS[found[0].device_kind].total(program), rel=most)
    # Where a launch takes a second, the time is the kernels.
    monkeypatch.setitem(DEVICES, "gpu", DEVICES["gpu"]._replace(launch=1))
    kernels = muon_jax.plan(case.params, **settings).total("seconds")
    assert kernels == pytest.approx(program.kernel_count, rel=most)
