"""Llama and Qwen as functions of plain params, for rows with one or several texts.

The families are Llama 3 (2407.21783), Qwen2.5 (2412.15115), whose queries, keys and values have
biases, and Qwen3 (2505.09388), with an RMSNorm of queries and keys.

Params are nested dicts of float32 arrays; those of the layers are stacked, `(layers, ...)`. As in
pretraining, `sharding` gives their shardings, and the functions run under `jax.set_mesh`.

Shapes: B rows, T positions, D hidden, N query heads, K key heads, H head_dim.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import muon_jax
from experiments.finetune.architecture import Architecture
from experiments.finetune.config import Lora
from experiments.finetune.lora import adapt
from experiments.language import sharding, vocabulary
from experiments.language.attention import KEEP_KERNELS, GroupedQuery
from experiments.language.decoder import Cache, Layer, graph
from experiments.language.packed_attention import texts
from experiments.language.tensors import Dtype
from experiments.layers import RMSNorm, SwiGLU

Params = dict[str, Any]


# Models of at most this many layers are unrolled, since a loop copies kernels out of the stack.
_UNROLLED = 8


class Losses(NamedTuple):
    """The result of a forward pass for each target."""

    loss: jax.Array  # cross-entropy in nats, `(B, T)` float32; 0 where there is no target
    correct: jax.Array  # whether the target has the largest logit, `(B, T)` bool
    # Largest attention logits `(layers, N)` by the path of the attention, as for
    # `muon_jax.qk_clip`, without padding; empty if not requested.
    max_logits: dict[str, jax.Array]


class LanguageModel:
    """The forward pass; params are float32 masters, cast before the layers.

    Args:
        architecture: The architecture of the model.
        dtype: The dtype of the computation, except norms, angles, softmax and logits, which are
            float32.
        remat: Whether to store only the layers' inputs and the results of attention kernels, and
            recompute the rest in the backward pass.
        lora: Which kernels have adapters.
    """

    def __init__(
        self,
        architecture: Architecture,
        dtype: Dtype = "bfloat16",
        remat: bool = True,
        lora: Lora = Lora(),  # noqa: B008 - it is frozen
    ):
        self.architecture, self.dtype, self.remat = architecture, dtype, remat
        self._layer = graph(functools.partial(_layer, architecture, lora))
        norm = functools.partial(RMSNorm, architecture.hidden, epsilon=architecture.epsilon)
        self._norm = graph(lambda rngs: norm(rngs=rngs))

    def hidden(
        self,
        params: Params,
        tokens_BxT: jax.Array,
        segments_BxT: jax.Array | None = None,
        *,
        max_logits: bool = False,
        threshold: float | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the input of the head, `(B, T, D)`, and `Losses.max_logits`.

        Args:
            params: The params.
            tokens_BxT: The tokens, int32.
            segments_BxT: int32. Neighbouring positions with equal numbers are one text, which does
                not see others and whose positions begin at 0. 0 is padding. None means one text per
                row.
            max_logits: Whether to return the largest attention logits.
            threshold: As for `causal_attention`.

        Raises:
            ValueError: If the segments have another shape than the tokens.
        """
        positions = jnp.arange(tokens_BxT.shape[1])
        if segments_BxT is not None:
            if segments_BxT.shape != tokens_BxT.shape:
                raise ValueError(
                    "Segments must have the shape of the tokens, "
                    f"{tokens_BxT.shape}; got {segments_BxT.shape}."
                )
            segments_BxT, positions = texts(segments_BxT)

        def layer(x_BxTxD, kernels):
            x_BxTxD, (largest, _) = nnx.merge(self._layer, kernels)(
                x_BxTxD, threshold if max_logits else math.inf, segments_BxT, positions
            )
            return x_BxTxD, largest if max_logits else None

        x_BxTxD = vocabulary.look_up(params["embedding"]["embedding"], tokens_BxT, self.dtype)
        x_BxTxD, largest = jax.lax.scan(
            jax.checkpoint(layer, policy=KEEP_KERNELS) if self.remat else layer,
            x_BxTxD,
            self._cast(params, "layers"),
            unroll=self.architecture.layers <= _UNROLLED,
        )
        return self._normed(params, x_BxTxD), {"layers/attention": largest} if max_logits else {}

    def continued(
        self,
        params: Params,
        tokens_BxT: jax.Array,
        caches: Cache | None = None,
        at: int | jax.Array = 0,
    ) -> tuple[jax.Array, Cache]:
        """Returns what the head reads of tokens from position `at` on, and the caches with them.

        `caches` and `at` are as for `decoder.Layer.continued`; caches of all layers are stacked.
        """

        def layer(x_BxTxD, inputs):
            kernels, cache = inputs
            return nnx.merge(self._layer, kernels).continued(x_BxTxD, cache, at)

        x_BxTxD = vocabulary.look_up(params["embedding"]["embedding"], tokens_BxT, self.dtype)
        layers = self._cast(params, "layers")
        unroll = self.architecture.layers <= _UNROLLED
        x_BxTxD, caches = jax.lax.scan(layer, x_BxTxD, (layers, caches), unroll=unroll)
        return self._normed(params, x_BxTxD), caches

    def losses(
        self,
        params: Params,
        tokens_BxT: jax.Array,
        targets_BxT: jax.Array,
        segments_BxT: jax.Array | None = None,
    ) -> Losses:
        """Returns the loss of each position's target, with only chunks of logits in memory.

        Targets are int32, and negative where there is none; other arguments are as for `hidden`.
        """
        hidden, _ = self.hidden(params, tokens_BxT, segments_BxT)
        loss, correct = vocabulary.cross_entropy(self._head(params), hidden, targets_BxT)
        return Losses(jnp.where(targets_BxT >= 0, loss, 0), correct, {})

    def loss(
        self,
        params: Params,
        tokens_BxT: jax.Array,
        targets_BxT: jax.Array,
        segments_BxT: jax.Array | None,
        total: jax.Array,
        *,
        max_logits: bool = False,
        threshold: float | None = None,
    ) -> tuple[jax.Array, Losses]:
        """Returns the losses' sum over `total`, to differentiate, and `losses` without gradient.

        It is faster to differentiate: the forward pass computes the cross-entropy's gradient.
        """
        hidden, largest = self.hidden(
            params, tokens_BxT, segments_BxT, max_logits=max_logits, threshold=threshold
        )
        weights = (targets_BxT >= 0) / total
        loss, (each, correct) = vocabulary.weighted_loss(
            self._head(params), hidden, targets_BxT, weights, tied=self.architecture.tied
        )
        return loss, Losses(jnp.where(targets_BxT >= 0, each, 0), correct, largest)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns all logits at once, `(..., D)` -> `(..., vocabulary)` float32."""
        return vocabulary.logits(self._head(params), hidden)

    def _head(self, params: Params) -> jax.Array:
        if self.architecture.tied:
            return self._cast(params, "embedding")["embedding"].T
        return self._cast(params, "head")["kernel"]

    def _normed(self, params: Params, x_BxTxD: jax.Array) -> jax.Array:
        return nnx.merge(self._norm, self._cast(params, "norm"))(x_BxTxD)

    def _cast(self, params: Params, name: str) -> Params:
        """Casts params to the model's dtype before they are gathered, which halves the bytes."""
        params = {name: params[name]}
        specs = sharding.param_specs(params, jax.sharding.get_abstract_mesh())
        return jax.tree.map(
            lambda x, s: jax.lax.with_sharding_constraint(x.astype(self.dtype), s), params, specs
        )[name]


