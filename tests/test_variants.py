"""Muon's relatives: ten steps against float64 NumPy, and the optimizers that they turn into."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_variants
from trajectories import (
    DECAY,
    GRADS,
    KERNELS,
    PARAMS,
    RAMP,
    ROUNDING,
    assert_same_bits,
    distance,
    normal,
    of_leaves,
    run,
    updates_of,
    with_adamw,
)

import muon_jax as mj

BASE = {"learning_rate": 0.02, "weight_decay": 0.1}
SCHEDULES = {"learning_rate": RAMP, "weight_decay": DECAY}


def of_kernels(tree):
    return {name: tree[name] for name in KERNELS}


def run_kernels(tx, jit=False):
    return run(tx, of_kernels(PARAMS), [of_kernels(g) for g in GRADS], jit=jit)


# --- Float64 NumPy, beside AdamW -------------------------------------------------------------


def truncated(w, grads, *, rank, **settings):
    """A share is rounded up to whole directions."""
    rank = math.ceil(rank * min(w.shape)) if isinstance(rank, float) else rank
    return reference_variants.low_rank(w, grads, rank=rank, **settings)


def warm_dion(w, grads, *, rank, beta, **settings):
    """From the Q that ours begins with."""
    state = mj.dion(0.02, rank=rank).init(PARAMS).inner_states["muon"].inner_state[0]
    (q,) = [state.q[name] for name in KERNELS if PARAMS[name].shape == w.shape]
    return reference_variants.dion(w, grads, q=q, mu=beta, **settings)


PAIRS = {
    "normuon": (mj.normuon, reference_variants.normuon),
    "adamuon": (mj.adamuon, reference_variants.adamuon),
    "low_rank": (mj.low_rank, truncated),
    "muonbp": (mj.muonbp, reference_variants.muonbp),
    "dion": (mj.dion, warm_dion),
    "dion2": (mj.dion2, reference_variants.dion2),
    "dion3": (mj.dion3, reference_variants.dion2),
    "int8": (functools.partial(mj.muon, mu_dtype=jnp.int8), reference_variants.int8_muon),
    "int4": (
        functools.partial(mj.muon, mu_dtype=jnp.int4),
        functools.partial(reference_variants.int8_muon, levels=7),
    ),
}

# Settings of both, and those that only one of the two has.
ROWS = [
    ("normuon", {}, {}, {}),
    ("normuon", {"nesterov": False, "beta2": 0.8}, {}, {}),
    ("normuon", {"momentum": "heavy_ball", "scale": "match_rms_adamw"}, {}, {}),
    ("normuon", {"momentum": "optax", "scale": "mup", "eps": 0.1} | SCHEDULES, {}, {}),
    ("normuon", {"beta": 0.8, "beta2": 0.0}, {}, {}),
    ("adamuon", {}, {}, {}),
    ("adamuon", {"nesterov": False, "beta2": 0.8}, {}, {}),
    ("adamuon", {"momentum": "heavy_ball", "beta": 0.8, "eps": 0.1}, {}, {}),
    ("adamuon", SCHEDULES, {"scale": lambda m, n: 0.7 * max(m, n) ** 0.5}, {"rms": 0.7}),
    ("low_rank", {"rank": 2}, {}, {}),
    ("low_rank", {"rank": 0.3, "nesterov": False, "scale": "mup"} | SCHEDULES, {}, {}),
    ("low_rank", {"rank": 99, "momentum": "optax", "beta": 0.8}, {}, {}),
    ("low_rank", {"rank": 3}, {"method": "subspace"}, {}),
    ("muonbp", {"blocks": (2, 2), "period": 3}, {}, {}),
    ("muonbp", {"blocks": (1, 2), "period": 4, "scale": "match_rms_adamw"} | SCHEDULES, {}, {}),
    ("muonbp", {"blocks": (2, 1), "period": 2, "nesterov": False, "scale": "mup"}, {}, {}),
    (
        "muonbp",
        {"blocks": (2, 1), "period": 5, "weight_decay": 0.0},
        {"block_ratio": 0.5},
        {"block_learning_rate": 0.01},
    ),
    ("dion", {"rank": 3, "beta": 0.95}, {}, {}),
    ("dion", {"rank": 0.5, "beta": 0.6, "scale": "match_rms_adamw"} | SCHEDULES, {}, {}),
    ("dion", {"rank": 99, "beta": 0.95}, {}, {}),
    ("dion2", {"fraction": 0.25, "beta": 0.95}, {}, {}),
    ("dion2", {"fraction": 0.5, "beta": 0.6, "scale": "mup"} | SCHEDULES, {}, {}),
    ("dion2", {"fraction": 0.4, "side": "fan_in"}, {}, {}),
    ("dion2", {"fraction": 1.0, "side": "fan_out", "beta": 0.0}, {}, {}),
    ("dion3", {"fraction": 0.5, "beta2": 0.9}, {}, {}),
    ("int8", {}, {}, {}),
    ("int8", {"nesterov": False, "momentum": "heavy_ball", "beta": 0.8}, {}, {}),
    ("int8", {"momentum": "optax", "scale": "mup"} | SCHEDULES, {}, {}),
    ("int4", {}, {}, {}),
]


@pytest.mark.parametrize(
    ("name", "both", "ours", "theirs"), ROWS, ids=["-".join((r[0], *r[1], *r[2])) for r in ROWS]
)
def test_ten_steps(name, both, ours, theirs):
    make, follow = PAIRS[name]
    settings = BASE | both
    descent = {key: settings[key] for key in BASE}
    expected = with_adamw(of_leaves(follow, **settings, **theirs), **descent)
    # Outside jit a lax.cond is compiled anew at every step.
    trajectory, _ = run(make(**settings, **ours), jit=name == "muonbp")
    assert distance(trajectory, expected) < ROUNDING


# --- Float64 NumPy, every leaf ---------------------------------------------------------------


def of_splus(names=tuple(PARAMS), **settings):
    """The trajectory of the leaves, and that of their averages."""
    pairs = {
        name: reference_variants.splus(
            PARAMS[name], [g[name] for g in GRADS], standard=name in KERNELS, **settings
        )
        for name in names
    }
    return [
        [{name: pair[i][step] for name, pair in pairs.items()} for step in range(len(GRADS))]
        for i in range(2)
    ]


@pytest.mark.parametrize("every", [1, 3, 100])
def test_ten_steps_of_splus(every):
    """Only the shorter sides of the rectangles are turned: see the next test for the longer."""
    settings = {"b1": 0.8, "b2": 0.9, "every": every, "max_dim": 16}
    expected, averages = of_splus(**settings, ema_rate=0.9, **SCHEDULES)
    trajectory, state = run(mj.splus(**settings, other_b1=0.8, average=0.9, **SCHEDULES), jit=True)
    assert distance(trajectory, expected) < ROUNDING
    assert distance([mj.evaluation_params(state, trajectory[-1])], averages[-1:]) < ROUNDING


def test_splus_turns_the_longer_sides_too():
    """From step 5 on, when their second moments have full rank and with it one eigenbasis."""
    settings = {"learning_rate": 1.0, "b2": 0.9, "every": 3}
    expected, _ = of_splus(KERNELS, **settings)
    ours, _ = run_kernels(mj.splus(**settings), jit=True)
    for name in KERNELS:
        a, b = ([way[name] for way in trajectory] for trajectory in (ours, expected))
        moves = np.diff(np.asarray(a, np.float64), axis=0), np.diff(b, axis=0)
        np.testing.assert_allclose(moves[0][3:], moves[1][3:], rtol=0, atol=1e-4)
        m, n = PARAMS[name].shape
        lengths = np.linalg.norm(moves[0], axis=(1, 2))
        np.testing.assert_allclose(lengths, 2 * math.sqrt(m * n) / (m + n), rtol=1e-5)


MATRIX_BALLS = ["spectral", "sign", "row_norm", "col_norm"]


def turned(follow):
    """Of an embedding, whose width is fan_in."""
    return lambda w, grads, **kw: [x.T for x in follow(w.T, [g.T for g in grads], **kw)]


def of_balls(follow, kernel, table, **settings):
    """The oracles of kernels and embedding; the bias has its own."""
    ways = [
        of_leaves(follow, **kernel, **settings),
        of_leaves(turned(follow), ["embed"], **table, **settings),
        of_leaves(follow, ["bias"], oracle="bias_rms", **settings),
    ]
    return [a | b | c for a, b, c in zip(*ways, strict=True)]


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("oracle", MATRIX_BALLS)
def test_ten_steps_of_scion(oracle, constrained):
    balls = [("up|down|square", mj.Ball(oracle, 5.0)), ("embed", mj.Ball(oracle, 2.0))]
    settings = {"learning_rate": RAMP, "alpha": 0.3, "constrained": constrained}
    expected = of_balls(
        reference_variants.scion,
        {"oracle": oracle, "radius": 5.0},
        {"oracle": oracle, "radius": 2.0},
        **settings,
    )
    assert distance(run(mj.scion(**settings, balls=balls))[0], expected) < ROUNDING


def test_ten_steps_of_scion_as_it_is():
    expected = of_balls(
        reference_variants.scion,
        {"radius": 50.0},
        {"oracle": "sign", "radius": 3000.0},
        learning_rate=2**-9,
        constrained=False,
    )
    assert distance(run(mj.scion(2**-9))[0], expected) < ROUNDING


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (5, 4, 8)])
def test_ten_steps_of_scion_on_a_convolution(shape):
    def flat(tree):
        return tree["conv"]["kernel"].reshape(-1, shape[-1])

    params, *grads = ({"conv": {"kernel": normal({"k": shape}, i)["k"]}} for i in range(11))
    expected = reference_variants.scion(
        flat(params),
        map(flat, grads),
        learning_rate=0.01,
        radius=50.0,
        constrained=False,
        oracle="spectral_conv",
        area=math.prod(shape[:-2]),
    )
    trajectory, _ = run(mj.scion(0.01), params, grads)
    ours, theirs = [{"k": flat(way)} for way in trajectory], [{"k": x} for x in expected]
    assert distance(ours, theirs, {"k": flat(params)}) < ROUNDING


@pytest.mark.parametrize("oracle", MATRIX_BALLS)
@pytest.mark.parametrize("l0,l1", [(0.5, 2.0), (3.0, 0.0), (0.0, 2.0)])
def test_ten_steps_of_gluon(oracle, l0, l1):
    """With the exact polar factor, whose product with d is the dual norm."""
    settings = {"alpha": 0.3, **SCHEDULES}
    expected = of_balls(
        lambda w, g, **kw: reference_variants.gluon(w, g, **({"l0": 1.0, "l1": 4.0} | kw)),
        {"oracle": oracle, "l0": l0, "l1": l1},
        {"oracle": oracle},
        schedule=reference.SCHEDULES["exact"],
        **settings,
    )
    smoothness = [("embed|bias", (1.0, 4.0)), ("", (l0, l1))]
    tx = mj.gluon(
        **settings,
        smoothness=smoothness,
        oracles=[("up|down|square|embed", oracle)],
        orthogonalizer=mj.polar_factor,
    )
    assert distance(run(tx)[0], expected) < ROUNDING


# --- The references --------------------------------------------------------------------------


FLAVOURS = {
    reference_variants.low_rank: [{"rank": 99}, {"rank": 3}],
    reference_variants.normuon: [{}, {"nesterov": False}, {"beta2": 0.0}],
    reference_variants.adamuon: [{}, {"beta2": 0.8}],
    reference_variants.muonbp: [
        {"blocks": blocks, "period": n} for blocks, n in (((2, 2), 3), ((2, 1), 3), ((2, 2), 4))
    ],
    warm_dion: [
        {"rank": 3, "beta": 0.95} | settings
        for settings in ({}, {"rank": 2}, {"beta": 0.6}, {"scale": "none"})
    ],
    reference_variants.scion: [{"oracle": oracle, "constrained": False} for oracle in MATRIX_BALLS],
    reference_variants.gluon: [{"l0": 1.0, "l1": 1.0}],
    reference_variants.int8_muon: [{"nesterov": False}, {}],
}


def test_the_references_variants_differ():
    """So that agreement with one of them says something."""
    ways = []
    for follow, flavours in FLAVOURS.items():
        descent = {"learning_rate": 0.02} if follow is reference_variants.scion else BASE
        ways += [of_leaves(follow, **descent, **settings) for settings in flavours]
    ways += [of_splus(KERNELS, learning_rate=1.0, every=n, b2=0.9)[0] for n in (1, 2, 100)]
    assert all(distance(a, b) > 1e-2 for a, b in itertools.combinations(ways, 2))
    exact = of_leaves(reference_variants.muon, **BASE)
    assert distance(ways[-4], exact) > 10 * ROUNDING  # int8


# --- What they turn into ---------------------------------------------------------------------


def identity(x):
    return x


PLAIN = {"orthogonalizer": identity, "scale": "none", "beta": 0.9}
SAME = {
    "blocks at no step": lambda: (mj.muonbp(0.02, period=1, blocks=(2, 2)), mj.muon(0.02)),
    "a ball by its fields": lambda: (
        mj.scion(0.02, balls=[("", ("spectral", 2.0))]),
        mj.scion(0.02, balls=[("", mj.Ball("spectral", 2.0))]),
    ),
    "every direction": lambda: (
        mj.low_rank(0.02, 8),
        mj.muon(0.02, orthogonalizer=mj.polar_factor),
    ),
    "so many that nothing is left out": lambda: (
        mj.low_rank(0.02, 3, method="subspace"),
        mj.low_rank(0.02, 3),
    ),
    "plain momentum, in blocks": lambda: (
        optax.chain(
            mj.scale_by_muonbp(**PLAIN, momentum="heavy_ball", blocks=(2, 2)), optax.scale(-1)
        ),
        optax.sgd(1.0, momentum=0.9, nesterov=True),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_it_is_bit_for_bit(case):
    """Operation by operation: in one program XLA may contract the sums of two unlike."""
    ours, theirs = SAME[case]()
    assert_same_bits(run_kernels(ours)[0], run_kernels(theirs)[0])


def row_normalized(g, state, params=None):
    norm = lambda x: jnp.linalg.norm(x, axis=0, keepdims=True)  # noqa: E731
    return jax.tree.map(lambda x: x / norm(x) * jnp.linalg.norm(x) / x.shape[1] ** 0.5, g), state


def signs(beta, size):
    return optax.chain(optax.ema(beta, debias=False), optax.scale_by_sign(), optax.scale(-size))


CLOSE = {
    # Without a second moment its root is a constant, which the norm takes away.
    "normuon without a second moment": lambda: (mj.normuon(0.02, beta2=1.0), mj.muon(0.02)),
    "normuon of the last step alone": lambda: (
        mj.normuon(0.02, **PLAIN | {"beta": 0.0}, beta2=0.0),
        optax.chain(optax.GradientTransformation(lambda _: (), row_normalized), optax.scale(-0.02)),
    ),
    # Signs have squares of 1.
    "adamuon of signs": lambda: (
        mj.adamuon(0.02, orthogonalizer=identity, beta=0.9, nesterov=False),
        signs(0.9, 0.2 * 0.02),
    ),
    "blocks that are whole": lambda: (mj.muonbp(0.02, period=3, blocks=(1, 1)), mj.muon(0.02)),
    "splus of long sides": lambda: (mj.splus(0.02, b1=0.8, max_dim=1), signs(0.8, 0.001 * 0.02)),
    "scion in unit balls": lambda: (
        mj.scion(0.02, balls=[("", mj.Ball())], alpha=0.05),
        mj.muon(0.02, nesterov=False, scale="mup"),
    ),
    "scion of signs": lambda: (
        mj.scion(0.02, balls=[("", mj.Ball(lambda x: jnp.sign(x)))], alpha=0.2),
        signs(0.8, 0.02),
    ),
}


@pytest.mark.parametrize("case", CLOSE)
def test_it_is(case):
    ours, theirs = (run_kernels(tx, jit=True)[0] for tx in CLOSE[case]())
    assert distance(ours, theirs) < ROUNDING


def test_blocks_are_parts_of_the_leaf():
    """All steps but the first, and the shape scale is the block's."""
    parts = mj.MatrixAxes(split_fan_in=2, split_fan_out=2)
    ours, _ = run_kernels(mj.muonbp(0.02, period=99, blocks=(2, 2), scale="mup"), jit=True)
    whole, _ = run_kernels(mj.muon(0.02, scale="mup"), jit=True)
    cut, _ = run_kernels(mj.muon(0.02, scale="mup", matrix_axes=parts), jit=True)
    moves = [np.diff([way["up"] for way in trajectory], axis=0) for trajectory in (ours, cut)]
    np.testing.assert_allclose(ours[0]["up"], whole[0]["up"], atol=1e-6)
    np.testing.assert_allclose(*moves, atol=1e-6)


