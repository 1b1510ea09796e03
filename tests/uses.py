"""Functions that use parameters in known ways, and what each use is.

A case is a function of params and inputs. Of each leaf its decorator has the shape and the expected
route, in the notation of `trees`. `h` is an activation behind a matrix and before another one, so
that neither the first nor the last matrix is meant.
"""

import jax
import jax.numpy as jnp
from jax import lax

CASES = {}
X = jax.ShapeDtypeStruct((4, 6), jnp.float32)
IDS = jax.ShapeDtypeStruct((4,), jnp.int32)
KEY = jax.eval_shape(lambda: jax.random.key(0))
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32)


def case(*args, wrap=True, **leaves):
    """Between a first matrix and a last one of width 6, unless `wrap` is off."""

    def add(function):
        def between(p, x, *rest):
            return function(p, jnp.tanh(x @ p["first"]), *rest) @ p["last"]

        tree = leaves | ({"first": "6 6 -", "last": "6 9 -"} if wrap else {})
        CASES[function.__name__] = between if wrap else function, tree, args or (X,)
        return function

    return add


# --- Matrices and what their axes are ---


@case(w="6 6 io")
def matrix(p, h):
    return h @ p["w"]


@case(w="6 6 oi")
def output_first(p, h):
    return jax.vmap(lambda x: p["w"] @ x)(h)


@case(q="6 2 3 ioo", o="2 3 6 iio", b="2 3 -")
def heads(p, h):
    return jnp.einsum("thk,hkd->td", jnp.einsum("td,dhk->thk", h, p["q"]) + p["b"], p["o"])


@case(w="6 18 io", o="6 6 io")
def fused(p, h):
    q, k, v = jnp.split((h @ p["w"]).reshape(4, 2, 9), 3, -1)
    return ((q * k + v).reshape(4, 6)) @ p["o"]


@case(w="6 12 io")
def sliced_halves(p, h):
    return (h @ p["w"][:, :6]) * jax.nn.silu(h @ p["w"][:, 6:])


@case(a="6 6 io", b="6 6 io", c="6 9 io")
def in_another_order(p, h):
    order = jnp.array([2, 0, 1, 5, 4, 3])
    h = jnp.tanh(jnp.tanh(h @ p["a"][order]) @ p["b"][:, order])
    return h @ jnp.take(p["c"], order, axis=1)


@case(w="6 6 io")
def reshaped_there_and_back(p, h):
    w = p["w"].reshape(2, 3, 6).transpose(2, 0, 1).reshape(6, 6).T
    return jax.jit(lambda x: x @ w.astype(jnp.float32))(h)


@case(q="6 6 io", k="6 6 io", v="6 6 io")
def concatenated(p, h):
    q, k, v = jnp.split(h @ jnp.concatenate([p["q"], p["k"], p["v"]], 1), 3, -1)
    return jax.nn.softmax(q @ k.T) @ v


@case(w="3 6 6 bio")
def scanned(p, h):
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), h, p["w"])[0]


@case(w="6 3 6 ibo")
def scanned_along_axis_1(p, h):
    return lax.scan(lambda x, w: (x + x @ w, None), h, p["w"].swapaxes(0, 1))[0]


@case(w="2 3 6 6 bbio", g="2 3 6 -")
def scanned_twice(p, h):
    def inner(x, layer):
        return x + (x * layer["g"]) @ layer["w"], None

    stacks = {"w": p["w"], "g": p["g"]}
    return lax.scan(lambda x, block: (lax.scan(inner, x, block)[0], None), h, stacks)[0]


@case(w="3 6 6 bio")
def indexed_in_a_loop(p, h):
    return lax.fori_loop(0, 3, lambda i, x: x + x @ p["w"][i], h)


@case(w="3 6 6 bio")
def indexed_layer_by_layer(p, h):
    for i in range(3):
        h = h + h @ p["w"][i]
    return h


@case(w="6 6 io", v="6 6 io")
def a_while_loop(p, h):
    return lax.while_loop(lambda c: jnp.sum(c @ p["v"]) < 9, lambda c: c + c @ p["w"], h) @ p["v"]


@case(w="6 6 io", v="6 6 io")
def branches(p, h):
    return lax.cond(h[0, 0] > 0, lambda x: x @ p["w"], lambda x: x @ p["v"] + 1, h)


@case(w="6 6 io", v="6 6 io")
def derivatives_of_ones_own(p, h):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    @jax.custom_jvp
    def other(x, w):
        return jax.nn.gelu(x) @ w

    other.defjvp(lambda primals, tangents: (other(*primals), other(*tangents)))
    return jax.checkpoint(lambda x: other(product(x, p["w"]), p["v"]))(h)


