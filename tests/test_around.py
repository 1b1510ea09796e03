"""What stands around an optimizer: outer steps, looks ahead, averages, schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_variants
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from trajectories import (
    GRADS,
    PARAMS,
    ROUNDING,
    assert_same_bits,
    distance,
    of_leaves,
    run,
    with_adamw,
)

from experiments.compiled import measure
from muon_jax import (
    evaluation_average,
    evaluation_params,
    lookahead,
    lookahead_params,
    muloco,
    muon,
)

# --- Schedules and averages ------------------------------------------------------------------


def test_a_schedule_of_the_momentum():
    """Two phases, told apart by what numbers would do in each."""
    betas = [0.5] * 4 + [0.9] * 6
    settings = {"learning_rate": 0.02, "nesterov": False}

    def reference(w, grads, **settings):
        mu, way = np.zeros(w.shape), []

        def step(g, t):
            nonlocal mu
            mu = betas[t] * mu + (1 - betas[t]) * np.asarray(g, np.float64)
            return mu

        average = [step(g, t) for t, g in enumerate(grads)]
        way = reference_variants.muonbp(
            w, average, blocks=(1, 1), period=1, scale="spectral", **settings | {"beta": 0.0}
        )
        return way

    expected = with_adamw(of_leaves(reference, **settings), learning_rate=0.02)
    tx = muon(beta=lambda count: jnp.where(count < 4, 0.5, 0.9), **settings)
    assert distance(run(tx, jit=True)[0], expected) < ROUNDING


def test_an_average_at_the_end_of_any_chain():
    tx = optax.chain(muon(0.02), optax.chain(evaluation_average(0.8)))
    trajectory, state = run(tx)
    assert_same_bits(trajectory, run(muon(0.02))[0])
    weights = 0.8 ** np.arange(len(GRADS))[::-1]
    mean = {n: np.average([t[n] for t in trajectory], axis=0, weights=weights) for n in PARAMS}
    last = trajectory[-1]
    assert distance([evaluation_params(state, last)], [mean]) < ROUNDING
    mixed = evaluation_params(state, last, share=0.25)
    part = {name: 0.25 * mean[name] + 0.75 * last[name] for name in last}
    assert distance([mixed], [part]) < ROUNDING
    half = {name: jnp.asarray(w, jnp.bfloat16) for name, w in PARAMS.items()}
    before = evaluation_params(tx.init(half), half)
    assert_same_bits([before], [half])
    assert before["up"].dtype == jnp.bfloat16


# --- Looks ahead -----------------------------------------------------------------------------


def test_ten_looks_ahead():
    """Of SGD on a quadratic, as modded-nanogpt's wrapper does it."""
    factor, decay, rate = [0.0, 0.5] * 5, 0.8, 0.1
    w = np.float64(PARAMS["up"])
    mean = np.zeros(w.shape)
    ours, tx = (
        {"up": jnp.asarray(PARAMS["up"])},
        optax.chain(optax.sgd(rate), lookahead(lambda count: 0.5 * (count % 2), decay=decay)),
    )
    state = tx.init(ours)
    for f in factor:
        ahead = w + f * mean
        new = ahead - rate * ahead
        mean, w = decay * mean + (1 - decay) * (new - w), new
        there = lookahead_params(state, ours)
        updates, state = tx.update(there, state, there)
        ours = optax.apply_updates(there, updates)
    np.testing.assert_allclose(ours["up"], w, rtol=1e-5)


# --- MuLoCo ----------------------------------------------------------------------------------

outer = {"every": 3, "learning_rate": 0.7, "momentum": 0.6}


def reference_muloco(params, gradients, rate):
    """Algorithm 1 with SGD within: `gradients[step][worker]`."""
    workers = [np.float64(params) for _ in gradients[0]]
    anchor, velocity = np.float64(params), np.zeros(np.shape(params))
    for step, of_workers in enumerate(gradients, start=1):
        workers = [w - rate * g for w, g in zip(workers, of_workers, strict=True)]
        if step % outer["every"] == 0:
            delta = anchor - np.mean(workers, axis=0)
            velocity = outer["momentum"] * velocity + outer["learning_rate"] * delta
            anchor = anchor - outer["momentum"] * velocity - outer["learning_rate"] * delta
            workers = [anchor] * len(workers)
    return np.stack(workers)


def test_ten_steps_of_muloco():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(4, 8)), rng.normal(size=(10, 5, 4, 8))
    tx = muloco(optax.sgd(0.1), axis_name="workers", **outer)
    params = jnp.broadcast_to(jnp.float32(start), (5, 4, 8))
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(tx.update, axis_name="workers"))
    for g in gradients:
        updates, state = step(jnp.float32(g), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, reference_muloco(start, gradients, 0.1), atol=1e-5)


def test_one_worker_whose_outer_step_is_whole_is_the_optimizer_itself():
    plain, _ = run(muon(0.02))
    wrapped, _ = run(muloco(muon(0.02), every=2, learning_rate=1.0, momentum=0.0))
    assert distance(wrapped, plain) < ROUNDING


def of_each_pod(function, mesh, arguments):
    """Over arrays with a leading axis of pods, which each pod has one entry of."""

    def one(*trees):
        mine = jax.tree.map(lambda x: x[0], trees)
        return jax.tree.map(lambda x: x[None], function(*mine))

    return jax.jit(
        jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(P("pod"),) * arguments,
            out_specs=P("pod"),
            axis_names={"pod"},
            check_vma=False,
        )
    )


def test_workers_exchange_params_and_nothing_else():
    """Of a mesh of two pods: what crosses it in an outer step, and that nothing does in others."""
    mesh = mesh_of("Auto", pod=2, fsdp=4)
    where = NamedSharding(mesh, P("pod", None, "fsdp"))
    params = {"kernel": jax.device_put(np.ones((2, 8, 64, 128), np.float32), where)}
    inner = functools.partial(muon, 0.02, ns_steps=1, routing=lambda path, x: "muon")

    def cost(tx):
        with jax.set_mesh(mesh):
            state = of_each_pod(tx.init, mesh, 1)(params)
            state = jax.tree.map(lambda x: jax.device_put(x, where) if x.ndim == 4 else x, state)
            update = of_each_pod(tx.update, mesh, 3)
            return measure(update.lower(params, state, params).compile()).collectives

    alone, joined = cost(inner()), cost(muloco(inner(), axis_name="pod", **outer))
    average = joined.pop("all-reduce")
    # The params that a device holds, in float32, in the branch of one step in three.
    assert (average.count, average.output_bytes) == (1, 4 * 8 * 16 * 128)
    assert joined == alone  # within a pod


def without_params(tx):
    return lambda: tx.update(PARAMS, tx.init(PARAMS))


AVERAGES = evaluation_average()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: muloco(muon(0.1), every=0), "every must be"),
        (lambda: muloco(muon(0.1), momentum=1.0), "momentum must be"),
        (lambda: lookahead(-1.0), "factor must be"),
        (without_params(muloco(muon(0.1))), "muloco needs the params"),
        (without_params(AVERAGES), "evaluation_average needs the params"),
        (lambda: evaluation_params(muon(0.1).init(PARAMS), PARAMS), "0 averages"),
        (lambda: evaluation_params([AVERAGES.init(PARAMS)] * 2, PARAMS), "2 averages"),
        (lambda: evaluation_params(AVERAGES.init(PARAMS), PARAMS, share=2.0), "share must be"),
        (lambda: lookahead_params(muon(0.1).init(PARAMS), PARAMS), "has 0 look-ahead states"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
