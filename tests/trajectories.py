"""Ten steps of an optimizer on a small tree, and how far apart two such runs are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from jax.extend import core as jax_core

STEPS = 10

# Of the way a leaf has come: one rounding of a float32 param, 6e-8 of it, is 2e-5 of a first step
# of 3e-3. Measured: 9e-6 against float64, 1.4e-5 against torch, 7e-6 against optax.
ROUNDING = 3e-5

SHAPES = {"embed": (12, 6), "up": (6, 16), "down": (16, 6), "square": (8, 8), "bias": (6,)}
KERNELS = ("up", "down", "square")
LABELS = {name: "muon" if name in KERNELS else "other" for name in SHAPES}


def normal(tree_shapes, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in tree_shapes.items()}


def gaussian(*shape, seed=0, dtype=np.float32):
    """An array of standard normal numbers; of complex ones both parts are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return (x + 1j * rng.normal(size=shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


PARAMS = normal(SHAPES, 0)
GRADS = [normal(SHAPES, seed) for seed in range(1, STEPS + 1)]

RAMP = optax.linear_schedule(0.01, 0.05, STEPS)
DECAY = optax.linear_schedule(0.3, 0.0, STEPS)


def run(tx, params=PARAMS, grads=GRADS, state=None, jit=False):
    """The params after each step, and the last state."""

    def step(g, state, params):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params) if state is None else state
    trajectory = []
    for g in grads:
        params, state = step(jax.tree.map(jnp.asarray, g), state, params)
        trajectory.append(params)
    return trajectory, state


def of_leaves(follow, names=KERNELS, **settings):
    """The trajectory of a tree from `follow(w, grads, **settings)` of each leaf."""
    ways = {name: follow(PARAMS[name], [g[name] for g in GRADS], **settings) for name in names}
    return [dict(zip(ways, leaves, strict=True)) for leaves in zip(*ways.values(), strict=True)]


def of_torch(make, names=KERNELS, evaluate=False):
    """The leaves after each step of `make(tensor)`, whose kernels have the output first.

    With `evaluate` the leaves at the end, in the optimizer's mode for evaluation.
    """
    import torch

    ways = {}
    for name in names:
        tensor = torch.nn.Parameter(torch.tensor(PARAMS[name].T.copy()))
        optimizer, ways[name] = make(tensor), []
        for g in GRADS:
            tensor.grad = torch.tensor(g[name].T.copy())
            optimizer.step()
            ways[name].append(tensor.detach().numpy().T.copy())
        if evaluate:
            optimizer.eval()
            ways[name] = [tensor.detach().numpy().T.copy()]
    return [dict(zip(ways, leaves, strict=True)) for leaves in zip(*ways.values(), strict=True)]


def with_adamw(kernels, **settings):
    """The trajectory of the kernels, and beside them that of the rest, on AdamW."""
    rest = [name for name in SHAPES if name not in KERNELS]
    trees = [{name: tree[name] for name in rest} for tree in (PARAMS, *GRADS)]
    others = reference.hybrid(trees[0], trees[1:], LABELS, reference.Hyper(**settings))
    return [a | b for a, b in zip(kernels, others, strict=True)]


def distance(ours, theirs, start=PARAMS):
    """The largest difference of any leaf at any step, as a share of the way it has come."""
    steps = zip(ours, theirs, strict=True)
    return np.max([apart({n: a[n] for n in b}, b, {n: start[n] for n in b}) for a, b in steps])


def apart(ours, theirs, start):
    """The largest difference of any leaf of two trees, as a share of the way from `start`."""

    def share(a, b, begin):
        b = np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / np.linalg.norm(b - begin)

    return np.max(jax.tree.leaves(jax.tree.map(share, ours, theirs, start)))


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def relative_error(ours, theirs):
    """The largest of any leaf."""

    def wide(x):
        return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)

    pairs = zip(*(map(wide, jax.tree.leaves(t)) for t in (ours, theirs)), strict=True)
    return np.max([np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in pairs])


def equations(jaxpr):
    """Those of a program, and of the programs within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax_core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def updates_of(tx, grads):
    """The updates of each step, and the last state."""
    step, state, found = jax.jit(tx.update), tx.init(grads[0]), []
    for g in grads:
        updates, state = step(g, state)
        found.append(updates)
    return found, state