@case(w="4 6 6 bio")
def an_ensemble(p, h):
    return jax.vmap(lambda w, x: x @ w)(p["w"], h)


@case(w="6 6 io")
def a_gradient_within(p, h):
    return jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["w"])))(h)


@case(w="6 6 6 iio")
def bilinear(p, h):
    return jnp.einsum("ti,tj,ijk->tk", h, h, p["w"])


@case(w="6 6 3 iob")
def spectral_modes(p, h):
    modes = jnp.fft.rfft(h, axis=0)
    mixed = jnp.einsum("mi,iom->mo", modes, p["w"].astype(jnp.complex64))
    return jnp.fft.irfft(mixed, 4, axis=0)


@case(re="6 6 io", im="6 6 io")
def a_complex_pair(p, h):
    return jnp.real(h @ (p["re"] + 1j * p["im"]))


# --- Experts ---


@case(w="3 6 6 bio", r="6 3 io")
def ragged_experts(p, h):
    order = jnp.argsort(jnp.argmax(h @ p["r"], -1))
    sizes = jnp.bincount(jnp.argmax(h @ p["r"], -1), length=3)
    return lax.ragged_dot(h[order], p["w"], sizes)[jnp.argsort(order)]


@case(w="3 6 6 bio", r="6 3 io")
def experts_by_gather(p, h):
    weight, ids = lax.top_k(jax.nn.softmax(h @ p["r"]), 2)
    return jnp.einsum("td,tkdf,tk->tf", h, p["w"][ids], weight)


@case(X, IDS, w="3 6 6 bio")
def experts_by_one_hot(p, h, ids):
    chosen = jnp.einsum("te,edf->tdf", jax.nn.one_hot(ids, 3), p["w"])
    return jnp.einsum("td,tdf->tf", h, chosen)


@case(w="3 6 6 bio", r="6 3 io")
def experts_by_dispatch(p, h):
    mask = jax.nn.one_hot(jnp.argmax(h @ p["r"], -1), 3)
    sent = jnp.einsum("td,te->etd", h, mask)
    return jnp.einsum("etf,te->tf", jnp.einsum("etd,edf->etf", sent, p["w"]), mask)


@case(w="3 6 6 bio", v="3 6 6 bio", r="6 3 io")
def all_experts_for_every_token(p, h):
    y = jnp.einsum("tef,efd->ted", jax.nn.silu(jnp.einsum("td,edf->tef", h, p["w"])), p["v"])
    return jnp.einsum("ted,te->td", y, jax.nn.softmax(h @ p["r"]))


@case(q="2 6 3 oio", kv="2 2 6 3 boio", u="2 6 6 bio", t="2 6 6 boi")
def keys_and_values_in_one(p, h):
    q = jnp.einsum("td,hdk->thk", h, p["q"])
    k, v = jnp.unstack(jnp.einsum("td,chdk->cthk", h, p["kv"]))
    scores = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
    h = jnp.einsum("hts,shk->thk", scores, v).reshape(4, 6)
    up = jnp.einsum("td,gdf->tgf", h, p["u"])
    h = jax.nn.silu(up[:, 0]) * up[:, 1]
    up = jnp.einsum("td,gfd->tgf", h, p["t"])
    return jax.nn.silu(up[:, 0]) * up[:, 1]


# --- Lookups ---


@case(IDS, wrap=False, t="9 6 -", pos="4 6 -", w="6 6 io", head="6 9 -")
def tokens_and_positions(p, ids):
    x = p["t"][ids] * 2.5 + p["pos"][jnp.arange(4)]
    return (x + x @ p["w"]) @ p["head"]


@case(IDS, wrap=False, t="9 6 -", w="6 6 io")
def tied(p, ids):
    x = jax.nn.one_hot(ids, 9) @ p["t"]
    return (x @ p["w"]) @ p["t"].T


@case(X, IDS, t="9 6 -")
def rows_at_a_traced_place(p, h, ids):
    return h + lax.dynamic_slice_in_dim(p["t"], ids[0], 4)


# --- Vectors, whatever their shape ---


@case(gain="6 -", bias="1 6 -", mix="4 6 -", table="4 4 -", decay="6 3 -", scalar="-")
def entry_by_entry(p, h):
    h = h * p["gain"] + p["bias"] + p["mix"] * p["scalar"]
    h = jax.nn.softmax(h @ h.T + p["table"]) @ h
    decay = jnp.exp(h[..., None] * -jnp.exp(p["decay"]))
    return jnp.einsum("tdn,tn->td", decay, h[:, :3])


@case(gain="2 3 -", bias="2 3 -")
def a_norm_of_heads(p, h):
    h = h.reshape(4, 2, 3)
    h = (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True)) * p["gain"]
    return (h + p["bias"]).reshape(4, 6)


