"""The optimizer over ten steps: float64 NumPy, torch, optax, KellerJordan/Muon, and plain SGD."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from trajectories import (
    DECAY,
    GRADS,
    KERNELS,
    LABELS,
    PARAMS,
    RAMP,
    ROUNDING,
    STEPS,
    assert_same_bits,
    distance,
    normal,
    run,
)

import muon_jax
from muon_jax import MatrixAxes, muon, scale_by_muon

# --- Float64 NumPy ---------------------------------------------------------------------------

HYBRIDS = [
    *[
        {"momentum": m, "nesterov": n}
        for m in ("ema", "optax", "heavy_ball")
        for n in (True, False)
    ],
    *[{"scale": scale} for scale in ("match_rms_adamw", "mup", "none")],
    {"beta": 0.8, "weight_decay": 0.3, "scale": "match_rms_adamw"},
    {"weight_decay": 0.3, "adam_weight_decay": 0.0},
    {"adam_learning_rate": 3e-3, "adam_weight_decay": 0.5},
    {"adam_b1": 0.7, "adam_b2": 0.999, "adam_eps": 1e-2, "adam_nesterov": True},
    {"learning_rate": RAMP, "weight_decay": DECAY, "adam_learning_rate": lambda t: 0.1 / (t + 1)},
    {"learning_rate": RAMP, "adam_weight_decay": DECAY, "schedule": "polar_express"},
]


@pytest.mark.parametrize("settings", HYBRIDS, ids=lambda settings: "-".join(settings))
def test_ten_steps_of_the_hybrid(settings):
    settings = {"learning_rate": 0.02} | settings
    name = settings.pop("schedule", "jordan")
    hyper = reference.Hyper(**settings, schedule=reference.SCHEDULES[name])
    expected = reference.hybrid(PARAMS, GRADS, LABELS, hyper)
    trajectory, _ = run(muon(**settings, ns_coeffs=name))
    assert distance(trajectory, expected) < ROUNDING


def test_the_references_flavours_differ():
    """So that agreement with one of them says something."""
    jordan = reference.SCHEDULES["jordan"]
    ends = [
        reference.hybrid(PARAMS, GRADS, LABELS, reference.Hyper(**case, schedule=jordan))
        for case in ({}, {"nesterov": False}, {"momentum": "optax"}, {"scale": "mup"})
    ]
    for n, end in enumerate(ends):
        assert all(distance(end, other) > 1e-2 for other in ends[n + 1 :])


# --- KellerJordan/Muon -----------------------------------------------------------------------


def keller_jordan_update(grad, momentum, beta=0.95, nesterov=True):
    """github.com/KellerJordan/Muon, muon_update, on torch's (out, in)."""
    momentum += (1 - beta) * (grad - momentum)
    update = grad + beta * (momentum - grad) if nesterov else momentum
    update = update.reshape(len(update), -1)
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    update = x.T if update.shape[0] > update.shape[1] else x
    return update * max(1, update.shape[-2] / update.shape[-1]) ** 0.5


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (3, 3, 4, 10)])
def test_keller_jordans_nine_lines(shape, nesterov):
    params = normal({"kernel": shape}, 0)
    grads = [normal({"kernel": shape}, seed) for seed in range(1, STEPS + 1)]
    weight, buffer = params["kernel"].astype(np.float64), np.zeros(shape[::-1])
    expected = []
    for g in grads:
        # (kh, kw, in, out) flattened is his (out, in·kh·kw), but for the order of in, kh, kw.
        out_first = np.transpose(g["kernel"].astype(np.float64))
        update = keller_jordan_update(out_first, buffer, nesterov=nesterov).reshape(shape[::-1])
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * np.transpose(update)
        expected.append({"kernel": weight})
    trajectory, _ = run(muon(0.02, weight_decay=0.1, nesterov=nesterov), params, grads)
    assert distance(trajectory, expected, params) < ROUNDING


