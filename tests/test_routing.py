"""Which leaf goes where: 40 published families, live models, overrides, errors and the table."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import FAMILIES
from trees.text import spelled

from muon_jax import MatrixAxes, label_params, routing_table
from muon_jax._routing.rules import route


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def nested(shapes):
    """`{"a/b": shape}` as nested dicts."""
    tree = {}
    for path, shape in shapes.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = struct(*shape)
    return tree


def routes_by_path(params, rules=None):
    return {leaf.path: leaf for leaf in route(params, rules).values()}


def matrices(params, rules=None):
    """The roles of the axes of the Muon leaves, by path."""
    routes = routes_by_path(params, rules).items()
    return {path: spelled(leaf) for path, leaf in routes if leaf.label == "muon"}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_families(family):
    leaves = {path.removesuffix("/value"): rest for path, *rest in FAMILIES[family]}
    found = routes_by_path(nested({path: shape for path, (shape, _) in leaves.items()}))
    assert set(found) == set(leaves)
    wrong = {}
    for path, (shape, roles) in leaves.items():
        accepted = {roles, roles[::-1] if len(set(shape)) == 1 else roles}  # a square's transpose
        if spelled(found[path]) not in accepted:
            wrong[path] = shape, roles, spelled(found[path])
    assert wrong == {}


# --- Live models -----------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=rngs, decode=False)
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.down = nnx.Linear(32, 8, use_bias=False, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        stack = nnx.split_rngs(splits=5)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
        self.embed = nnx.Embed(50, 8, rngs=rngs)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.first = NnxBlock(rngs)
        self.layers = stack(rngs)
        self.lora = nnx.LoRA(8, 2, 8, rngs=rngs)
        self.final = nnx.LayerNorm(8, rngs=rngs)
        self.lm_head = nnx.Linear(8, 50, rngs=rngs)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "tp"))
        h = nn.LayerNorm()(x)
        h = nn.MultiHeadDotProductAttention(2)(h, h)
        h = nn.Dense(32, kernel_init=init, name="up")(h)
        return x + nn.Dense(8, use_bias=False, name="down")(h), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens, image):
        x = nn.Embed(50, 8)(tokens) + nn.Conv(8, (3, 3))(image).mean((1, 2))[:, None]
        x, _ = LinenBlock(name="first")(x)
        scanned = nn.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=5,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scanned(name="layers")(x, None)
        return nn.Dense(50, name="lm_head")(x)


def nnx_params():
    return nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), nnx.Param)


def linen_params():
    tokens, image = jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4, 4, 3))
    return jax.eval_shape(LinenModel().init, jax.random.key(0), tokens, image)["params"]


def equinox_params(stacked=False):
    make = lambda key: eqx.nn.MLP(4, 3, 16, 2, key=key)  # noqa: E731
    model = eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), 5)) if stacked else None
    return eqx.filter(model or make(jax.random.key(0)), eqx.is_array)


def blocks(attn):
    block = dict.fromkeys((f"{attn}/query", f"{attn}/key", f"{attn}/value"), "ioo")
    return block | {f"{attn}/out": "iio", "up": "io", "down": "io"}


def both_blocks(attn):
    first = {f"first/{path}/kernel": roles for path, roles in blocks(attn).items()}
    return first | {f"layers/{path}/kernel": f"b{roles}" for path, roles in blocks(attn).items()}


LIVE = {
    "nnx": (nnx_params, both_blocks("attn") | {"lora/lora_a": "io", "lora/lora_b": "io"}),
    "linen": (linen_params, both_blocks("MultiHeadDotProductAttention_0")),
    "equinox": (equinox_params, {"layers/1/weight": "oi"}),
    "equinox stack": (lambda: equinox_params(stacked=True), {"layers/1/weight": "boi"}),
    "scanned stack alone": (
        lambda: nnx.to_pure_dict(nnx_params())["layers"],
        {f"{path}/kernel": f"b{roles}" for path, roles in blocks("attn").items()},
    ),
}


@pytest.mark.parametrize("name", LIVE)
def test_live_models(name):
    make, expected = LIVE[name]
    params = make()
    assert matrices(params) == expected
    assert {leaf.label for leaf in route(params).values()} == {"muon", "other"}
    # Nothing names the first and the last matrix of an MLP.
    assert routing_table(params).count("ambiguous") == 2 * name.startswith("equinox")


@pytest.mark.parametrize("name", LIVE)
def test_labels_are_a_tree_and_a_routing(name):
    params = LIVE[name][0]()
    labels = label_params(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    frozen = jax.tree.map(lambda label: "frozen" if label == "other" else label, labels)
    assert jax.tree.leaves(label_params(params, labels)) == jax.tree.leaves(labels)
    assert jax.tree.leaves(label_params(params, frozen)) == jax.tree.leaves(frozen)
    assert matrices(params, labels) == matrices(params)


# --- Shapes that mislead ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "path,shape,label,doubt",
    [
        ("query/kernel", (5, 16, 16), "muon", "could be a stack of 2-D kernels"),
        ("mystery", (16, 24), "muon", "could be an embedding or a head"),
        ("mystery", (500, 16), "other", "could be a hidden matrix"),
        ("up/kernel", (5, 16, 64), "muon", "leading axes are assumed to be a stack"),
        ("patches/kernel", (2, 3, 6, 8), "muon", "could be a stack of matrices"),
    ],
)
def test_ambiguous_shapes_are_said_to_be(path, shape, label, doubt):
    params = nested({path: shape, "head/bias": (3,)})
    assert routes_by_path(params)[path].label == label
    warnings = re.findall(r"^ambiguous: (.*)$", routing_table(params), re.MULTILINE)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{path} {shape}: ") and doubt in warnings[0]


# --- Overrides -------------------------------------------------------------------------------

PARAMS = nested({"embed": (50, 8), "mlp/kernel": (8, 8), "mlp/bias": (8,), "out/kernel": (2, 4, 8)})
BUILT_IN = {"embed": "other", "mlp/bias": "other", "mlp/kernel": "muon", "out/kernel": "muon"}
MLP = {"kernel": "other", "bias": "frozen"}
WHOLE = {"embed": "frozen", "mlp": MLP, "out": {"kernel": "muon"}}


@pytest.mark.parametrize(
    "rules,changed",
    [
        (None, {}),
        ([], {}),
        ({}, {}),
        ([("mlp/kernel", "other")], {"mlp/kernel": "other"}),
        (
            [("kernel$", "other"), ("^embed", "muon")],
            {"embed": "muon", "mlp/kernel": "other", "out/kernel": "other"},
        ),
        ([("mlp/k", "frozen"), ("mlp", "other")], {"mlp/kernel": "frozen", "mlp/bias": "other"}),
        (
            [(re.compile("MLP", re.IGNORECASE), "frozen")],
            {"mlp/kernel": "frozen", "mlp/bias": "frozen"},
        ),
        ([["embed|out", "frozen"]], {"embed": "frozen", "out/kernel": "frozen"}),
        ((("^embed$", "muon"),), {"embed": "muon"}),
        ([("embed", MatrixAxes())], {"embed": "muon"}),
        (lambda path, leaf: "frozen" if leaf.ndim == 3 else None, {"out/kernel": "frozen"}),
        ([("mlp/kernel", "adamw")], {"mlp/kernel": "other"}),  # an old name
        (lambda path, leaf: "other" if "mlp" in path else None, {"mlp/kernel": "other"}),
        (WHOLE, {"embed": "frozen", "mlp/kernel": "other", "mlp/bias": "frozen"}),
        (
            {"embed": "other", "mlp": "other", "out": MatrixAxes((0, 1), 2)},
            {"mlp/kernel": "other"},
        ),
    ],
)
def test_overrides(rules, changed):
    expected = BUILT_IN | changed
    found = routes_by_path(PARAMS, rules)
    assert {path: leaf.label for path, leaf in found.items()} == expected
    assert all(leaf.axes is not None for leaf in found.values() if leaf.label == "muon")
    reasons = {path: leaf.why for path, leaf in routes_by_path(PARAMS).items()}
    for path in changed:
        assert found[path].why != reasons[path]


@pytest.mark.parametrize(
    "axes", [MatrixAxes(0, (1, 2)), optax.contrib.MuonDimensionNumbers(0, (1, 2))]
)
def test_axes_as_a_choice_send_the_leaf_to_muon_along_them(axes):
    assert matrices(PARAMS)["out/kernel"] == "iio?"
    assert matrices(PARAMS, [("out", axes)])["out/kernel"] == "ioo"
    tree = {"embed": "other", "mlp": "other", "out": axes}
    assert matrices(PARAMS, tree) == {"out/kernel": "ioo"}


SCALARS = {"scalar": 1.0, "flag": struct(dtype=bool), "empty": struct(0, 8)}
INTEGER = {"mlp": {"kernel": struct(8, 8)}, "steps": struct(3, dtype=jnp.int32)}


@pytest.mark.parametrize(
    "params,rules,words",
    [
        (PARAMS, [("mpl", "other")], ["'mpl'", "no leaf", "mlp/kernel", "out/kernel"]),
        (PARAMS, {"mlp": "other", "head": "other"}, ["'head'", "no leaf", "mlp/kernel", "pairs"]),
        (PARAMS, {"mlp": "other"}, ["no entry for leaf 'embed'", "pairs"]),
        (PARAMS, {"embed|out": "frozen"}, ["'embed|out'", "no leaf", "[('head', 'other')]"]),
        (PARAMS, WHOLE | {"embed": 3}, ["got 3 at 'embed'", "muon, other, frozen"]),
        (PARAMS, [("mlp(", "other")], ["'mlp('", "regular expression", "unterminated"]),
        (
            PARAMS,
            [("bias", "other"), ("mlp/k", "other"), ("mlp", "muon")],
            ["'mlp' decides no", "rule 'bias' and rule 'mlp/k'"],
        ),
        (PARAMS, ("mlp", "other"), ["routing[0]", "(regex, choice)", "'mlp'"]),
        (PARAMS, [("embed", "other"), ("mlp", 3)], ["routing[1]", "('mlp', 3)"]),
        (PARAMS, lambda path, leaf: 3, ["routing callable", "'embed'", "to 3"]),
        (PARAMS, lambda path, leaf: leaf, ["routing callable", "'embed'", "must be one of"]),
        (PARAMS, "adam", ["'adam'", "must be one of"]),
        (PARAMS, {"embed": "other", "mlp": {"kernel": "muon"}, "out": "muon"}, ["'mlp/bias'"]),
        (PARAMS, WHOLE | {"lora": {"a": "muon"}}, ["'lora/a'", "no leaf"]),
        (PARAMS, WHOLE | {"mlp": {"kernel": "adam", "bias": "other"}}, ["'adam'", "'mlp/kernel'"]),
        (PARAMS, [("mlp", "sgd")], ["'sgd'", "'mlp/", "other", "MatrixAxes"]),
        (PARAMS, [("bias", "muon")], ["'mlp/bias'", "(8,)", "'other'"]),
        (PARAMS, [("mlp/bias", MatrixAxes())], ["'mlp/bias'", "(8,)", "does not fit"]),
        (PARAMS, [("out", MatrixAxes(0, 1.5))], ["'out/kernel'", "(2, 4, 8)", "does not fit"]),
        (PARAMS, [("out", MatrixAxes("ab", 1))], ["'out/kernel'", "(2, 4, 8)", "does not fit"]),
        (PARAMS, [("out", MatrixAxes(split_fan_in=0))], ["'out/kernel'", "positive", "got 0"]),
        (PARAMS, [("out", MatrixAxes(split_fan_in="ab"))], ["'out/kernel'", "positive", "'ab'"]),
        (PARAMS, 3, ["3", "(regex, label)"]),
        (INTEGER, None, ["'steps'", "int32", "'frozen'"]),
        (INTEGER, [("steps", "other")], ["rule 'steps'", "'other'", "int32", "'frozen'"]),
        (INTEGER, [("steps", MatrixAxes())], ["rule 'steps'", "int32", "'frozen'"]),
        (
            SCALARS,
            [("flag", "frozen"), ("scalar", "muon")],
            ["'scalar'", "()", "not that of a matrix", "'other'"],
        ),
        (SCALARS, [("flag", "frozen"), ("scalar", MatrixAxes())], ["'scalar'", "does not fit"]),
        (SCALARS, [("flag", "other")], ["'flag'", "bool", "'frozen'"]),
        (SCALARS | {"f": jax.nn.relu}, None, ["'f'", "must be an array", "is_inexact_array"]),
        (SCALARS | {"f": "tanh"}, None, ["'f'", "must be an array", "'tanh'"]),
    ],
)
def test_errors_name_the_path_and_the_remedy(params, rules, words):
    with pytest.raises(ValueError) as raised:
        label_params(params, rules)
    assert [word for word in words if word not in str(raised.value)] == []


def test_trees_without_names_are_routed_by_shape_with_a_doubt():
    bare, layers = struct(64, 64), [(struct(64, 32), struct(32)), (struct(32, 64), struct(64))]
    assert label_params(bare) == "muon"
    assert label_params(layers) == [("muon", "other"), ("muon", "other")]
    assert "ambiguous: (root) (64, 64)" in routing_table(bare)
    assert routing_table(layers).count("ambiguous: ") == 2


def test_an_integer_leaf_may_be_frozen():
    labels = label_params(INTEGER, [("steps", "frozen")])
    assert labels == {"mlp": {"kernel": "muon"}, "steps": "frozen"}
    labels = label_params(SCALARS, [("flag", "frozen")])
    assert labels == {"scalar": "other", "flag": "frozen", "empty": "muon"}


def test_complex_leaves_are_routed_as_real_ones_and_rules_decide():
    params = nested({"embed": (50, 8), "mlp/kernel": (8, 8), "mlp/bias": (8,)})
    complex_params = jax.tree.map(lambda x: struct(*x.shape, dtype=jnp.complex64), params)
    assert label_params(complex_params) == label_params(params)
    assert label_params(params)["mlp"] == {"kernel": "muon", "bias": "other"}
    for choice in ("other", "frozen"):
        labels = label_params(complex_params, [("mlp", choice)])
        assert labels["mlp"] == {"kernel": choice, "bias": choice}
    assert routes_by_path(complex_params, [("embed", MatrixAxes(1, 0))])["embed"].label == "muon"


def test_a_dict_keeps_its_meaning_when_a_key_is_added():
    params = nested({"head/kernel": (8, 8), "headless/kernel": (8, 8)})
    labels = {"head": "other", "headless": "frozen"}
    found = label_params(params, labels)
    assert found == {"head": {"kernel": "other"}, "headless": {"kernel": "frozen"}}
    with pytest.raises(ValueError, match="no entry for leaf 'headless/kernel'"):
        label_params(params, {"head": "other"})
    # As rules the first one has both, and the second none.
    with pytest.raises(ValueError, match="'headless' decides no leaf"):
        label_params(params, list(labels.items()))
    assert set(jax.tree.leaves(label_params(params, [("head", "other")]))) == {"other"}


def test_an_error_in_a_routing_callable_says_for_which_leaf():
    with pytest.raises(AttributeError) as raised:
        label_params(PARAMS, lambda path, leaf: leaf.nothing)
    assert "routing callable, for leaf 'embed'" in raised.value.__notes__[0]


def test_many_paths_are_cut_short_in_an_error():
    with pytest.raises(ValueError, match="and 38 more") as raised:
        label_params(nested({f"layer_{n}/kernel": (4, 4) for n in range(50)}), [("x", "muon")])
    assert len(str(raised.value)) < 500


def test_arrays_and_structs_are_labelled_alike():
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), PARAMS)
    assert label_params(arrays) == label_params(PARAMS)
    traced = jax.jit(lambda p: p["mlp"]["kernel"] if label_params(p) else None)(arrays)
    assert traced.shape == (8, 8)


WORDS = "kernel weight w bias scale embed head query out c_attn conv experts norm layers 0 foo a.b"
LEAVES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 97]), max_size=5).map(lambda s: struct(*s))
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS.split()), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(TREES)
def test_every_tree_has_a_route_for_every_leaf(params):
    routes = route(params).values()
    assert len(routes) == len(jax.tree.leaves(params))
    for leaf in routes:
        assert leaf.label in ("muon", "other")
        if leaf.label == "muon":
            batch, fan_in, fan_out = leaf.axes.matrix_shape(leaf.shape)
            assert np.prod([*batch, fan_in, fan_out]) == np.prod(leaf.shape)
    assert all(leaf.path in routing_table(params) for leaf in routes)
