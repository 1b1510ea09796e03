"""Params of attention modules in every layout of heads, and the logits that they give."""

import jax
import jax.numpy as jnp
import numpy as np
from trajectories import gaussian

from experiments.layers import rotate
from muon_jax import GroupedQuery, MultiHeadLatent

WIDTH, HEADS, HEAD_DIM = 12, 4, 6
# Powers and products of a few float32 numbers.
CLOSE = 1e-5


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(gaussian(*shape, seed=seed), dtype)


X = normal((3, 5, WIDTH), 100)


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_close(ours, theirs, rtol=CLOSE, atol=0):
    ours, theirs = (np.concatenate([*map(np.ravel, jax.tree.leaves(t))]) for t in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


ONES = jnp.ones(HEADS)


def attend(q, k):
    """Logits `(batch, heads, positions, positions)` of rotated queries and grouped keys."""
    q, k = (rotate(y, jnp.arange(y.shape[1]), 1e4) for y in (q, k))
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5


def largest(logits):
    return logits.max(axis=(0, 2, 3))


def some_are_over(max_logits):
    """A threshold that half of the heads exceed."""
    return float(jnp.median(max_logits))


# How a kernel `(width, heads, head_dim)` is stored, and the axis of its heads.
LAYOUTS = {
    "merged": (lambda w: w.reshape(len(w), -1), -1),
    "torch": (lambda w: w.reshape(len(w), -1).T, 0),
    "split": (lambda w: w, -2),
    "heads first": (lambda w: jnp.moveaxis(w, 0, 1), 0),
}


def stored(kernel, bias, layout):
    """A leaf's kernel and bias; `torch` calls them otherwise."""
    flat = layout in ("merged", "torch")
    return {
        "weight" if layout == "torch" else "kernel": LAYOUTS[layout][0](kernel),
        "bias": bias.reshape(-1) if flat else bias,
    }


def project(x, leaves, layout, heads):
    bias, kernel = (leaves[name] for name in sorted(leaves))
    if layout == "torch":
        kernel = kernel.T
    if layout == "heads first":
        kernel = jnp.moveaxis(kernel, 0, 1)
    kernel, bias = kernel.reshape(WIDTH, heads, -1), bias.reshape(1, 1, heads, -1)
    return jnp.einsum("btd,dnh->btnh", x, kernel) + bias


def grouped(layout="merged", kv_heads=HEADS):
    """Params of one module, and their spec."""
    drawn = {
        name: stored(normal((WIDTH, n, HEAD_DIM), seed), normal((n, HEAD_DIM), seed + 1), layout)
        for name, n, seed in (("query", HEADS, 1), ("key", kv_heads, 3), ("value", kv_heads, 5))
    }
    spec = GroupedQuery(heads=HEADS, kv_heads=kv_heads, head_axis=LAYOUTS[layout][1])
    return {"attention": drawn}, spec


def grouped_logits(params, layout="merged", kv_heads=HEADS):
    q = project(X, params["attention"]["query"], layout, HEADS)
    return attend(q, project(X, params["attention"]["key"], layout, kv_heads))


NOPE, ROPE, VALUE, LATENT = 6, 4, 5, 7


def latent(layout="merged"):
    def leaf(columns, fan_in, seed):
        kernel = LAYOUTS[layout][0](normal((fan_in, HEADS, columns), seed))
        return {"weight" if layout == "torch" else "kernel": kernel}

    params = {
        "q_b": leaf(NOPE + ROPE, WIDTH, 1),
        "kv_a": {"kernel": normal((WIDTH, LATENT + ROPE), 2)},
        "kv_b": leaf(NOPE + VALUE, LATENT, 3),
        "q_a_layernorm": {"scale": jnp.ones(WIDTH)},
        "kv_a_layernorm": {"scale": jnp.ones(LATENT)},
    }
    sizes = {"heads": HEADS, "nope": NOPE, "rope": ROPE, "value": VALUE}
    spec = MultiHeadLatent(query="q_b", key="kv_b", head_axis=LAYOUTS[layout][1], **sizes)
    return params, spec


def latent_parts(params, layout="merged"):
    """The parts of the logits without and with position, and the values."""

    def heads(x, leaf):
        (kernel,) = leaf.values()
        kernel = kernel.T if layout == "torch" else kernel
        return jnp.einsum("btd,dnh->btnh", x, kernel.reshape(x.shape[-1], HEADS, -1))

    q = heads(X, params["q_b"])
    shared = X @ params["kv_a"]["kernel"]
    kv = heads(shared[..., :LATENT], params["kv_b"])
    k_rope = jnp.repeat(shared[..., None, LATENT:], HEADS, axis=2)
    nope = jnp.einsum("btnh,bsnh->bnts", q[..., :NOPE], kv[..., :NOPE]) * NOPE**-0.5
    return nope, attend(q[..., NOPE:], k_rope), kv[..., NOPE:]


def normed_logits(params):
    """Like Qwen3: RMS norm of each head, then rotation."""

    def norm(y, gains):
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True))
        return y * gains["scale"].reshape(1, 1, 1, -1)

    q = norm(project(X, params["query"], "merged", HEADS), params["q_norm"])
    return attend(q, norm(project(X, params["key"], "merged", 2), params["k_norm"]))


def normed():
    params, _ = grouped(kv_heads=2)
    gains = {f"{name}_norm": {"scale": 3 * normal((HEAD_DIM,), ord(name))} for name in "qk"}
    return params["attention"] | gains


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
