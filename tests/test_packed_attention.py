"""The kernels for rows of several texts on a GPU, interpreted, against softmax with a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretraining import mesh_of

from experiments.experimental import triton
from experiments.language import attention, packed_attention
from experiments.topology import TopologyError, topology_devices

pytestmark = pytest.mark.skipif(triton is None, reason="this JAX has no Pallas for GPUs")

ROWS, LENGTH, HEADS, KEY_HEADS, COLUMNS = 2, 150, 4, 2, 24


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def case():
    """Texts that begin within a block, at its edge, span several, and have one token."""
    segments = np.zeros((ROWS, LENGTH), np.int32)
    segments[0, :50], segments[0, 50:140] = 1, 2
    segments[1, :1], segments[1, 1:64], segments[1, 64:] = 5, 4, 9
    q, weights = (normal(seed, ROWS, LENGTH, HEADS, COLUMNS) for seed in (0, 3))
    k, v = (normal(seed, ROWS, LENGTH, KEY_HEADS, COLUMNS) for seed in (1, 2))
    return q, k, v, jnp.asarray(segments), weights


def masked(q, k, v, segments):
    k, v = (jnp.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * COLUMNS**-0.5
    seen = np.tri(LENGTH, dtype=bool)[None, None] & (
        segments[:, None, :, None] == segments[:, None, None]
    )
    logits = jnp.where(seen, logits, -jnp.inf)
    largest = jnp.where(segments[:, None] > 0, jnp.max(logits, axis=3), -jnp.inf)
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)
    return mixed, jnp.max(largest, axis=(0, 2))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 1, 2)], ids=["one device", "fsdp, tensor"])
def test_packed_attention_and_its_gradient_are_those_with_a_mask(monkeypatch, sizes):
    interpreted = functools.partial(packed_attention.attend, interpret=True)
    monkeypatch.setattr(packed_attention, "attend", interpreted)
    q, k, v, segments, weights = case()

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


def test_the_program_for_a_gpu_has_no_mask_in_memory():
    try:
        devices = topology_devices("h100:1")
    except TopologyError as error:
        pytest.skip(str(error))
    mesh = jax.sharding.Mesh(
        np.reshape(devices, (1, 1, 1, 1)), ("data", "fsdp", "expert", "tensor")
    )
    place = jax.NamedSharding(mesh, jax.P())
    assert attention.shows_logits(mesh, 1024, packed=True)
    assert not attention.shows_logits(mesh, 1024)

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
