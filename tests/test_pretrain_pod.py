"""`--compile-only`: what it reads from programs, and the kernels that TPUs run."""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretraining import DENSE, SMALL, VOCABULARY, mesh_of, one_device, training
from rich.console import Console

from experiments.compiled import Kernel, Program, measure
from experiments.language import compile_only
from experiments.language.attention import BLOCK, KEEP_KERNELS, causal_attention, splash
from experiments.language.kernels import Shape, with_attention
from experiments.language.mesh import Mesh, make_mesh
from experiments.language.planning import Planning, TooLarge, compiled_bytes
from experiments.pretrain import plan
from experiments.pretrain.costs import step_costs
from experiments.pretrain.model import LanguageModel
from experiments.pretrain.presets import PRESETS
from experiments.pretrain.step import Trainer
from experiments.roofline import estimate
from experiments.topology import MEMORY, TopologyError, topology_devices

change = dataclasses.replace
DEEP = change(SMALL, layers=5, hidden=64, expert_hidden=32)


# --- FLOPs of the model ----------------------------------------------------------------------


# Loops of one trip are unrolled, and then XLA finds what is computed twice.
@pytest.mark.parametrize(
    "model",
    [change(SMALL, layers=4, dense_layers=2), DENSE],
    ids=["latent, experts", "multi-head, dense"],
)
def test_model_flops_are_those_of_the_program_but_for_what_it_computes_twice(model, monkeypatch):
    monkeypatch.setattr("experiments.language.vocabulary.LOSS_TOKENS", 64)
    config = training(model)
    lm = LanguageModel(config.model, VOCABULARY)
    params = lm.shapes
    windows = jax.ShapeDtypeStruct((config.batch, config.context + 1), jnp.int32)

    with jax.set_mesh(one_device()):
        step = jax.jit(jax.value_and_grad(lm.loss, has_aux=True))
        found = measure(step.lower(params, lm.initial_bias(), windows).compile()).flops

    tokens = config.tokens_per_step
    # Both halves of the logits, and the mixed values again, which a division's gradient needs: 3
    # products over columns of a key, 4 of a value. In loops so short XLA finds the logits again.
    latent = model.attention == "latent"
    key = model.nope + model.rope if latent else model.width // model.heads
    value = model.value if latent else key
    pairs = model.layers * model.heads * config.context * tokens
    extra = 2 * pairs * (3 * key + 4 * value) - 3 * pairs * (key + value)
    # Experts' blocks of 64 places that are not full.
    sparse = model.layers - model.dense_layers
    routed = tokens * model.active
    places = (math.ceil(routed / 64) + model.experts) * 64
    extra += 6 * sparse * (places - routed) * 3 * model.width * model.expert_hidden
    assert found == step_costs(config, "adamw", params).model_flops + extra


def test_moonlight_takes_19_gflop_a_token():
    """As Liu et al., 2502.16982, count: 590 TFLOP of Newton-Schulz a step in the standard form."""
    config = PRESETS["moonlight-16b"]
    lm = LanguageModel(config.model, config.data.vocabulary)
    costs = step_costs(config, "muon", lm.shapes)
    assert costs.model_flops / costs.tokens == pytest.approx(18.9e9, rel=0.005)
    assert 0.7 * 590e12 < costs.newton_schulz_flops < 590e12


# --- Reports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    """Of eight simulated devices."""
    mesh = Mesh(fsdp=4, tensor=2)
    config = training(DENSE, mesh=mesh, accumulate=2)
    case = plan.case(config, "adamw", make_mesh(mesh.sizes, jax.devices()[:8]))
    return case, compile_only.compile_case(case)


def test_a_report_tells_what_one_device_has(report):
    case, report = report
    state, program = jax.tree.leaves(case.trainer.abstract), report.program
    shards = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state)
    windows = 2 * 1 * (case.config.context + 1) * 4
    assert program.argument_bytes == shards + windows + 4  # the learning rate
    assert 0 <= report.kept_bytes < 1000 < program.temp_bytes
    assert 1 < program.flops / report.model_flops < 3
    assert {"all-gather", "all-reduce", "reduce-scatter"} <= set(program.collectives)
    assert (program.unread, report.newton_schulz) == ({}, None)
    assert report.estimate is None  # a CPU has no roofline
    assert report.total_bytes == compiled_bytes(case.trainer.program)


def test_experts_are_orthogonalised_where_they_lie():
    config = training(DEEP, mesh=Mesh(fsdp=2, expert=2))
    share = compile_only.newton_schulz_share(plan.case(config, "muon", mesh_of(1, 2, 2, 1)))
    assert share.expert_collectives == {}
    assert share.collectives
    assert 0.9 < share.ratio <= 1.1


