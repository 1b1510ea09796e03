"""Options of the whole family: the rest, cautious decay, momentum in integers, parts of a leaf."""

import functools
import itertools

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
    LABELS,
    PARAMS,
    RAMP,
    ROUNDING,
    assert_same_bits,
    distance,
    normal,
    of_leaves,
    relative_error,
    run,
    updates_of,
    with_adamw,
)
from variants import BLOCKS, QUICK, SCALE_BY

from muon_jax import (
    Interleaved,
    MatrixAxes,
    adamuon,
    gluon,
    hybrid,
    muon,
    muonbp,
    normuon,
    scale_by_muon,
    scion,
)
from muon_jax._momentum import Packed

# --- The rest --------------------------------------------------------------------------------

REST = [name for name in PARAMS if name not in KERNELS]


def only(names, tree):
    return {name: tree[name] for name in names}


def run_only(names, tx):
    return run(tx, only(names, PARAMS), [only(names, g) for g in GRADS])[0]


def decayed(*directions, rate=0.02, decay=0.1):
    return optax.chain(*directions, optax.add_decayed_weights(decay), optax.scale(-rate))


SIGN = optax.ema(0.9, debias=False), optax.scale_by_sign(), optax.scale(0.001)
# What is given as `other_*`, and the optimizer that this is.
RESTS = [
    ({}, optax.adamw(0.02, b2=0.95, weight_decay=0.1)),
    ({"optimizer": "sgd"}, decayed(optax.trace(0.9))),
    ({"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}, optax.sgd(0.1, 0.9)),
    ({"optimizer": "lion"}, optax.lion(0.02, b1=0.9, b2=0.99, weight_decay=0.1)),
    (
        {"optimizer": "lion", "learning_rate": RAMP, "weight_decay": DECAY, "b1": 0.8},
        optax.lion(RAMP, b1=0.8, b2=0.99, weight_decay=DECAY),
    ),
    ({"optimizer": "sign"}, decayed(*SIGN)),
    ({"optimizer": "frozen"}, optax.set_to_zero()),
    ({"optimizer": optax.adafactor(1e-2)}, optax.adafactor(1e-2)),
]


@pytest.mark.parametrize("others, expected", RESTS)
def test_the_rest_is_the_optimizer_that_was_asked_for(others, expected):
    settings = {f"other_{name}": value for name, value in others.items()}
    trajectory, _ = run(muon(0.02, weight_decay=0.1, **settings))
    assert_same_bits([only(REST, way) for way in trajectory], run_only(REST, expected))
    hidden = run_only(KERNELS, muon(0.02, weight_decay=0.1))
    assert_same_bits([only(KERNELS, way) for way in trajectory], hidden)


def test_the_rest_gets_extra_arguments():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: value * g, updates), state

    rest = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = muon(0.02, other_optimizer=rest)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=3.0)
    np.testing.assert_array_equal(updates["bias"], 3 * GRADS[0]["bias"])


def test_any_scale_by_may_be_in_the_hybrid():
    ours = run(hybrid(scale_by_muon, 0.02, weight_decay=0.1))[0]
    assert_same_bits(ours, run(muon(0.02, weight_decay=0.1))[0])


# --- Cautious decay --------------------------------------------------------------------------


def directions(trajectory, name):
    """Of a run with a rate of 1 and no decay."""
    way = [np.asarray(PARAMS[name], np.float64), *(params[name] for params in trajectory)]
    return [a - b for a, b in itertools.pairwise(way)]


