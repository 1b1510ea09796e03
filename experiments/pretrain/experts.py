"""Routed experts without dropped tokens: gate, dispatch, expert FFN, combine.

Shapes: B sequences, T positions, D width, E experts, K experts per token, F hidden size of an
expert. Each device along the expert axis has E / (size of the axis) experts, and serves the tokens
of all devices along it. Tokens are sorted by expert with a permutation and restored with its
inverse, also in the backward pass, so that no sum depends on the order in which a scatter adds.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.language.sharding import gather, platform, spec
from experiments.layers import gated
from experiments.pretrain.grouped import block_of, grouped_product

Exchange = Literal["gather", "ragged"]

_NOWHERE = 2**30


class Gated(NamedTuple):
    """The result of the gate.

    Attributes:
        ids: `(B, T, K)` int32, the experts of each token.
        weights: `(B, T, K)` float32, the weights of their outputs.
        load: `(E,)` int32, the number of tokens of each expert.
        balance: The sequence-wise balance loss before its factor, a scalar.
        entropy: The entropy of the normalised scores in nats, mean over tokens, a scalar.
    """

    ids: jax.Array
    weights: jax.Array
    load: jax.Array
    balance: jax.Array
    entropy: jax.Array


def gate(logits_BxTxE: jax.Array, bias_E: jax.Array, active: int, scale: float) -> Gated:
    """Computes a sigmoid gate with selection bias (DeepSeek-V3, 2412.19437, equations 12 to 20).

    The bias affects the choice of the top-k, but not the weights or the balance loss, whose top-k
    is of the scores alone (equation 18). Scores are normalised as logarithms, since all of them may
    be too small for float32.
    """
    log_scores = jax.nn.log_sigmoid(logits_BxTxE)
    biased = jax.lax.stop_gradient(jnp.exp(log_scores)) + bias_E[None, None]
    _, ids = jax.lax.top_k(biased, active)
    weights = scale * jax.nn.softmax(jnp.take_along_axis(log_scores, ids, axis=-1), axis=-1)
    log_share = jax.nn.log_softmax(log_scores, axis=-1)
    share = jnp.exp(log_share)
    _, unbiased = jax.lax.top_k(jax.lax.stop_gradient(logits_BxTxE), active)
    experts, length = share.shape[-1], share.shape[1]
    frequency = _count(unbiased, experts) * (experts / (active * length))
    balance = jnp.mean(jnp.sum(frequency * jnp.mean(share, axis=1), axis=-1))
    entropy = -jnp.mean(jnp.sum(share * log_share, axis=-1))
    load = jnp.sum(_count(ids, experts), axis=0)
    return Gated(ids, weights, load, balance, jax.lax.stop_gradient(entropy))


def _count(ids: jax.Array, experts: int) -> jax.Array:
    """Counts how often each sequence chooses each expert: `(B, T, K)` -> `(B, E)`."""
    return jnp.sum(jax.nn.one_hot(ids, experts, dtype=jnp.int32), axis=(1, 2))


def updated_bias(bias: jax.Array, load: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Returns the selection bias `(..., E)` after a step with load `(..., E)` (2408.15664).

    The bias of experts below the mean load rises by `rate`, that of others falls by it. Then the
    bias is shifted so that its mean does not change.
    """
    load = load.astype(jnp.float32)
    sign = jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    return bias + rate * (sign - jnp.mean(sign, axis=-1, keepdims=True))


