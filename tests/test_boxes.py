"""Values given by path fit the leaves, whatever boxes, classes and kinds of keys hold them."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.training import train_state
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, register_dataclass, register_pytree_with_keys

import muon_jax
from muon_jax._matrix_axes import axes_by_path
from muon_jax._sharding.layout import find_placing, layouts_by_path
from muon_jax._trees import broadcast_prefix, path_strings


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Nameless:
    """An array whose box gives its child no key, as Haliax's NamedArray."""

    array: object

    def tree_flatten(self):
        return (self.array,), ("in", "out")

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(*children)


@functools.partial(register_dataclass, data_fields=["data_array"], meta_fields=["named_axes"])
@dataclasses.dataclass
class Named:
    """As penzai's NamedArray."""

    data_array: object
    named_axes: tuple = ("in", "out")


@functools.partial(register_dataclass, data_fields=["value"], meta_fields=["label"])
@dataclasses.dataclass
class ParameterValue:
    """As penzai's, around a NamedArray."""

    value: object
    label: str = "a"


class Attributes:
    """A node whose children are attributes, where another tree has keys."""

    def __init__(self, **children):
        self.__dict__.update(children)


register_pytree_with_keys(
    Attributes,
    lambda node: ([(GetAttrKey(k), v) for k, v in node.__dict__.items()], tuple(node.__dict__)),
    lambda names, children: Attributes(**dict(zip(names, children, strict=True))),
)


def pure(layers=list, mapping=dict, box=lambda x: x):
    """Two layers, an attention with an array called `value`, and an embedding."""

    def layer():
        return mapping(kernel=box(jnp.ones((4, 8))), bias=box(jnp.ones(8)))

    attention = mapping(query=box(jnp.ones((4, 4))), value=box(jnp.ones((4, 4))))
    blocks = [layer(), layer()]
    return mapping(
        attn=attention,
        embed=box(jnp.ones((50, 4))),
        layers=blocks if layers is list else {layers(i): block for i, block in enumerate(blocks)},
    )


TREES = {
    "pure": pure,
    "int keys": lambda: pure(layers=int),
    "string keys": lambda: pure(layers=str),
    "attributes": lambda: pure(mapping=Attributes),
    "frozen dicts": lambda: pure(mapping=lambda **children: FrozenDict(children)),
    "variables": lambda: nnx.State(pure(layers=int, box=nnx.Param)),
    "partitioned": lambda: pure(box=lambda x: nn.Partitioned(x, names=(None,) * x.ndim)),
    "logically partitioned": lambda: pure(box=lambda x: nn.LogicallyPartitioned(x, names=())),
    "nameless boxes": lambda: pure(mapping=Attributes, box=Nameless),
    "named boxes": lambda: pure(mapping=Attributes, box=Named),
    "boxes in boxes": lambda: pure(box=lambda x: ParameterValue(Named(x))),
    "a box around a tree": lambda: {key: ParameterValue(x) for key, x in pure().items()},
}
LABELS = {
    "attn/query": "muon",
    "attn/value": "muon",
    "embed": "other",
    "layers/0/bias": "other",
    "layers/0/kernel": "muon",
    "layers/1/bias": "other",
    "layers/1/kernel": "muon",
}


def is_label(x):
    return isinstance(x, str)


@pytest.mark.parametrize("name", TREES)
def test_names_are_those_of_the_pure_tree(name):
    assert set(path_strings(TREES[name]()).values()) == set(LABELS)


@pytest.mark.parametrize("given", TREES)
@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_values_fits_every_tree_of_its_names(name, given):
    params = TREES[name]()
    strings = path_strings(params)
    # Every leaf has a value of its own, so that none can have another's.
    values = jax.tree.unflatten(
        jax.tree.structure(TREES[given]()), list(path_strings(TREES[given]()).values())
    )
    found = broadcast_prefix(values, params, what="It", kind="a string", is_value=is_label)
    assert found == strings