# --- torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale,torch_scale", [("spectral", "original"), ("match_rms_adamw",) * 2])
@pytest.mark.parametrize("nesterov", [True, False])
def test_ten_steps_of_torch(monkeypatch, scale, torch_scale, nesterov):
    torch = pytest.importorskip("torch", reason="parity with torch needs torch")
    # torch rounds to bfloat16 before Newton-Schulz; here both run it in float32.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())

    def turned(arrays):
        return {name: x.T.copy() if name in KERNELS else x.copy() for name, x in arrays.items()}

    tensors = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in turned(PARAMS).items()}
    settings = {"lr": 0.02, "weight_decay": 0.1}
    hidden = [tensors[name] for name in KERNELS]
    others = [tensor for name, tensor in tensors.items() if name not in KERNELS]
    optimizers = [
        torch.optim.Muon(hidden, **settings, nesterov=nesterov, adjust_lr_fn=torch_scale),
        torch.optim.AdamW(others, **settings, betas=(0.9, 0.95)),
    ]
    expected = []
    for grads in GRADS:
        for name, g in turned(grads).items():
            tensors[name].grad = torch.tensor(g)
        for optimizer in optimizers:
            optimizer.step()
        expected.append(turned({name: tensor.detach().numpy() for name, tensor in tensors.items()}))
    trajectory, _ = run(muon(0.02, weight_decay=0.1, nesterov=nesterov, scale=scale))
    assert distance(trajectory, expected) < ROUNDING


# --- optax -----------------------------------------------------------------------------------


def two_dimensional(path, leaf):
    return "muon" if leaf.ndim == 2 else "other"


LIKE_OPTAX = {
    "momentum": "optax",
    "adam_nesterov": True,
    "adam_b2": 0.999,
    "adam_weight_decay": 0.0,
    "routing": two_dimensional,
}


def test_optax_dimension_numbers():
    shapes = {"query": (6, 2, 4), "out": (2, 4, 6), "stack": (3, 8, 4)}
    axes = {
        "query": optax.contrib.MuonDimensionNumbers(0, (1, 2)),
        "out": optax.contrib.MuonDimensionNumbers((0, 1), 2),
        "stack": optax.contrib.MuonDimensionNumbers(-2, -1),
    }
    params, grads = normal(shapes, 0), [normal(shapes, seed) for seed in range(1, STEPS + 1)]
    theirs = optax.contrib.muon(0.02, muon_weight_dimension_numbers=axes)
    expected, _ = run(theirs, params, grads, jit=True)
    settings = LIKE_OPTAX | {"routing": dict.fromkeys(shapes, "muon"), "matrix_axes": axes}
    trajectory, _ = run(muon(0.02, **settings), params, grads)
    assert distance(trajectory, expected, params) < ROUNDING


def moments(state):
    kinds = (optax.contrib.MuonState, muon_jax.MuonState, optax.ScaleByAdamState)
    leaves, tree = jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, kinds))
    return leaves, tree, [n for n, leaf in enumerate(leaves) if isinstance(leaf, kinds)]


def test_a_run_may_switch_from_optax_in_the_middle():
    theirs, ours = optax.contrib.muon(0.02), muon(0.02, **LIKE_OPTAX)
    expected, _ = run(theirs, jit=True)
    half, state = run(theirs, grads=GRADS[:5], jit=True)
    old, _, old_places = moments(state)
    by_kind = {hasattr(old[n], "nu"): old[n]._asdict() for n in old_places}
    leaves, tree, places = moments(ours.init(PARAMS))
    assert len(places) == len(by_kind) == 2
    for n in places:
        carried = by_kind[hasattr(leaves[n], "nu")]
        leaves[n] = leaves[n]._replace(**{field: carried[field] for field in leaves[n]._fields})
    rest, _ = run(ours, half[-1], GRADS[5:], jax.tree.unflatten(tree, leaves))
    assert distance(half + rest, expected) < ROUNDING


