"""Decay masks and matrix axes: every form in which they may be given, and the errors of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muon_jax
from muon_jax import MatrixAxes

PARAMS = {
    "embed": jnp.ones((50, 4)),
    "head": jnp.ones((4, 50)),
    "layers": [{"kernel": jnp.ones((4, 4)), "bias": jnp.ones((2, 2))} for _ in range(2)],
    "norm": {"scale": jnp.ones(4)},
}
LIST = [PARAMS["layers"][0]["kernel"], PARAMS["norm"]["scale"]]
EVERYTHING = {
    "embed",
    "head",
    "layers/0/bias",
    "layers/0/kernel",
    "layers/1/bias",
    "layers/1/kernel",
    "norm/scale",
}
MATRICES = {"layers/0/kernel", "layers/1/kernel"}
OPTIMIZERS = {
    "muon": lambda mask: muon_jax.muon(1.0, weight_decay=1.0, weight_decay_mask=mask, ns_steps=1),
    "scion": lambda mask: muon_jax.gluon(
        1.0, smoothness=(1.0, 1.0), weight_decay=1.0, weight_decay_mask=mask, ns_steps=1
    ),
}


def decayed(mask, params=PARAMS, name="muon"):
    """The leaves that move without a gradient."""
    tx = OPTIMIZERS[name](mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, u in leaves if u.any()}


MASKS = {
    "none": (None, EVERYTHING),
    "all": (True, EVERYTHING),
    "nothing": (np.bool_(False), set()),
    "an array": (jnp.array(False), set()),
    "matrices": ("matrices", MATRICES),
    "a prefix": (
        {"embed": False, "head": np.array(True), "layers": True, "norm": False},
        EVERYTHING - {"embed", "norm/scale"},
    ),
    "a callable": (
        lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        EVERYTHING - {"norm/scale"},
    ),
    "a callable that gives a prefix": (lambda tree: dict.fromkeys(tree, False), set()),
    "rules": ([("bias$", False), ("norm|head", False)], MATRICES | {"embed"}),
    "rules that leave some out": (
        [("layers/0/kernel", True), ("", jnp.array(False))],
        {"layers/0/kernel"},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mask", MASKS)
def test_decayed_leaves(mask, name):
    given, expected = MASKS[mask]
    assert decayed(given, name=name) == expected


def test_a_list_is_a_mask_of_a_list_and_else_rules():
    assert decayed([True, False], LIST) == {"0"}
    assert decayed([("1", False)], LIST) == {"0"}


def test_matrices_follow_the_routing():
    routing = {"embed": "muon", "head": "frozen", "layers": "other", "norm": "other"}
    tx = muon_jax.muon(
        1.0, weight_decay=1.0, weight_decay_mask="matrices", routing=routing, ns_steps=1
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert [bool(u.any()) for u in jax.tree.leaves(updates)] == [True] + 6 * [False]


WRONG_MASKS = {
    "a word": ("matrix", ['"matrices"', "'matrix'"]),
    "a number": (1, ["True or False", "got 1."]),
    "a list of bools for a dict": (
        [True, False],
        ["weight_decay_mask[0]", "(regex, bool)", "True"],
    ),
    "a bare pair": (("bias", False), ["weight_decay_mask[0]", "'bias'"]),
    "a rule without a bool": ([("bias", "no")], ["weight_decay_mask[0]", "'no'"]),
    "a bad regex": ([("bias(", False)], ["'bias('", "regular expression"]),
    "a rule that decides nothing": ([("layers", True), ("bias", False)], ["'bias'", "'layers'"]),
    "too few": ({"embed": False}, ["weight_decay_mask", "no entry for leaf 'head'", "pairs"]),
    "too many": (
        {"embed": False, "head": False, "layers": False, "norm": False, "nrom": True},
        ["'nrom'", "no leaf", "norm/scale"],
    ),
    "no bool": (
        {
            "embed": False,
            "head": False,
            "layers": [{"kernel": 1, "bias": True}, True],
            "norm": True,
        },
        ["True or False", "got 1 at 'layers/0/kernel'"],
    ),
    "an array of bools": (
        lambda tree: jax.tree.map(lambda x: x > 0, tree),
        ["result of the callable weight_decay_mask", "True or False", "'embed'"],
    ),
    "a callable of junk": (lambda tree: "matrices", ["callable weight_decay_mask", "'matrices'"]),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_errors_of_masks(name):
    mask, words = WRONG_MASKS[name]
    with pytest.raises(ValueError) as raised:
        OPTIMIZERS["muon"](mask).init(PARAMS)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_callable_that_raises_says_which_it_is():
    with pytest.raises(TypeError) as raised:
        OPTIMIZERS["muon"](lambda: True).init(PARAMS)
    assert raised.value.__notes__ == ["This comes from the callable weight_decay_mask."]


KERNEL = "'layers/0/kernel'"
WRONG_AXES = {
    "a number": (3, ["matrix_axes", "MatrixAxes", "got 3"]),
    "a list": ([0, 1], ["matrix_axes", "MatrixAxes", "got 0 at '0'"]),
    "a word": ({"layers": "-1"}, ["matrix_axes", "MatrixAxes", "'-1' at 'layers'"]),
    "a callable of junk": (lambda tree: (0, 1), ["result of the callable matrix_axes", "got 0"]),
    "no leaf": ({"layer": MatrixAxes()}, ["matrix_axes", "'layer'", "no leaf"]),
    "out of range": (MatrixAxes(0, 2), [KERNEL, "(4, 4)", "does not fit"]),
    "no axis": ({"layers": MatrixAxes(0, ())}, [KERNEL, "does not fit"]),
    "twice": ({"layers": [MatrixAxes(0, -2), None]}, [KERNEL, "twice"]),
    "parts": (MatrixAxes(split_fan_out=3), [KERNEL, "3 equal parts"]),
    "sizes": (lambda tree: MatrixAxes(split_fan_in=(1, 2)), [KERNEL, "add up to 3", "(4, 4)"]),
}


@pytest.mark.parametrize("name", WRONG_AXES)
def test_errors_of_axes_come_at_init(name):
    axes, words = WRONG_AXES[name]
    with pytest.raises(ValueError) as raised:
        muon_jax.muon(1.0, matrix_axes=axes).init(PARAMS)
    assert [word for word in words if word not in str(raised.value)] == []
    with pytest.raises(ValueError) as raised:
        muon_jax.plan(PARAMS, matrix_axes=axes)
    assert [word for word in words if word not in str(raised.value)] == []


def test_axes_of_scale_by_muon_are_refused_with_the_path():
    params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
    for axes, words in [
        (MatrixAxes(0, 2), "'down': .*does not fit"),
        ({"up": MatrixAxes(split_fan_out=4), "down": MatrixAxes()}, "'up': .*4 equal parts"),
        ({"up": MatrixAxes()}, "no entry for leaf 'down'"),
        (1, "must have muon_jax.MatrixAxes"),
    ]:
        tx = muon_jax.scale_by_muon(matrix_axes=axes)
        with pytest.raises(ValueError, match=words):
            tx.update(params, tx.init(params))


def test_axes_for_everything_are_those_of_the_matrices():
    """A prefix may cover leaves that it does not fit, where they are no matrices."""
    tx = muon_jax.muon(1.0, matrix_axes=MatrixAxes(-1, -2, split_fan_out=2), ns_steps=1)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_shardings_of_another_kind_are_refused_with_the_path():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = {"kernel": jnp.ones((4, 4))}
    tx = muon_jax.muon(1.0, mesh=mesh, shardings={"kernel": "x"}, ns_steps=1)
    with pytest.raises(ValueError, match=r"shardings must have NamedSharding.*'x' at 'kernel'"):
        tx.update(kernel, tx.init(kernel), kernel)