class Experts(nnx.Module):
    """Routed experts, with stacked SwiGLU kernels `(E, D, F)` and `(E, F, D)`."""

    def __init__(self, experts: int, width: int, hidden: int, *, init, rngs: nnx.Rngs):
        self.gate = nnx.Param(init(rngs.params(), (experts, width, hidden), jnp.float32))
        self.up = nnx.Param(init(rngs.params(), (experts, width, hidden), jnp.float32))
        self.down = nnx.Param(init(rngs.params(), (experts, hidden, width), jnp.float32))

    def __call__(
        self, x_BxTxD: jax.Array, ids: jax.Array, weights: jax.Array, exchange: Exchange | None
    ) -> jax.Array:
        """Returns the weighted sum `(B, T, D)` of each token's experts.

        `exchange` is how tokens reach experts on other devices. "gather" sends all tokens of the
        group to each of its devices. "ragged" sends each token only to its experts' devices, which
        CPUs do not support. None takes the one that moves fewer bytes: "ragged" sends K copies of
        a token, "gather" as many as the group has devices.
        """
        mesh = jax.sharding.get_abstract_mesh()
        far = mesh.shape["expert"] > ids.shape[-1]
        exchange = exchange or ("ragged" if far and platform() != "cpu" else "gather")
        run = {"gather": _by_gather, "ragged": _by_ragged}[exchange]

        def local(x, ids, weights, *kernels):
            return run(x, ids, weights, *(gather(kernel, "fsdp") for kernel in kernels))

        tokens = spec("batch", None, None)
        up, down = spec("experts", None, "hidden"), spec("experts", "hidden", None)
        return jax.shard_map(
            local,
            in_specs=(tokens, tokens, tokens, up, up, down),
            out_specs=tokens,
            check_vma=False,
        )(x_BxTxD, ids, weights, self.gate[...], self.up[...], self.down[...])


def _by_gather(x, ids, weights, *kernels):
    """Gathers the group's tokens on each device, and sums the outputs of all devices' experts."""
    experts = kernels[0].shape[0]
    everyone = [
        jax.lax.all_gather(a, "expert", axis=0, tiled=True).reshape(-1, a.shape[-1])
        for a in (x, ids, weights)
    ]
    tokens, ids, weights = everyone
    ids = ids - jax.lax.axis_index("expert") * experts
    ids = jnp.where((ids >= 0) & (ids < experts), ids, _NOWHERE)
    order = sort_by_expert(ids, experts, block_of(platform()))
    share = ids.size // jax.lax.axis_size("expert")
    y = expert_ffn(dispatch(tokens, order), order, *kernels, expected=share)
    y = combine(y, order, weights)
    y = jax.lax.psum(y.astype(x.dtype), "tensor")
    y = y.reshape(-1, *x.shape[1:])
    return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)


def _by_ragged(x, ids, weights, *kernels):
    """Sends each token to the devices of its experts only, and the results back.

    The receive buffer has room for all tokens of the group, so none is dropped.
    """
    experts, devices = kernels[0].shape[0], jax.lax.axis_size("expert")
    me = jax.lax.axis_index("expert")
    tokens = x.reshape(-1, x.shape[-1])
    ids, weights = (a.reshape(-1, a.shape[-1]) for a in (ids, weights))
    order = sort_by_expert(ids, experts * devices, block=1)
    # sizes[s, d, e]: tokens that device s sends to expert e of device d.
    sizes = jax.lax.all_gather(order.sizes, "expert").reshape(devices, devices, experts)
    to = jnp.sum(sizes, axis=2)
    before = jnp.cumsum(to, axis=0) - to  # offsets of a sender's tokens at the receiver
    begin = jnp.cumsum(to, axis=1) - to  # and at the sender
    arrivals = devices * ids.size if devices > 1 else ids.size
    send = dispatch(tokens, order)
    received = jax.lax.ragged_all_to_all(
        send,
        jnp.zeros((arrivals, send.shape[1]), send.dtype),
        begin[me], to[me], before[me], to[:, me],
        axis_name="expert",
    )  # fmt: skip
    # Received tokens are sorted by (sender, expert).
    ends = jnp.cumsum(sizes[:, me].reshape(-1))
    segment = jnp.searchsorted(ends, jnp.arange(arrivals), side="right")
    expert = jnp.where(segment < devices * experts, segment % experts, _NOWHERE)
    local = sort_by_expert(expert[:, None], experts, block_of(platform()))
    ones = jnp.ones((arrivals, 1), jnp.float32)
    y = expert_ffn(dispatch(received, local), local, *kernels, expected=ids.size)
    y = combine(y, local, ones)
    y = jax.lax.psum(y.astype(x.dtype), "tensor")
    back = jax.lax.ragged_all_to_all(
        y,
        jnp.zeros_like(send),
        before[:, me], to[:, me], begin[:, me], to[me],
        axis_name="expert",
    )  # fmt: skip
    return combine(back, order, weights).astype(x.dtype).reshape(x.shape)


