"""What has the size of the vocabulary: embeddings of tokens, and the cross-entropy of logits.

Both run on a mesh with the axes of `sharding`: its table is split over "tensor" and "fsdp".
"""

import jax
import jax.numpy as jnp

from experiments.language.sharding import gather, platform, spec

# Tokens of a device whose logits are held at once; on a GPU, where each run of a kernel costs, as
# many more as this memory of logits holds.
LOSS_TOKENS = 2048
_GPU_LOGITS = 2 << 30


def look_up(table: jax.Array, tokens_BxT: jax.Array, dtype: str) -> jax.Array:
    """Embeddings `(B, T, D)`. Each device finds all tokens' entries in its part of the table.

    So tokens and embeddings travel, and neither the table nor its gradient, which adds up in the
    table's own dtype.
    """

    def local(table, tokens):
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        tokens -= jax.lax.axis_index("tensor") * table.shape[0]
        here = (tokens >= 0) & (tokens < table.shape[0])
        columns = jnp.where(here[..., None], table[tokens], 0).astype(dtype)
        columns = jax.lax.psum(columns, "tensor")
        return jax.lax.all_to_all(columns, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        local,
        in_specs=(spec("vocabulary", "width"), spec("batch", None)),
        out_specs=spec("batch", None, None),
        check_vma=False,
    )(table, tokens_BxT)


