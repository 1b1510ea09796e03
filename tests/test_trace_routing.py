"""Routing by use: what functions do with their parameters, and what the result is good for."""

import dataclasses
import functools

import chex
import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import pretraining
import pytest
import uses
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning

import muon_jax
from experiments.family import config as family_config
from experiments.family import model as family
from experiments.family import train as family_train
from experiments.finetune import architecture, arms
from experiments.finetune import config as finetune_config
from experiments.finetune import model as finetune
from experiments.grok import config as grok_config
from experiments.grok import model as grok
from experiments.grok import train as grok_train
from experiments.pretrain import model as pretrain
from experiments.pretrain import step
from muon_jax._routing.rules import route

X = uses.X


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def read(routes):
    """The routes as `uses` writes them, by path."""

    def axes(leaf):
        parts = leaf.axes.split_fan_out
        return (*leaf.axes.split(leaf.shape), *([parts] if parts != 1 else []))

    leaves = routes.values()
    return {leaf.path: axes(leaf) if leaf.label == "muon" else leaf.label for leaf in leaves}


def test_nothing_is_allocated():
    """Each of these would take four terabytes."""
    x, w = (jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32) for _ in range(2))
    params = {"a": w, "b": w, "c": w}
    routes = routes_of(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], params, x)
    assert [routes[name].label for name in params] == ["other", "muon", "other"]


@pytest.mark.parametrize("name", uses.CASES)
def test_each_use(name):
    function, leaves, args, expected = uses.CASES[name]
    params = shapes(**leaves)
    with jax.numpy_rank_promotion("allow"):  # as in the models of the world
        routing = muon_jax.trace_routing(function, params, *args)
    routes = route(params, routing)
    assert read(routes) == expected
    assert not any(leaf.doubt for leaf in routes.values())
    assert all("uses.py:" in leaf.why for leaf in routes.values())


def routes_of(function, params, *args, **options):
    routing = muon_jax.trace_routing(function, params, *args, **options)
    return {leaf.path: leaf for leaf in route(params, routing).values()}


def test_shards_are_followed_through_collectives():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("d")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(split, jax.P(None, "d"), split, split), out_specs=split
    )
    def body(tiled, stacked, scattered, h):
        h = h @ lax.all_gather(tiled, "d", axis=0, tiled=True)
        h = h @ lax.all_gather(stacked, "d").transpose(1, 0, 2).reshape(6, 6)
        whole = lax.psum(lax.all_gather(h, "d", tiled=True) * 0.5, "d")
        gathered = lax.all_gather(scattered, "d", tiled=True)
        return lax.psum_scatter(whole @ gathered, "d", tiled=True)

    def model(p, x):
        return body(p["tiled"], p["stacked"], p["scattered"], jnp.tanh(x @ p["a"])) @ p["z"]

    names = ("tiled", "stacked", "scattered", "a", "z")
    params = shapes(**dict.fromkeys(names, (6, 6)))
    routes = route(params, muon_jax.trace_routing(model, params, X))
    inner = dict.fromkeys(names[:3], uses.ROWS)
    assert read(routes) == inner | {"a": "other", "z": "other"}


def unknown(p, x):
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    h = jnp.tanh(x @ p["first"])
    h = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4, 6), h.dtype))(h, p["q_proj"])
    q, _ = jnp.linalg.qr(p["k_proj"])
    return jax.nn.relu(h @ q) @ p["last"]


def test_entries_that_constants_take_several_times_are_no_matrix():
    def model(p, x):
        h = jnp.tanh(x @ p["first"])
        h = jnp.tanh(h @ p["columns"][:, jnp.array([0, 0, 1, 1, 2, 2])])
        h = jnp.tanh(h @ p["pairs"][jnp.array([0, 1] * 3), jnp.array([0, 0, 1, 1, 2, 2])])
        distances = jnp.abs(jnp.arange(4)[:, None] - jnp.arange(4)[None])
        h = jnp.einsum("td,tsd->ts", h, p["distances"][distances]) + p["bias"][distances]
        return h @ p["last"]

    leaves = {"first": (6, 6), "columns": (6, 3), "pairs": (2, 3, 6), "distances": (4, 6)}
    routes = routes_of(model, shapes(**leaves, bias=(4,), last=(4, 9)), X)
    assert read(routes) == dict.fromkeys(routes, "other")
    for name in ("columns", "pairs", "distances"):
        assert "constant indices select" in routes[name].doubt
        assert "selected by constant indices" in routes[name].why
    assert not routes["bias"].doubt


