"""What accelerators do otherwise: products rounded once, upright matrices, leaves in one stack."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from trajectories import gaussian, relative_error

import muon_jax
from muon_jax import MatrixAxes
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz
from muon_jax._sharding.assignment import _STACK_FLOPS, plan_buckets
from muon_jax._sharding.buckets import Stack
from muon_jax._sharding.exchange import _pack_symmetric, _unpack_symmetric
from muon_jax._sharding.layout import Placing


def on(platform, newton_schulz, x):
    y = newton_schulz(x, form=newton_schulz.form(*x.shape[-2:], x.dtype, platform))
    return np.asarray(y if jnp.iscomplexobj(x) else y.astype(jnp.float32))


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("coeffs", ["jordan", "aol"])
def test_forms_of_accelerators_agree_with_the_cpus(coeffs, method):
    newton_schulz = NewtonSchulz(coeffs, method=method)
    # Without restarts the Gram form magnifies roundings of square matrices in float32.
    for shape in ((12, 40) if method == "gram" else (12, 12), (2, 40, 12)):
        z = gaussian(*shape) + 1j * gaussian(*shape, seed=1)
        form = newton_schulz.form(*shape[-2:], z.dtype, "gpu")
        assert form.rounded and form.upright
        assert not newton_schulz.form(*shape[-2:], z.dtype, "cpu").rounded
        assert relative_error(on("gpu", newton_schulz, z), on("cpu", newton_schulz, z)) < 1e-5


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("coeffs", ["jordan", "polar_express", "deepseek_v4"])
def test_products_rounded_once_keep_singular_values_in_range(coeffs, method):
    """Flat and steep spectra; the limit is that of the CPU's form."""
    newton_schulz = NewtonSchulz(coeffs, dtype=jnp.bfloat16, method=method)
    basis = [np.linalg.qr(gaussian(n, n, seed=n))[0] for n in (32, 128)]
    decay = np.arange(32)
    spectra = np.stack([np.ones(32), 1 / (1 + decay), 1 / (1 + decay) ** 2, 10.0 ** (-decay / 8)])
    x = (basis[0] * spectra[:, None]) @ basis[1][:32]
    for matrices in (x.swapaxes(1, 2), x[..., :32]):
        values = np.linalg.svd(on("gpu", newton_schulz, jnp.asarray(matrices)), compute_uv=False)
        assert values[:, 0].min() > 0.6 and values.max() < 1.21


@pytest.mark.parametrize("coeffs", ["jordan", "aol"])
def test_padding_changes_no_matrix(coeffs):
    newton_schulz = NewtonSchulz(coeffs)
    form = newton_schulz.padded_form(12, 40, jnp.float32)
    xs = [
        gaussian(*shape, seed=i) for i, shape in enumerate([(2, 12, 12), (1, 40, 12), (3, 12, 24)])
    ]
    xs[0][1] *= 1e30
    xs[2][0] = 0
    together = newton_schulz.together([jnp.asarray(x) for x in xs], form)
    for x, y in zip(xs, together, strict=True):
        assert y.shape == x.shape
        for one, found in zip(x, y, strict=True):
            alone = newton_schulz(one, form=form._replace(padded=0))
            np.testing.assert_allclose(found, alone, atol=1e-5)
    assert not np.any(together[2][0]) and np.all(np.isfinite(together[0]))


