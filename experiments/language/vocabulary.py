"""Token embeddings, and the cross-entropy of the output logits.

Both run on a mesh with the axes of `sharding`, with tables split over "tensor" and "fsdp".
"""

import jax
import jax.numpy as jnp

from experiments.language.sharding import gather, platform, spec

# Number of a device's tokens whose logits are in memory at once. On a GPU, where kernel launches
# cost time, as many more as fit into this many bytes of logits.
LOSS_TOKENS = 2048
_GPU_LOGITS = 2 << 30


def look_up(table: jax.Array, tokens_BxT: jax.Array, dtype: str) -> jax.Array:
    """Returns the embeddings of tokens, `(B, T, D)`. Each device reads its part of the table.

    So devices exchange tokens and embeddings, but neither the table nor its gradient, which is
    accumulated in the table's dtype.
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
    """Returns the number of a device's tokens whose logits are in memory at once.

    All chunks have this number of tokens; the last one is padded.
    """
    most = max(LOSS_TOKENS, _GPU_LOGITS // (4 * vocabulary) if platform == "gpu" else 0)
    return -(-count // -(-count // most))


def logits(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """Returns the logits of a kernel `(width, vocabulary)` and `(..., width)`, always float32."""
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def cross_entropy(
    kernel: jax.Array, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each target's loss in nats and whether it is the logits' argmax, `(B, T)` each.

    This is for evaluation, with only a chunk of logits in memory at a time. `weighted_loss` is to
    be differentiated.
    """

    def local(kernel, hidden, targets):
        whole = gather(kernel, "fsdp").astype(hidden.dtype)
        first = jax.lax.axis_index("tensor") * kernel.shape[1]

        def read(token):
            hidden, target = token
            of_token = logits(whole, hidden)
            normaliser, place = _read(of_token)
            return normaliser - _own(of_token, target), place == target

        flat = hidden.reshape(-1, hidden.shape[-1]), targets.ravel() - first
        tokens = loss_tokens(targets.size, kernel.shape[1], platform())
        results = jax.lax.map(read, flat, batch_size=tokens)
        return tuple(x.reshape(targets.shape) for x in results)

    return jax.shard_map(
        local,
        in_specs=(spec("width", "vocabulary"), spec("batch", None, None), spec("batch", None)),
        out_specs=(spec("batch", None), spec("batch", None)),
        check_vma=False,
    )(kernel, hidden, targets)