def test_an_unknown_operation_is_named_and_leaves_the_leaf_to_its_name():
    params = shapes(first=(6, 8), q_proj=(8, 6), k_proj=(6, 6), last=(6, 3))
    routes = routes_of(unknown, params, X)
    by_name = {leaf.path: leaf for leaf in route(params).values()}
    for name, operation in (("q_proj", "pallas_call"), ("k_proj", "qr")):
        assert routes[name][2:4] == by_name[name][2:4]
        assert operation in routes[name].why and operation in routes[name].doubt
    assert routes["first"].label == routes["last"].label == "other"


def test_what_a_function_partitions_itself_is_followed():
    @custom_partitioning
    def product(x, w):
        return x @ w

    product.def_partition(
        partition=lambda *a: None, sharding_rule="i j, j k -> i k", propagate_user_sharding=None
    )

    def model(p, x):
        return product(jnp.tanh(x @ p["a"]), p["b"]) @ p["c"]

    params = shapes(a=(6, 6), b=(6, 6), c=(6, 6))
    assert routes_of(model, params, X)["b"].axes.split((6, 6)) == uses.ROWS


def several(p, x):
    h = jnp.tanh(x @ p["first"])
    h = h @ (p["packed"].astype(jnp.float32) * p["steps"])
    h = h * p["both"][0] + h @ p["both"]
    h = jnp.einsum("td,dek->tek", h, p["cube"]) + jnp.einsum("te,dek->tdk", h, p["cube"])
    h = h[:, 0] @ p["summed"].sum(0)
    h = jax.nn.relu(h @ p["there"]) @ p["there"].T
    return h @ p["last"]


SEVERAL = shapes(
    first=(6, 6),
    steps=(1, 6),
    both=(6, 6),
    cube=(6, 6, 6),
    summed=(2, 6, 6),
    there=(6, 6),
    last=(6, 6),
    spare=(6, 6),
) | {"packed": jax.ShapeDtypeStruct((6, 6), jnp.int8)}


def test_leaves_of_no_use_or_several_are_told():
    with jax.numpy_rank_promotion("allow"):
        routes = routes_of(several, SEVERAL, X)
    assert routes["packed"].label == "frozen" and "int8" in routes["packed"].why
    assert routes["steps"].label == "other"
    assert "not used" in routes["spare"].why and "does not use it" in routes["spare"].doubt
    assert routes["both"].why.startswith("elementwise with activations and contracted over axis 0")
    assert routes["summed"].label == "other" and "could be a matrix" in routes["summed"].doubt
    for name in ("both", "cube"):
        assert routes[name].label == "other" and "several ways" in routes[name].doubt
    # The transposed matrix is the same matrix.
    assert routes["there"].axes.split((6, 6)) == uses.ROWS and not routes["there"].doubt


def test_arguments_decide_before_the_trace():
    rules = [("both", "frozen"), ("there|cube", muon_jax.MatrixAxes(1, 0))]
    with jax.numpy_rank_promotion("allow"):
        routes = routes_of(several, SEVERAL, X, rules=rules, first="muon", last="frozen")
    assert routes["first"].axes.split((6, 6)) == uses.ROWS
    assert routes["last"].label == routes["both"].label == "frozen"
    assert routes["there"].axes.split((6, 6)) == uses.COLUMNS
    assert routes["cube"].axes.split((6, 6, 6)) == ((2,), (1,), (0,))
    assert routes["there"].why == "rule 'there|cube'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": "adam"}, "last must be one of muon, other, frozen; got 'adam'"),
        ({"rules": [("nowhere", "muon")]}, "The rule 'nowhere' matches no leaf"),
        ({"rules": ["both"]}, r"rules\[0\] must be a pair"),
        ({"rules": [("both", "sgd")]}, "sends 'both' to 'sgd'"),
    ],
)
def test_wrong_arguments(options, message):
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=message):
        routes_of(several, SEVERAL, X, **options)


def test_other_leaves_than_those_traced_are_an_error():
    params = shapes(a=(6, 6))
    routing = muon_jax.trace_routing(lambda p, x: x @ p["a"], params, X)
    with pytest.raises(ValueError, match=r"traced without a leaf 'b'.*Trace the function again"):
        muon_jax.label_params(shapes(b=(6, 6)), routing)


