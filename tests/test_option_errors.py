"""Options of the whole family that are wrong, unknown, or of optax's: each is named."""

import inspect
import pydoc

import jax.numpy as jnp
import optax
import pytest

import muon_jax as mj


def update(tx, **others):
    tree = {"qkv": jnp.ones((6, 16))} | others
    return tx.update(tree, tx.init(tree), tree)


def cut(**parts):
    return update(mj.scale_by_muon(matrix_axes=mj.MatrixAxes(**parts)))


# What has a wrong value, or is of a wrong kind, and parts of its message.
VALUES = [
    (
        lambda: mj.muon(0.1, other_optimizer="adam"),
        "other_optimizer | adamw, sgd, lion, sign, frozen | 'adam'",
    ),
    (
        lambda: mj.normuon(0.1, other_optimizer=optax.sgd(0.1), adam_learning_rate=0.1),
        "other_optimizer | adam_learning_rate | its own settings",
    ),
    (
        lambda: mj.muon(0.1, other_optimizer=optax.sgd(0.1), adam_weight_decay=0.0),
        "other_optimizer | adam_weight_decay | its own settings",
    ),
    (
        lambda: mj.muon(0.1, other_optimizer="sgd", adam_b2=0.9, nu_dtype=jnp.float32),
        "other_optimizer='sgd' | other_b1 | Remove adam_b2, nu_dtype, or",
    ),
    (
        lambda: mj.normuon(0.1, other_optimizer="frozen", adam_learning_rate=0.1),
        "other_optimizer='frozen' | Remove adam_learning_rate, or",
    ),
    (lambda: mj.splus(0.1, adam_eps=1e-6), "other_optimizer='sign' | adam_eps"),
    (lambda: mj.dion(jnp.inf), "learning_rate | at least 0 | inf"),
    (lambda: mj.scale_by_muon(beta=jnp.float32(1.5)), "beta | less than 1"),
    (lambda: mj.muon(0.1, nu_dtype=jnp.int8), "nu_dtype | floating | int8"),
    (lambda: mj.muon(0.1, mu_dtype=jnp.int32), "mu_dtype | int8 | int32"),
    (lambda: mj.scale_by_normuon(mu_dtype=jnp.complex64), "mu_dtype | complex64"),
    (lambda: mj.adamuon(0.1, momentum="nag"), "'nag' | heavy_ball"),
    (lambda: mj.scale_by_adamuon(scale="rms"), "'rms' | match_rms_adamw"),
    (
        lambda: mj.muonbp(0.1, orthogonalizer=mj.TruncatedPolar(2), ns_steps=3),
        "orthogonalizer | ns_steps",
    ),
    (lambda: cut(split_fan_out=5), "Axis 1 | (6, 16) | 5 equal parts"),
    (lambda: cut(split_fan_in=0), "positive | got 0 | axis 0 | (6, 16)"),
    (lambda: cut(split_fan_out=(8, 4)), "(8, 4) | add up to 12 | (6, 16) | 16"),
    (lambda: cut(split_fan_out=()), "positive | got () | axis 1 | (6, 16)"),
    (lambda: cut(split_fan_out=(16, 0)), "(16, 0)"),
    (lambda: update(mj.scale_by_muonbp(blocks=(4, 1))), "Axis 0 | (6, 16) | 4"),
    (lambda: mj.low_rank(0.1, 0), "rank | at least 1 | 0"),
    (lambda: mj.TruncatedPolar(-2), "rank | -2"),
    (lambda: mj.TruncatedPolar(1.5), "rank | (0, 1] | 1.5"),
    (lambda: mj.low_rank(0.1, 2, method="qr"), "method | svd | subspace | 'qr'"),
    (lambda: mj.dion(0.1, rank=0), "rank | at least 1 | 0"),
    (lambda: mj.splus(0.1, every=0), "every | at least 1 | 0"),
    (lambda: mj.scale_by_lmo(mj.Ball("nuclear")), "'nuclear' | spectral | row_norm"),
    (lambda: mj.scion(0.1, balls=[("", mj.Ball("nuclear"))]), "'nuclear'"),
    (lambda: mj.scion(0.1, constrained=True, weight_decay=0.1), "constrained | weight_decay | 0.1"),
    (lambda: update(mj.scion(0.1, balls=[("kqv", mj.Ball())])), "'kqv' | no leaf"),
    (lambda: update(mj.gluon(smoothness=[("kqv", (0.0, 1.0))])), "'kqv' | no leaf"),
    (
        lambda: update(mj.gluon(smoothness=[("embed", (0.0, 1.0))]), embed=jnp.ones((9, 6))),
        "smoothness | 'qkv'",
    ),
    (lambda: mj.gluon(smoothness=(-1.0, 1.0)), "L0 of smoothness | -1"),
    (lambda: mj.gluon(smoothness=(0.0, 0.0)), "L0 or L1 | greater than 0"),
    (lambda: mj.gluon(smoothness=(1.0,)), "(L0, L1)"),
    (lambda: mj.gluon(smoothness=()), "(L0, L1)"),
    (lambda: mj.TruncatedPolar(2, "subspace", 0), "iterations | at least 1 | 0"),
]
KINDS = [
    (lambda: mj.muon(None), "learning_rate must be a number or a schedule; got None"),
    (lambda: mj.muon(0.1, weight_decay="0.1"), "weight_decay | '0.1'"),
    (
        lambda: mj.muon(0.1, other_optimizer=optax.adamw),
        "other_optimizer must be one of adamw | got adamw | with its learning rate",
    ),
    (
        lambda: mj.hybrid(mj.scale_by_muon(), 0.1),
        "scale_by must be a function | muon_jax.scale_by_muon | Pass the function",
    ),
    (lambda: mj.muon(0.1, mesh="x"), "mesh must be a jax.sharding.Mesh | 'x'"),
    (lambda: mj.scale_by_muon(mesh="x"), "mesh must be a jax.sharding.Mesh | 'x'"),
    (lambda: mj.muon(0.1, mu_dtype="x"), "mu_dtype must be real floating | 'x'"),
    (lambda: mj.muon(0.1, nu_dtype=3.0), "nu_dtype must be real floating | 3.0"),
    (
        lambda: mj.muon(0.1, cautious_weight_decay=jnp.asarray(True)),
        "cautious_weight_decay | static",
    ),
    (lambda: mj.muon(0.1, eps=1e-8), "muon | adam_eps | muon_jax.optax_muon"),
    (lambda: mj.muon(0.1, adaptive=True), "'adaptive' | muon_jax.optax_muon"),
    (lambda: mj.normuon(0.1, preconditioning="aol"), "normuon | ns_coeffs | muon_jax.optax_muon"),
    (lambda: mj.muon(0.1, consistent_rms=0.2), "match_rms_adamw | muon_jax.optax_muon"),
    (
        lambda: mj.muon(0.1, muon_weight_dimension_numbers=None),
        "matrix_axes | routing | muon_jax.optax_muon",
    ),
    (
        lambda: mj.muon(0.02, "jordan"),
        "only learning_rate | 'jordan' | ns_coeffs | muon_jax.optax_muon",
    ),
]
CASES = [((TypeError, ValueError), *case) for case in VALUES] + [(TypeError, *x) for x in KINDS]