def stack(count, m=256, n=256, dtype=jnp.bfloat16):
    return Stack(count, m, n, (), (), (), jnp.dtype(dtype))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_matrices_of_one_shape_share_a_stack_where_launches_pay(platform):
    stacks = (stack(1), stack(3, n=512), stack(2), stack(1, dtype=jnp.float32))
    buckets = plan_buckets(stacks, (), NewtonSchulz(dtype=jnp.bfloat16), platform)
    found = sorted(tuple(span.stack for span in bucket.spans) for bucket in buckets)
    assert found == ([(0,), (1,), (2,), (3,)] if platform == "cpu" else [(0, 2), (1,), (3,)])
    assert sum(bucket.matrices for bucket in buckets) == 7


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_matrices_of_one_short_side_share_a_call_if_their_form_is_one(platform):
    """And what a call holds at once is told together."""
    large = (stack(1, 2048, 8192), stack(1, 8192, 2048))
    stacks = (stack(1), stack(2, 256, 1024), stack(1, 1024, 256), stack(1, 512, 2048), *large)
    buckets = plan_buckets(stacks, (), NewtonSchulz(dtype=jnp.bfloat16), platform)
    calls = [bucket.call for bucket in buckets]
    padded = 3 if platform == "gpu" else 0
    assert [bucket.form.padded for bucket in buckets] == [1024] * padded + [0] * (6 - padded)
    alone = padded or 1
    assert [bucket.form.method for bucket in buckets] == ["standard"] * alone + ["gram"] * (
        6 - alone
    )
    assert len(set(calls)) == {"cpu": 6, "tpu": 5, "gpu": 4}[platform]
    assert (calls[1] == calls[2]) == (platform != "cpu")
    assert (calls[0] == calls[1]) == (platform == "gpu")

    def working(*shapes):
        leaves = {
            f"{i}/kernel": jax.ShapeDtypeStruct(x, jnp.bfloat16) for i, x in enumerate(shapes)
        }
        return muon_jax.plan(leaves, platform=platform).peak()

    up, down = (256, 1024), (1024, 256)
    assert working(up, down) == (1 if platform == "cpu" else 2) * working(up)


