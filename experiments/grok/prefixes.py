"""Computes the transformer's forward pass with every distinct prefix only once.

In a causal model an activation depends only on its prefix, and rows of a table share prefixes: all
rows that begin with `a op` agree in two of four positions. A prefix tree holds the distinct
prefixes at each position as nodes. Positions with more distinct prefixes than a batch has rows have
one node per row instead. Two more savings are exact. The projections of the first layer are
computed once for each vocabulary entry. The last layer computes only keys and values at positions
before the last. Dropout masks differ between rows, so with dropout prefixes are shared only up to
the first mask.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.grok.model import MaxLogits, Transformer, attention_path
from experiments.grok.tasks import Table
from experiments.layers import Attention, Block, rotate


class PrefixTree(NamedTuple):
    """The distinct prefixes of a table at its leading positions.

    Attributes:
        tokens: The last token of every distinct prefix, `(nodes,)` for each shared position.
        parents: The node of the prefix that is one token shorter, `(nodes,)` for each shared
            position after the first. None if both positions have the same nodes.
        nodes: The node of every table row at the last shared position, `(rows,)`.
    """

    tokens: list[np.ndarray]
    parents: list[np.ndarray | None]
    nodes: np.ndarray

    @classmethod
    def of(cls, table: Table, batch: int) -> "PrefixTree":
        """Builds the tree of positions with at most as many distinct prefixes as a batch's rows."""
        tokens, parents, nodes = [], [], np.zeros(len(table.tokens), np.int32)
        for position in range(table.tokens.shape[1] - 1):
            prefixes, first, node = np.unique(
                table.tokens[:, : position + 1], axis=0, return_index=True, return_inverse=True
            )
            if len(prefixes) > batch:
                break
            parent = nodes[first]
            if position:
                parents.append(None if np.array_equal(parent, np.arange(len(parent))) else parent)
            tokens.append(prefixes[:, -1])
            nodes = node.reshape(-1).astype(np.int32)
        return cls(tokens, parents, nodes)

    def nodes_of(self, rows: jax.Array) -> list[jax.Array]:
        """Returns the node of each of these rows, `(batch,)` for each shared position."""
        if not self.tokens:
            return []
        found = [jnp.asarray(self.nodes)[rows]]
        for parents in reversed(self.parents):
            node = found[0] if parents is None else jnp.asarray(parents)[found[0]]
            found.insert(0, node)
        return found


def logits(
    model: Transformer,
    tree: PrefixTree,
    tokens: jax.Array,
    rows: jax.Array,
    *,
    dropout_rngs: nnx.Rngs | None = None,
    return_max_logits: bool = False,
) -> jax.Array | tuple[jax.Array, MaxLogits]:
    """Returns the value of `model(tokens[rows])`, `(batch, vocabulary)`.

    Args:
        model: The model.
        tree: The prefix tree of the whole table.
        tokens: The tokens of the table, `(rows of the table, positions)`.
        rows: The indices of the rows of the batch, `(batch,)`.
        dropout_rngs: The random streams of dropout, as in the model. The masks differ from the
            model's but have the same distribution.
        return_max_logits: Whether to return the largest attention logits of these rows too.
    """
    nodes = tree.nodes_of(rows)
    shared, positions = len(nodes), tokens.shape[1]
    level_tokens = [*tree.tokens, *(tokens[rows, t] for t in range(shared, positions))]
    parents = [*tree.parents, *[None] * (positions - 1 - len(tree.parents))]
    if shared:
        parents[shared - 1] = nodes[-1]

    vocabulary = model.embedding.embedding[...]
    x = [vocabulary[t] for t in level_tokens]
    max_logits: MaxLogits = {}
    for depth, block in enumerate(model.blocks):
        drop = functools.partial(
            block.dropout, deterministic=dropout_rngs is None, rngs=dropout_rngs
        )
        if depth == 0:
            qkv = [[y[t] for t in level_tokens] for y in _project(block, vocabulary)]
        else:
            qkv = [_split(y, x) for y in _project(block, jnp.concatenate(x))]
        final = depth + 1 == len(model.blocks)
        mixed, largest = _mix(block.attention, *qkv, parents, only_last=final)
        if return_max_logits:
            max_logits[attention_path(depth)] = _over_rows(largest, nodes)
        x = x[-1:] if final else x
        mixed = _split(block.attention.out(jnp.concatenate(mixed)), x)
        if dropout_rngs is not None and not final:
            x, mixed = _a_node_each_row(x, nodes), _a_node_each_row(mixed, nodes)
            nodes, parents = [], [None] * len(parents)
        flat = jnp.concatenate(x) + drop(jnp.concatenate(mixed))
        flat = flat + drop(block.feed_forward(block.feed_forward_norm(flat)))
        x = _split(flat, x)
    answers = model.head(model.norm(x[-1]))
    return (answers, max_logits) if return_max_logits else answers


def _a_node_each_row(x: list[jax.Array], nodes: list[jax.Array]) -> list[jax.Array]:
    """Expands the positions that are shared, `(nodes, ...)`, to one node per row."""
    return [*(y[node] for y, node in zip(x, nodes, strict=False)), *x[len(nodes) :]]


def _project(block: Block, x: jax.Array) -> list[jax.Array]:
    """Returns query, key and value of every node, each `(nodes, heads, head_dim)`."""
    x, attention = block.attention_norm(x), block.attention
    maps = (attention.query, attention.key, attention.value)
    return [attention.split_heads(linear(x)) for linear in maps]


def _split(x: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    return jnp.split(x, np.cumsum([len(y) for y in like])[:-1])


def _mix(
    attention: Attention,
    queries: list[jax.Array],
    keys: list[jax.Array],
    values: list[jax.Array],
    parents: list[Any],
    only_last: bool,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the attention of every node to its prefix, `(nodes, width)` for each position.

    Also returns the largest attention logits `(nodes, heads)` of all positions, even with
    `only_last`. XLA removes their computation if they are not used.
    """
    mixed, largest = [], []
    context = ()  # keys and values so far, each (nodes, positions, heads, head_dim)
    for position, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        k = rotate(k, position, attention.rope_base)
        own = k[:, None], v[:, None]
        if position:
            parent = parents[position - 1]
            before = context if parent is None else [y[parent] for y in context]
            own = [jnp.concatenate(pair, axis=1) for pair in zip(before, own, strict=True)]
        context = own
        q = rotate(q, position, attention.rope_base)
        scores = jnp.einsum("nhk,nthk->nth", q, context[0]) * q.shape[-1] ** -0.5
        largest.append(jax.lax.stop_gradient(scores).max(axis=1))
        if not only_last or position + 1 == len(queries):
            weights = jax.nn.softmax(scores, axis=1)
            mixed.append(jnp.einsum("nth,nthk->nhk", weights, context[1]).reshape(len(q), -1))
    return mixed, largest


def _over_rows(largest: list[jax.Array], nodes: list[jax.Array]) -> jax.Array:
    """Returns the maximum `(heads,)` over the nodes that are prefixes of these rows.

    The tree also has nodes of other rows, such as validation rows, which are excluded here.
    """
    return jnp.stack([x.max(axis=0) for x in _a_node_each_row(largest, nodes)]).max(axis=0)