def test_dion_of_what_never_leaves_finds_the_top_directions():
    """With beta 1 nothing is taken out of the average: power iteration on one matrix."""
    first = {name: jnp.asarray(PARAMS[name]) for name in KERNELS}
    zeros = jax.tree.map(jnp.zeros_like, first)
    found, _ = updates_of(mj.scale_by_dion(rank=2, beta=1.0, scale=None), [first] + [zeros] * 150)
    for name, x in first.items():
        expected = reference_variants.truncated_polar(x, 2)
        np.testing.assert_allclose(found[-1][name], expected, rtol=0, atol=1e-5)


def test_dion_keeps_its_directions_where_nothing_comes():
    first = {name: jnp.asarray(PARAMS[name]) for name in KERNELS}
    zeros = jax.tree.map(jnp.zeros_like, first)
    waited, _ = updates_of(mj.scale_by_dion(rank=2), [zeros, zeros, first])
    at_once, _ = updates_of(mj.scale_by_dion(rank=2), [first])
    assert_same_bits(waited[-1:], at_once)


def test_scion_keeps_weights_in_their_balls():
    balls = [("", mj.Ball("spectral", 3.0))]
    params = {name: 0.1 * w for name, w in of_kernels(PARAMS).items()}
    tx = mj.scion(0.3, balls=balls, constrained=True, orthogonalizer=mj.polar_factor)
    trajectory, _ = run(tx, params, [of_kernels(g) for g in GRADS])
    for w in trajectory[-1].values():
        m, n = w.shape
        assert 2.5 < np.linalg.norm(w, 2) * math.sqrt(m / n) < 3 * (1 + 1e-5)
