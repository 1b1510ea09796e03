"""The kernels for rows of several texts on a GPU, interpreted, against softmax with a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretraining import mesh_of

from experiments.compiled import measure
from experiments.experimental import triton
from experiments.language import attention, packed_attention
from experiments.topology import TopologyError, topology_devices

pytestmark = pytest.mark.skipif(triton is None, reason="this JAX has no Pallas for GPUs")

ROWS, LENGTH, HEADS, KEY_HEADS, COLUMNS, VALUES = 2, 150, 4, 2, 40, 24


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def case():
    """Texts that begin within a block, at its edge, span several, and have one token."""
    segments = np.zeros((ROWS, LENGTH), np.int32)
    segments[0, :50], segments[0, 50:140] = 1, 2
    segments[1, :1], segments[1, 1:64], segments[1, 64:] = 5, 4, 9
    q, k = normal(0, ROWS, LENGTH, HEADS, COLUMNS), normal(1, ROWS, LENGTH, KEY_HEADS, COLUMNS)
    v, weights = normal(2, ROWS, LENGTH, KEY_HEADS, VALUES), normal(3, ROWS, LENGTH, HEADS, VALUES)
    return q, k, v, jnp.asarray(segments), weights


def masked(q, k, v, segments):
    k, v = (jnp.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * COLUMNS**-0.5
    segments = jnp.ones((ROWS, LENGTH)) if segments is None else segments
    seen = np.tri(LENGTH, dtype=bool)[None, None] & (
        segments[:, None, :, None] == segments[:, None, None]
    )
    logits = jnp.where(seen, logits, -jnp.inf)
    largest = jnp.where(segments[:, None] > 0, jnp.max(logits, axis=3), -jnp.inf)
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)
    return mixed, jnp.max(largest, axis=(0, 2))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 1, 2)], ids=["one device", "fsdp, tensor"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "a text a row"])
def test_packed_attention_and_its_gradient_are_those_with_a_mask(monkeypatch, packed, sizes):
    interpreted = functools.partial(packed_attention.attend, interpret=True)
    monkeypatch.setattr(packed_attention, "attend", interpreted)
    q, k, v, segments, weights = case()
    segments = segments if packed else None

    def run(attend, *arguments):
        def objective(q, k, v):
            mixed, largest = attend(q, k, v, segments, *arguments)
            return jnp.sum(weights * mixed), (mixed, largest)

        return jax.device_get(jax.jit(jax.grad(objective, (0, 1, 2), has_aux=True))(q, k, v))

    with jax.set_mesh(mesh_of(*sizes)), jax.default_matmul_precision("highest"):
        gradient, (mixed, largest) = run(attention._by_packed, None)
        expected, (plain, logits) = run(masked)
    np.testing.assert_allclose(mixed, plain, atol=1e-5)
    np.testing.assert_allclose(largest, logits, rtol=1e-5)
    for ours, theirs in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_in_bfloat16_it_is_as_near_as_its_products():
    q, k, v, segments, _ = case()
    exact, _ = masked(q, k, v, segments)
    rounded = (x.astype(jnp.bfloat16) for x in (q, k, v))
    mixed, largest = packed_attention.attend(*rounded, segments, interpret=True)
    assert mixed.dtype == jnp.bfloat16 and largest.dtype == jnp.float32
    assert np.linalg.norm(mixed.astype(jnp.float32) - exact) < 0.01 * np.linalg.norm(exact)


@pytest.fixture(scope="module")
def gpu():
    """A mesh of one that is not here."""
    try:
        devices = topology_devices("h100:1")
    except TopologyError as error:
        pytest.skip(str(error))
    return jax.sharding.Mesh(
        np.reshape(devices, (1, 1, 1, 1)), ("data", "fsdp", "expert", "tensor")
    )


def test_heads_that_are_too_wide_for_cudnn_compile_for_a_gpu(gpu):
    """Those of latent attention, whose values have fewer columns; each product is counted once.

    The layer is computed again in the backward pass, but for the kernel.
    """
    place = jax.NamedSharding(gpu, jax.P())
    k, v = (
        jax.ShapeDtypeStruct((1, 512, 2, columns), jnp.bfloat16, sharding=place)
        for columns in (192, 128)
    )

    @functools.partial(jax.checkpoint, policy=attention.KEEP_KERNELS)
    def layer(q, k, v):
        return jnp.sin(attention.causal_attention(jnp.sin(q), k, v)[0])

    def summed(q, k, v):
        return jnp.sum(layer(q, k, v), dtype=jnp.float32)

    with jax.set_mesh(gpu):
        step = jax.jit(jax.grad(summed, (0, 1, 2)), out_shardings=place)
        program = measure(step.lower(k, k, v).compile())
    pairs = 2 * (512 // packed_attention.BLOCK) * (512 // packed_attention.BLOCK + 1) // 2
    columns = (1 + 2 + 2) * 192 + (1 + 1 + 2) * 128
    assert program.unread == {}
    assert program.flops == 2 * pairs * packed_attention.BLOCK**2 * columns


def test_float32_attention_compiles_for_a_gpu(gpu):
    """cuDNN's kernel refuses float32, which ours takes; its products count."""
    assert attention.shows_logits(gpu, 128, 32, jnp.float32)
    place = jax.NamedSharding(gpu, jax.P())
    x = jax.ShapeDtypeStruct((1, 128, 2, 32), jnp.float32, sharding=place)
    with jax.set_mesh(gpu):
        layer = jax.jit(lambda q: attention.causal_attention(q, q, q)[0], out_shardings=place)
        program = measure(layer.lower(x).compile())
    assert program.flops == 2 * 3 * 2 * packed_attention.BLOCK**2 * (32 + 32)


def test_the_program_for_a_gpu_has_no_mask_in_memory(gpu):
    mesh, place = gpu, jax.NamedSharding(gpu, jax.P())
    assert attention.shows_logits(mesh, 1024, 64, jnp.bfloat16, packed=True)
    assert not attention.shows_logits(mesh, 1024, 64, jnp.bfloat16)

    def gradient(q, k, v, segments):
        def summed(q, k, v):
            return jnp.sum(attention.causal_attention(q, k, v, segments)[0], dtype=jnp.float32)

        return jax.grad(summed, (0, 1, 2))(q, k, v)

    q, k = (
        jax.ShapeDtypeStruct((1, 4096, heads, 64), jnp.bfloat16, sharding=place) for heads in (2, 1)
    )
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=place)
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient, out_shardings=place).lower(q, k, k, segments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096**2