def run(case, limit, monkeypatch):
    """The command's text and error, with a simulated topology."""
    planning = Planning(compile_only=True, topology="simulated", device_memory=limit)
    devices = case.mesh.devices.ravel().tolist()
    monkeypatch.setattr(compile_only, "topology_devices", lambda name: devices)
    console = Console(record=True, width=160)
    try:
        compile_only.compile_only(planning, case.config.mesh, lambda mesh: [case], console)
    except TooLarge as error:
        return console.export_text(), str(error)
    return console.export_text(), None


def test_what_does_not_fit_is_refused_with_what_would(report, monkeypatch):
    case, made = report
    monkeypatch.setattr(compile_only, "compile_case", lambda case: made)
    said, error = run(case, 1000.0, monkeypatch)
    assert error is None and re.search(r"available +931.32 GiB", said)
    assert "on 8 devices of simulated (cpu), data 1 × fsdp 4" in said
    said, error = run(case, 1e-9 * case.memory.total, monkeypatch)
    assert "temporaries" in said
    assert error.startswith("The compiled step of adamw requires") and "--accumulate" in error
    said, error = run(case, 1e-6, monkeypatch)
    assert "temporaries" not in said and error.startswith("The planned step of adamw requires")


def test_a_report_tells_the_roofline_and_the_dearest_kernels(report):
    _, made = report
    kernel = Kernel("works", runs=4, flops=10**9, hbm_bytes=10**6, source="model.py:3 f")
    program = Program(0, {}, kernels=(kernel,), unread={"other": 3})
    kind = "NVIDIA H100 80GB HBM3"
    known = made._replace(program=program, estimate=estimate(program, kind))
    console = Console(record=True, width=160)
    compile_only.print_reports({"adamw": known}, None, kind, console)
    said = " ".join(console.export_text().split())
    for text in ("kernels 4", "HBM traffic 4.00 MB", "roofline 0.0137 ms", "model.py:3 f"):
        assert text in said, text
    assert "2 µs per launch, 3.35 TB/s" in said and "exclude 3 × other" in said


def test_kernels_of_attention_count_and_others_are_named():
    shape = Shape(sequences=2, heads=4, length=1024, key=64, value=32)
    kernels = Kernel("splash_mha_fwd_residuals.7", runs=3), Kernel("other.1", runs=2)
    unread = {"splash_mha_fwd_residuals": 3, "splash_mha_dkv_no_residuals": 1, "other": 2}
    program = with_attention(Program(10, {}, unread=unread, kernels=kernels), shape)
    pairs = 2 * 4 * 3 * 2 * BLOCK**2  # three pairs of blocks
    assert [kernel.flops for kernel in program.kernels] == [pairs * (64 + 32), 0]
    columns = 3 * (64 + 32) + 2 * (64 + 32)
    assert (program.flops, program.unread) == (10 + pairs * columns, {"other": 2})
    config = change(PRESETS["moonlight-16b"], batch=512, accumulate=4)
    # 16 sequences and 8 heads on each device
    case = plan.case(config, "adamw", mesh_of(1, 8, 1, 2))
    assert case.attention == Shape(16, 8, 8192, 192, 128)


def test_the_compilers_refusal_is_passed_on(report, monkeypatch):
    config = report[0].config
    case = plan.case(config, "adamw", report[0].mesh)

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5T exceed 95.74G.\nmore")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    _, error = run(case, None, monkeypatch)
    assert error.startswith("The step of adamw does not fit: 5T exceed 95.74G. ")
    assert "use a smaller model" in error


# --- Kernels of TPUs, interpreted ------------------------------------------------------------


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_splash_kernel_is_causal_attention():
    q, k, v = normal(0, 1, 384, 2, 48), normal(1, 1, 384, 2, 48), normal(2, 1, 384, 2, 32)

    def weighted(attend, q, k, v):
        return jnp.sum(attend(q, k, v)[0] * v)

    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        kernel = functools.partial(splash, interpret=True)
        mixed, logsumexp = kernel(q, k, v)
        expected, largest = causal_attention(q, k, v)
        np.testing.assert_allclose(mixed, expected, atol=2e-6)
        gradients = [
            jax.grad(functools.partial(weighted, attend), (0, 1, 2))(q, k, v)
            for attend in (kernel, causal_attention)
        ]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    bound = jnp.max(logsumexp, axis=(0, 1))
    assert np.all(bound >= largest) and np.all(bound <= largest + np.log(384))


