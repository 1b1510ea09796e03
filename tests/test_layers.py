"""Parts with gradients of their own have those of the plain forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import layers
from experiments.language import vocabulary


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def same_value_and_gradients(ours, plain, *arguments, tolerance=1e-5):
    weights = normal(9, *jax.eval_shape(plain, *arguments).shape)
    every = tuple(range(len(arguments)))

    def graded(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(weights * f(*a)), every))(*arguments)

    found, wanted = graded(ours), graded(plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [(), (6,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("fan_out", [5, 7])
def test_a_projection_is_a_product(tokens, fan_out):
    same_value_and_gradients(
        layers.project, jnp.matmul, normal(0, *tokens, 5), normal(1, 5, fan_out)
    )


def test_the_gradient_of_a_bias_is_summed_in_float32():
    layer = layers.Linear(4, 64, bias=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x, weights = normal(0, 8, 512, 4).astype(jnp.bfloat16), normal(1, 8, 512, 64)
    weights = weights.astype(jnp.bfloat16)

    def loss(params):
        y = nnx.merge(graph, params)(x)
        assert y.dtype == jnp.bfloat16
        return jnp.sum((y * weights).astype(jnp.float32))

    found = jax.jit(jax.grad(loss))(params)["bias"][...].astype(jnp.float32)
    wanted = jnp.sum(weights.astype(jnp.float32), axis=(0, 1))
    assert np.linalg.norm(found - wanted) < 3e-3 * np.linalg.norm(wanted)  # of rounding it once


def test_projections_of_blocks_are_products():
    ours = jax.vmap(layers.project)
    same_value_and_gradients(ours, jnp.matmul, normal(0, 4, 3, 5), normal(1, 4, 5, 5))


def test_a_gated_product_is_silu_times_up():
    def plain(gate, up):
        return gate / (1 + jnp.exp(-gate)) * up

    same_value_and_gradients(layers.gated, plain, normal(0, 6, 8), normal(1, 6, 8))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_norm_is_flax_s(dtype, tolerance):
    """Of a stream in the model's dtype, in both dtypes of the gains."""
    x, scale = normal(0, 2, 3, 16).astype(dtype), 1 + normal(1, 16)
    graph, state = nnx.split(nnx.RMSNorm(16, epsilon=1e-2, rngs=nnx.Rngs(0)))

    def plain(x, scale):
        return nnx.merge(graph, jax.tree.map(lambda _: scale, state))(x)

    for gains in (scale, scale.astype(dtype)):
        ours = functools.partial(layers.rms_normed, 1e-2)
        assert ours(x, gains).dtype == plain(x, gains).dtype
        same_value_and_gradients(ours, plain, x, gains, tolerance=tolerance)


def test_a_rotation_keeps_norms_and_its_gradient_turns_back():
    x, position = normal(0, 2, 5, 3, 8), jnp.arange(5)
    turned, pull = jax.vjp(lambda x: layers.rotate(x, position, 100.0), x)
    norms = jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(*norms, rtol=1e-5)
    np.testing.assert_allclose(pull(turned)[0], x, rtol=1e-5, atol=1e-6)


def test_logits_read_at_once_are_as_read_one_after_another():
    """With equal largest ones, of which the first counts, and with one that is not a number."""
    logits = np.array(100 * normal(0, 6, 40))
    logits[1, [7, 3, 31]] = logits[2, [39, 38]] = 500.0
    logits[3], logits[4, 5] = -2.0, np.nan
    plain = jax.vmap(vocabulary._in_passes)(logits)
    for read in (vocabulary._in_one_pass, vocabulary._in_two_passes):
        found = [np.asarray(x) for x in jax.vmap(read)(logits)]
        for ours, theirs in zip(found, plain, strict=True):
            np.testing.assert_allclose(np.delete(ours, 4), np.delete(theirs, 4), rtol=1e-6)
        assert np.isnan(found[0][4]) and np.isnan(found[1][4])
        assert found[2].tolist()[1:4] == [3, 38, 0]
