"""Every optimizer of the package as a factory, with quick settings, and a small tree for them."""

import jax
import jax.numpy as jnp
import optax

import muon_jax

# One Newton-Schulz step, which compiles faster than five.
FACTORIES = {
    "muon": (muon_jax.muon, {"learning_rate": 0.02, "ns_steps": 1}),
    "int8": (muon_jax.muon, {"learning_rate": 0.02, "ns_steps": 1, "mu_dtype": jnp.int8}),
    "int4": (muon_jax.muon, {"learning_rate": 0.02, "ns_steps": 1, "mu_dtype": jnp.int4}),
    "sgd": (muon_jax.muon, {"learning_rate": 0.02, "ns_steps": 1, "other_optimizer": "sgd"}),
    "lion": (muon_jax.muon, {"learning_rate": 0.02, "ns_steps": 1, "other_optimizer": "lion"}),
    "nadam": (
        muon_jax.muon,
        {"learning_rate": 0.02, "ns_steps": 1, "adam_nesterov": True, "nu_dtype": jnp.float32}
        | {"cautious_weight_decay": True, "momentum": "optax"},
    ),
    "normuon": (muon_jax.normuon, {"learning_rate": 0.02, "ns_steps": 1}),
    "adamuon": (muon_jax.adamuon, {"learning_rate": 0.02, "ns_steps": 1}),
    "low_rank": (muon_jax.low_rank, {"learning_rate": 0.02, "rank": 2}),
    "muonbp": (
        muon_jax.muonbp,
        {"learning_rate": 0.02, "ns_steps": 1, "period": 2, "blocks": (2, 2)},
    ),
    "dion": (muon_jax.dion, {"learning_rate": 0.02, "rank": 2}),
    "splus": (muon_jax.splus, {"learning_rate": 0.02, "every": 2, "max_dim": 6}),
    "scion": (muon_jax.scion, {"learning_rate": 2**-9, "ns_steps": 1}),
    "gluon": (
        muon_jax.gluon,
        {"learning_rate": 1.0, "smoothness": (0.5, 9.0), "ns_steps": 1},
    ),
}

RATE = optax.cosine_decay_schedule(0.02, 100)
DECAY = optax.linear_schedule(0.1, 0.0, 100)


def make(name, wrap=lambda factory: factory, **options):
    factory, settings = FACTORIES[name]
    return wrap(factory)(**settings | options)


def draw(dtype=jnp.float32, seed=0):
    """A matrix, a stack of them, a bias and a table."""
    shapes = {"mlp": {"kernel": (4, 6), "bias": (6,)}, "stack": (2, 6, 4), "embed": (8, 4)}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, leaves, strict=True))
    return tree.unflatten([x.astype(dtype) for x in drawn])