def identity(x):
    return x


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({"momentum": "heavy_ball"}, optax.sgd(0.02, momentum=0.9, nesterov=True)),
        ({"momentum": "heavy_ball", "nesterov": False}, optax.sgd(0.02, momentum=0.9)),
        (
            # With 1 - beta of the float32 beta, as ours; optax takes Python's for a Python number.
            {"nesterov": False},
            optax.chain(optax.ema(jnp.float32(0.9), debias=False), optax.sgd(0.02)),
        ),
    ],
)
def test_without_orthogonalisation_it_is_plain_momentum(settings, expected):
    settings = settings | {"beta": 0.9, "scale": "none", "orthogonalizer": identity}
    kernels = {name: w for name, w in PARAMS.items() if w.ndim == 2}
    grads = [{name: g[name] for name in kernels} for g in GRADS]
    ours, _ = run(muon(0.02, **settings, routing=two_dimensional), kernels, grads)
    assert_same_bits(ours, run(expected, kernels, grads)[0])


def test_everything_on_adamw_is_adamw():
    tx = muon(0.02, weight_decay=0.1, adam_learning_rate=3e-3, routing=[(".", "other")])
    assert_same_bits(run(tx)[0], run(optax.adamw(3e-3, b2=0.95, weight_decay=0.1))[0])


# --- Leaves ----------------------------------------------------------------------------------


def test_frozen_leaves_stay():
    trajectory, _ = run(muon(0.02, weight_decay=0.1, routing=[("embed|up", "frozen")]))
    for name, w in PARAMS.items():
        assert np.array_equal(trajectory[-1][name], w) == (name in ("embed", "up"))


@pytest.mark.parametrize(
    "path,shape,fan_in,fan_out",
    [
        ("conv/kernel", (3, 3, 2, 8), 18, 8),
        ("query/kernel", (12, 2, 4), 12, 8),
        ("out/kernel", (2, 4, 12), 8, 12),
        ("mlp/kernel", (12, 8), 12, 8),
    ],
)
def test_an_nd_kernel_is_one_matrix(path, shape, fan_in, fan_out):
    module, _ = path.split("/")
    g = normal({"g": shape}, 1)["g"]
    params = {module: {"kernel": jnp.zeros(shape)}, "norm": {"scale": jnp.ones(12)}}
    grads = {module: {"kernel": jnp.asarray(g)}, "norm": {"scale": jnp.ones(12)}}
    tx = muon(1.0, scale="mup")
    updates, _ = tx.update(grads, tx.init(params), params)
    factor = reference.newton_schulz(g.reshape(fan_in, fan_out), *reference.SCHEDULES["jordan"])
    expected = -((fan_out / fan_in) ** 0.5) * factor.reshape(shape)
    np.testing.assert_allclose(updates[module]["kernel"], expected, atol=1e-5)


@pytest.mark.parametrize("axes", [MatrixAxes(), MatrixAxes(1, 2), MatrixAxes((0, -1), -2)])
def test_a_stack_is_its_matrices(axes):
    shape = (2, 3, 4, 5)
    batch, fan_in, fan_out = axes.split(shape)
    g = normal({"g": shape}, 1)["g"]
    tx = scale_by_muon(matrix_axes=axes, scale="mup")
    updates, _ = tx.update({"g": jnp.asarray(g)}, tx.init({"g": jnp.asarray(g)}))
    moved = np.transpose(g, batch + fan_in + fan_out)
    ours = np.transpose(updates["g"], batch + fan_in + fan_out)
    for index in np.ndindex(*moved.shape[: len(batch)]):
        m = moved[index].reshape(int(np.prod([shape[a] for a in fan_in])), -1)
        factor = reference.newton_schulz(m, *reference.SCHEDULES["jordan"])
        scale = (m.shape[1] / m.shape[0]) ** 0.5
        np.testing.assert_allclose(ours[index].reshape(m.shape), scale * factor, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_params_keep_their_dtype(dtype):
    params, grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), (PARAMS, GRADS))
    tx = muon(0.02, weight_decay=0.1)
    updates, _ = tx.update(grads[0], tx.init(params), params)
    assert {u.dtype for u in updates.values()} == {jnp.dtype(dtype)}
    trajectory, _ = run(tx, params, grads)
    assert {w.dtype for w in trajectory[-1].values()} == {jnp.dtype(dtype)}
    assert distance(trajectory[-1:], run(tx)[0][-1:]) < 32 * float(jnp.finfo(dtype).eps)