@pytest.mark.parametrize("name", ["muon", "adamuon"])
@pytest.mark.parametrize("rate,decay", [(0.02, 1.0), (RAMP, DECAY)], ids=["constant", "scheduled"])
def test_ten_steps_of_cautious_decay(name, rate, decay):
    plain = {"learning_rate": 1.0}
    free = reference.hybrid(PARAMS, GRADS, LABELS, reference.Hyper(**plain))
    if name == "adamuon":
        free = with_adamw(of_leaves(reference_variants.adamuon, **plain), **plain)
    ways = {
        leaf: reference_variants.cautious_decay(
            w, directions(free, leaf), learning_rate=rate, weight_decay=decay
        )
        for leaf, w in PARAMS.items()
    }
    expected = [dict(zip(ways, leaves, strict=True)) for leaves in zip(*ways.values(), strict=True)]
    make = {"muon": muon, "adamuon": adamuon}[name]
    settings = {"weight_decay": decay, "cautious_weight_decay": True}
    assert distance(run(make(rate, **settings))[0], expected) < ROUNDING
    assert distance(run(make(rate, weight_decay=decay))[0], expected) > 100 * ROUNDING


@pytest.mark.parametrize("rest", ["adamw", "sgd", "lion", "sign"])
def test_an_entry_without_an_update_decays_unless_it_is_masked(rest):
    mask = {name: name != "square" for name in PARAMS}
    settings = {"weight_decay": 0.5, "weight_decay_mask": mask, "cautious_weight_decay": True}
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    tx = muon(0.02, other_optimizer=rest, **settings)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    for name, w in PARAMS.items():
        np.testing.assert_allclose(updates[name], -0.02 * 0.5 * w * mask[name], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_only_entries_that_shrink_anyway_decay(dtype):
    """Also where the product of update and weight is too small for the dtype."""
    tiny = 2 * jnp.finfo(dtype).tiny
    w, g = (tiny * jnp.asarray(signs, dtype) for signs in ([1, -1, 1, -1], [1, 1, -1, -1]))
    settings = {"other_optimizer": "sgd", "weight_decay": 1.0, "cautious_weight_decay": True}
    tx = muon(1.0, **settings)
    updates, _ = tx.update({"bias": g}, tx.init({"bias": w}), {"bias": w})
    expected = -(g + jnp.where(jnp.sign(g) == jnp.sign(w), w, 0))
    np.testing.assert_allclose(updates["bias"], expected, rtol=0.02)


# --- Momentum in int8 ------------------------------------------------------------------------


ROW = np.array([0.3, -1.0, 0.004, 0.0])
ROWS = np.stack([ROW, 1e30 * ROW, 1e-30 * ROW, 0 * ROW, [0, 0, 0, -2], np.arange(4)])


LEVELS = {127: jnp.int8, 7: jnp.int4}


@pytest.mark.parametrize("shape", [(6, 4), (3, 64, 96), (5,)])
@pytest.mark.parametrize("levels", LEVELS)
def test_a_rounding_costs_less_than_a_step_and_nothing_on_average(shape, levels):
    x = ROWS if shape == (6, 4) else normal({"x": shape}, 0)["x"]
    x = x.astype(np.float32)
    step = np.abs(x).max(axis=-1, keepdims=True) / levels
    encode = jax.jit(lambda count: Packed.encode({"x": jnp.asarray(x)}, count, LEVELS[levels]))
    errors = []
    for count in range(64):
        packed = encode(count)
        values, scales, _ = reference_variants.round_trip(x, count, np.float32, levels)
        # One in ten thousand has a fraction so near its random number that float32 decides.
        assert np.mean(packed.values["x"].astype(jnp.int8) != values) < 1e-4
        np.testing.assert_allclose(packed.scales["x"], scales, rtol=2e-7)
        error = np.asarray(packed.decode()["x"], np.float64) - x
        assert np.all(np.abs(error) <= step * (1 + 1e-5))
        errors.append(np.where(step > 0, error / np.where(step > 0, step, 1), 0))
    # Half a step at most, over eight; five times that for the largest of thousands.
    assert np.abs(np.mean(errors, axis=0)).max() < 5 / 16
    neighbours = np.mean(errors, axis=0).ravel()
    assert abs(neighbours.mean()) < 3 / 16 / np.sqrt(x.size)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("beta", [0.95, 0.99])
def test_integers_learn_a_steady_gradient_of_any_size(beta, levels):
    """A hundredth of a step a step: rounding to nearest would keep the momentum at zero."""
    share = 0.01 / levels / (1 - beta)
    g = jnp.full((64, 64), share).at[:, 0].set(1.0)
    tx = scale_by_muon(beta=beta, mu_dtype=LEVELS[levels], orthogonalizer=lambda x: x)

    def step(state, _):
        _, state = tx.update(g, state)
        return state, state.mu.decode()

    _, mu = jax.lax.scan(step, tx.init(g), None, length=int(8 / (1 - beta)))
    assert np.round(share * (1 - beta) * levels) == 0
    mu = np.asarray(mu)[-int(3 / (1 - beta)) :, :, 1:]
    # What the docstring says of one entry; of their mean, the largest deviation seen is a third.
    deviation = 1 / (2 * levels) / np.sqrt(1 - beta**2)
    assert abs(mu.mean() - share) < min(deviation / 8, share / 10)
    assert 0 < mu.std() < deviation


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("make", [muon, normuon, adamuon, muonbp])
def test_int8_takes_a_byte_an_entry_and_stays(make, dtype):
    check_packed(make, dtype, jnp.int8)


def test_int4_takes_half_a_byte_an_entry_and_stays():
    check_packed(muon, jnp.float32, jnp.int4)
    params = {name: jnp.asarray(x) for name, x in PARAMS.items()}
    tx = muon(0.02, mu_dtype=jnp.int4, other_optimizer="frozen")
    program = jax.jit(lambda state: state).lower(jax.eval_shape(tx.init, params)).compile()
    size = sum(PARAMS[name].size for name in KERNELS)
    scales = 4 * sum(len(PARAMS[name]) for name in KERNELS)
    held = program.memory_analysis().argument_size_in_bytes
    assert size / 2 + scales <= held < 0.7 * size + scales


def check_packed(make, dtype, packed):
    settings = {"mu_dtype": packed, "ns_steps": 1} | (BLOCKS if make is muonbp else {})
    tx = make(0.02, **settings)
    params, grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), (PARAMS, GRADS[:3]))
    before = tx.init(params)
    _, state = run(tx, params, grads, jit=True)
    for old, new in zip(*map(jax.tree.leaves, (before, state)), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    hidden, rest = (state.inner_states[label].inner_state[0].mu for label in ("muon", "other"))
    values, scales = hidden
    for name in KERNELS:
        assert values[name].dtype == packed and values[name].nbytes == values[name].size
        assert scales[name].dtype == jnp.float32 and scales[name].size == len(values[name])
    assert {rest[name].dtype for name in REST} == {jnp.dtype(dtype)}


def test_int8_rows_without_gradients_stay_zero():
    grads = [jnp.asarray(g["down"]).at[3].set(0).at[5, 2].set(jnp.inf) for g in GRADS]
    _, state = updates_of(SCALE_BY["int8"](), grads)
    mu = state.mu.decode()
    assert not np.any(mu[3])
    assert np.isfinite(mu).all(axis=1).sum() == len(mu) - 1


@pytest.mark.parametrize("make", [scion, functools.partial(gluon, smoothness=(0.0, 50.0))])
def test_int8_of_vectors_and_scalars(make):
    """One scale each; the leaves that others leave to AdamW."""
    tree = {"bias": jnp.asarray(PARAMS["bias"]), "temperature": jnp.asarray(2.0)}
    packed, exact = (make(0.1, mu_dtype=dtype) for dtype in (jnp.int8, None))
    ours, theirs = (tx.update(tree, tx.init(tree), tree)[0] for tx in (packed, exact))
    assert relative_error(ours, theirs) < 1e-6


# --- Parts of a leaf -------------------------------------------------------------------------

# Shape, axes, and the sizes of the parts along fan_in and fan_out, all fan axes merged.
PARTS = {
    "query, key, value": ((8, 14), MatrixAxes(split_fan_out=(8, 3, 3)), [8], [8, 3, 3]),
    "gate and up": ((3, 6, 8), MatrixAxes(split_fan_out=2), [6], [4, 4]),
    "heads": ((6, 3, 4), MatrixAxes(0, (1, 2), split_fan_out=3), [6], [4] * 3),
    "groups of heads": ((6, 4, 2), MatrixAxes(0, (1, 2), split_fan_out=(2, 1, 1)), [6], [4, 2, 2]),
    "heads in": ((3, 4, 6), MatrixAxes((0, 1), 2, split_fan_in=3), [4] * 3, [6]),
    "tiles": ((2, 8, 9), MatrixAxes(split_fan_in=2, split_fan_out=(4, 5)), [4, 4], [4, 5]),
    "equal ones apart": ((6, 10), MatrixAxes(split_fan_out=(2, 2, 4, 2)), [6], [2, 2, 4, 2]),
    "turned": ((9, 6), MatrixAxes(1, 0, 2, (5, 4)), [3, 3], [5, 4]),
    "squares": ((8, 24), MatrixAxes(split_fan_out=3), [8], [8] * 3),
    "all different": ((3, 8, 14), MatrixAxes(split_fan_out=(8, 2, 4)), [8], [8, 2, 4]),
    "all in one": ((6, 8), MatrixAxes(split_fan_out=(8,)), [6], [8]),
}


ONLY = {
    # A row of int8 is the leaf's last axis, of which a part may have some only; and an entry's
    # random bits depend on its place in the leaf.
    "int8": {"all in one"},
    # Equal parts that follow each other are one stack, with one draw of Q.
    "dion": {"all different", "all in one"},
    # Elsewhere a second moment has null directions after one step.
    "splus": {"squares"},
    "eigenbasis": {"squares"},
    # Their own tests have halves of whole leaves.
    "muonbp": set(),
}


def apart(x, axes, along_in, along_out):
    """The parts as leaves `(*batch, fan_in, fan_out)`."""
    rows = np.split(axes.to_matrices(x), np.cumsum(along_in)[:-1], axis=-2)
    tiles = [np.split(row, np.cumsum(along_out)[:-1], axis=-1) for row in rows]
    return {f"{i}, {j}": x for i, row in enumerate(tiles) for j, x in enumerate(row)}


@pytest.mark.parametrize("name", [name for name in SCALE_BY if ONLY.get(name, PARTS)])
def test_parts_are_leaves_of_their_own(name):
    cases = {case: row for case, row in PARTS.items() if case in ONLY.get(name, PARTS)}
    grads = [normal({case: row[0] for case, row in cases.items()}, seed) for seed in (1, 2)]

    def split(tree):
        return {case: apart(x, *PARTS[case][1:]) for case, x in tree.items()}

    axes = {case: row[1] for case, row in cases.items()}
    ours, _ = updates_of(SCALE_BY[name](matrix_axes=axes), grads)
    theirs, _ = updates_of(SCALE_BY[name](), [split(g) for g in grads])
    for whole, parts in zip(ours, theirs, strict=True):
        errors = {case: relative_error(split(whole)[case], parts[case]) for case in cases}
        assert max(errors.values()) < 1e-5, errors


# Two query heads of 3, a key and a value: (3 + 3) + 3 + 3 entries for each of four groups.
TURNS = (6, 3, 3)


def consecutive(x, axis=-1):
    """All queries, then all keys, then all values."""
    rounds = np.split(np.asarray(x), 4, axis=axis)
    turns = [np.split(one, np.cumsum(TURNS)[:-1], axis=axis) for one in rounds]
    return np.concatenate([t[i] for i in range(3) for t in turns], axis=axis)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("together", "sizes"), [(True, (24, 12, 12)), (False, (6,) * 4 + (3,) * 4 + (3,) * 4)]
)
def test_parts_that_take_turns(together, sizes, turned):
    axis = -2 if turned else -1
    grads = [np.swapaxes(normal({"w": (2, 8, 48)}, i)["w"], -1, axis) for i in (1, 2)]
    fans = {"fan_in": -1, "fan_out": -2} if turned else {}
    parts = MatrixAxes(split_fan_out=Interleaved(TURNS, together), **fans)
    ours, _ = updates_of(SCALE_BY["normuon"](matrix_axes=parts), grads)
    plain = MatrixAxes(split_fan_out=sizes, **fans)
    theirs, _ = updates_of(
        SCALE_BY["normuon"](matrix_axes=plain), [consecutive(g, axis) for g in grads]
    )
    for x, y in zip(ours, theirs, strict=True):
        assert relative_error(consecutive(x, axis), y) < 1e-6


