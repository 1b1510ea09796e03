"""newton_schulz against float64 NumPy, at the ends of each dtype, and on what it must refuse."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from trajectories import equations, gaussian

import muon_jax
from muon_jax._orthogonalize.coefficients import SCHEDULES
from muon_jax._orthogonalize.newton_schulz import NewtonSchulz, gram_restarts

FORMS = ("standard", "gram")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
HALVES = (jnp.bfloat16, jnp.float16)


def with_spectrum(singular_values, n, seed=0):
    rng = np.random.default_rng(seed)
    m = len(singular_values)
    u, v = (np.linalg.qr(rng.normal(size=(k, m)))[0] for k in (m, n))
    return ((u * singular_values) @ v.T).astype(np.float32)


def singular_values(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def spectral_distance(x, y):
    return np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64), 2, axis=(-2, -1))


def float32_error(x, name, method):
    """How far float32 may be off: what the formula itself suffers when NumPy runs it in float32.

    Twice the most that was measured: 4 times in the standard form; the Gram form works on squared
    singular values, so the smallest suffer by the square of the condition number (0.8 measured).
    """
    schedule = reference.SCHEDULES[name]
    error = reference.newton_schulz(x, *schedule, dtype=np.float32)
    formula = spectral_distance(error, reference.newton_schulz(x, *schedule))
    sigma = singular_values(x)
    return formula * max(8, 2 * (sigma[0] / sigma[-1]) ** 2 if method == "gram" else 0)


def test_the_reference_knows_every_schedule():
    assert set(SCHEDULES) == set(reference.SCHEDULES)


@pytest.mark.parametrize("name", reference.SCHEDULES)
@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("shape", [(96, 24), (16, 24)])
def test_float32_agrees_with_the_reference(name, method, shape):
    x = gaussian(*shape)
    y = muon_jax.newton_schulz(x, coeffs=name, method=method)
    expected = reference.newton_schulz(x, *reference.SCHEDULES[name])
    assert spectral_distance(y, expected) <= float32_error(x, name, method) < 1e-2


@pytest.mark.parametrize("name", reference.SCHEDULES)
def test_a_square_matrix_agrees_with_the_reference(name):
    x = gaussian(32, 32)
    y = muon_jax.newton_schulz(x, coeffs=name, method="standard")
    expected = reference.newton_schulz(x, *reference.SCHEDULES[name])
    assert spectral_distance(y, expected) <= float32_error(x, name, "standard")


@pytest.mark.parametrize("method", FORMS)
def test_exact_converges_to_the_polar_factor(method):
    x = with_spectrum(np.geomspace(1, 1e-3, 16), 24)
    y = muon_jax.newton_schulz(x, coeffs="exact", method=method)
    # Forward error of the polar factor: rounding over the smallest singular value, in the Gram
    # form over its square.
    rounding = np.finfo(np.float32).eps
    limit = {"standard": 4 * rounding / 1e-3, "gram": 4 * rounding / 1e-6}[method]
    assert spectral_distance(y, reference.polar_factor(x)) < limit
    assert np.abs(singular_values(y) - 1).max() < 1e-5


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (4, 64), (16, 64)])
def test_jordan_leaves_singular_values_near_one(shape):
    sigma = singular_values(muon_jax.newton_schulz(gaussian(*shape)))
    assert sigma.min() > 0.67 and sigma.max() < 1.21


SPECTRA = {
    "gaussian": gaussian(32, 128),
    "decade": with_spectrum(np.geomspace(1, 0.1, 32), 128),
    "1/k": with_spectrum(1 / np.arange(1, 33), 128),
    "exponential": with_spectrum(np.exp(-np.arange(32) / 2.0), 128),
    "rank one": with_spectrum(np.eye(32)[0], 128),
}


@pytest.mark.parametrize("name", reference.SCHEDULES)
@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_stays_in_range(name, method, dtype):
    x = jnp.asarray(np.stack(list(SPECTRA.values())), dtype)
    y = muon_jax.newton_schulz(x, coeffs=name, method=method)
    sigma = dict(zip(SPECTRA, singular_values(y), strict=True))
    assert {key: s[0] for key, s in sigma.items() if not 0.65 <= s[0] <= 1.21} == {}
    for full_rank in ("gaussian", "decade"):
        assert sigma[full_rank][-1] >= 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", FORMS)
def test_zero_gives_zero(dtype, method):
    x = jnp.zeros((2, 4, 6), dtype).at[1].set(1)
    y = muon_jax.newton_schulz(x, coeffs="aol", method=method)  # it divides twice
    assert not jnp.any(y[0]) and jnp.all(y[1] != 0)


# Integers that the dtype holds exactly, so that a power of two changes no mantissa and the factor
# must be the same bit for bit; the last scale lifts `largest` to the dtype's largest finite number.
SCALES = {
    jnp.float32: (2**24 - 1, (2.0**-100, 2.0**-60, 2.0**60, 2.0**104)),
    jnp.float16: (2047, (2.0**-24, 2.0**-14, 2.0**5)),
    jnp.bfloat16: (255, (2.0**-100, 2.0**100, 2.0**120)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["jordan", "aol"])
def test_scale_does_not_matter(dtype, name):
    largest, scales = SCALES[dtype]
    x = np.random.default_rng(0).integers(-largest, largest + 1, (8, 12)).astype(np.float64)
    x[0, 0] = largest
    assert largest * scales[-1] == float(jnp.finfo(dtype).max)
    unit = muon_jax.newton_schulz(jnp.asarray(x, dtype), coeffs=name)
    assert singular_values(unit)[-1] > 0.5
    for scale in scales:
        scaled = jnp.asarray(np.asarray(x * scale, dtype))
        np.testing.assert_array_equal(muon_jax.newton_schulz(scaled, coeffs=name), unit)


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (0, 5), (5, 0), (0, 4, 4), (3, 0, 5)])
def test_thin_and_empty_shapes(shape, method):
    x = gaussian(*shape)
    y = muon_jax.newton_schulz(x, coeffs="exact", method=method)
    assert y.shape == shape
    if x.size:
        np.testing.assert_allclose(y, x / np.linalg.norm(x), rtol=1e-5)


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("name", ["jordan", "aol"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_matrix_spoils_only_itself(method, name, bad):
    x = gaussian(4, 6, 10)
    spoilt = x.copy()
    spoilt[1, 2, 3] = bad
    run = functools.partial(muon_jax.newton_schulz, coeffs=name, method=method)
    clean, y = np.asarray(run(x)), np.asarray(run(spoilt))
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))
    assert not np.isfinite(y[1]).any()


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("name", ["jordan", "aol"])
def test_a_stack_is_its_matrices(method, name):
    x = gaussian(2, 3, 6, 10)
    run = functools.partial(muon_jax.newton_schulz, coeffs=name, method=method)
    one_by_one = np.stack([[run(matrix) for matrix in row] for row in x])
    limit = max(float32_error(matrix, name, method) for matrix in x.reshape(6, 6, 10))
    mapped = jax.vmap(jax.vmap(run))(x)
    for stacked in (run(x), mapped):
        assert spectral_distance(stacked, one_by_one).max() < limit
    transposed = np.asarray(run(x.swapaxes(-1, -2))).swapaxes(-1, -2)
    assert spectral_distance(transposed, one_by_one).max() < limit


@pytest.mark.parametrize("x_dtype,dtype", [*itertools.product(DTYPES, (None, *DTYPES))])
def test_the_result_has_the_input_dtype(x_dtype, dtype):
    x = jax.ShapeDtypeStruct((4, 6), x_dtype)
    y = jax.eval_shape(functools.partial(muon_jax.newton_schulz, dtype=dtype), x)
    assert y.dtype == x_dtype
    program = str(jax.make_jaxpr(functools.partial(muon_jax.newton_schulz, dtype=dtype))(x))
    works_in = {jnp.float32: "f32", jnp.bfloat16: "bf16", jnp.float16: "f16"}[dtype or x_dtype]
    used = {name for name in ("bf16", "f16") if f":{name}[" in program}
    outside = {jnp.float32: set(), jnp.bfloat16: {"bf16"}, jnp.float16: {"f16"}}[x_dtype]
    assert used == ({works_in} - {"f32"}) | outside


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("name", ["jordan", "aol"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 7, 5)])
def test_batch_axes_are_never_merged(method, name, shape):
    run = functools.partial(muon_jax.newton_schulz, coeffs=name, method=method)
    program = list(equations(jax.make_jaxpr(run)(jnp.ones(shape)).jaxpr))
    shapes = {v.aval.shape for e in program for v in e.outvars if v.aval.size >= 2 * 3 * 5}
    assert {s[:2] for s in shapes} == {(2, 3)}
    products = [e for e in program if e.primitive.name == "dot_general"]
    assert products and all(e.params["dimension_numbers"][1] == ((0, 1), (0, 1)) for e in products)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["jordan", "polar_express", "deepseek_v4"])
def test_auto_takes_the_form_with_fewer_flops(dtype, name):
    rows = reference.SCHEDULES[name].rows
    restarts = len(gram_restarts(SCHEDULES[name].resolve(None, dtype), jnp.dtype(dtype)))
    assert bool(restarts) == (dtype != jnp.float32 or name == "deepseek_v4")
    chosen = set()
    for shape in [(8, 8), (8, 10), (8, 14), (20, 8), (8, 64)]:
        ratio = max(shape) / min(shape)
        standard = len(rows) * (4 * ratio + 2)
        gram = (restarts + 1) * (4 * ratio - 6) + 8 * len(rows)
        form = NewtonSchulz(name).form(*shape, dtype, "cpu")
        assert form.method == ("gram" if gram < standard else "standard")
        chosen.add(form.method)
    assert chosen == set(FORMS)


ROW = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize(
    "settings,same_as",
    [
        ({"coeffs": ROW}, {}),
        ({"coeffs": ROW, "steps": 7}, {"steps": 7}),
        ({"coeffs": [ROW] * 5}, {}),
        ({"coeffs": np.array([ROW] * 5)}, {}),
        ({"coeffs": muon_jax.Schedule((), tail=ROW, steps=5)}, {}),
        ({"coeffs": muon_jax.Schedule((ROW,) * 3)}, {"steps": 3}),
        ({"steps": np.int64(5)}, {}),
        ({"coeffs": reference.YOU}, {"coeffs": "you"}),
    ],
)
def test_coefficients_may_be_given_in_many_forms(settings, same_as):
    x = gaussian(6, 10)
    np.testing.assert_array_equal(
        muon_jax.newton_schulz(x, **settings), muon_jax.newton_schulz(x, **same_as)
    )


@pytest.mark.parametrize("name,steps", [("jordan", 3), ("polar_express", 8), ("exact", 12)])
def test_repeatable_schedules_take_other_step_counts(name, steps):
    x = gaussian(16, 48)
    rows = reference.SCHEDULES[name].rows[:steps]
    tail = {"polar_express": [1.875, -1.25, 0.375]}.get(name, rows[-1])
    expected = reference.newton_schulz(x, rows + [tail] * (steps - len(rows)))
    y = muon_jax.newton_schulz(x, coeffs=name, steps=steps)
    assert spectral_distance(y, expected) < float32_error(x, name, "gram")


ONES = np.ones((4, 6), np.float32)


@pytest.mark.parametrize(
    "x,settings,error,words",
    [
        (ONES, {"coeffs": "you", "steps": 4}, ValueError, ["5", "steps=4", "Omit steps"]),
        (ONES, {"steps": 0}, ValueError, ["steps=0", "at least 1"]),
        (ONES, {"steps": -2}, ValueError, ["steps=-2", "at least 1"]),
        (ONES, {"steps": 5.0}, TypeError, ["float", "static Python int"]),
        (ONES, {"steps": True}, TypeError, ["bool", "static Python int"]),
        (ONES, {"coeffs": "jordann"}, ValueError, ["'jordann'", "polar_express", "(a, b, c)"]),
        (ONES, {"coeffs": (3.0, 2.0)}, ValueError, ["(3.0, 2.0)", "triples"]),
        (ONES, {"coeffs": [(3.0, 2.0)]}, ValueError, ["[(3.0, 2.0)]", "triples"]),
        (ONES, {"coeffs": []}, ValueError, ["[]", "triples"]),
        (ONES, {"coeffs": 3.0}, ValueError, ["3.0", "triples"]),
        (ONES, {"method": "fast"}, ValueError, ["'fast'", "standard, gram"]),
        (ONES[0], {}, ValueError, ["(6,)", "(..., m, n)"]),
        (ONES.astype(np.int32), {}, TypeError, ["int32", "floating"]),
        (ONES, {"dtype": np.complex64}, TypeError, ["complex64", "floating"]),
        (ONES, {"dtype": jnp.int8}, TypeError, ["int8", "floating"]),
    ],
)
def test_errors_name_what_came_and_what_to_do(x, settings, error, words):
    with pytest.raises(error) as raised:
        muon_jax.newton_schulz(x, **settings)
    assert [word for word in words if word not in str(raised.value)] == []


def test_traced_steps_and_coefficients_are_refused():
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(lambda steps: muon_jax.newton_schulz(ONES, steps=steps))(5)
    with pytest.raises(ValueError, match="static"):
        jax.jit(lambda rows: muon_jax.newton_schulz(ONES, coeffs=rows))(jnp.ones((5, 3)))


@pytest.mark.parametrize("settings", [{"normalization": "l2"}, {"rows": ()}])
def test_a_schedule_checks_itself(settings):
    with pytest.raises(ValueError, match=r"'l2'|got none"):
        muon_jax.Schedule(**{"rows": (ROW,)} | settings)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    hypothesis_numpy.arrays(
        np.float32, (5, 7), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_any_finite_matrix_gives_a_bounded_factor(x):
    y = np.asarray(muon_jax.newton_schulz(x))
    assert np.isfinite(y).all()
    assert singular_values(y)[0] <= 1.25