@pytest.mark.parametrize("error, build, parts", CASES, ids=[case[2] for case in CASES])
def test_what_is_wrong_is_named(error, build, parts):
    with pytest.raises(error) as raised:
        build()
    assert [part for part in parts.split(" | ") if part not in str(raised.value)] == []


@pytest.mark.parametrize(
    "name, value, bound",
    [
        ("learning_rate", float("nan"), "at least 0"),
        ("learning_rate", -0.1, "at least 0"),
        ("weight_decay", -1, "at least 0"),
        ("beta", 1.0, "less than 1"),
        ("adam_b1", -0.1, "at least 0"),
        ("adam_b2", 1.0, "less than 1"),
        ("adam_eps", -1e-8, "at least 0"),
        ("adam_eps_root", -1.0, "at least 0"),
        ("adam_learning_rate", -1.0, "at least 0"),
        ("adam_weight_decay", float("inf"), "at least 0"),
        ("chunk_size", 0, "at least 1"),
        ("period", 0, "at least 1"),
        ("period", 2.5, "integer"),
    ],
)
def test_a_number_out_of_bounds_is_named_with_its_bound(name, value, bound):
    with pytest.raises((TypeError, ValueError)) as raised:
        mj.muonbp(**{"learning_rate": 0.1} | {name: value})
    assert [word for word in (name, bound, str(value)) if word not in str(raised.value)] == []


def test_help_shows_every_argument():
    shown = pydoc.plain(pydoc.render_doc(mj.muon)).split("\n\n")[1]  # on one line up to Python 3.12
    shown = shown[: shown.index("->")]
    for name in inspect.signature(mj.hybrid).parameters:
        assert name == "scale_by" or f"{name}:" in shown
    assert "**" not in shown and "beta: " in shown and "ns_coeffs" in shown


FAMILY = (
    "muon normuon adamuon muonbp low_rank dion splus scion gluon hybrid muonh muon_eq muon_plus "
    "muon_squared namo polargrad aurora soap soap_muon muown dion2 dion3 muon_sphere spel "
    "scale_by_muon scale_by_normuon scale_by_adamuon scale_by_muonbp scale_by_dion scale_by_splus "
    "scale_by_lmo scale_by_dion2"
)


@pytest.mark.parametrize("name", FAMILY.split())
def test_an_unknown_option_is_named_and_the_known_ones_are_in_the_signature(name):
    function = getattr(mj, name)
    required = {"learning_rate": 0.1, "rank": 2, "scale_by": mj.scale_by_muon}
    required["smoothness"] = (0.0, 1.0)
    parameters = inspect.signature(function).parameters
    given = {key: value for key, value in required.items() if key in parameters}
    function(**given)
    with pytest.raises(TypeError, match=rf"{name}.*'weight_decai'"):
        function(**given, weight_decai=0.1)
    assert not any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    assert {"mesh", "shardings", "chunk_size", "matrix_axes", "mu_dtype"} <= set(parameters)


@pytest.mark.parametrize("option", ["orthogonalizer", "ns_coeffs", "ns_steps", "ns_dtype"])
def test_low_rank_has_its_own_orthogonalizer(option):
    with pytest.raises(TypeError, match=f"low_rank.*'{option}'"):
        mj.low_rank(0.1, 2, **{option: None})