def test_the_line_of_a_use_is_that_of_the_model():
    """Even where the program of `jnp.take` is that of an earlier call, from another line."""

    def model(p, i):
        x = jnp.take(p["a"], i, axis=0)
        return x + jnp.take(p["b"], i, axis=0)

    start = model.__code__.co_firstlineno
    routes = routes_of(model, shapes(a=(9, 6), b=(9, 6)), uses.IDS)
    for name, line in (("a", start + 1), ("b", start + 2)):
        assert routes[name].why == f"looked up along axis 0 · test_trace_routing.py:{line}"


# --- Trees of libraries ---


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.one = nnx.Linear(8, 8, rngs=rngs)
        self.other = nnx.Linear(8, 8, rngs=rngs)
        self.other.kernel = self.one.kernel
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.depthwise(nnx.relu(self.norm(self.conv(x))))
        x = self.dropout(x).reshape(x.shape[0], -1, 8)
        x = x + self.attention(x)
        return self.out(nnx.relu(self.other(nnx.relu(self.one(x)))).mean(1))


HEADS = ((), (0,), (1, 2))
NET = {
    "attention/query/kernel": HEADS,
    "attention/key/kernel": HEADS,
    "attention/value/kernel": HEADS,
    "attention/out/kernel": ((), (0, 1), (2,)),
    "one/kernel": uses.ROWS,
}
IMAGES = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)


def matrices(params, routing):
    axes = read(route(params, routing))
    return {path: found for path, found in axes.items() if found != "other"}


def test_an_nnx_module_and_its_inputs():
    """With dropout, batch statistics, and a kernel that two layers share."""
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    pure = nnx.to_pure_dict(state)
    loss = muon_jax.trace_routing(lambda model, x: model(x).sum(), model, IMAGES)
    for routing in (loss, muon_jax.trace_routing(model, IMAGES)):
        assert matrices(state, routing) == matrices(pure, routing) == NET
        assert "a depthwise convolution · test_trace_routing.py:" in str(routing)


def test_a_linen_loss_with_dropout_and_mutable_state():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            y = linen.DenseGeneral((2, 4))(linen.LayerNorm()(x))
            y = linen.Dropout(0.1, deterministic=False)(linen.relu(y))
            return x + linen.DenseGeneral(8, axis=(-2, -1))(y), None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            init = linen.with_partitioning(linen.initializers.normal(), ("vocabulary", None))
            x = linen.Embed(9, 8, embedding_init=init)(tokens)
            x = linen.BatchNorm(use_running_average=False)(x)
            split = {"params": True, "dropout": True}
            stack = linen.scan(linen.remat(Layer), {"params": 0}, split_rngs=split, length=3)
            return linen.Dense(5)(stack(name="layers")(x, None)[0])

    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    variables = jax.eval_shape(Model().init, {"params": uses.KEY, "dropout": uses.KEY}, tokens)

    def loss(params, statistics, key, tokens):
        logits, changed = Model().apply(
            {"params": params, "batch_stats": statistics},
            tokens,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return -jax.nn.log_softmax(logits)[..., 0].mean(), changed

    boxed = variables["params"]
    routing = muon_jax.trace_routing(loss, boxed, variables["batch_stats"], uses.KEY, tokens)
    assert matrices(boxed, routing) == matrices(linen.meta.unbox(boxed), routing)
    assert matrices(boxed, routing) == {
        "layers/DenseGeneral_0/kernel": ((0,), (1,), (2, 3)),
        "layers/DenseGeneral_1/kernel": ((0,), (1, 2), (3,)),
    }


def test_an_equinox_module_with_what_is_no_array():
    class Model(eqx.Module):
        layers: list
        scale: float = 0.5

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x) * self.scale
            return x

    def make(key):
        sizes = [(6, 8), (8, 8), (8, 3)]
        return Model([eqx.nn.Linear(m, n, key=key) for m, n in sizes] + [jax.nn.relu])

    model = eqx.filter_eval_shape(make, jax.random.key(0))
    routing = muon_jax.trace_routing(lambda model, x: jax.vmap(model)(x), model, X)
    params = eqx.filter(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    assert matrices(params, routing) == {"layers/1/weight": uses.COLUMNS}


def adapted(adapters, base, ids):
    x = base["table"][ids]
    for layer, adapter in zip(base["layers"], adapters["layers"], strict=True):
        x = x + jnp.tanh(x @ layer["kernel"] + x @ adapter["a"] @ adapter["b"])
    return x @ base["head"]


@pytest.mark.parametrize("closed_over", [False, True])
def test_adapters_of_a_frozen_model_have_no_first_and_no_last_matrix(closed_over):
    adapters = {"layers": [shapes(a=(6, 2), b=(2, 6)) for _ in range(2)]}
    base = shapes(table=(9, 6), head=(6, 9)) | {"layers": [shapes(kernel=(6, 6))] * 2}
    function, args = adapted, (base, uses.IDS)
    if closed_over:
        held = jax.tree.map(lambda x: jnp.ones(x.shape), base)
        function, args = (lambda adapters, ids: adapted(adapters, held, ids)), (uses.IDS,)
    routing = muon_jax.trace_routing(function, adapters, *args)
    names = [f"layers/{i}/{name}" for i in range(2) for name in "ab"]
    assert matrices(adapters, routing) == dict.fromkeys(names, uses.ROWS)


# --- As a routing ---


def perceptron(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["in"]) @ p["up"]["w"].T) @ p["out"]


