"""What comes before the first step, and complex matrices: optax's numbers, wherever a leaf lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of, place
from optax.contrib import _muon as optax_muon
from trajectories import gaussian, relative_error

import muon_jax
from muon_jax._orthogonalize import newton_schulz as _newton_schulz
from muon_jax._orthogonalize.coefficients import NORMALIZATIONS

ROW = (3.4445, -4.7750, 2.0315)


def schedule(normalization, **settings):
    return muon_jax.Schedule((), tail=ROW, steps=3, normalization=normalization, **settings)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (8, 8)])
def test_every_normalization_is_optaxs(normalization, shape, dtype):
    if (normalization, dtype) == ("schatten", np.complex64):
        pytest.skip("optax's does not conjugate here, and is NaN")
    x = jnp.asarray(gaussian(*shape, dtype=dtype))
    expected = optax_muon.orthogonalize_via_newton_schulz(x, jnp.asarray(ROW), 3, normalization)
    for method in ("standard", "gram"):
        ours = muon_jax.newton_schulz(x, coeffs=schedule(normalization), method=method)
        assert ours.dtype == dtype and relative_error(ours, expected) < 1e-5


NORMS = {
    "frobenius": lambda x: np.linalg.norm(x),
    "schatten": lambda x: np.linalg.norm(x @ x.conj().T) ** 0.5,
    "spectral": lambda x: np.linalg.norm(x, 2),
    "aol": lambda x: np.abs(x @ x.conj().T).sum(axis=1, keepdims=True) ** 0.5,
}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_norm_is_what_its_name_says_and_safety_divides_too(normalization):
    """In NumPy, of complex matrices as well, whose every second is far larger."""
    x = gaussian(2, 6, 10, dtype=np.complex64) * np.float32([[[1]], [[1e20]]])
    only_a = muon_jax.Schedule(((1.0, 0.0, 0.0),), normalization=normalization, safety=1.25)
    ours = muon_jax.newton_schulz(x, coeffs=only_a)
    for y, matrix in zip(ours, x.astype(np.complex128), strict=True):
        assert relative_error(y, matrix / NORMS[normalization](matrix) / 1.25) < 1e-6


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_panels_of_complex_matrices_mirror_with_conjugation(method, monkeypatch):
    x = gaussian(2, 40, 70, dtype=np.complex64)
    run = functools.partial(muon_jax.newton_schulz, coeffs="exact", method=method, steps=12)
    whole = run(x)
    monkeypatch.setattr(_newton_schulz, "panel_count", lambda *_: 2)
    assert relative_error(run(x), whole) < 1e-5
    left, _, right = np.linalg.svd(x, full_matrices=False)
    assert relative_error(whole, left @ right) < 1e-4


def test_a_complex_matrix_keeps_its_dtype_under_a_low_precision():
    x = gaussian(6, 10, dtype=np.complex64)
    np.testing.assert_array_equal(
        muon_jax.newton_schulz(x, dtype=jnp.bfloat16), muon_jax.newton_schulz(x)
    )


SPECS = {"rows": P("a", None), "columns": P(None, ("a", "b")), "both": P("b", "a")}


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("normalization", ["aol", "spectral"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_mesh_changes_nothing(normalization, dtype, spec):
    """Also of squares, whose sides AOL tells apart; bfloat16 leaves complex ones alone."""
    mesh = mesh_of("Explicit", a=4, b=2)
    grads = {"square": gaussian(16, 16, dtype=dtype)}
    grads["tall"] = gaussian(32, 16, seed=1, dtype=dtype)
    low = jnp.bfloat16 if dtype == np.complex64 else None
    run = functools.partial(muon_jax.newton_schulz, coeffs=schedule(normalization), dtype=low)
    tx = muon_jax.scale_by_muon(orthogonalizer=run)
    alone, _ = tx.update(grads, tx.init(grads))
    placed, _ = place(grads, lambda x: SPECS[spec], mesh)
    with jax.set_mesh(mesh):
        spread, _ = jax.jit(tx.update)(placed, tx.init(placed))
    for name in grads:
        assert relative_error(spread[name], alone[name]) < 1e-5
