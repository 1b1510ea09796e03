"""Programs compiled for a GPU that is not here lack what had no need to be in them."""

import dataclasses
import re

import finetuning
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import devices_of

import muon_jax
from experiments.compiled import Program, measure
from experiments.grok.config import Cell, Config
from experiments.grok.train import compile_arm
from experiments.language.mesh import one_device
from experiments.roofline import estimate
from muon_jax._momentum import update_momentum


@pytest.fixture(scope="module")
def gpu():
    """A mesh of one."""
    return one_device(devices_of("h100:1")[0])


def test_a_step_of_fine_tuning_copies_no_parameters(gpu):
    """The new ones take the old ones' place, also where a step may be skipped."""
    architecture = dataclasses.replace(finetuning.NORMED, layers=1, vocabulary=640)
    config = finetuning.training(dtype="bfloat16")
    text = finetuning.trainer_of(config, "muon_adamw", architecture, gpu).program.as_text()
    assert "f32[640,32]" in text
    assert not re.search(r"f32\[640,32\]\S* copy\(", text)


def _update(gpu, tx, shapes):
    place = jax.NamedSharding(gpu, jax.P())
    xs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    with jax.set_mesh(gpu):
        state = jax.eval_shape(tx.init, xs)
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state
        )
        return measure(jax.jit(tx.update, out_shardings=place).lower(xs, state).compile())


def test_an_update_of_a_toy_is_one_stack(gpu):
    """Four squares and three longer matrices: 47 kernels, and 97 if shapes do not share them."""
    shapes = ((128, 128),) * 4 + ((128, 512),) * 2 + ((512, 128),)
    program = _update(gpu, muon_jax.scale_by_muon(mesh=gpu), shapes)
    xs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert program.flops == muon_jax.plan(xs, mesh=gpu).total("flops")
    assert program.kernel_count <= 47


def test_leaves_of_one_shape_share_the_kernels_of_their_momentum(gpu):
    """Three in all: of twelve leaves, of the count, and of the coefficient that the leaves read."""
    tx = muon_jax.scale_by_muon(orthogonalizer=lambda x: x, mesh=gpu)
    assert _update(gpu, tx, ((128, 128),) * 12).kernel_count == 3


@pytest.mark.parametrize("kind", ["ema", "heavy_ball", "optax"])
def test_the_momentum_of_a_gpu_has_the_same_numbers(kind):
    """Also where sums overflow, and of gradients that are infinite or NaN."""
    largest = float(jnp.finfo(jnp.float32).max)
    numbers = jnp.array([0.0, 1e-38, -3.0, largest, -largest, jnp.inf, -jnp.inf, jnp.nan])
    g, mu = (x.ravel() for x in jnp.meshgrid(numbers, numbers))
    settings = {"beta": 0.95, "nesterov": True, "kind": kind, "count": jnp.int32(1)}
    plain, merged = (update_momentum(g, mu, gpu=gpu, **settings) for gpu in (False, True))
    for one, other in zip(plain, merged, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)


def test_a_muon_step_of_grokking_takes_at_most_one_and_a_half_of_adamws(gpu):
    """By the roofline, one layer and three seeds together: 0.340 and 0.228 ms, 117 and 85 kernels.

    If leaves of one shape did not share their momentum's kernels it would be 0.353 ms and 123.
    """
    device, config = gpu.devices.flat[0], Config(layers=1)

    def step_of(optimizer):
        program = compile_arm(config, Cell("mul", "softmax", optimizer, 0), 3, device)
        kernels = measure(program.epoch).kernels
        steps = [
            dataclasses.replace(kernel, runs=kernel.runs // program.steps)
            for kernel in kernels
            if kernel.runs % program.steps == 0
        ]
        return estimate(Program(0, {}, kernels=tuple(steps)), device.device_kind)

    muon, adamw = step_of("muon"), step_of("adamw")
    assert muon.kernels <= 120
    assert muon.seconds <= 1.5 * adamw.seconds
