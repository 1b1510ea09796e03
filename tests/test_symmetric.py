"""Symmetric products against float64 NumPy, their exact FLOPs, and what passes through them."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from trajectories import gaussian

import muon_jax
from muon_jax._orthogonalize import newton_schulz as _newton_schulz
from muon_jax._orthogonalize import symmetric as _symmetric
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz

PANELS = (1, 2, 3, 4)
N = 300  # two panels of 160 and 140 rows, four of 80, 80, 80 and 60


@pytest.fixture
def panels(request, monkeypatch):
    """As many panels as the parameter says, whatever the size."""
    monkeypatch.setattr(_newton_schulz, "panel_count", lambda *_: request.param)
    return request.param


def commuting(n=N, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return [(basis * rng.uniform(-1, 1, n)) @ basis.T for _ in range(2)]


def spectral_norm(x):
    return np.linalg.norm(np.asarray(x, np.float64), 2)


@pytest.mark.parametrize("count", PANELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(N, 40), (2, N, 40), (256, 40), (2, 1, 5, 9)])
def test_gram_agrees_with_numpy(count, dtype, shape):
    x = jnp.asarray(gaussian(*shape), dtype)
    y = np.asarray(_symmetric.join_panels(_symmetric.gram(x, count)))
    exact = np.asarray(x, np.float64)
    exact = exact @ exact.mT
    assert y.dtype == np.float32 and y.shape == exact.shape
    # The operands are exact in every dtype; only the accumulation rounds.
    np.testing.assert_allclose(y, exact, rtol=0, atol=40 * np.finfo(np.float32).eps * exact.max())


@pytest.mark.parametrize("count", PANELS)
def test_products_of_commuting_matrices_agree_with_numpy(count):
    p, q = commuting()
    cut_p, cut_q = (_symmetric.split_panels(jnp.asarray(m, jnp.float32), count) for m in (p, q))
    for y, exact in (
        (_symmetric.product(cut_p, cut_q), p @ q),
        (_symmetric.square(cut_p), p @ p),
    ):
        y = np.asarray(_symmetric.join_panels(y))
        assert spectral_norm(y - exact) < 20 * np.finfo(np.float32).eps


@pytest.mark.parametrize("count", PANELS[1:])
def test_products_are_exactly_symmetric(count):
    p, q = (_symmetric.split_panels(jnp.asarray(m, jnp.float32), count) for m in commuting())
    y = np.asarray(_symmetric.join_panels(_symmetric.product(p, q)))
    np.testing.assert_array_equal(y, y.T)


@pytest.mark.parametrize("panels", PANELS[1:], indirect=True)
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(N, 500), (500, N), (N, N)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_panels_do_not_change_the_factor(panels, method, shape, dtype, monkeypatch):
    x = gaussian(*shape)
    run = functools.partial(muon_jax.newton_schulz, coeffs="aol", method=method, dtype=dtype)
    y = run(x)
    monkeypatch.setattr(_newton_schulz, "panel_count", lambda *_: 1)
    # Twice what was measured. The Gram form feels rounding at the smallest singular values, which
    # a square Gaussian matrix has next to zero.
    limit = {jnp.float32: 1e-4, jnp.bfloat16: 0.1}[dtype] * (1 if shape != (N, N) else 5)
    assert spectral_norm(y - run(x)) < limit


def test_gradients_pass():
    x, weight = gaussian(N, 40) / 10, gaussian(N, N, seed=1)

    def loss(product):
        return lambda x: jnp.vdot(weight, product(x))

    def ours(x):
        r = _symmetric.gram(x, 2)
        return _symmetric.join_panels(_symmetric.product(r, r)) + _symmetric.join_panels(
            _symmetric.square(r)
        )

    def plain(x):
        r = jnp.matmul(x, x.T, precision="highest")
        return 2 * jnp.matmul(r, r, precision="highest")

    # Only the lower blocks are computed, so both are differentiated on symmetric matrices.
    weight = weight + weight.T
    expected = jax.grad(loss(plain))(x)
    np.testing.assert_allclose(
        jax.grad(loss(ours))(x), expected, atol=1e-5 * float(jnp.abs(expected).max())
    )


@pytest.mark.parametrize("panels", [2], indirect=True)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_vmap_gives_each_matrix_its_factor(panels, method):
    x = gaussian(3, N, N + 20)
    run = functools.partial(muon_jax.newton_schulz, method=method)
    for mapped, one in zip(jax.vmap(run)(x), x, strict=True):
        assert spectral_norm(mapped - run(one)) < 1e-4


@pytest.mark.parametrize("panels", [2], indirect=True)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_matrix_spoils_only_itself(panels, bad):
    x = gaussian(3, N, N + 20)
    spoilt = x.copy()
    spoilt[1, 200, 3] = bad
    clean, y = (np.asarray(muon_jax.newton_schulz(a)) for a in (x, spoilt))
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))
    assert not np.isfinite(y[1]).any()


@pytest.mark.parametrize("shape", [(4, 20, 40), (2, 2, 40, 20), (4, 16, 40)])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_a_cpu_loops_over_a_stack_of_large_matrices(shape, method, monkeypatch):
    monkeypatch.setattr(_newton_schulz, "_LOOP_FROM", 17)
    x = jnp.asarray(gaussian(*shape))
    solver = NewtonSchulz(method=method)
    batched, looped = (
        functools.partial(solver, form=solver.form(*shape[-2:], x.dtype, "cpu", local))
        for local in (False, True)
    )
    assert "scan[" not in str(jax.make_jaxpr(batched)(x))
    assert ("scan[" in str(jax.make_jaxpr(looped)(x))) == (min(shape[-2:]) >= 17)
    np.testing.assert_allclose(looped(x), batched(x), atol=1e-5)
    gradients = (jax.grad(lambda x, run=run: jnp.sum(run(x) ** 3))(x) for run in (batched, looped))
    np.testing.assert_allclose(*gradients, atol=1e-4)
    for platform in ("gpu", "tpu"):
        assert not solver.form(*shape[-2:], x.dtype, platform).one_by_one


def dot_flops(compiled):
    """FLOPs of the matrix products of a compiled program without loops."""
    flops, shapes = 0, {}
    for line in compiled.as_text().splitlines():
        if not line.startswith(" "):
            shapes = {}  # another computation
        if found := re.match(r"\s+(?:ROOT )?(%\S+) = \w+\[([\d,]*)\]", line):
            shapes[found[1]] = [int(n) for n in found[2].split(",") if n]
            if dot := re.search(r" dot\((%[^,]+), .*lhs_contracting_dims={([\d,]+)}", line):
                contracted = [shapes[dot[1]][int(axis)] for axis in dot[2].split(",")]
                flops += 2 * math.prod(shapes[found[1]]) * math.prod(contracted)
    return flops


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *[("polar_express", (m, n)) for m, n in ((64, 96), (520, 700), (700, 520))],
        *[("polar_express", (n, n)) for n in (512, 2048)],
        *[(name, (64, 256)) for name in ("cubic", "aol", "jordan")],
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_flops_are_those_of_the_compiled_program_exactly(name, shape, dtype):
    steps = {"aol": None, "jordan": 5}.get(name, 2 if max(shape) > 1000 else 3)
    for method in ("standard", "gram"):
        solver = NewtonSchulz(name, steps, method=method)
        form = solver.form(*shape, dtype, "cpu")
        compiled = jax.jit(solver).lower(jax.ShapeDtypeStruct(shape, dtype)).compile()
        rescaling = 2 * min(shape) ** 2 * max(shape) if name == "aol" else 0
        flops = form.flops(*sorted(shape), solver.rows(dtype)) + rescaling
        assert dot_flops(compiled) == flops


@pytest.mark.parametrize("count", PANELS)
@pytest.mark.parametrize("n", [1, 5, 127, 128, 300, 513, 768, 1000, 2048, 2050, 5000])
def test_panels_cover_every_row_once_and_end_at_tiles(n, count):
    stops = _symmetric.panel_stops(n, count)
    assert stops[-1] == n and list(stops) == sorted(set(stops)) and len(stops) <= count
    heights = [b - a for a, b in itertools.pairwise((0, *stops))]
    assert all(height % (16 if n < 1024 else 128) == 0 for height in heights[:-1])
    kernels = _symmetric.symmetric_kernels(1, n, n, n**2, count)
    share = sum(kernel.flops for kernel in kernels) / (2 * n**3)
    assert share == 1 if len(heights) == 1 else share < 0.83
    if n >= 300:
        assert share < (count + 1) / (2 * count) + 0.03


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_small_matrices_are_not_cut(platform):
    for dtype in (jnp.float32, jnp.bfloat16):
        assert _symmetric.panel_count(384, dtype, platform) == 1
        large = _symmetric.panel_count(8192, dtype, platform)
        # A TPU is as fast in bfloat16 as it reads and writes the blocks, a GPU faster from 5120 on.
        assert (large > 1) == (platform != "tpu" or dtype == jnp.float32)
    assert (_symmetric.panel_count(4096, jnp.bfloat16, platform) > 1) == (platform == "cpu")


def test_the_platform_is_that_of_the_mesh_in_use():
    assert _newton_schulz.current_platform() == jax.default_backend()
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))):
        assert _newton_schulz.current_platform() == "cpu"