@pytest.mark.parametrize(
    "name,given",
    [
        ("pure", "variables"),
        ("variables", "pure"),
        ("partitioned", "boxes in boxes"),
        ("attributes", "string keys"),
        ("nameless boxes", "int keys"),
    ],
)
def test_labels_masks_axes_and_shardings_of_one_tree_are_those_of_another(name, given):
    params, other = TREES[name](), TREES[given]()
    labels = muon_jax.label_params(other)
    strings = path_strings(params)
    assert dict(zip(path_strings(other).values(), jax.tree.leaves(labels), strict=True)) == LABELS
    by_path = muon_jax.label_params(params, labels)
    assert dict(zip(strings.values(), jax.tree.leaves(by_path), strict=True)) == LABELS

    axes = muon_jax.MatrixAxes(-1, -2)
    flipped = jax.tree.map(lambda x: axes if x.ndim > 1 else None, other)
    chosen = axes_by_path(lambda tree: flipped, params, partial=True)
    assert {strings[path] for path in chosen} == set(LABELS) - {"layers/0/bias", "layers/1/bias"}

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec("x") if x.ndim > 1 else PartitionSpec()), other
    )
    layouts = layouts_by_path(shardings, params, find_placing(mesh, ()))
    assert {strings[path] for path, layout in layouts.items() if any(layout)} == {
        strings[path] for path in chosen
    }

    mask = jax.tree.map(lambda x: x.shape == (4, 4), other)
    tx = muon_jax.muon(
        1.0,
        weight_decay=1.0,
        weight_decay_mask=lambda tree: mask,
        routing=labels,
        matrix_axes=flipped,
        shardings=shardings,
        ns_steps=1,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    decayed = zip(strings.values(), jax.tree.leaves(updates), strict=True)
    assert {path for path, u in decayed if u.any()} == {"attn/query", "attn/value"}


class Block(nnx.Module):
    def __init__(self, rngs):
        split = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "x"))
        make = lambda: nnx.Linear(4, 4, kernel_init=split, rngs=rngs)  # noqa: E731
        self.layers = nnx.List([make(), make()])
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.lora = nnx.LoRAParam(jnp.ones((4, 2)))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.lora[...]


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.LoRAParam, nnx.Not(nnx.LoRAParam)])
def test_nnx_optimizer_takes_trees_made_of_its_state(wrt):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        model = Block(nnx.Rngs(0))
    state = nnx.state(model, wrt)
    labels = muon_jax.label_params(state)
    tx = muon_jax.muon(
        0.1,
        weight_decay=0.1,
        routing=labels,
        weight_decay_mask=jax.tree.map(lambda x: x.ndim > 1, state),
        matrix_axes=jax.tree.map(lambda label: muon_jax.MatrixAxes(-1, -2), labels),
        shardings=nnx.get_named_sharding(state, mesh),
        mesh=mesh,
        ns_steps=1,
    )
    with jax.set_mesh(mesh):
        optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    before = nnx.to_pure_dict(state)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.sum(model(jnp.arange(8.0).reshape(2, 4)) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model))

    for _ in range(2):
        step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, wrt))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: np.any(x != y), before, after)))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(8, kernel_init=nn.with_partitioning(init, (None, "x")), name="up")(x)
        return nn.Dense(4, kernel_init=nn.with_logical_partitioning(init, ("a", "b")), name="down")(
            x
        )


@pytest.mark.parametrize("unboxed", ["params", "values"])
def test_linen_train_state_takes_boxed_and_unboxed_trees(unboxed):
    model, x = Linen(), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    values = nn.unbox(params) if unboxed == "values" else params
    params = nn.unbox(params) if unboxed == "params" else params
    labels = muon_jax.label_params(values)
    mask = jax.tree.map(lambda x: x.ndim > 1, values)
    tx = muon_jax.muon(0.1, weight_decay=0.1, routing=labels, weight_decay_mask=mask, ns_steps=1)
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x) ** 2))(params)
    after = state.apply_gradients(grads=grads).params
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, after)), strict=True))


OPTIMIZERS = {
    "muon": lambda: muon_jax.muon(0.1, weight_decay=0.1, ns_steps=1),
    "scion": lambda: muon_jax.scion(0.1, ns_steps=1),
    "optax": lambda: optax.adamw(0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unfiltered_equinox_module_is_params_of_update(name):
    tx = OPTIMIZERS[name]()
    model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_inexact_array)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(4)) ** 2))(model)
    updates, state = tx.update(grads, tx.init(arrays), model)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    expected, _ = tx.update(grads, tx.init(arrays), arrays)
    assert eqx.tree_equal(updates, expected)
    assert eqx.apply_updates(model, updates)(jnp.ones(4)).shape == (4,)
    tx.update(grads, state, model)


def test_an_average_of_an_unfiltered_equinox_module():
    tx = muon_jax.splus(0.1)
    model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(4)) ** 2))(model)
    updates, state = tx.update(grads, state, model)
    averaged = muon_jax.evaluation_params(state, model)
    assert averaged.activation is model.activation
    after = eqx.apply_updates(model, updates)
    np.testing.assert_allclose(averaged.layers[0].weight, after.layers[0].weight, rtol=1e-5)


def test_init_with_an_unfiltered_equinox_module_says_what_to_do():
    model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"'activation'.*eqx\.filter\(model, eqx\.is_inexact_ar"):
        muon_jax.muon(0.1).init(model)