# --- TPUs that are not there -----------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[tpu]'",
)


def test_a_dense_step_on_gpus_launches_few_kernels():
    """Two layers of twelve: bars of kernels, and of bytes of those that are no products."""
    try:
        devices = topology_devices("h100:8")
    except TopologyError as error:
        pytest.skip(str(error))
    whole = PRESETS["nanogpt-124m"]
    model = change(whole.model, layers=2, dense_layers=2)
    config = change(whole, model=model, batch=128, accumulate=2, mesh=Mesh(fsdp=8))
    mesh = make_mesh(config.mesh.sizes, devices)
    program = measure(Trainer(config, "adamw", mesh, config.data.vocabulary).program)
    others = sum(k.runs * k.hbm_bytes for k in program.kernels if not k.flops)
    assert program.kernel_count <= 370 and others < 13.3e9  # they were 518 and 17.7e9


@needs_libtpu
@pytest.mark.parametrize("exchange", ["gather", "ragged"])
def test_a_small_step_compiles_for_a_tpu(exchange):
    tiny = PRESETS["tiny"]
    model = change(tiny.model, dtype="bfloat16", exchange=exchange)
    config = change(tiny, model=model, mesh=Mesh(fsdp=2, expert=2))
    mesh = make_mesh(config.mesh.sizes, topology_devices("v5e:2x2"))
    report = compile_only.compile_case(plan.case(config, "adamw", mesh))
    program = report.program
    assert report.total_bytes <= MEMORY["TPU v5 lite"] * 2**30 and program.unread == {}
    exchanged = {"ragged-all-to-all"} if exchange == "ragged" else set()
    assert {kind for kind in program.collectives if "ragged" in kind} == exchanged
    assert 1 < program.flops / report.model_flops < 4


@needs_libtpu
def test_a_layer_that_is_computed_again_runs_attention_once():
    mesh = make_mesh((1, 1, 1, 1), topology_devices("v5e:2x2")[:1])
    place = jax.NamedSharding(mesh, jax.P())
    x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16, sharding=place)

    def loss(x, kernels):
        layer = jax.checkpoint(lambda x: jnp.sin(splash(x * kernels, x, x)[0]), policy=KEEP_KERNELS)
        return jnp.sum(layer(layer(x)), dtype=jnp.float32)

    with jax.set_mesh(mesh):
        program = measure(jax.jit(jax.grad(loss), out_shardings=place).lower(x, x).compile())
    runs = {name.split("_")[2]: count for name, count in program.unread.items()}
    assert runs == {"fwd": 2, "dq": 2, "dkv": 2}


@needs_libtpu
def test_muon_of_the_16b_model_shares_its_work_out():
    config = PRESETS["moonlight-16b"]
    mesh = make_mesh(config.mesh.sizes, topology_devices("v5p:4x4x4"))
    share = compile_only.newton_schulz_share(plan.case(config, "muon", mesh))
    assert share.ratio == pytest.approx(1.02, abs=0.01)
    assert share.expert_collectives == {}
    counts = {kind: c.count for kind, c in share.collectives.items()}
    assert counts["all-reduce"] <= 10 and counts["all-to-all"] <= 28 and len(counts) == 2


@needs_libtpu
def test_the_16b_step_fits():
    """A layer of 27, two sequences of eight: the full one is the command's, for minutes."""
    whole = PRESETS["moonlight-16b"]
    model = change(whole.model, layers=2, dense_layers=0)
    config = change(whole, model=model, batch=256, accumulate=1)
    mesh = make_mesh(config.mesh.sizes, topology_devices("v5p:4x4x4"))
    report = compile_only.compile_case(plan.case(config, "adamw", mesh))
    program = report.program
    assert report.total_bytes <= MEMORY["TPU v5"] * 2**30 and program.unread == {}
    assert program.argument_bytes == pytest.approx(0.32 * 2**30, rel=0.02)
    assert report.total_bytes == pytest.approx(10.6 * 2**30, rel=0.1)
    assert program.flops / report.model_flops == pytest.approx(1.14, abs=0.05)
    assert all(c.in_loops == 0 for c in program.collectives.values())
    # The experts' kernels, which nearly all params are, are gathered twice; their gradients and the
    # head's leave by reduce-scatters.
    kernels, head = 2 * 64 * 3 * 2048 * 1408 * 2, 2048 * 163_840 * 2
    assert program.collectives["all-gather"].output_bytes < 1.3 * 2 * kernels
    assert program.collectives["reduce-scatter"].operand_bytes < 1.1 * (kernels + head)
    assert program.collectives["all-reduce"].output_bytes < head