@case(a="2 3 -", gate="6 1 -")
def contracted_to_numbers(p, h):
    score = jnp.einsum("thk,hk->th", h.reshape(4, 2, 3), p["a"])
    return h * score.sum(-1, keepdims=True) * (h @ p["gate"])


@case(token="1 6 -", state="6 -", w="6 6 io")
def learned_tokens_and_states(p, h):
    h = jnp.concatenate([p["token"], h])[:4]
    return h + lax.scan(lambda s, x: (jnp.tanh(x + s @ p["w"]),) * 2, p["state"], h)[1]


@case(queries="4 6 -", q="6 6 io", b="6 -", v="6 6 io")
def learned_queries(p, h):
    queries = jnp.broadcast_to(p["queries"], (2, 4, 6)) @ p["q"] + p["b"]
    return (jax.nn.softmax(queries @ h.T) @ (h @ p["v"])).sum(0)


# --- Products of parameters ---


@case(w="6 6 io", a="6 2 io", b="2 6 io")
def merged_adapters(p, h):
    return h @ (p["w"] + 0.5 * p["a"] @ p["b"])


@case(w="6 6 io", a="6 2 io", b="2 6 io")
def adapters_beside(p, h):
    return h @ p["w"] + (h @ p["a"]) @ p["b"]


@case(v="6 6 io", g="6 -")
def weight_norm(p, h):
    return h @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True))


@case(X, jax.ShapeDtypeStruct((6,), jnp.float32), v="6 6 io")
def spectral_norm(p, h, u):
    v = u @ p["v"]
    v = v / jnp.linalg.norm(v)
    sigma = u @ p["v"] @ v
    return h @ (p["v"] / sigma)


@case(q="6 2 3 ioo", k="6 2 3 obi")
def absorbed(p, h):
    both = jnp.einsum("dhn,chn->dhc", p["q"], p["k"])
    return jnp.einsum("td,dhc->thc", h, both).sum(1)


# --- Convolutions ---


def _conv(x, w, groups=1, spec=("NHWC", "HWIO", "NHWC"), **options):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups, **options
    )


@case(IMAGES, w="3 3 6 6 iiio", b="6 -")
def convolution(p, h):
    return _conv(h, p["w"]) + p["b"]


@case(IMAGES, w="6 6 3 3 oiii")
def convolution_output_first(p, h):
    return _conv(h, p["w"], spec=("NHWC", "OIHW", "NHWC"))


@case(IMAGES, w="3 3 1 6 -")
def depthwise(p, h):
    return _conv(h, p["w"], groups=6)


@case(IMAGES, w="3 3 2 6 iiio/3")
def grouped(p, h):
    return _conv(h, p["w"], groups=3)


@case(IMAGES, w="2 3 3 6 6 biiio")
def convolutions_of_an_ensemble(p, h):
    return jax.vmap(_conv)(h[:, None], p["w"])[:, 0]


@case(IMAGES, w="3 3 6 6 iiio")
def standardised(p, h):
    w = p["w"]
    return _conv(h, (w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-5))


@case(IMAGES, w="3 3 6 6 iiio", s="6 6 io")
def modulated(p, h):
    style = h.mean((1, 2)) @ p["s"]
    w = p["w"] * style[:, None, None, :, None]
    w = w * lax.rsqrt(jnp.sum(w**2, (1, 2, 3), keepdims=True))
    return jax.vmap(lambda x, w: _conv(x[None], w)[0])(h, w)


@case(w="2 3 2 6 bbio")
def unshared_windows(p, h):
    patches = h.reshape(4, 2, 3, 1).repeat(2, -1)
    return jnp.einsum("tabi,abio->tabo", patches, p["w"]).sum((1, 2))


# --- Ends, and what is no use ---


@case(X, IDS, wrap=False, a="6 8 -", b="8 8 io", c="8 3 -")
def a_loss(p, x, labels):
    logits = jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    decay = sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return losses.mean() + 0.1 * decay


@case(X, wrap=False, a="6 8 -", b="8 8 io", pi="8 3 -", v="8 1 -", u="8 -")
def several_heads(p, x):
    h = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])
    return h @ p["pi"], h @ p["v"], h @ p["u"]


@case(X, wrap=False, xh="6 8 -", hh="8 8 io", out="8 3 -")
def recurrent(p, x):
    def step(h, x):
        return jnp.tanh(x @ p["xh"] + h @ p["hh"]), None

    return lax.scan(step, jnp.zeros(8), x)[0] @ p["out"]


@case(X, KEY, w="6 6 io", b="6 -")
def dropout(p, h, key):
    mask = jax.random.bernoulli(key, 0.5, h.shape)
    return jnp.where(mask, h @ p["w"] + p["b"], 0) / 0.5
