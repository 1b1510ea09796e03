"""Routing by use: what functions do with their parameters, and what the result is good for."""

import jax
import jax.numpy as jnp
import pytest
import uses

import muon_jax
from muon_jax._routing import route

X = uses.X


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def read(routes):
    """The routes as `uses` writes them, by path."""

    def axes(leaf):
        parts = leaf.axes.fan_out_parts
        return (*leaf.axes.split(leaf.shape), *([parts] if parts != 1 else []))

    leaves = routes.values()
    return {leaf.path: axes(leaf) if leaf.label == "muon" else leaf.label for leaf in leaves}


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