def shapes(architecture: Architecture, lora: Lora = Lora()) -> Params:  # noqa: B008
    """The params as shapes, float32.

    Raises:
        ValueError: the rank of LoRA is larger than a side of a target.
    """
    a = architecture
    layer = nnx.eval_shape(lambda: _layer(a, lora, nnx.Rngs(0)))
    of_layer = nnx.to_pure_dict(nnx.state(layer, nnx.Param))

    def stack(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params: Params = {
        "embedding": {"embedding": stack(a.vocabulary, a.hidden)},
        "layers": jax.tree.map(lambda x: stack(a.layers, *x.shape), of_layer),
        "norm": {"scale": stack(a.hidden)},
    }
    if not a.tied:
        params["head"] = {"kernel": stack(a.hidden, a.vocabulary)}
    return params


def shardings(architecture: Architecture, mesh: jax.sharding.Mesh) -> Params:
    """Returns the shardings of the params on a mesh of `mesh.make_mesh`.

    Raises:
        ValueError: If the mesh does not divide an axis.
    """
    if architecture.kv_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"--mesh.tensor must divide the model's {architecture.kv_heads} key heads; got "
            f"{mesh.shape['tensor']}."
        )
    return sharding.shardings(sharding.param_specs(shapes(architecture), mesh), mesh)


def init(architecture: Architecture, key: jax.Array) -> Params:
    """Initialises params as transformers does: normal matrices, gains of 1, biases of 0."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(architecture))
    constant = {"scale": 1.0, "bias": 0.0}
    params = [
        jnp.full(leaf.shape, constant[path[-1].key], leaf.dtype)
        if path[-1].key in constant
        else architecture.initializer_range * jax.random.normal(key, leaf.shape, leaf.dtype)
        for (path, leaf), key in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
    ]
    return jax.tree.unflatten(tree, params)


def attention_spec(a: Architecture, projections: bool = False) -> muon_jax.GroupedQuery:
    """Returns the spec of attention for `muon_jax.qk_clip`.

    With QK-norm it clips the norms' gains, or the `projections`, which the norm undoes.
    """
    norm = ("query_norm", "key_norm") if a.qk_norm else "refuse"
    return muon_jax.GroupedQuery(
        heads=a.heads, kv_heads=a.kv_heads, qk_norm="ignore" if projections else norm
    )


def _layer(a: Architecture, lora: Lora, rngs: nnx.Rngs) -> Layer:
    norm = a.epsilon if a.qk_norm else None
    heads = a.heads, a.kv_heads, a.head_dim, a.rope_theta, norm
    attention = functools.partial(
        GroupedQuery, a.hidden, *heads, bias=a.qkv_bias, rope_scaling=a.rope_scaling
    )
    feed_forward = functools.partial(SwiGLU, a.hidden, a.ffn)
    return adapt(Layer(a.hidden, a.epsilon, attention, feed_forward, rngs=rngs), lora, rngs)