def loss_tokens(count: int, vocabulary: int, platform: str) -> int:
    """Of how many of its tokens a device holds the logits, of its part of the vocabulary, at once.

    All chunks have as many, and the last one is filled up.
    """
    most = max(LOSS_TOKENS, _GPU_LOGITS // (4 * vocabulary) if platform == "gpu" else 0)
    return -(-count // -(-count // most))


def logits(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """Of `(width, vocabulary)` and `(..., width)`, float32 whatever the dtype of these."""
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def cross_entropy(
    kernel: jax.Array, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of each target, `(B, T)`: its loss in nats, and whether it is the argmax of the logits.

    Few logits exist at a time. A device gathers the kernel once for all its tokens, adds up its
    gradient in float32 and scatters it once.
    """

    def local(kernel, hidden, targets):
        whole = gather(kernel, "fsdp").astype(jnp.float32)
        first = jax.lax.axis_index("tensor") * kernel.shape[1]

        def loss(token):
            hidden, target = token
            of_token = logits(whole.astype(hidden.dtype), hidden)
            seen = jax.lax.stop_gradient(of_token)
            return token_loss(of_token, target - first), _read(seen)[1] == target - first

        flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        tokens = loss_tokens(targets.size, kernel.shape[1], platform())
        if targets.size == tokens:
            found = jax.vmap(loss)(flat)
        else:
            found = jax.lax.map(jax.checkpoint(loss), flat, batch_size=tokens)
        return tuple(x.reshape(targets.shape) for x in found)

    return jax.shard_map(
        local,
        in_specs=(spec("width", "vocabulary"), spec("batch", None, None), spec("batch", None)),
        out_specs=(spec("batch", None), spec("batch", None)),
        check_vma=False,
    )(kernel, hidden, targets)


def weighted_loss(
    kernel: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *, tied: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sum of weight × loss, to be differentiated, and what `cross_entropy` returns.

    With its gradient it takes three products of the size of the logits, where `cross_entropy` takes
    four: the weights are there when the logits are, so that these become their own gradient at
    once, in the dtype of the products, and are not made again. `tied` tells that the kernel is the
    embedding, transposed: XLA for TPUs lays its gradient out as that of the embedding, and would
    make all-reduces of both stages of `gather`, where one is beside computation.
    """

    def local(kernel, hidden, targets, weights):
        if tied:
            whole = jax.lax.all_gather(kernel, "fsdp", axis=0, tiled=True)
        else:
            whole = gather(kernel, "fsdp")
        whole = whole.astype(hidden.dtype)
        first = jax.lax.axis_index("tensor") * kernel.shape[1]
        flat = hidden.reshape(-1, hidden.shape[-1]), targets.ravel() - first, weights.ravel()
        total, found = _weighted_loss(whole, *flat)
        return total[None], tuple(x.reshape(targets.shape) for x in found)

    batch = spec("batch", None)
    totals, found = jax.shard_map(
        local,
        in_specs=(spec("width", "vocabulary"), spec("batch", None, None), batch, batch),
        out_specs=(spec("batch"), (batch, batch)),
        check_vma=False,
    )(kernel, hidden, targets, weights)
    return jnp.sum(totals), found


@jax.custom_vjp
def _weighted_loss(kernel, hidden, targets, weights):
    """Of a device's tokens `(T, D)` and, along "tensor", its part of the vocabulary."""
    return _weighted_loss_forward(kernel, hidden, targets, weights)[0]


def _weighted_loss_forward(kernel, hidden, targets, weights):
    size = loss_tokens(len(targets), kernel.shape[1], platform())
    count = -(-len(targets) // size)

    def cut(x):
        """`(T, ...)` as `(chunks, t, ...)`, filled up with zeros."""
        rest = ((0, count * size - len(x)), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, rest).reshape(count, size, *x.shape[1:])

    def add(of_kernel, chunk):
        hidden, targets, weights = chunk
        made = logits(kernel, hidden)
        normalisers, first = jax.vmap(_read)(made)
        losses = normalisers - jax.vmap(_own)(made, targets)
        of_logits = jax.vmap(_token_loss_gradient)(made, normalisers, targets, weights)
        of_logits = of_logits.astype(hidden.dtype)
        of_kernel += jax.lax.dot_general(
            hidden, of_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return of_kernel, (losses, first == targets, of_logits @ kernel.T)

    zeros = jnp.zeros(kernel.shape, jnp.float32)
    of_kernel, found = jax.lax.scan(add, zeros, tuple(map(cut, (hidden, targets, weights))))
    losses, correct, of_hidden = (x.reshape(-1, *x.shape[2:])[: len(targets)] for x in found)
    gradients = of_kernel.astype(kernel.dtype), of_hidden
    return (jnp.sum(weights * losses), (losses, correct)), gradients


def _weighted_loss_backward(gradients, g):
    g = jax.lax.psum(g[0], "tensor")  # each device has a share of the loss that all of them return
    return *((g * x).astype(x.dtype) for x in gradients), None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


@jax.custom_vjp
def token_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy of one token; along "tensor" each device has some of the vocabulary's logits.

    Its own derivative, `softmax - one_hot`, takes one pass where that of its parts takes several.
    """
    return _token_loss_forward(logits, target)[0]


def _token_loss_forward(logits, target):
    normaliser, _ = _read(logits)
    return normaliser - _own(logits, target), (logits, normaliser, target)


def _token_loss_backward(saved, g):
    logits, normaliser, target = saved
    g = jax.lax.psum(g, "tensor")  # each device has a share of the loss that all of them return
    return _token_loss_gradient(logits, normaliser, target, g), None


def _token_loss_gradient(logits, normaliser, target, g):
    own = jnp.arange(logits.size) == target
    return g * (jnp.exp(logits - normaliser) - own)


token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def _own(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The target's logit."""
    here = (target >= 0) & (target < logits.size)
    return jax.lax.psum(jnp.where(here, logits[target], 0), "tensor")


def _read(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token's log-sum-exp, and which of its largest logits is first, as targets are counted."""
    read = {"gpu": _in_one_pass, "tpu": _in_two_passes}.get(platform(), _in_passes)
    largest, total, place = read(logits)
    of_all = jax.lax.pmax(largest, "tensor")
    total = jax.lax.psum(total * jnp.exp(largest - of_all), "tensor")
    begin, beyond = (f("tensor") * logits.size for f in (jax.lax.axis_index, jax.lax.axis_size))
    first = jax.lax.pmin(jnp.where(largest == of_all, begin + place, beyond), "tensor")
    return jnp.log(total) + of_all, first - begin


def _in_passes(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest logit, the sum of exponentials below it, and where it is first."""
    largest = jnp.max(logits)
    places = jnp.where(logits == largest, jnp.arange(logits.size), logits.size)
    return largest, jnp.sum(jnp.exp(logits - largest)), jnp.min(places)


def _in_two_passes(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same; the compiler of TPUs would read once more for the place of the largest."""
    largest = jnp.max(logits)
    places = jnp.where(logits == largest, jnp.arange(logits.size), logits.size)

    def join(a, b):
        return a[0] + b[0], jnp.minimum(a[1], b[1])

    nothing = jnp.zeros([], logits.dtype), jnp.int32(logits.size)
    total, place = jax.lax.reduce((jnp.exp(logits - largest), places), nothing, join, (0,))
    return largest, total, place


def _in_one_pass(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same; a CPU takes longer to do it at once than to read thrice."""

    def join(a, b):
        (largest, total, place), (other, more, its) = a, b
        least = jnp.exp(-jnp.abs(largest - other))
        before = (largest > other) | ((largest == other) & (place < its))
        summed = jnp.where(largest > other, total + more * least, total * least + more)
        return jnp.maximum(largest, other), summed, jnp.where(before, place, its)

    each = logits, jnp.ones_like(logits), jnp.arange(logits.size)
    nothing = jnp.finfo(logits.dtype).min, jnp.zeros([], logits.dtype), jnp.int32(logits.size)
    return jax.lax.reduce(each, nothing, join, (0,))
