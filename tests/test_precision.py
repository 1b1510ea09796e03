"""Low precision is as exact as it can be: coefficients and sums in float32, one rounding each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of, place
from trajectories import equations

import muon_jax
from muon_jax import scale_by_muon

LOW = ("bfloat16", "float16")

# Relative Frobenius error of torch.optim.Muon's orthogonalisation (torch 2.13, CPU) against
# float32, mean of the eight matrices below; in float16 with its one cast replaced.
TORCH = {
    ((32, 96), "bfloat16"): 0.0175,
    ((64, 192), "bfloat16"): 0.0139,
    ((128, 128), "bfloat16"): 0.0122,
    ((256, 256), "bfloat16"): 0.0115,
    ((32, 96), "float16"): 0.00211,
    ((64, 192), "float16"): 0.00176,
    ((128, 128), "float16"): 0.00156,
}


def gaussians(shape):
    return np.stack([np.random.default_rng(i).normal(size=shape) for i in range(8)], dtype="f4")


def relative_errors(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs, axis=(-2, -1)) / np.linalg.norm(theirs, axis=(-2, -1))


@pytest.mark.parametrize(("shape", "dtype"), TORCH)
def test_newton_schulz_is_as_exact_as_torchs(shape, dtype):
    x = gaussians(shape)
    exact = muon_jax.newton_schulz(x, method="standard")
    for method, bar in (("standard", 1.1), ("gram", 2.3)):
        for tall in (False, True):
            run = functools.partial(muon_jax.newton_schulz, method=method, dtype=dtype)
            y = run(x.mT).mT if tall else run(x)
            error = relative_errors(y, exact).mean()
            assert 0.5 * TORCH[shape, dtype] < error < bar * TORCH[shape, dtype]


@pytest.mark.parametrize(("shape", "dtype"), TORCH)
def test_the_figures_of_torch_are_torchs(shape, dtype, monkeypatch):
    torch = pytest.importorskip("torch", reason="parity with torch needs torch")
    found = []
    for x in gaussians(shape):
        ways = []
        for cast in (dtype, "float32"):
            low = getattr(torch, cast)
            monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t, low=low: t.to(low, copy=True))
            parameter = torch.nn.Parameter(torch.zeros(shape))
            parameter.grad = torch.tensor(x)
            settings = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
            torch.optim.Muon([parameter], **settings).step()
            ways.append(parameter.detach().float().numpy())
        found.append(relative_errors(*ways))
    assert np.mean(found) == pytest.approx(TORCH[shape, dtype], rel=0.03)


# --- Momentum and shape scale ----------------------------------------------------------------


def identity(x):
    return x


def trajectory(tx, grads):
    state, updates = tx.init(grads[0]), []
    step = jax.jit(tx.update)
    for g in grads:
        u, state = step(g, state)
        updates.append(u)
    return updates, state


@pytest.mark.parametrize("momentum", ["ema", "heavy_ball", "optax"])
@pytest.mark.parametrize("dtype", ["float32", *LOW])
def test_a_beta_is_the_same_number_however_it_is_given(momentum, dtype):
    grads = [jnp.asarray(x, dtype) for x in gaussians((4, 6))]
    make = functools.partial(
        scale_by_muon, momentum=momentum, orthogonalizer=identity, scale="none"
    )
    expected = trajectory(make(beta=0.999), grads)
    for beta in (np.float32(0.999), jnp.float32(0.999)):
        jax.tree.map(np.testing.assert_array_equal, trajectory(make(beta=beta), grads), expected)


@pytest.mark.parametrize("dtype", LOW)
def test_momentum_acts_in_float32(dtype):
    """A beta of 0.999 is 1 in bfloat16: nothing of the first gradient would come through."""
    g = jnp.asarray(gaussians((4, 6))[0], dtype)
    tx = scale_by_muon(beta=0.999, nesterov=False, orthogonalizer=identity, scale="none")
    [update], _ = trajectory(tx, [g])
    np.testing.assert_allclose(np.float64(update), 1e-3 * np.float64(g), rtol=jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("scale", ["spectral", "match_rms_adamw", "mup"])
def test_the_shape_scale_acts_in_float32(scale, dtype):
    """Rounded itself, it is off all one way; what is left is half a unit at random."""
    g = jnp.asarray(gaussians((50, 70))[0], dtype)
    make = functools.partial(scale_by_muon, beta=0.0, nesterov=False, orthogonalizer=identity)
    [[plain], _], [[scaled], _] = (trajectory(make(scale=s), [g]) for s in ("none", scale))
    factor = {"spectral": 1.4**0.5, "match_rms_adamw": 0.2 * 70**0.5, "mup": 1.4**0.5}[scale]
    ratios = np.float64(scaled) / np.float64(plain) / factor - 1
    assert abs(ratios.mean()) < jnp.finfo(dtype).eps / 50


@pytest.mark.parametrize("mu_dtype", ["float32", *LOW])
@pytest.mark.parametrize("momentum", ["ema", "heavy_ball", "optax"])
def test_a_sum_beyond_the_range_becomes_the_largest_number(momentum, mu_dtype):
    """Of finite gradients as large as they come, and of others only in their own matrix."""
    g = jnp.asarray(np.sign(gaussians((3, 4, 6))[0]) * np.float32([[[3.4e38]], [[2e6]], [[1]]]))
    tx = scale_by_muon(momentum=momentum, beta=0.5, mu_dtype=mu_dtype)
    updates, state = trajectory(tx, [g] * 4)
    assert np.isfinite(np.float32(state.mu)).all() and np.isfinite(updates).all()
    assert np.linalg.svd(np.asarray(updates[-1]), compute_uv=False)[:, -1].min() > 0.3
    bad, state = trajectory(tx, [g.at[1, 2, 3].set(jnp.inf), g])
    assert np.isfinite(np.float32(state.mu)).all(axis=(1, 2)).tolist() == [True, False, True]
    np.testing.assert_array_equal(bad[1][0], updates[1][0])


def test_complex_momentum_keeps_its_dtype_and_int8_is_refused():
    g = jnp.asarray(gaussians((4, 6))[0] + 1j, jnp.complex64)
    [update], state = trajectory(scale_by_muon(mu_dtype=jnp.bfloat16), [g])
    assert update.dtype == state.mu.dtype == jnp.complex64
    for dtype in ("int8", "int4"):
        with pytest.raises(ValueError, match=rf"{dtype}.*complex64"):
            scale_by_muon(mu_dtype=dtype).init(g)


def test_devices_sum_in_float32():
    mesh = mesh_of("Explicit", a=4)
    run = functools.partial(muon_jax.newton_schulz, dtype=jnp.bfloat16, method="gram")
    tx = scale_by_muon(orthogonalizer=run)
    params, _ = place(jnp.ones((16, 64), jnp.bfloat16), lambda x: P(None, "a"), mesh)
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(tx.update)(params, tx.init(params))
    sums = [e for e in equations(program.jaxpr) if e.primitive.name.startswith("psum")]
    assert {v.aval.dtype for e in sums for v in e.invars} == {jnp.dtype(jnp.float32)}
    assert any(v.aval.ndim == 3 and v.aval.size > 16 for e in sums for v in e.invars)


# --- Chunks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 10, 3, 5), (1, 1, 7, 3, 5), (3, 2, 2, 3, 5), (3, 5)])
@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_no_more_matrices_at_once_than_chunk_size(shape, chunk_size):
    seen = []

    def counted(x):
        seen.append(x.shape)
        return 2 * x

    g = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    make = functools.partial(scale_by_muon, orthogonalizer=counted, scale="none")
    chunked, _ = make(chunk_size=chunk_size).update(g, make().init(g))
    sizes = [int(np.prod(s[:-2])) for s in seen]
    assert max(sizes) <= chunk_size and sum(sizes) == np.prod(shape[:-2])
    assert all(len(s) == len(shape) for s in seen)
    np.testing.assert_array_equal(chunked, make().update(g, make().init(g))[0])


# --- Errors ----------------------------------------------------------------------------------

ONES = jnp.ones((4, 6))
RULE = "(a, b, c)"


def update(**settings):
    tx = scale_by_muon(**settings)
    return tx.update(ONES, tx.init(ONES))


def coefficients(value):
    return functools.partial(muon_jax.newton_schulz, ONES, coeffs=value)


MISTAKES = {
    "standard": (coefficients("standard"), ["'standard'", "'jordan'"]),
    "quintic": (coefficients("quintic"), ["'quintic'", "'jordan'"]),
    "optax's dion": (coefficients("dion"), ["'dion'", "'you'"]),
    "no coefficients": (coefficients(None), ["coeffs", RULE, "None"]),
    "a coefficient of none": (coefficients((1.0, None, 2.0)), ["coeffs", "a number", "None"]),
    "not finite": (coefficients((1.0, np.nan, 2.0)), ["coeffs", "finite", "nan"]),
    "infinite in a row": (coefficients([(1.0, np.inf, 2.0)]), ["coeffs", "finite", "inf"]),
    "not a number": (coefficients([(1.0, "b", 2.0)]), ["coeffs", "a number", "'b'"]),
    "eps": (lambda: muon_jax.newton_schulz(ONES, eps=-1.0), ["eps", "at least 0", "-1"]),
    "eps not a number": (lambda: muon_jax.newton_schulz(ONES, eps=np.nan), ["eps", "nan"]),
    "rows": (lambda: muon_jax.Schedule(None), ["Schedule.rows", RULE, "None"]),
    "tail": (lambda: muon_jax.Schedule((), tail=(1, 2)), ["Schedule.tail", RULE, "(1, 2)"]),
    "steps": (lambda: muon_jax.Schedule((), (1, 2, 3), 0), ["Schedule.steps", "at least 1", "0"]),
    "safety": (lambda: muon_jax.Schedule(((1, 2, 3),), safety=0), ["safety", "greater than 0"]),
    "beta": (lambda: scale_by_muon(beta=1.0), ["beta", "less than 1", "1.0"]),
    "no beta": (lambda: scale_by_muon(beta=None), ["beta", "a number", "None"]),
    "a name": (lambda: scale_by_muon(orthogonalizer="exact"), ["orthogonalizer", "'exact'"]),
    "another shape": (lambda: update(orthogonalizer=lambda x: x @ x.mT), ["(4, 6)", "(4, 4)"]),
    "nothing": (lambda: update(orthogonalizer=lambda x: None), ["(4, 6)", "NoneType"]),
    "a list": (lambda: scale_by_muon(scale=["mup"]), ["scale", "['mup']", "callable"]),
    "no factor": (lambda: update(scale=lambda m, n: np.nan), ["scale(4, 6)", "finite", "nan"]),
    "factors": (lambda: update(scale=lambda m, n: np.ones(2)), ["scale(4, 6)", "a number"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case):
    build, words = MISTAKES[case]
    with pytest.raises((TypeError, ValueError)) as raised:
        build()
    assert [word for word in words if word not in str(raised.value)] == []


def test_what_is_static_and_a_partial_are_accepted():
    exact = functools.partial(muon_jax.newton_schulz, coeffs="exact")
    for rows in (jnp.ones((2, 3)), np.ones((2, 3)), [np.ones(3)] * 2):
        assert muon_jax.newton_schulz(ONES, coeffs=rows).shape == ONES.shape
    assert update(orthogonalizer=exact)[0].shape == ONES.shape
    tx = optax.inject_hyperparams(scale_by_muon)(beta=0.9)
    assert tx.update(ONES, tx.init(ONES))[0].shape == ONES.shape