def test_a_stack_ends_where_its_products_are_long_enough():
    side = 4096
    most = _STACK_FLOPS // (2 * side**3)
    stacks = (stack(1, side, side),) * (2 * most + 1) + (stack(5 * most, side, side),)
    buckets = plan_buckets(stacks, (), NewtonSchulz(), "gpu")
    assert [bucket.slots for bucket in buckets] == [most, most, 1, 5 * most]


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_leaves_in_one_call_have_their_own_updates(platform, chunk_size, monkeypatch):
    """(16, 4, 4) is one 16 × 16 matrix along the axes that it is told."""
    monkeypatch.setattr(Placing, "platform", platform)
    shapes = {"a": (16, 16), "b": (3, 16, 16), "c": (16, 4, 4), "d": (4, 4, 16), "e": (16, 40)}
    shapes |= {"f": (40, 16), "g": (2, 40, 16)}
    axes = {"c": MatrixAxes(0, (1, 2)), "d": MatrixAxes((0, 1), 2)}
    params = {name: gaussian(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    axes = {name: axes.get(name, MatrixAxes()) for name in params}
    seen = []

    def orthogonalize(x):
        seen.append(x.shape)
        return muon_jax.newton_schulz(x)

    def update(mesh, **settings):
        tx = muon_jax.scale_by_muon(matrix_axes=axes, mesh=mesh, **settings)
        return jax.jit(tx.update)(params, tx.init(params))[0]

    mesh = mesh_of("Auto", d=1)
    together = update(mesh, chunk_size=chunk_size)
    update(mesh, chunk_size=chunk_size, orthogonalizer=orthogonalize)
    sizes = [6] if chunk_size is None else [2, 2, 2]
    tall = [3] if chunk_size is None else [2, 1]
    assert seen == [
        *((size, 16, 16) for size in sizes),
        (16, 40),
        *((size, 40, 16) for size in tall),
    ]
    monkeypatch.undo()
    apart = update(mesh)
    for name in params:
        assert together[name].shape == params[name].shape
        assert relative_error(together[name], apart[name]) < 1e-5


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_without_a_mesh_single_matrices_are_one_stack_and_batches_are_not_merged(
    platform, monkeypatch
):
    """In a process of several devices, of which XLA alone knows who has what of a leaf."""
    monkeypatch.setattr(Placing, "platform", platform)
    shapes = {"a": (16, 16), "b": (2, 8, 16, 16), "c": (16, 16), "d": (4, 4, 16), "e": (16, 40)}
    axes = {"d": MatrixAxes((0, 1), 2)}
    axes = {name: axes.get(name, MatrixAxes()) for name in shapes}
    params = {name: gaussian(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    seen = []

    def orthogonalize(x):
        seen.append(x.shape)
        return muon_jax.newton_schulz(x)

    def update(**settings):
        tx = muon_jax.scale_by_muon(matrix_axes=axes, orthogonalizer=orthogonalize, **settings)
        return tx, tx.init(params)

    assert jax.device_count() > 1
    tx, state = update()
    updates = jax.jit(tx.update)(params, state)[0]
    stacked = [(16, 16)] * 3 if platform == "cpu" else [(3, 16, 16)]
    assert sorted(seen) == sorted([*stacked, (2, 8, 16, 16), (16, 40)])
    # Experts that XLA splits stay where they are.
    mesh = mesh_of("Auto", d=8)
    split = jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P()), params)
    split["b"] = jax.NamedSharding(mesh, jax.P(None, "d"))
    step = jax.jit(lambda x: tx.update(x, state)[0], in_shardings=(split,), out_shardings=split)
    compiled = step.lower(params).compile()
    assert "all-" not in compiled.as_text()
    monkeypatch.undo()
    tx, state = update(mesh=mesh_of("Auto", d=1))
    alone = jax.jit(tx.update)(params, state)[0]
    for name in params:
        assert relative_error(updates[name], alone[name]) < 1e-5
        assert relative_error(compiled(params)[name], alone[name]) < 1e-5


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_norm_of_huge_and_tiny_entries_is_that_of_float64(platform):
    rows = [[3e38, 1e38, 1e-38], [2e15, 3e15, 1e15], [3e-16, 4e-16, 0], [2e-38, 4e-38, 4e-38]]
    x = np.array(rows, np.float32)[:, None, :]
    y = on(platform, NewtonSchulz((1.0, 0.0, 0.0), steps=1), jnp.asarray(x))  # only divided
    wide = x.astype(np.float64)
    exact = wide / np.linalg.norm(wide, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-30)


# --- The assignment --------------------------------------------------------------------------

stacks = st.builds(
    Stack,
    matrices=st.integers(1, 40),
    fan_in=st.sampled_from([16, 64]),
    fan_out=st.sampled_from([16, 64, 256]),
    batch_axes=st.just(()),
    in_axes=st.sampled_from([(), ("a",), ("b", "a")]),
    out_axes=st.sampled_from([(), ("c",)]),
    dtype=st.sampled_from([np.dtype("float32"), jnp.dtype("bfloat16")]),
)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.lists(stacks, min_size=1, max_size=5), st.sampled_from([2, 3, 8]))
def test_every_matrix_is_assigned_once_and_stays_in_one_group(found, size):
    sizes = (("a", size), ("b", 2), ("c", 2))
    seen = {i: [] for i in range(len(found))}
    for bucket in plan_buckets(tuple(found), sizes, NewtonSchulz(), "cpu"):
        for span in bucket.spans:
            seen[span.stack] += range(span.start, span.stop)
        table, shared = bucket.assign_slots()
        assert table.shape == shared.shape == (bucket.devices, bucket.slots)
        tiles = sum(span.matrices * span.tiles for span in bucket.spans)
        np.testing.assert_array_equal(np.sort(table[table >= 0]), np.arange(tiles))
        first = 0
        for span in bucket.spans:
            for _ in range(span.matrices):
                device, slot = np.nonzero((table >= first) & (table < first + span.tiles))
                assert len(set(slot)) == len(set(device // bucket.width)) == 1
                assert shared[device, slot].all() == (span.tiles > 1)
                first += span.tiles
    assert all(sorted(seen[i]) == list(range(b.matrices)) for i, b in enumerate(found))


@pytest.mark.parametrize("n", [2, 6, 7])
def test_a_symmetric_matrix_is_packed_without_loss(n):
    x = gaussian(3, n, n)
    x = jnp.asarray(x + np.swapaxes(x, 1, 2))
    packed = _pack_symmetric(x)
    assert n % 2 or packed.size == 3 * n * (n + 1) // 2
    np.testing.assert_array_equal(_unpack_symmetric(packed), x)