PERCEPTRON = {
    name: jnp.sin(jnp.arange(48.0) * (i + 1)).reshape(shape)
    for i, (name, shape) in enumerate([("in", (6, 8)), ("w", (6, 8)), ("out", (6, 8))])
}
PERCEPTRON["up"] = {"w": PERCEPTRON.pop("w")}
ALIKE = {"in": "other", "up": {"w": muon_jax.MatrixAxes(1, 0)}, "out": "other"}
OPTIMIZERS = {
    "muon": functools.partial(muon_jax.muon, ns_steps=1),
    "normuon": functools.partial(muon_jax.normuon, ns_steps=1),
    "scion": functools.partial(muon_jax.scion, ns_steps=1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_it_as_any_routing(name):
    gradient = jax.tree.map(jnp.cos, PERCEPTRON)
    routing = muon_jax.trace_routing(perceptron, PERCEPTRON, X)

    def step(routing):
        tx = OPTIMIZERS[name](0.1, routing=routing)
        return tx.update(gradient, tx.init(PERCEPTRON), PERCEPTRON)[0]

    chex.assert_trees_all_equal(step(routing), step(ALIKE))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(step(routing), step(None))


def test_labels_plan_and_table_take_it():
    routing = muon_jax.trace_routing(perceptron, PERCEPTRON, X)
    labels = {"in": "other", "up": {"w": "muon"}, "out": "other"}
    assert muon_jax.label_params(PERCEPTRON, routing) == labels
    assert str(routing) == muon_jax.routing_table(PERCEPTRON, routing)
    mesh = jax.make_mesh((1,), ("d",))
    plans = [muon_jax.plan(PERCEPTRON, mesh=mesh, routing=r) for r in (routing, ALIKE)]
    assert str(plans[0]) == str(plans[1])


# --- The studies ---


def test_scion_gives_traced_leaves_the_balls_of_their_use():
    """An embedding, a gain a layer and a kernel of windows, of which no name tells anything."""

    def model(p, ids):
        x = p["x"][ids]
        for i in range(2):
            x = jnp.tanh((x * p["y"][i, None]) @ p["z"])
        x = lax.conv_general_dilated(x[None], p["v"], (1,), "SAME", dimension_numbers=_NWC)[0]
        return x @ p["w"]

    named = {"x": "embed/embedding", "y": "norm/scale", "z": "mlp/kernel", "v": "conv/kernel"}
    named |= {"w": "head/kernel"}
    params = {
        name: jax.random.normal(jax.random.key(n), shape)
        for n, (name, shape) in enumerate(
            {"x": (9, 6), "y": (2, 6), "z": (6, 6), "v": (3, 6, 6), "w": (6, 9)}.items()
        )
    }
    routing = muon_jax.trace_routing(model, params, uses.IDS)
    by_use = muon_jax.scion(0.1, routing=routing)
    by_name = muon_jax.scion(0.1)
    renamed = {named[name]: leaf for name, leaf in params.items()}
    found, _ = by_use.update(params, by_use.init(params), params)
    expected, _ = by_name.update(renamed, by_name.init(renamed), renamed)
    chex.assert_trees_all_equal({named[name]: leaf for name, leaf in found.items()}, expected)


_NWC = ("NWC", "WIO", "NWC")


def grok_model():
    def make():
        rngs = nnx.Rngs(0)
        return grok.Transformer(99, width=32, layers=2, heads=2, dropout=0.1, rngs=rngs)

    model = nnx.eval_shape(make)

    def call(model, tokens, key):
        return model(tokens, dropout_rngs=nnx.Rngs(key), return_max_logits=True)

    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return call, model, tokens, uses.KEY


def family_model():
    def make():
        return family.LanguageModel(width=32, layers=2, head_size=16, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)
    return type(model).__call__, model, jax.ShapeDtypeStruct((2, 8), jnp.int32)


def pretrain_model(config):
    model = pretrain.LanguageModel(config, pretraining.VOCABULARY)
    params = jax.eval_shape(model.init, jax.random.key(0))
    windows = jax.ShapeDtypeStruct((2, 17), jnp.int32)
    return model.losses, params, jax.eval_shape(model.initial_bias), windows


def finetune_model(**changes):
    sizes = {"layers": 2, "hidden": 64, "ffn": 176, "heads": 4, "kv_heads": 2, "head_dim": 32}
    a = architecture.Architecture(vocabulary=256, **sizes | changes)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return finetune.LanguageModel(a).losses, finetune.shapes(a), tokens, tokens, tokens


STUDIES = {
    "grok": grok_model,
    "family": family_model,
    "pretrain": functools.partial(pretrain_model, pretraining.SMALL),
    "pretrain, dense": functools.partial(pretrain_model, pretraining.DENSE),
    "pretrain, heads and experts": functools.partial(
        pretrain_model, dataclasses.replace(pretraining.SMALL, attention="multi-head")
    ),
    "finetune": finetune_model,
    "finetune, biases": functools.partial(finetune_model, family="qwen2"),
    "finetune, untied": functools.partial(finetune_model, tied=False, layers=9, family="llama"),
}


def test_a_product_of_parameters_that_is_used_entry_by_entry_is_told():
    def function(p, ids):
        keys, values = p["t"] @ p["k"], p["t"] @ p["v"]
        return jnp.tanh(keys[ids] * values[ids]) @ p["w"] @ p["last"]

    params = shapes(t=(9, 6), k=(6, 6), v=(6, 6), w=(6, 6), last=(6, 9))
    routes = routes_of(function, params, uses.IDS)
    doubts = {name: bool(leaf.doubt) for name, leaf in routes.items()}
    assert doubts == {"t": False, "k": True, "v": True, "w": False, "last": False}


@pytest.mark.parametrize("study", STUDIES)
def test_use_and_names_agree_on_the_models_of_the_studies(study):
    function, params, *args = STUDIES[study]()
    with jax.set_mesh(pretraining.one_device()):
        routing = muon_jax.trace_routing(function, params, *args)
    params = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    by_use = route(params, routing)
    assert read(by_use) == read(route(params))
    assert not any(leaf.doubt for leaf in by_use.values())


class _Traced(Exception):
    pass


PROGRAMS = {
    "grok": lambda: grok_train.compile_arm(
        grok_config.Config(width=32, layers=2),
        grok_config.Cell("mul", "softmax", "muon", 0),
        1,
        jax.local_devices()[0],
    ),
    "family": lambda: family_train.language_model.__wrapped__(family_config.Training()),
    "pretrain": lambda: step.Trainer(
        pretraining.training(), "muon", pretraining.one_device(), pretraining.VOCABULARY
    ),
    "finetune": lambda: arms.routing.__wrapped__(
        "muon_adamw",
        finetune_config.Optimizer(),
        finetune_config.Lora(),
        architecture.Architecture(
            vocabulary=256, layers=2, hidden=64, ffn=176, heads=4, kv_heads=2, head_dim=32
        ),
    ),
}


@pytest.mark.parametrize("study", PROGRAMS)
def test_the_programs_of_the_studies_take_the_routes_of_their_models(study, monkeypatch):
    trace, found = muon_jax.trace_routing, {}

    def spy(function, params, *args, **options):
        found.update(by_use=route(params, trace(function, params, *args, **options)))
        found.update(by_name=route(params))
        raise _Traced

    monkeypatch.setattr(muon_jax, "trace_routing", spy)
    with pytest.raises(_Traced):
        PROGRAMS[study]()
    assert read(found["by_use"]) == read(found["by_name"])
    assert not any(leaf.doubt for leaf in found["by_use"].values())
