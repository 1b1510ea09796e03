"""The transformer's forward pass with every distinct prefix computed once.

In a causal model an activation depends on its prefix alone. The rows of a table share theirs: all
that start with `a op` agree in two of four positions. A prefix tree gives each position the nodes
that are distinct there: the table's own prefixes where these are fewer than the rows of a batch,
and one node a row from then on. Two more savings are exact: the first layer's projections are made
once a vocabulary entry, and in the last layer only the final position is needed past its keys and
values. Dropout is drawn row by row, so with it prefixes are shared up to its first mask.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.grok.model import Block, MaxLogits, Transformer, attention_path
from experiments.grok.tasks import Table
from experiments.layers import Attention, rotate


class PrefixTree(NamedTuple):
    """The distinct prefixes of a table at its leading positions.

    Attributes:
        tokens: for each shared position, the last token of every distinct prefix `(nodes,)`.
        parents: for each shared position after the first, the node of the prefix one token
            shorter `(nodes,)`; None where the nodes are the same.
        nodes: every table row's node at the last shared position `(rows,)`.
    """

    tokens: list[np.ndarray]
    parents: list[np.ndarray | None]
    nodes: np.ndarray

    @classmethod
    def of(cls, table: Table, batch: int) -> "PrefixTree":
        """Shares the positions that have at most as many distinct prefixes as a batch has rows."""
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
        """For each shared position, the node of every one of these rows, `(batch,)`."""
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
    """What `model(tokens[rows])` gives, `(batch, vocabulary)`.

    Args:
        model: the plain model.
        tree: of the whole table.
        tokens: `(rows of the table, positions)`.
        rows: `(batch,)` row numbers.
        dropout_rngs: as in the model: of training with dropout. The masks are other ones, of the
            same distribution.
        return_max_logits: as in the model: the largest attention logits of these rows, too.
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
    """Levels `(nodes, ...)`, those that are shared as `(batch, ...)` too."""
    return [*(y[node] for y, node in zip(x, nodes, strict=False)), *x[len(nodes) :]]


def _project(block: Block, x: jax.Array) -> list[jax.Array]:
    """Query, key and value of every node, each `(nodes, heads, head_dim)`."""
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
    """Attention of every node to its prefix; for each position `(nodes, width)`.

    Also the largest attention logits `(nodes, heads)`, of all positions even with `only_last`: XLA
    drops them where they are not used.
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
    """The maximum `(heads,)` over the nodes that are prefixes of these rows.

    The tree has those of the whole table, validation rows too, which the batch may not have.
    """
    return jnp.stack([x.max(axis=0) for x in _a_node_each_row(largest, nodes)]).max(axis=0)