def test_turns_that_do_not_fill_the_axis_are_refused():
    axes = MatrixAxes(split_fan_out=Interleaved((6, 3)))
    words = r"Axis 1 of a leaf .* rounds of the sizes \(6, 3\), which have 9"
    with pytest.raises(ValueError, match=words):
        updates_of(scale_by_muon(matrix_axes=axes), [jnp.ones((4, 10))])


def test_blocks_leave_parts_alone():
    axes, grads = MatrixAxes(split_fan_out=(8, 3, 5)), [g["up"] for g in GRADS[:4]]
    ours, _ = updates_of(SCALE_BY["muonbp"](matrix_axes=axes), grads)
    theirs, _ = updates_of(scale_by_muon(matrix_axes=axes, **QUICK), grads)
    assert relative_error(ours, theirs) < 1e-6


def test_parts_of_some_leaves_in_the_hybrid():
    axes = {"up": MatrixAxes(split_fan_out=(6, 5, 5))}
    trajectory = run(normuon(0.02, matrix_axes=axes))[0]
    split = lambda tree: tree | apart(tree["up"], axes["up"], [6], [6, 5, 5])  # noqa: E731
    params, *grads = ({k: v for k, v in split(t).items() if k != "up"} for t in (PARAMS, *GRADS))
    routing = [("bias|embed", "other"), (".", "muon")]
    expected = run(normuon(0.02, routing=routing), params, grads)[0]
    assert distance([split(way) for way in trajectory], expected, split(PARAMS)) < ROUNDING


