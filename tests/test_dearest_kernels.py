"""Programs compiled for a GPU that is not here lack what had no need to be in them."""

import dataclasses
import re

import finetuning
import jax
import jax.numpy as jnp
import pytest
from meshes import devices_of

import muon_jax
from experiments.compiled import measure
from experiments.language.mesh import one_device


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


def test_an_update_of_a_toy_is_one_stack(gpu):
    """Four squares and three longer matrices: 47 kernels, and 97 if shapes do not share them."""
    shapes = ((128, 128),) * 4 + ((128, 512),) * 2 + ((512, 128),)
    place = jax.NamedSharding(gpu, jax.P())
    xs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    tx = muon_jax.scale_by_muon(mesh=gpu)
    with jax.set_mesh(gpu):
        state = jax.eval_shape(tx.init, xs)
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state
        )
        program = measure(jax.jit(tx.update, out_shardings=place).lower(xs, state).compile())
    assert program.flops == muon_jax.plan(xs, mesh=gpu).total("flops")
    assert program.kernel_count <= 47
