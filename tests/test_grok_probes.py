"""What the grokking study measures inside its models, and the figures of it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.grok import probes, report_probes, tasks
from experiments.grok.config import Cell
from experiments.grok.report_data import Run

WIDTH = 32


def params_of(embedding, key=0):
    """Params named as the model's, with 97 + 2 embeddings of which the numbers' are given."""
    keys = jax.random.split(jax.random.key(key), 4)
    table = jnp.concatenate([embedding, jnp.zeros((2, WIDTH))])
    block = {
        "attention": {"query": {"kernel": jax.random.normal(keys[0], (WIDTH, WIDTH))}},
        "attention_norm": {"scale": jnp.ones(WIDTH)},
        "feed_forward": {"down": {"kernel": jax.random.normal(keys[1], (4 * WIDTH, WIDTH))}},
    }
    return {
        "embedding": {"embedding": table},
        "blocks": [block],
        "norm": {"scale": jnp.ones(WIDTH)},
        "head": {"kernel": jax.random.normal(keys[2], (WIDTH, 99))},
    }


def random_embedding(seed=0):
    return jax.random.normal(jax.random.key(seed), (97, WIDTH))


def places(task):
    """By brute force: every row's two places on the circle and its answer's, None outside."""
    table = tasks.table(task)
    if task in ("add", "sub"):
        return [tuple(map(int, (*row[[0, 2]], c))) for row, c in zip(*table[:2], strict=True)]
    log = {pow(5, x, 97): x for x in range(96)}
    return [
        None if not row[0] or (task == "mul" and not row[2]) else (log[int(row[0])], log[int(c)])
        for row, c in zip(*table[:2], strict=True)
    ]


def wave_logits(task, frequencies, height=40.0):
    """Logits Σ cos(w_k (x - c)) of every row, x the answer's place and c an output's."""
    period = 97 if task in ("add", "sub") else 96
    at = np.array([-1 if place is None else place[-1] for place in places(task)])
    outputs = np.arange(97) if period == 97 else [pow(5, x, 97) for x in range(96)]
    logits = np.full((len(at), 99), -3.0 * height, np.float32)
    angle = 2 * np.pi * (at[:, None] - np.arange(period)) / period
    logits[:, outputs] = height * sum(np.cos(k * angle) for k in frequencies)
    return jnp.asarray(logits)


@functools.cache
def compiled(task, softmax):
    return jax.jit(functools.partial(probes.measure, task, softmax))


def measured(task, softmax="softmax", logits=None, params=None, seed=0):
    table = tasks.table(task)
    train = jnp.asarray(tasks.split(len(table.tokens), 0.5, seed).train)
    if logits is None:
        logits = jax.random.normal(jax.random.key(seed), (len(table.tokens), table.vocabulary))
    params = params_of(random_embedding(seed)) if params is None else params
    updates = jax.tree.map(lambda x: 0.5 * x, params)
    found = compiled(task, softmax)(params, updates, logits, train)
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.mark.parametrize("task", ["add", "mul", "exp", "gcd"])
def test_a_planted_wave_has_all_the_embeddings_power(task):
    period = 97 if task in ("add", "gcd") else 96
    residues = np.arange(97) if period == 97 else [pow(5, x, 97) for x in range(96)]
    phases = np.linspace(0, 3, WIDTH)
    embedding = np.zeros((97, WIDTH), np.float32)
    angle = 2 * np.pi * 7 * np.arange(period) / period
    embedding[residues] = 4 + np.cos(angle[:, None] + phases)
    found = measured(task, params=params_of(jnp.asarray(embedding)))
    assert found["embedding_power"].shape == (48,)
    assert found["embedding_power"][6] == pytest.approx(1, abs=1e-4)
    assert found["embedding_gini"] > 0.95 and found["embedding_ipr"] > 0.999
    # In the wrong order the wave is noise.
    if period == 96:
        assert found["natural_gini"] < 0.5
    else:
        assert "natural_gini" not in found


@pytest.mark.parametrize("task", ["add", "mul"])
def test_a_random_embedding_has_even_power(task):
    found = measured(task)
    assert found["embedding_power"].sum() == pytest.approx(1, abs=1e-5)
    assert found["embedding_gini"] < 0.12 and found["embedding_ipr"] < 0.03


def test_power_is_the_share_of_variance():
    """Each frequency's, and half the period's as well, whose sine is zero everywhere."""
    x = np.arange(96)
    waves = 3 * np.cos(2 * np.pi * 5 * x / 96) + np.cos(np.pi * x) + 11
    power = probes.embedding_power(jnp.asarray(waves[:, None], jnp.float32))
    variance = np.var(waves)
    assert power[4] == pytest.approx(4.5 / variance, rel=1e-4)
    assert power[47] == pytest.approx(1 / variance, rel=1e-4)


def test_gini_of_one_among_many_and_of_equals():
    assert probes.gini(jnp.eye(10)[3]) == pytest.approx(0.9)
    assert probes.gini(jnp.full(10, 3.0)) == pytest.approx(0, abs=1e-6)
    assert probes.gini(jnp.array([1.0, 3.0])) == pytest.approx(0.25)


@pytest.mark.parametrize("task", ["add", "mul", "exp"])
def test_planted_waves_are_found_and_carry_the_losses(task):
    logits = wave_logits(task, [3, 8, 19, 30, 41])
    noise = 15 * jax.random.normal(jax.random.key(1), logits.shape)
    found = measured(task, logits=logits + noise)
    assert found["key_frequencies"].tolist() == [3, 8, 19, 30, 41]
    assert found["restricted_loss"] < 1e-3 < found["train_loss"]
    assert found["excluded_loss"] > 15 and found["excluded_loss"] > 2 * found["train_loss"]
    assert found["logit_gini"] > 0.8 and found["logit_power"].sum() == pytest.approx(1, abs=1e-5)


def test_logits_without_waves_lose_nothing_by_their_exclusion():
    found = measured("mul")
    assert found["excluded_loss"] == pytest.approx(found["train_loss"], abs=0.05)
    # What restriction leaves says nothing but that 99 outputs are alike.
    assert found["restricted_loss"] == pytest.approx(np.log(99), abs=0.05)
    assert found["logit_gini"] < 0.2


def test_losses_are_of_the_rows_they_name():
    """Training and held-out rows apart; rows with a zero have no say in the excluded loss."""
    table, split = tasks.table("mul"), tasks.split(97 * 97, 0.5, 0)
    logits = np.zeros((97 * 97, 99), np.float32)
    logits[split.train, table.answers[split.train]] = 30
    zero = (table.tokens[:, [0, 2]] == 0).any(axis=1)
    found = measured("mul", logits=jnp.asarray(logits))
    assert found["train_loss"] < 1e-6
    assert found["validation_loss"] == pytest.approx(np.log(99), rel=1e-4)
    logits[zero] = -logits[zero]
    changed = measured("mul", logits=jnp.asarray(logits))
    assert changed["train_loss"] > 0.1
    assert changed["excluded_loss"] == pytest.approx(found["excluded_loss"], rel=1e-4)
    assert changed["restricted_loss"] == pytest.approx(found["restricted_loss"], rel=1e-4)


@pytest.mark.parametrize(("task", "sign"), [("add", 1), ("sub", -1)])
def test_losses_are_those_of_the_two_dimensional_transform(task, sign):
    """As the paper has it: projections on cos and sin of w_k (a ± b) over the whole grid."""
    logits = 3 * jax.random.normal(jax.random.key(3), (97 * 97, 99)) + wave_logits(task, [5], 1.0)
    found = measured(task, logits=logits)
    a, b = np.divmod(np.arange(97 * 97), 97)
    z, kept = np.asarray(logits, np.float64), 0
    for k in found["key_frequencies"]:
        for wave in (np.cos, np.sin):
            direction = wave(2 * np.pi * k * (a + sign * b) / 97)
            kept = kept + np.outer(direction, direction @ z) / (direction @ direction)
    train = tasks.split(97 * 97, 0.5, 0).train
    sample = train[:: -(-len(train) // probes.LOSS_ROWS)]

    def loss(z, rows):
        answers = tasks.table(task).answers[rows]
        return np.mean(np.logaddexp.reduce(z[rows], axis=1) - z[rows, answers])

    restricted = loss(kept + z.mean(axis=0), np.arange(97 * 97))
    assert found["restricted_loss"] == pytest.approx(restricted, rel=1e-4)
    assert found["excluded_loss"] == pytest.approx(loss(z - kept, sample), rel=1e-4)
    assert found["train_loss"] == pytest.approx(loss(z, sample), rel=1e-4)


@pytest.mark.parametrize("task", ["mul", "div", "exp"])
def test_circle_leaves_rows_with_a_zero_out_and_knows_the_others(task):
    own = probes.circle(task)
    expected = [-1 if place is None else place[-1] for place in places(task)]
    assert own.answers.tolist() == expected
    assert len(own.residues) == 96 and own.residues[:3].tolist() == [1, 5, 25]


@pytest.mark.parametrize(
    ("task", "missing"),
    [("gcd", ["restricted_loss", "logit_gini"]), ("parity", ["restricted_loss", "embedding_gini"])],
)
def test_tasks_lack_what_they_have_no_waves_for(task, missing):
    found = measured(task)
    assert not {*missing} & {*found}
    assert {"train_loss", "validation_loss", "weight_stable_rank", "norm_total"} <= {*found}


def test_ranks_and_singular_values_of_known_matrices():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (40, 90))
    values = np.geomspace(5, 0.5, 40)
    known = jnp.asarray(left * values @ right.T, jnp.float32)
    one, eye = jnp.outer(jnp.arange(1.0, 6), jnp.arange(1.0, 8)), 1e-25 * jnp.eye(16)
    found = jax.jit(probes.spectra)([eye, one, known, jnp.zeros((4, 4))])
    largest, *_, smallest = found["singular_values"]
    shares = values / values.sum()
    effective = np.exp(-(shares * np.log(shares)).sum())
    stable = (values**2).sum() / 25
    np.testing.assert_allclose(found["stable_rank"], [16, 1, stable, 0], rtol=1e-4)
    np.testing.assert_allclose(found["effective_rank"], [16, 1, effective, 0], rtol=3e-3)
    assert found["singular_values"].shape == (32,)
    np.testing.assert_allclose([largest, smallest], [5, 0.5], rtol=1e-3)


@pytest.mark.parametrize("softmax", ["softmax", "stablemax"])
def test_collapse_is_where_float32_absorbs_the_other_logits(softmax):
    apart, close = np.zeros((2, 3), np.float32)
    apart[0], close[0] = (1e9, 1e6) if softmax == "stablemax" else (18, 15)
    logits = jnp.asarray(np.stack([apart, close, close - 3, apart]))
    assert probes.collapsed(softmax, logits).tolist() == [True, False, False, True]


def test_share_of_collapse_is_of_training_rows_and_not_for_sparsemax():
    train = tasks.split(97 * 97, 0.5, 0).train
    logits = jnp.zeros((97 * 97, 99)).at[train[::4], 0].set(40.0)
    assert measured("mul", logits=logits)["collapse_share"] == pytest.approx(0.25, abs=1e-3)
    assert "collapse_share" not in measured("mul", "sparsemax", logits=logits)


def test_norms_and_updates_by_group():
    params = params_of(random_embedding())
    found = measured("parity", params=params)
    block = params["blocks"][0]
    hidden = [block["attention"]["query"]["kernel"], block["feed_forward"]["down"]["kernel"]]
    leaves = {
        "embedding": [params["embedding"]["embedding"]],
        "hidden": hidden,
        "head": [params["head"]["kernel"]],
        "gains": [jnp.ones(2 * WIDTH)],
    }
    for name, of in leaves.items():
        flat = np.concatenate([np.ravel(leaf) for leaf in of])
        assert found[f"norm_{name}"] == pytest.approx(np.linalg.norm(flat), rel=1e-4)
        rms = 0.5 * np.sqrt(np.mean(flat**2))
        assert found[f"update_rms_{name}"] == pytest.approx(rms, rel=1e-4)
    every = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    assert found["norm_total"] == pytest.approx(np.linalg.norm(every), rel=1e-4)
    np.testing.assert_allclose(found["update_stable_rank"], found["weight_stable_rank"], rtol=1e-3)


@pytest.mark.parametrize("softmax", ["softmax", "sparsemax"])
def test_seeds_side_by_side_are_measured_as_alone(softmax):
    table = tasks.table("mul")
    params = [params_of(random_embedding(seed), seed) for seed in range(2)]
    trains = [tasks.split(len(table.tokens), 0.5, seed).train for seed in range(2)]
    logits = 5 * jax.random.normal(jax.random.key(2), (2, len(table.tokens), 99))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *params)
    measure, rows = compiled("mul", softmax), jnp.asarray(np.stack(trains))
    together = jax.jit(jax.vmap(measure))(stacked, stacked, logits, rows)
    for i in range(2):
        alone = measure(params[i], params[i], logits[i], rows[i])
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][i], value, rtol=2e-3, atol=1e-6, err_msg=name)


def test_a_record_is_plain_json_even_of_what_is_not_finite():
    params = params_of(random_embedding())
    found = probes.record(measured("mul", params=params))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["key_frequencies"]) == probes.KEY_FREQUENCIES
    assert all(isinstance(k, int) for k in found["key_frequencies"])
    broken = jax.tree.map(lambda x: jnp.nan * x, params)
    diverged = probes.record(measured("mul", params=broken))
    json.dumps(diverged, allow_nan=False)
    assert diverged["norm_total"] is None and diverged["embedding_gini"] is None


def planted_run(task, epochs=(10, 20, 30), seeds=2, **changes):
    """A run whose looks inside are of random models, as the log has them."""
    found, rows = {}, []
    records = [probes.record(measured(task, seed=seed)) | changes for seed in range(seeds)]
    for optimizer in ("adamw", "muon"):
        for seed in range(seeds):
            cell, record = Cell(task, "softmax", optimizer, seed), records[seed]
            trace = [{"epoch": n} | ({"probe": record} if n in epochs else {}) for n in range(40)]
            found[cell] = trace
            rows.append(cell._asdict() | {"grok_epoch_sustained": 20 + seed if seed else None})
    return Run({}, "", {}, len(rows), rows, found)


def test_figures_show_every_measure_of_every_optimizer():
    looks = report_probes.figures(planted_run("mul", collapse_share=0.25))
    kinds = "measures", "spectra", "power"
    assert [look.name for look in looks] == [f"inside_1_{kind}" for kind in kinds]
    measures, spectra, power = (look.draw() for look in looks)
    assert [len(axes.lines) for axes in spectra.axes] == [2 * 3, 2 * 3]
    heights = [line.get_ydata() for axes in spectra.axes for line in axes.lines]
    assert all(y[0] == 1 and (np.diff(y) <= 0).all() for y in heights)
    titles = [axes.get_title(loc="left") for axes in measures.axes]
    assert titles == [measure.title for measure in report_probes.MEASURES]
    assert all(list(line.get_xdata()) for axes in measures.axes for line in axes.lines)
    *images, _ = power.axes
    assert [axes.get_title(loc="left") for axes in images] == [
        f"{name}, seed 0: {kind}" for name in ("AdamW", "Muon") for kind in ("embedding", "logits")
    ]
    assert all(len(axes.collections) == 1 for axes in images)
    assert images[0].collections[0].get_array().shape == (48, 3)
    assert looks[0].caption.startswith("mul · softmax: ")
    middle = np.mean([probes.record(measured("mul", seed=i))["logit_gini"] for i in range(2)])
    assert f"Gini of the logits AdamW {middle:.3g}, Muon {middle:.3g};" in looks[0].caption


@pytest.mark.parametrize(
    ("task", "axes", "images"), [("gcd", 4, 2), ("parity", 4, 0)], ids=["gcd", "parity"]
)
def test_figures_leave_out_what_a_task_has_not(task, axes, images):
    looks = report_probes.figures(planted_run(task, epochs=(10,), seeds=1))
    assert len(looks[0].draw().axes) == axes  # without an empty panel of collapse
    assert "No training example is in softmax collapse." in looks[0].caption
    assert len(looks) == (3 if images else 2)
    if images:
        assert len(looks[2].draw().axes) == images + 1


def test_no_looks_no_figures():
    cell = Cell("mul", "softmax", "adamw", 0)
    assert report_probes.figures(Run({}, "", {}, 1, [], {cell: [{"epoch": 1}]})) == []