def test_mu_dtype_is_kept_and_costs_little():
    exact, _ = run(muon(0.02))
    trajectory, state = run(muon(0.02, mu_dtype=jnp.bfloat16))
    mu = [s.mu for s in moments(state)[0] if hasattr(s, "mu")]
    assert len(mu) == 2 and {m.dtype for m in jax.tree.leaves(mu)} == {jnp.dtype(jnp.bfloat16)}
    assert all(w.dtype == jnp.float32 for w in trajectory[-1].values())
    assert 0 < distance(trajectory, exact) < 0.05


# --- Weight decay mask -----------------------------------------------------------------------

MLP = eqx.filter(eqx.nn.MLP(4, 3, 6, 1, key=jax.random.key(0)), eqx.is_array)
NESTED = {"mlp": {"up": PARAMS["up"], "bias": PARAMS["bias"]}, "down": PARAMS["down"]}


@pytest.mark.parametrize(
    "params,mask,decayed",
    [
        (NESTED, None, [True, True, True]),
        (NESTED, {"mlp": {"up": True, "bias": False}, "down": False}, [False, False, True]),
        (NESTED, {"mlp": False, "down": np.bool_(True)}, [True, False, False]),
        (NESTED, False, [False] * 3),
        (NESTED, lambda p: jax.tree.map(lambda w: w.ndim > 1, p), [True, False, True]),
        (MLP, jax.tree.map(lambda w: w.ndim > 1, MLP), [True, False, True, False]),
        (MLP, lambda p: jax.tree.map(lambda w: w.ndim > 1, p), [True, False, True, False]),
    ],
)
def test_weight_decay_mask(params, mask, decayed):
    tx = muon(0.02, weight_decay=0.5, weight_decay_mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for u, w, is_decayed in zip(*map(jax.tree.leaves, (updates, params)), decayed, strict=True):
        np.testing.assert_allclose(u, -0.02 * 0.5 * w * is_decayed, rtol=1e-6)


@pytest.mark.parametrize(
    "build,words",
    [
        (lambda: muon(0.1, momentum="nag"), ["'nag'", "heavy_ball"]),
        (lambda: scale_by_muon(momentum="nag"), ["'nag'", "heavy_ball"]),
        (lambda: muon(0.1, scale="rms"), ["'rms'", "match_rms_adamw", "callable"]),
        (lambda: muon(0.1, ns_coeffs="jordann"), ["'jordann'", "polar_express"]),
        (lambda: muon(0.1, ns_coeffs="you", ns_steps=4), ["5", "steps=4"]),
        (lambda: muon(0.1, orthogonalizer=identity, ns_steps=4), ["orthogonalizer", "ns_steps"]),
        (lambda: muon(0.1, orthogonalizer=identity, ns_coeffs="you"), ["orthogonalizer"]),
        (lambda: run(scale_by_muon(matrix_axes=MatrixAxes(0, 2)), NESTED, [NESTED]), ["(16, 6)"]),
        (lambda: run(muon(0.1, matrix_axes=MatrixAxes(0, 2)), NESTED, [NESTED]), ["does not fit"]),
        (
            lambda: run(muon(0.1, matrix_axes={"mpl": MatrixAxes()}), NESTED, [NESTED]),
            ["matrix_axes", "'mpl'", "no leaf"],
        ),
        (
            lambda: run(scale_by_muon(matrix_axes={"down": MatrixAxes()}), NESTED, [NESTED]),
            ["matrix_axes", "'mlp/bias'"],
        ),
        (
            lambda: run(muon(0.1, weight_decay_mask={"mlp": True}), NESTED, [NESTED]),
            ["weight_decay_mask", "'down'"],
        ),
    ],
)
def test_errors_name_what_came(build, words):
    with pytest.raises(ValueError) as raised:
        build()
    assert [word for word in words if word not in str(raised.value)] == []