# --- Old names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [muon, normuon, functools.partial(hybrid, scale_by_muon)])
def test_an_old_name_works_and_tells_the_new_one(make):
    with pytest.warns(DeprecationWarning, match="'rest' is now called 'other_optimizer'"):
        old = make(0.02, rest="sgd", other_b1=0.5)
    new = make(0.02, other_optimizer="sgd", other_b1=0.5)
    assert distance(run(old)[0], run(new)[0]) == 0
    with pytest.raises(TypeError, match="'other_optimizer' without its old name 'rest'"):
        make(0.02, rest="sgd", other_optimizer="sgd")


def test_adam_s_names_work_for_sgd_with_a_warning():
    words = "With other_optimizer='sgd', 'adam_b1' is now called 'other_b1'"
    with pytest.warns(DeprecationWarning, match=words):
        old = muon(0.02, other_optimizer="sgd", adam_b1=0.5)
    assert distance(run(old)[0], run(muon(0.02, other_optimizer="sgd", other_b1=0.5))[0]) == 0
    with pytest.raises(ValueError, match="Remove other_b1, or"):
        muon(0.02, other_b1=0.5)


def test_the_old_names_of_parts_work_with_a_warning():
    for old, new in (("fan_in_parts", "split_fan_in"), ("fan_out_parts", "split_fan_out")):
        with pytest.warns(DeprecationWarning, match=f"'{old}' is now called '{new}'") as caught:
            axes = MatrixAxes(-1, **{old: 3})
        assert axes == MatrixAxes(-1, **{new: 3}) and caught[0].filename == __file__
        with pytest.warns(DeprecationWarning, match=f"MatrixAxes: '{old}' is now"):
            assert getattr(axes, old) == 3
        with pytest.raises(TypeError, match=f"'{new}' without its old name '{old}'"):
            MatrixAxes(**{old: 3, new: 3})