class Order(NamedTuple):
    """Pairs (token, expert) sorted by expert. Each expert's pairs begin at a multiple of a block.

    Attributes:
        position: `(tokens, K)` int32, the place of each pair; out of range for omitted pairs.
        pair: `(places,)` int32, the pair in each place; out of range for empty places.
        sizes: `(experts,)` int32, the number of pairs of each expert.
        padded: `(experts,)` int32, the number of places of each expert.
    """

    position: jax.Array
    pair: jax.Array
    sizes: jax.Array
    padded: jax.Array


def sort_by_expert(ids: jax.Array, experts: int, block: int) -> Order:
    """Sorts the pairs of `ids`, `(tokens, K)`, and omits those with an id of `experts` or more."""
    flat = jnp.minimum(ids.reshape(-1), experts)
    pairs = flat.size
    places = pairs if block == 1 else (-(-pairs // block) + experts) * block
    sorted_pairs = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(flat, length=experts + 1).astype(jnp.int32)
    padded = -(-sizes // block) * block
    shift = (jnp.cumsum(padded) - padded) - (jnp.cumsum(sizes) - sizes)
    owner = flat[sorted_pairs]
    place = jnp.arange(pairs, dtype=jnp.int32) + shift[owner]
    place = jnp.where(owner < experts, place, _NOWHERE).astype(jnp.int32)
    position = jnp.zeros(pairs, jnp.int32).at[sorted_pairs].set(place, unique_indices=True)
    pair = jnp.full(places, _NOWHERE, jnp.int32).at[place].set(sorted_pairs, mode="drop")
    return Order(position.reshape(ids.shape), pair, sizes[:-1], padded[:-1])


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `x[index]`, with zeros where the index is out of range."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(tokens: jax.Array, order: Order) -> jax.Array:
    """Copies tokens to their places: `(tokens, D)` -> `(places, D)`, zeros in empty places."""
    return _take(tokens, _token(order))


def _token(order: Order) -> jax.Array:
    return jnp.where(order.pair == _NOWHERE, _NOWHERE, order.pair // order.position.shape[1])


def _dispatch_backward(order: Order, g: jax.Array) -> tuple[jax.Array, None]:
    picked = _take(g, order.position).astype(jnp.float32)
    return jnp.sum(picked, axis=1).astype(g.dtype), None


dispatch.defvjp(lambda tokens, order: (dispatch(tokens, order), order), _dispatch_backward)


def combine(y: jax.Array, order: Order, weights: jax.Array) -> jax.Array:
    """Sums the weighted outputs of a token's experts in order: `(places, D)` -> `(tokens, D)`."""
    picked = _pick(y, order).astype(jnp.float32)
    return jnp.sum(picked * weights[..., None], axis=1)


@jax.custom_vjp
def _pick(y: jax.Array, order: Order) -> jax.Array:
    return _take(y, order.position)


def _pick_backward(order: Order, g: jax.Array) -> tuple[jax.Array, None]:
    return _take(g.reshape(-1, g.shape[-1]), order.pair), None


_pick.defvjp(lambda y, order: (_pick(y, order), order), _pick_backward)


def expert_ffn(
    x: jax.Array,
    order: Order,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    expected: int,
) -> jax.Array:
    """Applies its expert's SwiGLU to each place: `(places, D)` -> `(places, D)`.

    `expected` is the number of places in use if all experts have the same load.
    """
    product = functools.partial(
        grouped_product, group_sizes=order.padded, platform=platform(), expected=expected
    )
    return product(gated(product(x, gate), product(x, up)), down)