def weighted_loss(
    kernel: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *, tied: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the sum of weight × loss, to be differentiated, and the results of `cross_entropy`.

    With its gradient this takes three products of the size of the logits, not four: since the
    weights are known, the forward pass turns the logits into their gradient, in the products'
    dtype, and the backward pass need not compute them again. `tied` means that the kernel is the
    transposed embedding. It is then gathered in one stage, since XLA for TPUs lays out its gradient
    like the embedding's and would turn both stages of `gather` into all-reduces.
    """

    def local(kernel, hidden, targets, weights):
        if tied:
            whole = jax.lax.all_gather(kernel, "fsdp", axis=0, tiled=True)
        else:
            whole = gather(kernel, "fsdp")
        whole = whole.astype(hidden.dtype)
        first = jax.lax.axis_index("tensor") * kernel.shape[1]
        flat = hidden.reshape(-1, hidden.shape[-1]), targets.ravel() - first, weights.ravel()
        total, results = _weighted_loss(whole, *flat)
        return total[None], tuple(x.reshape(targets.shape) for x in results)

    batch = spec("batch", None)
    totals, results = jax.shard_map(
        local,
        in_specs=(spec("width", "vocabulary"), spec("batch", None, None), batch, batch),
        out_specs=(spec("batch"), (batch, batch)),
        check_vma=False,
    )(kernel, hidden, targets, weights)
    return jnp.sum(totals), results


@jax.custom_vjp
def _weighted_loss(kernel, hidden, targets, weights):
    """Computes `weighted_loss` for a device's tokens `(T, D)` and its part of the vocabulary."""
    return _weighted_loss_forward(kernel, hidden, targets, weights)[0]


def _weighted_loss_forward(kernel, hidden, targets, weights):
    size = loss_tokens(len(targets), kernel.shape[1], platform())
    count = -(-len(targets) // size)

    def cut(x):
        """Reshapes `(T, ...)` to `(chunks, t, ...)`, padded with zeros."""
        rest = ((0, count * size - len(x)), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, rest).reshape(count, size, *x.shape[1:])

    def add(of_kernel, chunk):
        hidden, targets, weights = chunk
        chunk_logits = logits(kernel, hidden)
        normalisers, first = jax.vmap(_read)(chunk_logits)
        losses = normalisers - jax.vmap(_own)(chunk_logits, targets)
        of_logits = jax.vmap(_token_loss_gradient)(chunk_logits, normalisers, targets, weights)
        of_logits = of_logits.astype(hidden.dtype)
        of_kernel += jax.lax.dot_general(
            hidden, of_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return of_kernel, (losses, first == targets, of_logits @ kernel.T)

    zeros = jnp.zeros(kernel.shape, jnp.float32)
    of_kernel, results = jax.lax.scan(add, zeros, tuple(map(cut, (hidden, targets, weights))))
    losses, correct, of_hidden = (x.reshape(-1, *x.shape[2:])[: len(targets)] for x in results)
    gradients = of_kernel.astype(kernel.dtype), of_hidden
    return (jnp.sum(weights * losses), (losses, correct)), gradients


def _weighted_loss_backward(gradients, g):
    g = jax.lax.psum(g[0], "tensor")  # each device has a share of the loss that all of them return
    return *((g * x).astype(x.dtype) for x in gradients), None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _token_loss_gradient(logits, normaliser, target, g):
    own = jnp.arange(logits.size) == target
    return g * (jnp.exp(logits - normaliser) - own)


def _own(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the target's logit."""
    here = (target >= 0) & (target < logits.size)
    return jax.lax.psum(jnp.where(here, logits[target], 0), "tensor")


def _read(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a token's log-sum-exp and the global index of its first largest logit."""
    read = {"gpu": _in_one_pass, "tpu": _in_two_passes}.get(platform(), _in_passes)
    largest, total, place = read(logits)
    of_all = jax.lax.pmax(largest, "tensor")
    total = jax.lax.psum(total * jnp.exp(largest - of_all), "tensor")
    begin, beyond = (f("tensor") * logits.size for f in (jax.lax.axis_index, jax.lax.axis_size))
    first = jax.lax.pmin(jnp.where(largest == of_all, begin + place, beyond), "tensor")
    return jnp.log(total) + of_all, first - begin


def _in_passes(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest logit, the sum of exponentials relative to it, and its first index."""
    largest = jnp.max(logits)
    places = jnp.where(logits == largest, jnp.arange(logits.size), logits.size)
    return largest, jnp.sum(jnp.exp(logits - largest)), jnp.min(places)


def _in_two_passes(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Does the same in two passes; the TPU compiler would add a pass for the index."""
    largest = jnp.max(logits)
    places = jnp.where(logits == largest, jnp.arange(logits.size), logits.size)

    def join(a, b):
        return a[0] + b[0], jnp.minimum(a[1], b[1])

    nothing = jnp.zeros([], logits.dtype), jnp.int32(logits.size)
    total, place = jax.lax.reduce((jnp.exp(logits - largest), places), nothing, join, (0,))
    return largest, total, place


def _in_one_pass(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Does the same in one pass, which is slower than three passes on a CPU."""

    def join(a, b):
        (largest, total, place), (other, more, its) = a, b
        least = jnp.exp(-jnp.abs(largest - other))
        before = (largest > other) | ((largest == other) & (place < its))
        summed = jnp.where(largest > other, total + more * least, total * least + more)
        return jnp.maximum(largest, other), summed, jnp.where(before, place, its)

    each = logits, jnp.ones_like(logits), jnp.arange(logits.size)
    nothing = jnp.finfo(logits.dtype).min, jnp.zeros([], logits.dtype), jnp.int32(logits.size)
    return jax.lax.reduce(each, nothing, join, (0,))
